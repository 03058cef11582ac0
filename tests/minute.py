"""A minute of the demo's model: `python -m tests.minute runs/demo/stage3 OUT [PROMPTS]` chains clips to 480 frames.

Each clip is given the last picture of the one before. Told are the shares of videos whose last second still shows
colour and shape, by both judges, and the memory of each process after its second clip and at its end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from opensora_repro.data.video import probe, read_frames
from opensora_repro.demo.adherence import mask_of, measure
from opensora_repro.demo.shapes import Motion, motions
from tests.bounding_box import shape_of_video

SECONDS, FPS = 60, 8
MEGABYTE = 1024  # of /proc's kB


def resident(pid: int) -> float:
    """MB of a process that runs, else 0."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / MEGABYTE for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def sample(run: str, motion: Motion, out: Path) -> tuple[float, float]:
    """Write OUT/0000.mp4; memory at the end of the second clip, and the most after it."""
    settings = ["--seconds", str(SECONDS), "--fps", str(FPS), "--condition-frames", "1", "--overwrite"]
    command = [sys.executable, "-m", "stages.sample", run, "--prompt", motion.caption, "--out", str(out), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second, most = 0.0, 0.0
    while process.poll() is None:
        clips = len(list(out.glob("0000.parts/[0-9]*.mp4")))
        now = resident(process.pid)
        if clips >= 2:
            second = second or now
            most = max(most, now)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return second, most


def main(run: str, out: Path, count: int) -> None:
    every = motions(held_out=False, returns=True)
    kept = []
    for number, index in enumerate(np.random.default_rng(0).permutation(len(every))[:count]):
        motion = every[index]
        second, most = sample(run, motion, out / f"{number:02d}")
        path = out / f"{number:02d}" / "0000.mp4"
        total = probe(path).num_frames
        last = read_frames(path, start=total - FPS, count=FPS).numpy()
        seen, boxed = measure(last), shape_of_video([mask_of(frame) for frame in last])
        kept.append((total == SECONDS * FPS, seen.colour == motion.colour, seen.shape == motion.shape,
                     boxed == motion.shape, most / second))  # fmt: skip
        print(f"{motion.caption}: {total} frames, at the end {seen.colour} {seen.shape}, by its box {boxed}; "
              f"{second:.0f} MB after the second clip, {most:.0f} MB at most", flush=True)  # fmt: skip
    whole, colour, shape, box, growth = np.array(kept, float).T
    print(f"{count} videos, whole {whole.mean():.2f}: colour {colour.mean():.2f}, shape {shape.mean():.2f}, by its box "
          f"{box.mean():.2f}; memory grew to {growth.max():.2f} of what it was after the second clip")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 24)
