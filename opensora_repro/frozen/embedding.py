"""What CLIP, its aesthetic head and an image encoder say of clips, in batches: `data_tools.score --clip`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from opensora_repro.data.clip_frames import read_middles
from opensora_repro.data.jobs.batches import run_batches, sized_batches
from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Keeping, memo_of
from opensora_repro.data.jobs.earlier import adopt, sampled_digest
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, contents_of
from opensora_repro.data.jobs.steps import KeyOf, ModelStep
from opensora_repro.data.score.found import packed
from opensora_repro.data.score.jobs import reason_of
from opensora_repro.data.tables import Again
from opensora_repro.data.video import DecodeError
from opensora_repro.files import digest
from opensora_repro.frozen.clip import clip_fingerprint, load_clip, load_head
from opensora_repro.frozen.fitting import in_batches_that_fit
from opensora_repro.frozen.image_encoder import find_image_encoder, image_encoder_fingerprint

MODEL_METHOD = 1  # raise when the model's scores are computed otherwise
BATCH_SIZE = 16  # clips, where memory does not tell
MODEL_RESOURCES = Resources(memory=2 << 30)
SHOWN = ("path", "num_frames", "caption")  # of a clip
Record = dict[str, Any]


def embed_all(
    clips: Iterable[Record],
    models: dict[str, str],
    keeping: Keeping,
    runner: Runner,
    *,
    device: str,
    batch_size: int | None,
) -> Iterable[Record]:
    """Return what the models say of every clip: those of "clip", "head" and "encoder" that are not "".

    `clips` are rows with what is SHOWN, as often as they are asked for; neither they nor the records are held.
    """
    load_models(**models, device="cpu")  # says now what every worker would say
    load_models.cache_clear()
    paths = Again(lambda: (Path(row["path"]) for row in clips))

    def keys(contents: Iterable[str], hash_file: Callable[[Path], str]) -> Iterable[str]:
        how = model_fingerprint(**models, hash_file=hash_file)
        return Again(lambda: (key_of(text, row, how) for text, row in zip(contents, clips, strict=True)))

    named = keys(contents_of(paths, keeping.records, runner), memo_of(keeping.records))
    adopt(keeping, named, lambda: keys(map(sampled_digest, paths), sampled_digest))
    todo = Again(lambda: zip(named, clips, strict=True))
    options = {**models, "device": device, "batch_size": batch_size}
    size = sized_batches(batch_size, device, usual=BATCH_SIZE)
    return run_batches(
        embed, todo, keeping, size=size, options=options, runner=runner, label="embedding", resources=MODEL_RESOURCES
    )


def embedding_step(
    out: Path, models: dict[str, str], runner: Runner, *, device: str, batch_size: int | None, columns: dict[str, str]
) -> ModelStep:
    """Return what `embed_all` does as a step of a line, of rows with these columns."""

    def ready(records: Records) -> tuple[KeyOf, Record]:
        load_models(**models, device="cpu")
        load_models.cache_clear()
        how = model_fingerprint(**models, hash_file=memo_of(records))
        return lambda text, row: key_of(text, row, how), {**models, "device": device, "batch_size": batch_size}

    more = {"text_match": models["clip"], "aesthetic": models["head"]}
    columns = {**columns, **{name: "double" for name, told in more.items() if told}}
    return ModelStep(
        "score by models", out, "models", rows_of, columns, embed, ready, SHOWN,
        sized_batches(batch_size, device, usual=BATCH_SIZE), runner, MODEL_RESOURCES,
    )  # fmt: skip


def key_of(content: str, row: Record, how: str) -> str:
    """Return what names the record of a clip."""
    return digest([content, int(row["num_frames"]), row["caption"], how])


def rows_of(row: Record, record: Record) -> list[Record]:
    return [{**row, **{name: value for name, value in record.items() if name != "embedding"}}]


def model_fingerprint(clip: str, head: str, encoder: str, hash_file: Callable[[Path], str]) -> str:
    """Return a digest of the models' files."""
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
    model = load_clip(clip, key="--clip", device=device) if clip else None
    return (
        model,
        load_head(head, model.channels, key="--aesthetic") if model and head else None,
        find_image_encoder(encoder, key="--embed", device=device).model if encoder else None,
    )


def embed(args: Record) -> Record:
    """Job: for every clip of a batch its embedding (mean of its middle frames') and scores, or why there are none."""
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
