"""Show on one page what training will read of a manifest: every bucket's crops, frames and captions, and what is lost.

    python -m data_tools.preview MANIFEST --config CONFIG.toml --out DIR [section.key=value ...]

DIR receives `preview.html`, one file that fetches nothing: the table of buckets that `--dry-run` prints; samples of
each bucket, read by the dataset that training reads by, as the first epoch of `run.seed` has them: where the picture is
cut, which frames, mirrored or not, and what of the caption the text encoder reads; what is lost, why, and clips of each
reason; rates and lengths. A clip that cannot be read is shown with its reason. `DIR/records.sqlite` keeps the pictures,
so that a second run makes only what is new.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.jobs.run import Runner, RunnerArguments, runner_of
from opensora_repro.data.options import argument, local_path, option, parser_of
from opensora_repro.errors import check_least, run_command

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.config import Config
    from opensora_repro.data.preflight import BucketRow, Survey
    from opensora_repro.data.preview.page import Loss, Preview
    from opensora_repro.data.report.summary import Numbers
    from opensora_repro.frozen.text import Reading

LOST_SHOWN = 6  # clips of each reason


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    """What the command line says."""

    manifest: str = argument("the clips' manifest, instead of data.manifest", type=local_path, metavar="MANIFEST")
    overrides: list[str] = argument("changes to the config", nargs="*", metavar="section.key=value")
    config: str = option("config of a stage", type=local_path, metavar="CONFIG.toml")
    out: str = option("folder for preview.html", type=local_path, metavar="DIR")
    samples: int = option("clips of each bucket to show (%(default)s)", 6, metavar="N")


build_parser = partial(parser_of, Arguments, "data_tools.preview", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = Arguments(**vars(build_parser().parse_intermixed_args(argv)))  # changes may follow the options
    return run_command(lambda: run(args))


def run(args: Arguments) -> int:
    """Write the page; returns the exit status. Raises UserError, also where no clip can be used."""
    from opensora_repro.config import load_config
    from opensora_repro.data.manifest import read_manifest
    from opensora_repro.data.preflight import require_usable, survey
    from opensora_repro.data.preview.page import page
    from opensora_repro.files import write_text

    check_least(args, "samples")
    runner = runner_of(args)
    cfg = load_config(args.config, args.overrides)
    found = survey(read_manifest(args.manifest), cfg.data, args.manifest)
    told = gather(args.config, cfg, found, args.samples, Path(args.out), runner)
    path = Path(args.out) / "preview.html"
    write_text(path, page(told))
    shown = [sample for _, samples in told.buckets for sample in samples]
    bad = [sample for sample in shown if "error" in sample.picture]
    for sample in bad:
        print(f"warning: {sample.row['path']}: {sample.picture['error']}", file=sys.stderr)
    plural = "" if len(told.buckets) == 1 else "s"
    print(f"{len(told.buckets)} bucket{plural}, {len(shown)} samples, {len(bad)} of them cannot be read: {path}")
    require_usable(found)
    return 0


def gather(config: str, cfg: Config, found: Survey, count: int, out: Path, runner: Runner) -> Preview:
    """Return what the page tells, with `count` samples of each bucket."""
    import numpy as np

    from opensora_repro.data.preflight import warnings
    from opensora_repro.data.preview.page import FRAMES, RATES, TOKENS, Preview, Sample
    from opensora_repro.data.preview.samples import read_samples
    from opensora_repro.data.report.thumbnails import read_strips

    taken = bucket_of_each(cfg, found)
    lost = losses(found, taken)
    strips = read_strips([row for loss in lost for row in loss.examples], Path("/"), out, runner)
    shown = [
        (bucket, chosen(found, np.flatnonzero(taken == number), count))
        for number, bucket in zip(np.flatnonzero(found.clips), table_of(cfg, found), strict=True)
    ]
    clips = [(row, bucket.bucket.shape) for bucket, rows in shown for row in rows]
    captions = read_captions(cfg, found, [row["caption"] for row, _ in clips])
    seen = zip(read_samples(clips, cfg.data, cfg.run.seed, out, runner), captions.shown, strict=True)
    buckets = [(bucket, [Sample(row, *next(seen)) for row in rows]) for bucket, rows in shown]
    marks: dict[str, list[float]] = {FRAMES + found.at_rate: [found.needed], TOKENS: [cfg.model.model_max_length]}
    marks |= {RATES: [cfg.data.fps]} if cfg.data.fps else {}
    return Preview(
        config, cfg.run.seed, found, buckets, lost, [*warnings(found), *captions.lines], captions.not_read,
        [*charts(found), *captions.chart], marks, strips,
    )  # fmt: skip


def table_of(cfg: Config, found: Survey) -> list[BucketRow]:
    """What `--dry-run` prints of each bucket that gets clips, on one process."""
    from opensora_repro.data.buckets import global_batch_sizes
    from opensora_repro.data.preflight import bucket_rows
    from opensora_repro.planning.budget import bucket_costs

    return bucket_rows(found, global_batch_sizes(cfg, 1), bucket_costs(cfg))


def bucket_of_each(cfg: Config, found: Survey) -> np.ndarray:
    """The bucket of each row that was looked at in the epoch that is shown, int64 [N]; -1: none."""
    import numpy as np

    from opensora_repro.data.buckets import assigned
    from opensora_repro.data.preview.samples import EPOCH

    return np.where(found.lost == "", assigned(found.looked, cfg).buckets(EPOCH), -1)


def losses(found: Survey, taken: np.ndarray) -> list[Loss]:
    """The reasons for which clips are lost, with some clips of each."""
    import numpy as np

    from opensora_repro.data.preflight import kinds
    from opensora_repro.data.preview.page import Loss

    where = {name: found.lost == name for name in ("missing", "too short", "too small")}
    where["not kept"] = (found.lost == "") & (taken < 0)
    return [
        Loss(name, number, note, chosen(found, np.flatnonzero(where[name]), LOST_SHOWN))
        for name, number, note in kinds(found)
        if name in where
    ]


def chosen(found: Survey, rows: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Some of the rows, evenly spread over them."""
    from opensora_repro.data.report.rows import spread

    picked: list[dict[str, Any]] = found.looked.take(rows[spread(len(rows), count)]).to_pylist()
    return picked


