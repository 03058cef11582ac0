"""Measure the clips of a manifest: motion, sharpness, text, duplicates and more, each as a column.

    python -m data_tools.score INPUT --out DIR [--scores motion,sharpness] [--clip MODEL [--aesthetic HEAD]]
                            [--embed timm/NAME]

INPUT is a manifest; a folder, a file, a pattern or a table of paths is probed first. Read are at most 24 frames of a
clip, three runs of eight in the middles of its thirds, scaled to a short side of 256. Columns, missing where a clip
cannot tell (an image has no motion):

    motion           mean optical flow, in short sides a second
    jitter           uneven part of the camera's movement, in short sides a second
    static_share     share of frames that repeat the one before
    sharpness        variance of the Laplacian
    brightness       mean, 0 black to 1 white;  black_share: share of black frames
    letterbox        share of the height in dark bars;  pillarbox: of the width
    text_area        share of the picture with text-like structure that stays in place (no text is read)
    watermark_area   share of the picture at edges that stay while the picture around them changes
    duplicate_group  id of the best clip that looks the same;  duplicate: there is one, and this is not it
    aesthetic, text_match   with --clip: of its aesthetic head, and the cosine of caption and frames

Clips look the same if their low frequencies do, or, with --embed or --clip, their embeddings (of --embed, if both are
given; a DINOv2 tells pictures apart that are of one kind). More than 20,000 embeddings are compared within clusters
where faiss is installed, else all with each other.

DIR receives `manifest.parquet`, `rejects.parquet` (clips that cannot be read), with a model `embeddings.parquet`, which
`data_tools.deduplicate` reads, and a record of every measured clip, so that a second run measures only what is new.
Nothing is downloaded: MODEL is a folder or a name in the hub's cache.
"""

from __future__ import annotations

import base64
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.jobs.batches import run_batches, sized_batches
from opensora_repro.data.jobs.cluster import Needs
from opensora_repro.data.jobs.course import Job, Keeping, memo_of
from opensora_repro.data.jobs.earlier import adopt, sampled_digest
from opensora_repro.data.jobs.gpus import check_device
from opensora_repro.data.jobs.line import Stage
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, contents_of, run_jobs, runner_of
from opensora_repro.data.manifest import REJECTS
from opensora_repro.data.options import any_path, argument, local_path, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import BATCH, in_batches, write_rows
from opensora_repro.errors import DataError, run_command
from opensora_repro.files import digest, one_line

if TYPE_CHECKING:
    import numpy as np

NAMES = ("motion", "jitter", "static", "sharpness", "brightness", "letterbox", "text", "watermark", "duplicates")
BATCH_SIZE = 16  # clips, where memory does not tell
MODEL_METHOD = 1  # raise when the model's scores are computed otherwise
NEEDS, MODEL_NEEDS = Needs(memory=1 << 30), Needs(memory=2 << 30)
TIMEOUT = 300.0  # seconds for a clip
FEW = 1000  # clips of which it is not told how they are compared
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    """What the command line says."""

    input: str = argument(INPUT_HELP, type=any_path)
    out: str = option("folder for manifest.parquet and the records", type=any_path, metavar="DIR")
    scores: str = option(f"all, or some of {', '.join(NAMES)} (all)", "all", metavar="A,B")
    clip: str = option(
        "CLIP model: adds text_match, and duplicates by its embeddings", "", type=local_path, metavar="MODEL"
    )
    embed: str = option(
        "image encoder of timm, such as timm/vit_small_patch14_dinov2.lvd142m: duplicates by its embeddings",
        "",
        type=local_path,
        metavar="MODEL",
    )
    aesthetic: str = option(
        "linear aesthetic head over that model: adds aesthetic", "", type=local_path, metavar="HEAD"
    )
    cosine: float = option(
        "embeddings that are at least so near are of near-duplicates (%(default)s)", 0.95, metavar="X"
    )
    device: str = option("where the model computes, such as cuda (%(default)s)", "cpu")
    batch_size: int | None = option(
        "clips a model batch (16; on a GPU as many as its free memory has room for)", None, metavar="N"
    )
    model_workers: int = option("copies of the model (%(default)s)", 1, metavar="N")


