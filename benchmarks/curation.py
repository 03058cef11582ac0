"""From footage to a manifest of clips: what each tool takes of a core, beside decoding alone and beside others' ways.

    python -m benchmarks.curation [--video FILE ...] [--seconds N] [--rounds N] [--price-per-core-hour X] [--out FILE]

Footage is long_dev.mp4 (1280x720) and long_dev_vfr.mp4 (480x270) of ../shared/videos, or the first N seconds of each.
Counted are CPU seconds, user and system, of a command and all it starts, medians over the rounds: `probe`, `split`,
`score` and `filter`, each with one worker, and the line they make together. A side's start is what it takes when it has
nothing to do; rates are without it, for it is paid once, however much footage there is. `caption` is left out: it
takes what its model takes.

Decoding every frame in one thread is the limit. Beside it, on the same files and in the same round: PySceneDetect and
an ffmpeg a scene (through PyAV where there is no ffmpeg), video2dataset's cut detection and exact clipping,
data-juicer's video_split_by_scene_mapper, and its video_motion_score_filter on the clips that `split` made. Each at its
own defaults; others that are not installed are said to be missing. The file is written after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.curation_sides import SIDES
from benchmarks.harness import environment, save, table
from benchmarks.split import VIDEOS

FOOTAGE = {"720p": "long_dev.mp4", "270p": "long_dev_vfr.mp4"}
LEAST_SECONDS = 0.2
PRICE = 0.04  # of a core hour, in any currency: an assumption, to be set
KEEP = ("--keep", "motion > 0.001 or missing(motion)", "--keep", "not duplicate", "--thumbnails", "0")
TOOLS = ("probe", "split", "score", "filter")
OTHERS = tuple(name for name in SIDES if name != "decode")
Counted = tuple[float, dict[str, Any]]


def cpu_seconds(command: Sequence[str]) -> tuple[float, str]:
    """Run a command with one thread a process: CPU seconds of it and all that it waited for, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def tool_command(tool: str, folder: Path, out: Path) -> list[str]:
    """The tool on what the one before left in `out`, or on the footage in `folder`."""
    before = TOOLS[TOOLS.index(tool) - 1] if tool != TOOLS[0] else None
    given = out / before / "manifest.parquet" if before else folder
    options = KEEP if tool == "filter" else ("--workers", "1")
    return [sys.executable, "-m", f"data_tools.{tool}", str(given), "--out", str(out / tool), *options]


def run_side(side: str, folder: Path, out: Path) -> Counted:
    """Decoding, or another's way: CPU seconds, and how many clips, or what is missing."""
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.curation_sides", side, str(folder), str(out)]
    seconds, told = cpu_seconds(command)
    return seconds, json.loads(told.splitlines()[-1])


def one_round(folder: Path, out: Path, others: bool) -> dict[str, dict[str, Any]]:
    """Every side once, in turn: its CPU seconds, and those of a second run, which has nothing to do."""
    from opensora_repro.data.tables import num_rows

    found: dict[str, dict[str, Any]] = {}
    for tool in TOOLS:
        seconds, again = (cpu_seconds(tool_command(tool, folder, out))[0] for _ in range(2))
        found[tool] = {"cpu_seconds": seconds, "start_cpu_seconds": again}
        if tool != "probe":
            found[tool]["clips"] = num_rows(out / tool / "manifest.parquet")
        print(f"{tool}: {seconds:.1f} s, {again:.1f} s of them its start", flush=True)
    nothing = out / "nothing"
    nothing.mkdir()
    for side in ("decode", *(OTHERS if others else ())):
        given = out / "split" / "clips" if side.endswith("motion") else folder
        seconds, told = run_side(side, given, out / side)
        found[side] = told if "missing" in told else {
            "cpu_seconds": seconds, "start_cpu_seconds": run_side(side, nothing, out / f"{side}, nothing")[0],
            "clips": told["count"],
        }  # fmt: skip
        print(f"{side}: {told.get('missing') or f'{seconds:.1f} s'}", flush=True)
    return found


def medians(rounds: Sequence[dict[str, dict[str, Any]]], side: str) -> dict[str, Any]:
    """A side's figures, seconds being medians over the rounds."""
    last = rounds[-1][side]
    return {
        name: round(statistics.median(one[side][name] for one in rounds), 2) if name.endswith("seconds") else value
        for name, value in last.items()
    }


