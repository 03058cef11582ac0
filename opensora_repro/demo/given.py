"""What the demo's model makes of given frames: pictures to animate, clips to go on with, to close and to join.

What is given are held-out clips: their first picture, first or last quarter. Loops are prompts whose motion comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora_repro.demo.adherence import MIN_AREA, centre_of, direction_of, mask_of, measure
from opensora_repro.demo.shapes import Motion

if TYPE_CHECKING:
    from opensora_repro.config import DataConfig
    from opensora_repro.frozen.autoencoder import Autoencoder

TASKS = {
    "first": "picture animated",
    "extend": "clip extended",
    "loop": "loop closed",
    "join": "two clips joined",
}
PARTS = ("colour", "shape", "direction", "seam")
FPS = 12  # of the clips that are given
MAX_JUMP = 1.5  # of the median step: more between old and new frames is a jump
GONE = 99.0  # the measure of a video whose shape is gone for a while
MAX_LOSS = 1.0  # dB that a first frame may be further from its picture than the autoencoder's own


@dataclass(frozen=True)
class Job:
    """One sample: what it is asked for, and given."""

    task: str
    motion: Motion
    given: tuple[Path, ...]
    seams: tuple[int, ...]  # after these frames what is given meets what is new; -1: after the last comes the first

    @property
    def options(self) -> list[str]:
        """Of `stages.sample`."""
        if self.task == "loop":  # two clips, the second from the first's last picture to its first one
            return ["--loop", "--condition-frames", "1"]
        return [f"--{self.task}", *map(str, self.given)]


def make_jobs(clips: Any, others: Any, data: DataConfig, folder: Path, count: int) -> list[Job]:
    """`count` jobs of each task, and the files that they are given, from tables of held-out clips and other takes."""
    from opensora_repro.data.write import write_png, write_video

    folder.mkdir(parents=True, exist_ok=True)
    takes = [{row["caption"]: row for row in table.to_pylist()} for table in (clips, others)]
    captions = sorted(takes[0])
    order = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]
    ways, returns = ([c for c in order if (" and back" in c) == back] for back in (False, True))
    quarter = max(1, data.num_frames // 4)
    jobs = []
    for number in range(count):
        caption = ways[number % len(ways)]
        clip, other = (_frames(own[caption], data) for own in takes)
        files = [folder / f"{number:02d}{name}" for name in ("-first.png", "-begin.mp4", "-end.mp4")]
        write_png(files[0], clip[0])
        for path, frames in zip(files[1:], (clip[:quarter], other[-quarter:]), strict=True):
            write_video(path, frames, FPS)
        motion, back = _motion(caption), _motion(returns[number % len(returns)])
        jobs += [
            Job("first", motion, (files[0],), ()),
            Job("extend", motion, (files[1],), (quarter - 1,)),
            Job("loop", back, (), (-1,)),
            Job("join", motion, (files[1], files[2]), (quarter - 1, data.num_frames - quarter - 1)),
        ]
    return sorted(jobs, key=lambda job: list(TASKS).index(job.task))


def _motion(caption: str) -> Motion:
    _, colour, shape, _, direction, *back = caption.split()
    return Motion(colour, shape, direction, bool(back))


def _frames(row: dict[str, Any], data: DataConfig) -> np.ndarray:
    """A clip as training takes it, uint8 [T, H, W, 3]."""
    from opensora_repro.data.sample_frames import choose_frames
    from opensora_repro.data.video import read_frames_at

    chosen = choose_frames(data, row["path"], int(row["num_frames"]), float(row["fps"]), data.num_frames, None)
    return np.asarray(read_frames_at(Path(row["path"]), chosen))


def judge(job: Job, frames: np.ndarray, vae: Autoencoder) -> dict[str, Any]:
    """What a written video uint8 [T, H, W, 3] shows, which of PARTS are as asked, and what was measured at its seams.

    `measured`: dB that a first frame lost, or the largest step at a seam in median steps.
    """
    seen, masks = asdict(measure(frames)), [mask_of(frame) for frame in frames]
    if job.motion.returns:
        seen["direction"] = direction_of(masks[0], farthest(masks))
    agrees = {key: value == getattr(job.motion, key) for key, value in seen.items()}
    if job.task == "first":
        loss = first_frame_loss(job.given[0], frames, vae)
        seen["seam"], agrees["seam"], measured = f"{loss:.1f} dB lost", loss <= MAX_LOSS, loss
    else:
        jump = largest_jump(masks, job.seams)
        seen["seam"], agrees["seam"], measured = f"a step of {jump:.1f} medians", jump <= MAX_JUMP, jump
    return {"seen": seen, "agrees": agrees, "seams": list(job.seams), "measured": round(min(measured, GONE), 3)}


def farthest(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Of the masks that show something, the one that is furthest from where the first one is."""
    shown = [mask for mask in masks if mask.mean() >= MIN_AREA]
    if not shown:
        return masks[0]
    start = centre_of(shown[0])
    return max(shown, key=lambda mask: float(np.linalg.norm(centre_of(mask) - start)))


def largest_jump(masks: Sequence[np.ndarray], seams: Sequence[int]) -> float:
    """The largest of the steps that the shape's centre makes at the seams, in median steps of the whole video."""
    if min(mask.mean() for mask in masks) < MIN_AREA:
        return float("inf")  # gone for a while
    centres = np.stack([centre_of(mask) * mask.shape[::-1] for mask in masks])
    steps = np.linalg.norm(np.roll(centres, -1, axis=0) - centres, axis=1)  # the last one leads to the first
    return float(max(steps[seam] for seam in seams) / max(np.median(steps[:-1]), 1e-6))


def first_frame_loss(picture: Path, frames: np.ndarray, vae: Autoencoder) -> float:
    """dB by which the first frame is further from the given picture than what the autoencoder alone makes of that.

    Both are read from an mp4.
    """
    import torch

    from opensora_repro.data.dataset import to_tensor
    from opensora_repro.data.video import read_frames
    from opensora_repro.data.write import write_video
    from opensora_repro.sampling.calibration import psnr
    from opensora_repro.sampling.generate import decode

    given = read_frames(picture, start=0, count=1)
    with torch.no_grad():
        latents = vae.sample_latents(vae.encode_moments(to_tensor(given)), None)
    with TemporaryDirectory() as folder:
        still = Path(folder) / "still.mp4"
        write_video(still, decode(vae, latents, num_frames=1), 1)
        own = read_frames(still, start=0, count=1)[0].numpy()
    source = [given[0].numpy()]
    return psnr([own], source) - psnr([frames[0]], source)


def rows_of(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Shares of each task that came out as asked, by its words."""
    return {
        TASKS[task]: {part: float(np.mean([r["agrees"][part] for r in own])) for part in PARTS}
        for task, own in _by_task(records)
    }


def _by_task(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for task in TASKS:
        own = [record for record in records if record["task"] == task]
        if own:
            yield task, own