build_parser = partial(parser_of, Arguments, "data_tools.score", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(made_by("score", args)(lambda: score(args)))


def check(args: Arguments) -> None:
    """Raise DataError for options that cannot work, before any input is looked at."""
    names_of(args)
    runner_of(args)


def names_of(args: Arguments) -> list[str]:
    """Check the options; return the scores in their usual order. Raises DataError."""
    requested = NAMES if args.scores == "all" else [name.strip() for name in args.scores.split(",")]
    for name in requested:
        if name not in NAMES:
            raise DataError(f"--scores {args.scores}: no score {name!r}; there are {', '.join(NAMES)}")
    if args.aesthetic and not args.clip:
        raise DataError("--aesthetic needs --clip, the model whose embeddings it was made for")
    for name in ("batch_size", "model_workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 < args.cosine <= 1:
        raise DataError(f"--cosine {args.cosine}: expected more than 0 and at most 1")
    return [name for name in NAMES if name in requested]


def score(args: Arguments) -> int:
    """Measure all clips, then write the manifest and the rejects; returns the exit status."""
    from opensora_repro.data.manifest import read_manifest, write_manifest

    names, runner, out = names_of(args), runner_of(args), Path(args.out)
    manifest = manifest_of(args.input, out, runner)
    clips = read_manifest(manifest, need_captions=False)
    with Records(out) as kept:
        found = measure_all(clips, names, Keeping(kept, "scores"), runner)
        if args.clip or args.embed:
            gpu = check_device(args.device, args.model_workers, over_ray=runner.kind == "ray")
            runner = replace(runner, workers=args.model_workers, gpu=gpu)
            readable = clips.filter([not reason for reason in found.reasons])
            models = embed_all(readable, args, Keeping(kept, "models"), runner)
            write_embeddings_of(readable["id"].to_pylist(), models, out / "embeddings.parquet")
            found.add(models)
    good = [not reason for reason in found.reasons]
    measured = with_columns(clips.filter(good), found, args.cosine if "duplicates" in names else None)
    refused = clips.filter([not kept for kept in good]).to_pylist()
    reasons = filter(None, found.reasons)
    rejects: list[Record] = [
        row | {"stage": "score", "reason": reason} for row, reason in zip(refused, reasons, strict=True)
    ]
    write_rows(out / "rejects.parquet", rejects, REJECTS)
    write_manifest(measured, out / "manifest.parquet")
    print(f"{sum(good)} of {len(clips)} clips scored, {len(clips) - sum(good)} rejected: {one_line(out)}")
    if not any(good):
        raise DataError(f"{manifest}: no clip could be scored; the reasons are in {out / 'rejects.parquet'}")
    return 0


def measure_all(clips: Any, names: list[str], keeping: Keeping, runner: Runner) -> Found:
    """Measure every clip. Jobs and records are made and read as they are needed: there may be millions."""
    jobs = Jobs(clips, names, old=keeping.records.num_taken_over(keeping.kind) > 0)
    return Found.of(run_jobs(measure, jobs, keeping, runner=runner, label="scoring", unit="clip", needs=NEEDS))


@dataclass(frozen=True)
class Jobs:
    """The jobs of a manifest's clips, made whenever they are asked for."""

    clips: Any
    names: list[str]
    old: bool  # also as earlier releases named them

    def __iter__(self) -> Iterator[Job]:
        for batch in self.clips.select(["id", "path", "num_frames", "fps"]).to_batches(max_chunksize=BATCH):
            yield from (job_of(row, self.names, old=self.old) for row in batch.to_pylist())


@dataclass
class Found:
    """What was found of clips: why there is nothing of each ("": there is), and of the others numbers by column."""

    reasons: list[str]
    columns: Any  # table of float64
    codes: list[str]  # of how they look, "" for none
    embeddings: list[str]  # likewise

    @classmethod
    def of(cls, records: Iterable[Record]) -> Found:
        """Gather records: columns, or "error"."""
        import pyarrow as pa

        from opensora_repro.data.score.measure import CODE

        reasons, codes, embeddings = list[str](), list[str](), list[str]()
        tables, names = list[Any](), list[str]()
        for batch in in_batches(records):
            reasons += [record.get("error", "") for record in batch]
            good = [record for record in batch if "error" not in record]
            codes += [record.get(CODE) or "" for record in good]
            embeddings += [record.get("embedding") or "" for record in good]
            names = names or [name for record in good[:1] for name in record if name not in (CODE, "embedding")]
            columns = {name: pa.array([record[name] for record in good], pa.float64()) for name in names}
            if good:
                tables.append(pa.table({"": pa.nulls(len(good)), **columns}))  # has a length without a column, too
        return cls(reasons, pa.concat_tables(tables) if tables else pa.table({"": pa.nulls(0)}), codes, embeddings)

    def add(self, records: Sequence[Record]) -> None:
        """Add what models say of the clips that there is something of."""
        more = Found.of(records)
        kept = [not reason for reason in more.reasons]
        left = iter(more.reasons)
        self.reasons = [reason or next(left) for reason in self.reasons]
        self.columns = self.columns.filter(kept)
        for name in more.columns.column_names[1:]:
            self.columns = self.columns.append_column(name, more.columns[name])
        self.codes, self.embeddings = list(compress(self.codes, kept)), more.embeddings


def job_of(row: Record, names: list[str], *, old: bool = False) -> Job:
    """Return the job that measures a clip; `old`: also as earlier releases named it."""
    from opensora_repro.data.score.measure import methods_of

    facts, methods = {"num_frames": int(row["num_frames"]), "fps": float(row["fps"])}, methods_of(names)
    earlier = digest([sampled_digest(Path(row["path"])), facts, methods]) if old else ""
    args = {"path": row["path"], "names": names, **facts}
    return Job(digest([facts, methods]), str(row["id"]), args, TIMEOUT, (Path(row["path"]),), earlier)


def stage_of(args: Arguments) -> Stage:
    """Return this tool as a step of a line over a cluster, see jobs/line.py; models and groups want all rows."""
    return Stage("score", Path(args.out), "scores", measure, NEEDS, jobs_after, {"names": names_of(args)})


def jobs_after(args: Record, result: Record, options: Record) -> list[Job]:
    """Return the jobs of the clips that a source was split to, or of a file that was probed."""
    if "error" in result:
        return []
    folder = Path(args.get("out", "")) / "clips"
    rows = [{**row, "path": str(folder / row["path"])} for row in result["clips"]] if "clips" in result else []
    if "clips" not in result:
        rows = [{**result, "path": args["path"], "fps": result["fps"] or 0.0}]
    return [job_of(row, options["names"]) for row in rows]


def measure(args: Record) -> Record:
    """Job: the columns of one clip, or why there are none."""
    from opensora_repro.data.score.measure import measure_clip
    from opensora_repro.data.video import DecodeError

    try:
        return measure_clip(args["path"], num_frames=args["num_frames"], fps=args["fps"], names=args["names"])
    except DecodeError as error:
        return {"error": reason_of(error, args["path"])}


def reason_of(error: Exception, path: str) -> str:
    return " ".join(str(error).removeprefix(f"{path}: ").split())


# ---- scores of a model


def embed_all(clips: Any, args: Arguments, keeping: Keeping, runner: Runner) -> list[Record]:
    """Return what the model says of every clip."""
    models = {"clip": args.clip, "head": args.aesthetic, "encoder": args.embed}
    load_models(**models, device="cpu")  # says now what every worker would say
    load_models.cache_clear()
    shown = clips.select(["path", "num_frames", "caption"]).to_pylist()
    items = [{**row, "num_frames": int(row["num_frames"])} for row in shown]
    paths = [Path(item["path"]) for item in items]

    def keys(contents: Iterable[str], hash_file: Callable[[Path], str]) -> list[str]:
        how = model_fingerprint(**models, hash_file=hash_file)
        return [digest([text, i["num_frames"], i["caption"], how]) for text, i in zip(contents, items, strict=True)]

    named = keys(contents_of(paths, keeping.records, runner), memo_of(keeping.records))
    adopt(keeping, named, lambda: keys(list(map(sampled_digest, paths)), sampled_digest))
    todo = list(zip(named, items, strict=True))
    options = {**models, "device": args.device, "batch_size": args.batch_size}
    size = sized_batches(args.batch_size, args.device, usual=BATCH_SIZE)
    found = run_batches(
        embed, todo, keeping, size=size, options=options, runner=runner, label="embedding", needs=MODEL_NEEDS
    )
    return list(found)


def model_fingerprint(clip: str, head: str, encoder: str, hash_file: Callable[[Path], str]) -> str:
    """Return a digest of the models' files."""
    from opensora_repro.frozen.clip import clip_fingerprint
    from opensora_repro.frozen.image_encoder import image_encoder_fingerprint

    files = [clip_fingerprint(clip, key="--clip", hash_file=hash_file)] if clip else []
    if encoder:
        files.append(image_encoder_fingerprint(encoder, key="--embed", hash_file=hash_file))
    if head:
        parts = sorted(Path(head).iterdir()) if Path(head).is_dir() else [Path(head)]
        files += [hash_file(part) for part in parts if part.is_file()]
    return digest([MODEL_METHOD, *files])


@lru_cache(maxsize=1)
def load_models(clip: str, head: str, encoder: str, device: str) -> tuple[Any, Any, Any]:
    """Return the CLIP model, its aesthetic head and the image encoder; kept by each worker. Raises ModelNotFound.

    What is not asked for ("") is None.
    """
    from opensora_repro.frozen.clip import load_clip, load_head
    from opensora_repro.frozen.image_encoder import find_image_encoder

    model = load_clip(clip, key="--clip", device=device) if clip else None
    return (
        model,
        load_head(head, model.channels, key="--aesthetic") if model and head else None,
        find_image_encoder(encoder, key="--embed", device=device).get() if encoder else None,
    )


def embed(args: Record) -> Record:
    """Job: for every clip of a batch its embedding (mean of its middle frames') and scores, or why there are none."""
    from opensora_repro.data.clip_frames import read_middles
    from opensora_repro.data.video import DecodeError
    from opensora_repro.frozen.fitting import in_batches_that_fit

    results: dict[str, Record] = {}
    readable: list[tuple[Record, Any]] = []
    for item in args["items"]:
        try:
            readable.append((item, read_middles(item["path"], item["num_frames"])))
        except DecodeError as error:
            results[item["key"]] = {"error": reason_of(error, item["path"])}
    models = load_models(args["clip"], args["head"], args["encoder"], args["device"])
    work = partial(embed_batch, models)
    found = in_batches_that_fit(work, readable, args["device"], given=bool(args["batch_size"]))
    results |= {item["key"]: result for (item, _), result in zip(readable, found, strict=True)}
    return {"clips": results}


def embed_batch(models: tuple[Any, Any, Any], batch: Sequence[tuple[Record, Any]]) -> list[Record]:
    """Return what the models say of clips with their frames, uint8 [T, H, W, 3], which go through them at once."""
    clip, head, encoder = models
    pictures = [picture for _, frames in batch for picture in frames]
    owners = [number for number, (_, frames) in enumerate(batch) for _ in frames]
    of_frames = (encoder or clip).embed_pictures(pictures)  # [frames, D]
    of_clip = clip.embed_pictures(pictures) if clip and encoder else of_frames  # in the captions' space
    captions = clip.embed_captions([item["caption"] for item, _ in batch]) if clip else [None] * len(batch)
    results = []
    for number, ((item, _), caption) in enumerate(zip(batch, captions, strict=True)):
        own = [owner == number for owner in owners]
        result: Record = {"embedding": packed(of_frames[own].mean(dim=0).numpy())}
        if caption is not None:
            result["text_match"] = (of_clip[own] @ caption).mean().item() if item["caption"].strip() else None
        if head:
            result["aesthetic"] = head(of_clip[own]).mean().item()
        results.append(result)
    return results


def packed(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    import numpy as np

    return np.frombuffer(base64.b64decode(text), dtype="<f2")


def write_embeddings_of(ids: Sequence[str], records: list[Record], path: Path) -> None:
    """Write the embeddings of the clips that have one; where none has, no file."""
    from opensora_repro.data.embeddings import write_embeddings

    known = [(name, record["embedding"]) for name, record in zip(ids, records, strict=True) if "embedding" in record]
    if known:
        write_embeddings(path, ((name, unpacked(text)) for name, text in known), len(unpacked(known[0][1])))


# ---- the manifest


def with_columns(clips: Any, found: Found, cosine: float | None) -> Any:
    """Return the clips with what was found of them, and the groups that look the same.

    `cosine`: from which on embeddings look the same; None: no groups are asked for.
    """
    import pyarrow as pa

    from opensora_repro.data.tables import set_column

    for name in found.columns.column_names[1:]:
        clips = set_column(clips, name, found.columns[name])
    if cosine is not None:
        best = best_alike(clips, found, cosine)
        sizes = Counter(best)
        ids = clips["id"].to_pylist()
        groups = [ids[row] if sizes[row] > 1 else None for row in best]
        clips = set_column(clips, "duplicate_group", pa.array(groups, pa.string()))
        clips = set_column(clips, "duplicate", pa.array([row != number for number, row in enumerate(best)], pa.bool_()))
    return clips


def best_alike(clips: Any, found: Found, cosine: float) -> list[int]:
    """Return for each clip the row of the best that looks the same: the largest, then longest, then first."""
    import numpy as np

    from opensora_repro.data.score.duplicates import groups_of, near_codes, num_crowded
    from opensora_repro.data.score.measure import code_of

    pixels = clips["height"].to_numpy() * clips["width"].to_numpy()
    order = np.lexsort((-clips["num_frames"].to_numpy(), -pixels))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))

    def pairs() -> Iterator[tuple[int, int]]:
        coded = [row for row, code in enumerate(found.codes) if code]
        embedded = [int(row) for row in order if found.embeddings[row]]
        if len(coded) > 1:
            codes = np.stack([code_of(found.codes[row]) for row in coded])
            if crowded := num_crowded(codes):
                print(f"{crowded:,} clips share part of their code with more than others can be compared: see --embed")
            yield from ((coded[a], coded[b]) for a, b in near_codes(codes))
        if len(embedded) > 1:
            yield from near_embeddings(embedded, np.stack([unpacked(found.embeddings[row]) for row in embedded]))

    def near_embeddings(rows: list[int], vectors: np.ndarray) -> Iterator[tuple[int, int]]:
        from opensora_repro.data.near_duplicates import cells_note, find_near_duplicates

        if len(rows) > FEW:
            print(cells_note(len(rows)), flush=True)
        with progress("comparing", len(rows), "clip") as advance:
            alike = find_near_duplicates(vectors, np.arange(len(rows)), cosine=cosine, advance=advance)
        yield from ((row, rows[better]) for row, better in zip(rows, alike.better.tolist(), strict=True) if better >= 0)

    return groups_of(len(found.codes), pairs(), rank.tolist())


if __name__ == "__main__":
    sys.exit(main())
