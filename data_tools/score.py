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

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.gpus import check_device
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, run_jobs, runner_of
from opensora_repro.data.jobs.steps import ModelStep, ToolStep
from opensora_repro.data.options import any_path, argument, local_path, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.data.score.jobs import Jobs, Record, job_of_row, measure, rows_of
from opensora_repro.data.tables import Again, Table, plain_columns
from opensora_repro.errors import DataError, check_least, run_command
from opensora_repro.files import one_line

if TYPE_CHECKING:
    from opensora_repro.data.score.found import Found

NAMES = ("motion", "jitter", "static", "sharpness", "brightness", "letterbox", "text", "watermark", "duplicates")
RESOURCES = Resources(memory=1 << 30)


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
    """Raise UserError for options that cannot work, before any input is looked at."""
    names_of(args)
    runner_of(args)


def names_of(args: Arguments) -> list[str]:
    """Check the options; return the scores in their usual order. Raises UserError."""
    requested = NAMES if args.scores == "all" else [name.strip() for name in args.scores.split(",")]
    for name in requested:
        if name not in NAMES:
            raise DataError(f"--scores {args.scores}: no score {name!r}; there are {', '.join(NAMES)}")
    if args.aesthetic and not args.clip:
        raise DataError("--aesthetic needs --clip, the model whose embeddings it was made for")
    check_least(args, "batch_size", "model_workers")
    if not 0 < args.cosine <= 1:
        raise DataError(f"--cosine {args.cosine}: expected more than 0 and at most 1")
    return [name for name in NAMES if name in requested]


def score(args: Arguments) -> int:
    """Measure all clips, then write the manifest and the rejects; returns the exit status."""
    from opensora_repro.data.score.found import Found, groups_alike, write_scored

    names, runner, out = names_of(args), runner_of(args), Path(args.out)
    clips = clips_of(args)
    with Records(out) as kept:
        jobs, keeping = Jobs(clips, names, old=kept.num_taken_over("scores") > 0), Keeping(kept, "scores")
        measured: Iterable[Record] = run_jobs(
            measure, jobs, keeping, runner=runner, label="scoring", unit="clip", resources=RESOURCES
        )
        found = Found.of(measured)
        told = add_models(args, clips, found, kept) if args.clip or args.embed else []
    groups = groups_alike(clips, found, args.cosine) if "duplicates" in names else None
    write_scored(clips, found, reasons_of(measured, told), groups, out)
    good, total = int(found.good.sum()), len(found.good)
    print(f"{good} of {total} clips scored, {total - good} rejected: {one_line(out)}")
    if not good:
        raise DataError(f"{clips.path}: no clip could be scored; the reasons are in {out / 'rejects.parquet'}")
    return 0


def add_models(args: Arguments, clips: Table, found: Found, kept: Records) -> Iterable[Record]:
    """Let the models look at the clips that could be measured; return what they say of these."""
    from opensora_repro.data.score.found import good_rows, write_embeddings_of
    from opensora_repro.frozen.embedding import SHOWN, embed_all

    good = found.good.copy()
    told = embed_all(
        Again(lambda: good_rows(clips, good, SHOWN)), models_of(args), Keeping(kept, "models"), model_runner(args),
        device=args.device, batch_size=args.batch_size,
    )  # fmt: skip
    out = Path(args.out)
    write_embeddings_of((row["id"] for row in good_rows(clips, good, ["id"])), told, out / "embeddings.parquet")
    found.add(told, out)
    return told


def reasons_of(measured: Iterable[Record], told: Iterable[Record]) -> Iterator[str]:
    """Yield why there is nothing of clips, of those in their order: not measured, or nothing that models could see."""
    by_models = iter(told)
    for record in measured:
        record = record if "error" in record else next(by_models, record)
        if "error" in record:
            yield str(record["error"])


def models_of(args: Arguments) -> dict[str, str]:
    return {"clip": args.clip, "head": args.aesthetic, "encoder": args.embed}


def model_runner(args: Arguments) -> Runner:
    """Return where the models compute. Raises DataError for a device that is not there."""
    runner = runner_of(args)
    gpu = check_device(args.device, args.model_workers, over_ray=runner.kind == "ray")
    return replace(runner, workers=args.model_workers, gpu=gpu)


# ---- as a step of a line, see jobs/steps.py


def steps_of(args: Arguments, columns: Mapping[str, str]) -> list[ToolStep | ModelStep]:
    """Return what is done clip by clip; groups of near-duplicates want all of them."""
    from opensora_repro.data.score.measure import columns_of

    names, out = names_of(args), Path(args.out)
    columns = {**(columns or plain_columns(clips_of(args).schema)), **columns_of(names)}
    how = {"names": names}
    steps: list[ToolStep | ModelStep] = [
        ToolStep("score", out, "scores", measure, RESOURCES, rows_of, columns, job_of_row, how)
    ]
    if args.clip or args.embed:
        from opensora_repro.frozen.embedding import embedding_step

        steps.append(
            embedding_step(
                out, models_of(args), model_runner(args), device=args.device, batch_size=args.batch_size,
                columns=columns,
            )
        )  # fmt: skip
    return steps


def first_jobs(args: Arguments) -> Iterable[Job]:
    """Return the jobs of INPUT's clips. Raises DataError."""
    clips, names = clips_of(args), names_of(args)
    told = list(plain_columns(clips.schema))
    return Again(lambda: (job_of_row({name: row[name] for name in told}, {"names": names}) for row in clips.rows()))


def clips_of(args: Arguments) -> Table:
    from opensora_repro.data.manifest import open_manifest

    return open_manifest(manifest_of(args.input, Path(args.out), runner_of(args)), need_captions=False)


if __name__ == "__main__":
    sys.exit(main())
