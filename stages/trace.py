"""What a checkpoint was made of: clips, windows, crops, mirrorings and captions, down to file, span and sha256.

All of it follows from the run's seed and its manifest, and is computed by the code that training draws with. Without
--step and --clip the whole is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.errors import run_command
from opensora_repro.files import user_path, user_place

SHOWN_SOURCES = 20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.trace", description=__doc__)
    add = parser.add_argument
    add("source", nargs="?", type=user_path, metavar="CHECKPOINT", help="a checkpoint, or a run (its newest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="each sample of this step, counted from 1")
    which.add_argument("--clip", metavar="ID", help="each time that this clip of the manifest was seen")
    differ = "how two manifests, or two runs or checkpoints, differ; exit status 0 either way"
    which.add_argument("--diff", nargs=2, type=user_path, metavar=("A", "B"), help=differ)
    add("--manifest", type=user_place, metavar="FILE", help="the run's manifest, where it lies elsewhere by now")
    add("--json", action="store_true", help="a JSON object a line, with all that is known")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.diff is None):
        parser.error("give a CHECKPOINT, or --diff A B")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: differences(args) if args.diff else trace(args))


def differences(args: argparse.Namespace) -> int:
    from opensora_repro.report.trace import diff

    for path in args.diff:
        if not path.exists():
            raise ConfigError(f"--diff {path}: nothing there")
    lines = list(diff(*args.diff))
    for line in lines or ["no difference"]:
        print(json.dumps({"difference": line}) if args.json and lines else line)
    return 0


def trace(args: argparse.Namespace) -> int:
    from opensora_repro.report.trace import Trace

    found = Trace.of(args.source, args.manifest)
    for line in found.warnings():
        print(f"warning: {line}", file=sys.stderr)
    if args.step is None and args.clip is None:
        facts = found.summary()
        print(json.dumps(facts) if args.json else "\n".join(summary_lines(facts)))
        return 0
    samples = found.step(args.step) if args.step is not None else found.clip(args.clip)
    return show(samples, as_json=args.json)


def show(samples: Iterable[dict[str, Any]], *, as_json: bool) -> int:
    found = False
    for sample in samples:
        print(json.dumps(sample) if as_json else sample_lines(sample), flush=True)
        found = True
    if not found and not as_json:
        print("never seen up to this step")
    return 0


def sample_lines(sample: dict[str, Any]) -> str:
    """Texts are as JSON writes them: a caption or a name may hold anything."""
    size = "x".join(map(str, sample["size"]))
    lines = [f"step {sample['step']}, epoch {sample['epoch']}, draw {sample['draw']}: {json.dumps(sample['id'])}"]
    lines.append(f"  caption  {json.dumps(sample['caption'])}")
    if "frames" in sample:
        top, left = sample["crop"]
        mirrored = ", mirrored" if sample["flipped"] else ""
        lines.append(f"  shown    frames {spans(sample['frames'])}, cut to {size} at {top},{left}{mirrored}")
    lines.append(f"  file     {json.dumps(sample['path'])} sha256 {sample['sha256'] or 'unknown: not there'}")
    if "source" in sample:
        frames = sample.get("source_frames")
        span = f" frames {spans(frames)}" if frames else ""
        whole = f" of [{sample['start_frame']}, {sample['end_frame']})" if "end_frame" in sample else ""
        lines.append(f"  source   {json.dumps(sample['source'])}{span}{whole}")
    lines += [f"  note     {sample[key]}" for key in ("skipped", "unread") if key in sample]
    return "\n".join(lines)


def spans(frames: Sequence[int]) -> str:
    """`3, 5, 7` as they are; `3 to 9` where they follow each other."""
    if len(frames) > 2 and all(b - a == 1 for a, b in pairwise(frames)):
        return f"{frames[0]} to {frames[-1]}"
    return ", ".join(map(str, frames))


def summary_lines(facts: dict[str, Any]) -> Iterable[str]:
    manifest, sources = facts["manifest"], facts["sources"]
    options = "".join(f" {name}={json.dumps(value)}" for name, value in manifest.get("options", {}).items())
    parents = ", ".join(f"{parent['file']} {parent['version']}" for parent in manifest.get("parents", []))
    made = f", by data_tools.{manifest['tool']}{options}" if "tool" in manifest else ", nothing told of its making"
    yield f"{facts['checkpoint']}: step {facts['step']}, seed {facts['seed']}"
    yield f"  manifest      {manifest['path']} version {manifest['version']}{made}" + (
        f", from {parents}" if parents else ""
    )
    least, most = facts["seen at least, at most"]
    yield f"  clips         {facts['clips seen']:,} of {facts['clips']:,} seen, {least} to {most} times each"
    drawn, seen = facts["samples drawn"], facts["samples seen"]
    yield f"  samples       {drawn:,} drawn, {seen:,} seen, {facts['epochs begun']} epochs begun"
    for name, sha256 in facts["started from"].items():
        yield f"  started from  {json.dumps(name)} sha256 {sha256}"
    for key, files in facts["frozen models"].items():
        for name, sha256 in files.items():
            yield f"  {key:<13} {json.dumps(name)} sha256 {sha256}"
    if facts["set aside"]:
        yield f"  set aside     {', '.join(map(json.dumps, facts['set aside'][:SHOWN_SOURCES]))}"
    if facts["steps skipped"]:
        yield f"  skipped       steps {', '.join(map(str, facts['steps skipped'][:SHOWN_SOURCES]))}"
    for name, count in list(sources.items())[:SHOWN_SOURCES]:
        yield f"  source        {json.dumps(name)}, {count:,} samples"
    if len(sources) > SHOWN_SOURCES:
        yield f"  source        and {len(sources) - SHOWN_SOURCES:,} more (--json has all)"


if __name__ == "__main__":
    sys.exit(main())
