"""Samples as pictures: read by the dataset that training reads by, in worker processes, and kept."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import DataConfig
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.data.manifest import MANIFEST
from opensora_repro.data.sampler import Shape
from opensora_repro.files import digest

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

METHOD = 1  # raise when the same sample would give another picture
EPOCH = 0  # whose samples are shown
FRAMES = 4  # of a sample
PIXELS = 96 * 170  # of a frame on the page
QUALITY = 74
SEEN = 0.02  # share of a picture from which on what is cut away is shown
EDGE = (255, 176, 32)
NOT_OF_SAMPLES = (
    "manifest", "val_manifest", "num_workers", "decode_timeout", "cache", "max_bad_fraction", "buckets",
    "packing_tokens",
)  # fmt: skip
Picture = dict[str, Any]  # as `make_sample` returns it, or {"error": reason}


def read_samples(
    clips: Sequence[tuple[Mapping[str, Any], Shape]], data: DataConfig, seed: int, out: Path, runner: Runner
) -> list[Picture]:
    """Return the picture of each sample: of a manifest's row, in a shape; kept in `out`."""
    decides = {name: value for name, value in dataclasses.asdict(data).items() if name not in NOT_OF_SAMPLES}
    jobs = []
    for row, shape in clips:
        own = {name: row[name] for name in MANIFEST}
        key = digest([METHOD, EPOCH, {**own, "path": ""}, shape, decides, seed])
        args = {"row": own, "shape": shape, "data": decides, "seed": seed}
        jobs.append(Job(key, Path(own["path"]).name, args, data.decode_timeout or None, (Path(own["path"]),)))
    if not jobs:
        return []
    with Records(out) as records:
        keeping = Keeping(records, "samples")
        return list(run_jobs(make_sample, jobs, keeping, runner=runner, label="samples", unit="clip"))


def make_sample(args: dict[str, Any]) -> Picture:
    """Job: some frames of a sample side by side, and the first one's picture with what is cut away; JPEG in base64.

    With them: what share of the picture is cut away, by how much it was scaled, the frames' numbers and rate, how
    many of them come again, and whether they are mirrored.
    """
    import numpy as np
    import pyarrow as pa

    from opensora_repro.config.toml import parse_config
    from opensora_repro.data.dataset import BadSample, ClipDataset
    from opensora_repro.data.tables import schema_of
    from opensora_repro.data.video import read_pictures_at

    row, (_, height, width) = args["row"], args["shape"]
    table = pa.Table.from_pylist([row], schema=schema_of(MANIFEST))
    dataset = ClipDataset(table, parse_config({"data": args["data"]}).data, args["seed"])
    sample = dataset.load(EPOCH, 0, tuple(args["shape"]))
    if isinstance(sample, BadSample):
        return {"error": sample.reason.removeprefix(f"{row['path']}: ")}
    (whole,) = read_pictures_at(row["path"], sample.indices[:1], size=(height, width))
    cut = 1 - height * width / (whole.shape[0] * whole.shape[1])
    last = len(sample.pixels) - 1
    moments = sorted({round(part * last / (FRAMES - 1)) for part in range(FRAMES)})
    frames = [np.asarray(_small(sample.pixels[moment].numpy())) for moment in moments]
    return {
        "frames": _jpeg(np.concatenate(frames, axis=1)),
        "whole": _jpeg(_with_crop(whole, sample.corner, (height, width))) if cut >= SEEN else None,
        "cut": cut,
        "scale": whole.shape[0] / row["height"],
        "first": sample.indices[0],
        "last": sample.indices[-1],
        "fps": sample.fps,
        "again": len(sample.indices) - len(set(sample.indices)),
        "flipped": sample.flipped,
    }


def _with_crop(whole: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """A small picture, dark where it is cut away."""
    import numpy as np
    from PIL import ImageDraw

    (top, left), (height, width) = corner, size
    shown = whole // 4
    shown[top : top + height, left : left + width] = whole[top : top + height, left : left + width]
    small = _small(shown)
    down, across = small.height / whole.shape[0], small.width / whole.shape[1]
    box = (left * across, top * down, (left + width) * across - 1, (top + height) * down - 1)
    ImageDraw.Draw(small).rectangle(box, outline=EDGE, width=2)
    return np.asarray(small)


def _small(picture: np.ndarray) -> Image:
    from PIL import Image

    height, width = picture.shape[:2]
    scale = min(1.0, (PIXELS / (height * width)) ** 0.5)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)


def _jpeg(picture: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=QUALITY)
    height, width = picture.shape[:2]
    return {"jpeg": base64.b64encode(data.getvalue()).decode("ascii"), "height": height, "width": width}
