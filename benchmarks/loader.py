"""Our frame reader against OpenCV's, on clips written on the fly.

    python -m benchmarks.loader [--seconds S] [--out FILE]

Each side reads the same random windows (16 frames, every third) of a 1280x720 H.264 clip and scales them to cover
256x256. OpenCV comes in its two usual forms: decoding from the start of the file, and seeking by frame number. Before
anything is timed, every side's frames are checked against the frame numbers drawn into the clip.

Then a small model trains on such windows, with some numbers of loader processes: which share of a step is spent waiting
for samples.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, interleaved, save, side_by_side, table

FRAMES, HEIGHT, WIDTH, FPS = 480, 720, 1280, 24
COUNT, STEP, SIZE = 16, 3, 256
BITS, CELL = 10, 64  # the frame number, drawn as a row of black and white squares
WORKERS, STEPS, WARMUP = (0, 1, 2), 16, 4
GOPS = {"long video, a key frame each 250": 250, "prepared clip, a key frame each 16": 16}


def write_clip(path: Path, gop: int) -> None:
    """A moving pattern with each frame's number in its first rows."""
    import av
    import numpy as np

    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast", "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            wave = 127 + 60 * np.sin((x + 6 * number) / 47) + 60 * np.cos((y - 4 * number) / 31)
            image = np.repeat(wave.astype(np.uint8)[..., None], 3, axis=2)
            for bit in range(BITS):
                image[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * (number >> bit & 1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def numbers(frames: Any) -> list[int]:
    """The numbers drawn into frames [T, h, w, 3], read from the middle of each square."""
    scale = frames.shape[1] / HEIGHT
    row = int(CELL / 2 * scale)
    columns = [int((bit + 0.5) * CELL * scale) for bit in range(BITS)]
    return [sum(int(frame[row, column, 1] > 127) << bit for bit, column in enumerate(columns)) for frame in frames]


def read_ours(path: Path, start: int) -> Any:
    from opensora_repro.data.video import read_frames

    return read_frames(path, start=start, count=COUNT, step=STEP, size=(SIZE, SIZE)).numpy()


def read_opencv(path: Path, start: int, seek: bool) -> Any:
    import cv2
    import numpy as np

    capture = cv2.VideoCapture(str(path))
    try:
        if seek:
            capture.set(cv2.CAP_PROP_POS_FRAMES, start)
        else:
            for _ in range(start):
                capture.grab()
        width = round(SIZE * WIDTH / HEIGHT)
        frames = []
        for i in range((COUNT - 1) * STEP + 1):
            if not capture.grab():
                raise RuntimeError(f"{path.name}: OpenCV stopped at frame {start + i}")
            if i % STEP == 0:
                picture = cv2.resize(capture.retrieve()[1], (width, SIZE), interpolation=cv2.INTER_AREA)
                frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        return np.stack(frames)
    finally:
        capture.release()


SIDES: dict[str, Callable[[Path, int], Any]] = {
    "OpenCV from the start": lambda path, start: read_opencv(path, start, seek=False),
    "OpenCV with a seek": lambda path, start: read_opencv(path, start, seek=True),
}


def starts() -> list[int]:
    import random

    return random.Random(0).sample(range(FRAMES - (COUNT - 1) * STEP), 24)


def calls(path: Path, read: Callable[[Path, int], Any]) -> Callable[[], Any]:
    """A call that reads the next window each time; every side gets the same sequence."""
    order: Iterator[int] = itertools.cycle(starts())
    return lambda: read(path, next(order))


def measure(folder: Path, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name, gop in GOPS.items():
        path = folder / f"gop{gop}.mp4"
        write_clip(path, gop)
        start = starts()[0]
        expected = list(range(start, start + COUNT * STEP, STEP))
        for side, read in {"ours": read_ours, **SIDES}.items():
            if (found := numbers(read(path, start))) != expected:
                raise SystemExit(f"error: {side} read frames {found} instead of {expected}")
        readers = {"ours": read_ours, **SIDES}
        times = interleaved(
            {side: calls(path, read) for side, read in readers.items()},
            rounds=len(starts()),
            seconds=seconds / len(GOPS),
            warmup=1,
        )
        for side in SIDES:
            rows.append({"case": name, "other_side": side, **side_by_side(times["ours"], times[side])})
    return rows


def measure_waiting(folder: Path, clip: Path) -> list[dict[str, Any]]:
    """Steps of the training loop on windows of the clip, for each number of loader processes."""
    import pyarrow as pa
    import torch

    from benchmarks import loop
    from opensora_repro.data.dataset import ClipDataset
    from opensora_repro.data.manifest import write_manifest
    from opensora_repro.data.sampler import BatchSampler, Schedule, SharedBatches, everything
    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.training.batches import ClipFeed

    same = {"path": str(clip), "num_frames": FRAMES, "fps": float(FPS), "height": HEIGHT, "width": WIDTH}
    captions = [{"id": f"window {i}", "caption": f"a red circle number {i}", **same} for i in range(8)]
    write_manifest(pa.Table.from_pylist(captions), folder / "clips.parquet")
    device = torch.device("cpu")
    model = STDiTConfig(hidden_size=144, depth=4, num_heads=4, caption_channels=loop.DEMO_CAPTION, model_max_length=12)
    encoder = loop.demo_encoder(device, model.model_max_length)
    rows = []
    for workers in WORKERS:
        run_dir = folder / f"{workers} workers"
        cfg = loop.loop_config(run_dir, model, size=64, frames=COUNT, batch_size=1, steps=STEPS, dtype="fp32")
        dataset = ClipDataset(folder / "clips.parquet", cfg.data, cfg.run.seed)
        schedule = Schedule(everything(len(dataset)), [cfg.train.batch_size], cfg.run.seed)
        sampler = SharedBatches(BatchSampler(schedule, [dataset.shape]), 0, 1)
        feed = ClipFeed(dataset, sampler, workers, pinned=False)
        lines = loop.run_loop(loop.build_loop(cfg, encoder, feed, device))
        rows.append({"workers": workers, **loop.times(lines, WARMUP)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="time to spend measuring (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/loader.json)")
    args = parser.parse_args()

    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.seconds)
        waiting = measure_waiting(Path(folder), Path(folder) / f"gop{min(GOPS.values())}.mp4")
    result = {
        "benchmark": "loader",
        "environment": where,
        "clip": {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "codec": "H.264"},
        "window": {"count": COUNT, "step": STEP, "size": SIZE},
        "rows": rows,
        "waiting": waiting,
    }
    path = save("loader", result, args.out)
    shown = [
        (r["case"], r["other_side"], r["ours"]["median_ms"], r["other"]["median_ms"], f"{r['ratio']:.2f}x")
        for r in rows
    ]
    title = f"A window of {COUNT} frames, every {STEP}rd, from {WIDTH}x{HEIGHT} (medians)"
    print(table(title, ("source", "against", "ours ms", "other ms", "speed"), shown))
    steps = [(row["workers"], row["step_ms"], f"{row['waiting_share']:.0%}") for row in waiting]
    print(table("Training steps on such windows", ("loader processes", "step ms", "waiting for samples"), steps))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
