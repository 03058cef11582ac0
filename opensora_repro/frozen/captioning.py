"""Clips described by a captioner of this machine, in batches: the work of `data_tools.caption --model`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from opensora_repro.data.caption.ask import INSTRUCTION, METHOD, clip_key, clip_keys, shown_frames, with_times
from opensora_repro.data.caption.options import AskedArguments
from opensora_repro.data.caption.outcome import CAPTIONS, captioned
from opensora_repro.data.caption.text import Caption, ends_sentence, judge
from opensora_repro.data.clip_frames import middles_of
from opensora_repro.data.jobs.batches import run_batches, sized_batches
from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Keeping, memo_of
from opensora_repro.data.jobs.earlier import sampled_digest
from opensora_repro.data.jobs.gpus import check_device, usual_device
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner
from opensora_repro.data.jobs.steps import KeyOf, ModelStep
from opensora_repro.data.tables import Again
from opensora_repro.data.video import DecodeError
from opensora_repro.errors import DataError
from opensora_repro.frozen.captioner import (
    ONE_IMAGE,
    Captioner,
    ShownClip,
    captioner_fingerprint,
    family_of,
    load_captioner,
)
from opensora_repro.frozen.fitting import in_batches_that_fit
from opensora_repro.frozen.pretrained import HashFile

RESOURCES = Resources(memory=4 << 30)  # of a worker with a captioner
BATCH_SIZE = 8  # clips, where memory does not tell
SHOWN = ("path", "num_frames", "fps", "height", "width")  # of a clip
Record = dict[str, Any]


def from_model(
    rows: Iterable[Record], model: str, args: AskedArguments, keeping: Keeping, runner: Runner
) -> Iterable[Caption]:
    """Return every clip's caption as the model writes it."""
    args, runner = with_device(args, runner)
    how, options = model_options(model, args, memo_of(keeping.records))
    keys = clip_keys(rows, keeping, how, runner, lambda: model_options(model, args, sampled_digest)[0])
    items = Again(lambda: ((key, {name: row[name] for name in SHOWN}) for key, row in zip(keys, rows, strict=True)))
    found = run_batches(
        describe, items, keeping, size=sized_batches(args.batch_size, args.device, usual=BATCH_SIZE), options=options,
        runner=runner, label="captioning", resources=RESOURCES,
    )  # fmt: skip
    return Again(lambda: map(judge, found))


def model_step(
    out: Path, model: str, args: AskedArguments, runner: Runner, columns: Mapping[str, str], keep_flagged: bool
) -> ModelStep:
    """Return what `from_model` does as a step of a line, of rows with these columns."""
    args, runner = with_device(args, runner)

    def ready(records: Records) -> tuple[KeyOf, Record]:
        how, options = model_options(model, args, memo_of(records))
        return lambda content, row: clip_key(content, row, how), options

    return ModelStep(
        "caption", out, "model", partial(captioned, keep_flagged=keep_flagged), {**columns, **CAPTIONS}, describe,
        ready, SHOWN, sized_batches(args.batch_size, args.device, usual=BATCH_SIZE), runner, RESOURCES,
    )  # fmt: skip


def with_device(args: AskedArguments, runner: Runner) -> tuple[Any, Runner]:
    """Return the options with the device and the numbers' type that are meant, and where the models compute."""
    over_ray = runner.kind == "ray"
    device = args.device or usual_device(over_ray=over_ray)
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    gpu = check_device(device, args.model_workers, over_ray=over_ray)
    return replace(args, device=device, dtype=dtype), replace(runner, workers=args.model_workers, gpu=gpu)


def model_options(model: str, args: AskedArguments, hash_file: HashFile) -> tuple[list[Any], Record]:
    """Return what decides the captions, and what the workers need. ModelNotFound."""
    family = family_of(model, key="--model")
    files = captioner_fingerprint(model, key="--model", hash_file=hash_file)
    frames = args.frames or family.frames
    if family.shown == ONE_IMAGE and frames != 1:
        raise DataError(f"--frames {frames}: this model looks at one picture")
    # What a model for one picture goes on from is best no text: its answer is the caption.
    instruction = args.instruction if args.instruction is not None else "" if family.shown == ONE_IMAGE else INSTRUCTION
    written = {"instruction": instruction, "max_tokens": args.max_tokens, "frames": frames, "dtype": args.dtype}
    return [METHOD, files, written], {**written, "model": model, "device": args.device, "batch_size": args.batch_size}


@lru_cache(maxsize=1)
def loaded(model: str, device: str, dtype: str) -> Captioner:
    """Return the model; kept by each worker. Raises ModelNotFound."""
    return load_captioner(model, key="--model", device=device, dtype=dtype)


def describe(args: Record) -> Record:
    """Job: for every clip of a batch the model's text, or why there is none."""
    captioner = loaded(args["model"], args["device"], args["dtype"])
    results: dict[str, Record] = {}
    clips: dict[str, ShownClip] = {}
    for item in args["items"]:
        numbers = middles_of(item["num_frames"], args["frames"])
        tells = captioner.family.times
        asked = args["instruction"] if tells else with_times(args["instruction"], item, numbers)
        try:
            frames = shown_frames(item, args["frames"])
            clips[item["key"]] = ShownClip(frames, numbers, item["num_frames"], item["fps"], asked)
        except DecodeError as error:
            results[item["key"]] = {"error": str(error)}
    if clips:
        write = partial(captioner.caption, max_tokens=args["max_tokens"])
        texts = in_batches_that_fit(write, list(clips.values()), args["device"], given=bool(args["batch_size"]))
        for key, (text, ended) in zip(clips, texts, strict=True):
            results[key] = {"text": text, "cut": ended and not ends_sentence(text)}
    return {"clips": results}
