"""Scene detection, cutting and reading clips, against what others do on the same file in the same run.

    python -m benchmarks.split [--video FILE --cuts FILE.cuts.json] [--crf Q] [--repeat N] [--out FILE]

Detection: CPU seconds (user and system, medians) of a process each, imports included, and of a second time in the same
process, as a worker has many; and F1 within two frames (gradual cuts: inside their span) of ours and of PySceneDetect's
detectors with their own reader. Cutting: ours, detecting and
cutting, against ContentDetector and then one encoder a scene (seek, decode, encode) at the same settings. The finer the
quality (`--crf`, by default x264's own), the larger the encoder's share, which is the same on both sides. That side
runs through PyAV instead of an ffmpeg binary, which need not be installed; both have the same libraries inside, and its
processes would only add to its time. Reading: CPU seconds of random windows of 16 frames, every third, of the source
and of its --for-training clips.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, save, table

VIDEOS = Path(__file__).resolve().parent.parent.parent / "shared" / "videos"
NAMES = ("long_dev", "long_dev_vfr")
COUNT, STEP, SIZE, READS = 16, 3, 256, 40
LONGEST = (COUNT - 1) * STEP + 1


def detect_ours(video: Path) -> list[int]:
    from opensora_repro.data.split.scenes import scan_video

    return list(scan_video(video).cuts)


def detect_theirs(video: Path, name: str) -> list[int]:
    """PySceneDetect's cuts as frame numbers; it tells times, which the file's own clock turns into frames."""
    from bisect import bisect_left

    import scenedetect

    from opensora_repro.data.video import frame_index, open_video

    manager = scenedetect.SceneManager()
    manager.add_detector(getattr(scenedetect, name)())
    manager.detect_scenes(scenedetect.open_video(str(video)))
    with open_video(video) as (_, stream):
        base = float(stream.time_base)
    times = frame_index(video).times
    seconds = [(t - times[0]) * base for t in times]
    return [bisect_left(seconds, scene[0].seconds - 1e-3) for scene in manager.get_scene_list()[1:]]


def cut_ours(video: Path, folder: Path, crf: int) -> None:
    from opensora_repro.data.split.cut import Encoding
    from opensora_repro.data.split.single_pass import SceneOptions, scan_and_cut

    options = SceneOptions(encoding=Encoding(crf=crf))
    if scan_and_cut(video, lambda span: folder / f"{span.start}.mp4", options) is None:
        raise SystemExit(f"{video}: cannot be split in one pass")


def cut_theirs(video: Path, folder: Path, crf: int) -> None:
    """Detect, then seek, decode and encode each scene by itself."""
    import av

    from opensora_repro.data.video import frame_index

    cuts, times = detect_theirs(video, "ContentDetector"), frame_index(video).times
    options = {"crf": str(crf), "preset": "veryfast", "g": "16", "bf": "0", "sc_threshold": "0"}
    for start, end in zip([0, *cuts], [*cuts, len(times)], strict=True):
        with av.open(str(video)) as source, av.open(str(folder / f"{start}.mp4"), "w") as out:
            stream = source.streams.video[0]
            stream.thread_type = "AUTO"
            written = out.add_stream("libx264", rate=stream.average_rate, options=options)
            written.width, written.height, written.pix_fmt = stream.width, stream.height, "yuv420p"
            written.codec_context.time_base = stream.time_base
            source.seek(times[start], stream=stream, backward=True)
            for frame in source.decode(stream):
                if frame.pts >= (times[end] if end < len(times) else times[-1] + 1):
                    break
                if frame.pts >= times[start]:
                    frame.pts, frame.pict_type = frame.pts - times[start], 0
                    out.mux(written.encode(frame))
            out.mux(written.encode(None))


def make_clips(video: Path, folder: Path) -> None:
    from opensora_repro.data.split.cut import TRAINING_SIDE, Encoding, cut_clips
    from opensora_repro.data.split.scenes import Span, scan_video

    scan = scan_video(video)
    spans = [Span(a, a + 150) for a in range(0, len(scan.times) - 149, 150)]
    how = Encoding(short_side=TRAINING_SIDE, fast_decode=True)
    cut_clips(video, scan, [(s, folder / f"{s.start}.mp4") for s in spans], how)


def read_speed(paths: Sequence[Path]) -> float:
    """CPU seconds of a random window, the median of READS."""
    from opensora_repro.data.video import frame_index, read_frames

    draw, times = random.Random(0), []
    for _ in range(READS):
        path = draw.choice(list(paths))
        start = draw.randrange(len(frame_index(path).times) - LONGEST)
        began = time.process_time()
        read_frames(path, start=start, count=COUNT, step=STEP, size=(SIZE, SIZE))
        times.append(time.process_time() - began)
    return statistics.median(times)


def f1(found: Sequence[int], truth: Sequence[dict[str, Any]]) -> float:
    """Return F1 of cuts within two frames, gradual ones inside their span, matched one to one."""
    left, hits = list(found), 0
    for cut in truth:
        start, end = cut.get("start", cut["frame"]), cut.get("end", cut["frame"])
        close = [c for c in left if start - 2 <= c <= end + 2]
        if close:
            left.remove(min(close, key=lambda c: abs(c - cut["frame"])))
            hits += 1
    return 2 * hits / max(1, len(found) + len(truth))


SIDES = {
    "ours": lambda video, folder, crf: detect_ours(video),
    "ContentDetector": lambda video, folder, crf: detect_theirs(video, "ContentDetector"),
    "AdaptiveDetector": lambda video, folder, crf: detect_theirs(video, "AdaptiveDetector"),
    "cut ours": cut_ours,
    "cut theirs": cut_theirs,
}


def told(side: str, video: Path, folder: Path, crf: int) -> dict[str, Any]:
    """Run a side: what it finds, and the CPU seconds of finding it again."""
    found = SIDES[side](video, folder, crf)
    began = time.process_time()
    if found is not None:
        SIDES[side](video, folder, crf)
    return {"found": found, "again": time.process_time() - began}


def in_a_process(side: str, video: Path, folder: Path, crf: int) -> tuple[float, float, Any]:
    """Run a side by itself: CPU seconds of a process that does it once, those of doing it again, and what it finds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "benchmarks.split", "--video", str(video), "--side", side, "--out", str(folder)]
    command += ["--crf", str(crf)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(done.stdout)
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return whole - result["again"], result["again"], result["found"]


def measure(video: Path, cuts: Path, repeat: int, crf: int) -> dict[str, Any]:
    truth = json.loads(cuts.read_text())["cuts"]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for turn in range(repeat):
            for side in SIDES:
                folder = Path(name) / f"{side}_{turn}".replace(" ", "_")
                folder.mkdir()
                *seconds, found = in_a_process(side, video, folder, crf)
                taken[side].append((seconds[0], seconds[1]))
                whole, again = (round(statistics.median(each), 2) for each in zip(*taken[side], strict=True))
                result[side] = {"cpu_seconds": whole}
                if found is not None:
                    result[side] |= {"again_cpu_seconds": again, "f1": round(f1(found, truth), 3)}
        clips = Path(name) / "clips"
        clips.mkdir()
        make_clips(video, clips)
        result["read source"] = {"cpu_seconds": round(read_speed([video]), 4)}
        result["read clips"] = {"cpu_seconds": round(read_speed(sorted(clips.iterdir())), 4)}
    return result


def ratio(rows: dict[str, Any], one: str, other: str, key: str = "cpu_seconds") -> float:
    return round(rows[one][key] / rows[other][key], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help=f"(default: {' and '.join(NAMES)} in ../shared/videos)")
    parser.add_argument("--cuts", type=Path, help="its true cuts (default: beside the video)")
    parser.add_argument("--crf", type=int, default=23, metavar="Q", help="x264 quality of the clips (%(default)s)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each side (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/split.json)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(told(args.side, args.video, args.out, args.crf)))
        return
    videos = [args.video] if args.video else [VIDEOS / f"{name}.mp4" for name in NAMES]
    missing = [video for video in videos if not video.exists()]
    if missing:
        print(f"{missing[0]}: not there; name a video and its cuts with --video and --cuts")
        return
    result: dict[str, Any] = {"benchmark": "split", "environment": environment(), "crf": args.crf, "videos": {}}
    for video in videos:
        rows = measure(video, args.cuts or video.with_suffix(".cuts.json"), args.repeat, args.crf)
        ratios = {
            "detection": ratio(rows, "ours", "ContentDetector", "again_cpu_seconds"),
            "detection_with_imports": ratio(rows, "ours", "ContentDetector"),
            "detection_and_cutting": ratio(rows, "cut ours", "cut theirs"),
            "reading": ratio(rows, "read source", "read clips"),
        }
        result["videos"][video.name] = {"repeat": args.repeat, "rows": rows, "ratios": ratios}
        shown = [
            (n, row.get("f1", ""), row["cpu_seconds"], row.get("again_cpu_seconds", "")) for n, row in rows.items()
        ]
        print(table(f"{video.name}: {ratios}", ("side", "F1", "CPU s", "again"), shown), flush=True)
    print(f"written to {save('split', result, args.out)}")


if __name__ == "__main__":
    main()