def charts(found: Survey) -> list[Numbers]:
    """Rates and lengths, of videos unless there are pictures alone."""
    from opensora_repro.data.preview.page import FRAMES, RATES, chart
    from opensora_repro.data.sample_frames import frames_at_rate

    moving = found.looked["num_frames"].to_numpy() > (0 if found.images else 1)
    frames, fps = (found.looked[name].to_numpy()[moving] for name in ("num_frames", "fps"))
    usable = (found.lost == "")[moving]
    drawn = chart(FRAMES + found.at_rate, frames_at_rate(found.data, frames, fps), usable)
    if not found.images:
        drawn = [*chart(RATES, fps, usable), *drawn, *chart("seconds", frames / fps, usable)]
    return drawn


@dataclass(frozen=True)
class Captions:
    """What the text encoder reads of captions."""

    shown: list[Reading]
    lines: list[str]  # as `--dry-run` tells of all
    chart: list[Numbers]  # how long they are
    not_read: str = ""  # why captions stand whole


def read_captions(cfg: Config, found: Survey, shown: Sequence[str]) -> Captions:
    """What the text encoder reads of captions that are shown, and of a sample of all."""
    import numpy as np
    import pyarrow as pa
    import torch

    from opensora_repro.data.preflight import SAMPLED_ROWS, keyed_sample
    from opensora_repro.data.preview.page import TOKENS, chart
    from opensora_repro.frozen.pretrained import ModelNotFound
    from opensora_repro.frozen.text import Reading, clean_caption, open_text_encoder, survey_captions

    looked = found.looked.select(["id", "caption"]).append_column("lost", pa.array(found.lost))
    sample = keyed_sample(looked, SAMPLED_ROWS)
    captions, usable = sample["caption"].to_pylist(), sample["lost"].to_numpy() == ""
    try:
        text = open_text_encoder(cfg.text, cfg.model.model_max_length, "cpu", torch.float32)
        told = survey_captions(text, captions, found.rows, cfg.sample.prompts)
        lines = [line.removeprefix("warning: ") for line in told]
        readings = text.read([*shown, *captions])
    except ModelNotFound as error:
        whole = [Reading(0, 0, 0, clean_caption(caption), "") for caption in shown]
        return Captions(whole, [], [], str(error))
    tokens = np.array([reading.tokens for reading in readings[len(shown) :]])
    return Captions(readings[: len(shown)], lines, chart(TOKENS, tokens, usable))


if __name__ == "__main__":
    sys.exit(main())
