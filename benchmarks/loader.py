"""Random windows of videos: our frame reader against OpenCV's, decord's and torchcodec's.

    python -m benchmarks.loader [VIDEO ...] [--windows N] [--samples N] [--out FILE]

Each side reads the same random windows (16 frames, every third, scaled to cover 256x256) of each video, by default
long_dev and long_dev_vfr of ../shared/videos, else a clip written on the fly, and of the clips that `data_tools.split
--for-training` makes of the first. A side is a process of its own. In a first pass its frames are compared with a
decoding from first to last: a side with a wrong one is marked and counts for nothing. In a second pass CPU seconds are
counted, of all its threads, the sides taking turns. Videos stay open or indexed from the first pass on where a side
can do that; a clip is read once, as in an epoch, so its opening counts. A side that is not installed is said to be
missing (decord and torchcodec need no more than to be importable; torchcodec finds FFmpeg by LD_LIBRARY_PATH).

Then a small model trains on such windows, with some numbers of loader processes: which share of a step is spent waiting
for samples. At last a loader process reads N samples of small clips, of a short manifest and of a long one: its private
memory after a tenth of them and after all.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, save, summary, table
from benchmarks.processes import Ask, Worker, in_processes
from benchmarks.readers import COUNT, LONGEST, READERS, SIZE, STEP, Size, build, reference, wrong_frames
from benchmarks.split import NAMES, VIDEOS, make_clips

FRAMES, HEIGHT, WIDTH, FPS = 480, 720, 1280, 24
WORKERS, STEPS, WARMUP = (0, 1, 2), 16, 4
ROWS = (1000, 1_000_000)  # of the manifests that memory is measured with
SMALL = {"libx264": "mp4", "mpeg4": "avi", "libvpx-vp9": "webm"}  # a small clip's codec and container

Window = tuple[str, int, Size]  # file, first frame, height and width to scale to


def write_clip(path: Path, gop: int) -> None:
    """A moving pattern, each frame unlike its neighbours."""
    import av
    import numpy as np

    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast", "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            wave = 127 + 60 * np.sin((x + 6 * number) / 47) + 60 * np.cos((y - 4 * number) / 31)
            image = np.repeat(wave.astype(np.uint8)[..., None], 3, axis=2)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@dataclass(frozen=True)
class Case:
    """`timed` are the windows of `checked`, or those of copies where a file is to be read for the first time."""

    name: str
    checked: list[Window]
    timed: list[Window]


def window_of(path: Path, draw: random.Random) -> Window:
    from opensora_repro.data.video import cover_size, probe

    info = probe(path)
    return str(path), draw.randrange(info.num_frames - LONGEST + 1), cover_size(info.height, info.width, (SIZE, SIZE))


def video_case(video: Path, windows: int) -> Case:
    draw = random.Random(0)
    drawn = [window_of(video, draw) for _ in range(windows)]
    return Case(video.name, drawn, drawn)


def clips_case(video: Path, folder: Path, windows: int) -> Case:
    """Every clip once, in random order."""
    draw, clips, copies = random.Random(0), folder / "clips", folder / "copies"
    clips.mkdir()
    make_clips(video, clips)
    shutil.copytree(clips, copies)
    files = sorted(clips.iterdir())
    checked = [window_of(path, draw) for path in draw.sample(files, min(windows, len(files)))]
    timed = [(str(copies / Path(path).name), start, size) for path, start, size in checked]
    return Case(f"--for-training clips of {video.name}", checked, timed)


def count_wrong(ask: Ask, windows: Sequence[Window], references: Mapping[str, Any]) -> int:
    return sum(wrong_frames(ask("thumbnails", *window), window[1], references[window[0]]) for window in windows)


def measure(case: Case, sides: Mapping[str, Ask]) -> list[dict[str, Any]]:
    """A row for each side but ours."""
    references = {path: reference(path) for path in {window[0] for window in case.checked}}
    wrong = {name: count_wrong(ask, case.checked, references) for name, ask in sides.items()}
    if wrong["ours"]:
        raise SystemExit(f"error: {case.name}: {wrong['ours']} of our frames are wrong")
    marks = {name: [ask("cpu_seconds")] for name, ask in sides.items()}
    for window in case.timed:
        for name, ask in sides.items():
            ask("read", *window)
            marks[name].append(ask("cpu_seconds"))
    times = {name: [after - before for before, after in pairwise(m)] for name, m in marks.items()}
    return [
        {
            "case": case.name,
            "other_side": name if not wrong[name] else f"{name} (wrong frames)",
            "wrong_frames": wrong[name],
            "frames": COUNT * len(case.checked),
            "ours": {**summary(times["ours"]), "clips_a_cpu_second": clips_a_second(times["ours"])},
            "other": {**summary(times[name]), "clips_a_cpu_second": clips_a_second(times[name])},
            "ratio": round(sum(times[name]) / sum(times["ours"]), 3),
        }
        for name in sides
        if name != "ours"
    ]


def clips_a_second(times: Sequence[float]) -> float:
    return round(len(times) / sum(times), 2)


def measure_all(videos: Sequence[Path], folder: Path, windows: int) -> dict[str, Any]:
    workers = {name: Worker(build, (name,), keeps_memory=False) for name in READERS}
    with in_processes(workers, one_thread=True) as readers:
        missing = {name: why for name, ask in readers.items() if (why := ask("missing"))}
        sides = {name: ask for name, ask in readers.items() if name not in missing}
        cases = [video_case(video, windows) for video in videos] + [clips_case(videos[0], folder, windows)]
        rows = [row for case in cases for row in measure(case, sides)]
    best = {
        case.name: min(row["ratio"] for row in rows if row["case"] == case.name and not row["wrong_frames"])
        for case in cases
    }
    return {"rows": rows, "against_the_best": best, "not_installed": missing}


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


def write_small(folder: Path) -> list[Path]:
    """Clips of 48 codecs, sizes and lengths."""
    import av
    import numpy as np

    paths = []
    for number in range(48):
        codec = list(SMALL)[number % len(SMALL)]
        paths.append(folder / f"{number}.{SMALL[codec]}")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream(codec, rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 32 + 2 * (number % 7), 32 + 2 * (number % 5), "yuv420p"
            for shade in range(4 + number % 9):
                image = np.full((stream.height, stream.width, 3), 20 * shade, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return paths


def memory_side() -> Mapping[str, Ask]:
    import multiprocessing

    multiprocessing.set_start_method("fork", force=True)  # as on Linux training does; this process was not
    return {"held": measure_memory}


def measure_memory(clips: Sequence[Path], rows: int, samples: int) -> dict[str, Any]:
    """Private megabytes of a loader process after a tenth of the samples and after all, drawn from all rows."""
    import multiprocessing

    import pyarrow as pa

    from benchmarks.resources import private_memory
    from opensora_repro.config import DataConfig
    from opensora_repro.data.dataset import BadSample, ClipDataset, build_loader
    from opensora_repro.data.sampler import BatchSampler, Schedule, everything

    names = [f"clip {row}" for row in range(rows)]
    columns = {"id": names, "path": [str(clips[row % len(clips)]) for row in range(rows)]}
    columns["caption"] = [f"a scene like no other, number {row}, in a caption of some length" for row in range(rows)]
    table = pa.table({**columns, "num_frames": pa.repeat(4, rows), "fps": pa.repeat(float(FPS), rows)})
    dataset = ClipDataset(table, DataConfig(num_frames=2, height=32, width=32), seed=0)
    size = samples // 100
    sampler = BatchSampler(Schedule(everything(rows), [size], 0), [dataset.shape])
    others = multiprocessing.active_children()
    found = []
    for number, batch in enumerate(build_loader(dataset, sampler, 0, 101, 1), start=1):
        if bad := [sample for sample in batch if isinstance(sample, BadSample)]:
            raise SystemExit(f"error: {bad[0].path}: {bad[0].reason}")
        if number in (10, 100):
            (worker,) = (child for child in multiprocessing.active_children() if child not in others)
            found.append(round(private_memory(worker.pid or 0) / 1e6, 1))
    return {"rows": rows, "samples": samples, "private_mb_early": found[0], "private_mb": found[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, metavar="VIDEO")
    parser.add_argument("--windows", type=int, default=16, help="of each video (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=50_000, help="to measure memory with (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/loader.json)")
    args = parser.parse_args()

    where = environment()
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name), Path(name) / "written.mp4"
        write_clip(written, gop=250)
        there = [path for path in (VIDEOS / f"{name}.mp4" for name in NAMES) if path.exists()]
        found = measure_all(args.videos or there or [written], folder, args.windows)
        waiting = measure_waiting(folder, written)
        clips = write_small(folder)
        # Each in a process of its own: what else there is in ours would part from the loader's, and count as its.
        with in_processes({str(rows): Worker(memory_side, (), False) for rows in ROWS}, one_thread=True) as asks:
            memory = [asks[str(rows)]("held", clips, rows, args.samples) for rows in ROWS]
    result = {
        "benchmark": "loader",
        "environment": where,
        "window": {"count": COUNT, "step": STEP, "size": SIZE},
        **found,
        "waiting": waiting,
        "memory": memory,
    }
    path = save("loader", result, args.out)
    rate = "clips_a_cpu_second"
    shown = [
        (r["case"], r["other_side"], r["ours"][rate], r["other"][rate], f"{r['ratio']:.2f}x") for r in found["rows"]
    ]
    title = f"Windows of {COUNT} frames, every {STEP}rd, {SIZE} px high, a CPU second"
    print(table(title, ("source", "against", "ours", "other", "speed"), shown))
    for side, why in found["not_installed"].items():
        print(f"{side} is not compared: {why}")
    steps = [(row["workers"], row["step_ms"], f"{row['waiting_share']:.0%}") for row in waiting]
    print(table("Training steps on such windows", ("loader processes", "step ms", "waiting for samples"), steps))
    held = [(f"{row['rows']:,}", row["private_mb_early"], row["private_mb"]) for row in memory]
    title = "Private memory of a loader process"
    print(table(title, ("rows", f"MB after {args.samples // 10:,} samples", f"MB after {args.samples:,}"), held))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