def summary(rounds: Sequence[dict[str, dict[str, Any]]], seconds: float, price: float) -> dict[str, Any]:
    """Medians and rates of one video, `seconds` long."""
    tools = {name: medians(rounds, name) for name in TOOLS}
    others = {name: medians(rounds, name) for name in rounds[-1] if name not in TOOLS}
    clips = tools["split"]["clips"]
    whole = sum(side["cpu_seconds"] for side in tools.values())
    line = {"cpu_seconds": round(whole, 2), "start_cpu_seconds": sum(t["start_cpu_seconds"] for t in tools.values())}
    for side in (*tools.values(), line, *others.values()):
        if "cpu_seconds" in side:
            work = side["cpu_seconds"] - side["start_cpu_seconds"]
            if work >= LEAST_SECONDS:  # less is no rate
                side["footage_minutes_per_core_hour"] = round(60 * seconds / work, 1)
                side["clips_per_core_hour"] = round(3600 * (side.get("clips") or clips) / work, 1)
    found = {
        "seconds": round(seconds, 2), "rounds": len(rounds), "clips": clips, "tools": tools, "line": line,
        "others": others,
    }  # fmt: skip
    if "clips_per_core_hour" in line:
        hours = 1e6 / line["clips_per_core_hour"]
        found["million_clips"] = {"core_hours": round(hours, 1), "cost": round(price * hours, 2)}
    return found


def take(video: Path, out: Path, seconds: float) -> float:
    """Copy the first seconds of a video, packet by packet, all of it for 0; return how long that is."""
    import av

    with av.open(str(video)) as source, av.open(str(out), "w") as made:
        stream = source.streams.video[0]
        copy, start, end = made.add_stream_from_template(stream), None, 0.0
        for packet in source.demux(stream):
            if packet.pts is None or packet.dts is None:
                continue
            start = float(packet.pts * packet.time_base) if start is None else start
            if seconds and float(packet.dts * packet.time_base) - start >= seconds:
                break
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - start)
            packet.stream = copy
            made.mux(packet)
    return end


def lines(result: dict[str, Any]) -> list[tuple[object, ...]]:
    """Rows of the table: of each video its sides, with minutes and clips a core hour."""
    rows: list[tuple[object, ...]] = []
    for name, video in result["footage"].items():
        for side, found in {**video["tools"], "the line": video["line"], **video["others"]}.items():
            shown = [found.get(key, "missing" if "missing" in found else "") for key in
                     ("cpu_seconds", "footage_minutes_per_core_hour", "clips_per_core_hour")]  # fmt: skip
            rows.append((f"{name}: {side}", *shown))
    return rows


def report(result: dict[str, Any]) -> str:
    columns = ("footage and side", "CPU s", "minutes a core hour", "clips a core hour")
    text = [table("Curation", columns, lines(result))]
    for name, video in result["footage"].items():
        if "million_clips" not in video:
            text.append(f"{name}: too short to tell what a million clips take")
            continue
        cost, hours = video["million_clips"]["cost"], video["million_clips"]["core_hours"]
        text.append(f"a million clips of {name}: {hours:,.0f} core hours, {cost:,.2f} at {result['price']} a core hour")
    return "\n".join(text)


def measure(
    videos: dict[str, Path], args: argparse.Namespace, keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Run the rounds, and hand what is known to `keep` after each; return all of it."""
    known: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in videos}
    result: dict[str, Any] = {"footage": {}}
    with tempfile.TemporaryDirectory() as place:
        lengths = {}
        for name, video in videos.items():
            folder = Path(place) / name
            folder.mkdir()
            lengths[name] = take(video, folder / video.name, args.seconds)
        for number in range(args.rounds):
            for name in videos:
                print(f"round {number + 1}, {name}", flush=True)
                out = Path(place) / f"{name}-{number}"
                known[name].append(one_round(Path(place) / name, out, not args.ours))
                result["footage"][name] = summary(known[name], lengths[name], args.price_per_core_hour)
                keep(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--video", type=Path, nargs="+", default=[], help=f"(default: {' and '.join(FOOTAGE.values())})")
    add("--seconds", type=float, default=0.0, metavar="N", help="of each video; 0: all (default)")
    add("--rounds", type=int, default=3, metavar="N", help="of every side (default: %(default)s)")
    add("--ours", action="store_true", help="without others' ways")
    add("--price-per-core-hour", type=float, default=PRICE, metavar="X", help="(default: %(default)s)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/curation.json)")
    args = parser.parse_args()
    videos = {path.stem: path for path in args.video} or {name: VIDEOS / file for name, file in FOOTAGE.items()}
    if len(videos) < len(args.video):
        parser.error("--video: two have one name but for its end; rename one")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    if missing := [video for video in videos.values() if not video.exists()]:
        print(f"{missing[0]}: not there; name videos with --video")
        return
    head = {"benchmark": "curation", "environment": environment(), "price": args.price_per_core_hour}

    found = measure(videos, args, lambda found: save("curation", {**head, **found}, args.out))
    print(report({**head, **found}))
    print(f"written to {save('curation', {**head, **found}, args.out)}")


if __name__ == "__main__":
    main()
