"""Split long videos at their cuts into clips that training reads fast.

    python -m data_tools.split INPUT --out DIR

INPUT is a video or a folder of videos (searched with its subfolders). DIR receives `clips/*.mp4`, `manifest.parquet`
(one row a clip, captions empty) and `rejects.parquet` (what gave no clip, with the reason). Run again, it does only
what is not done yet: a source is finished once its file in `DIR/sources` exists, and is known by its content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.files import beside, remove_leftovers
from opensora_repro.data.manifest import LINEAGE_COLUMNS, REQUIRED_COLUMNS, DataError

if TYPE_CHECKING:
    from opensora_repro.data.cut import Encoding
    from opensora_repro.data.scenes import Scan, Span

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")
)
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
CLIP_COLUMNS = (*REQUIRED_COLUMNS, *LINEAGE_COLUMNS, "resplit")
REJECT_COLUMNS = ("source", "start_frame", "end_frame", "reason")
METHOD = 2  # raise when the same options would give other clips, so that finished sources are done again
Row = dict[str, Any]
Record = dict[str, list[Row]]  # a finished source's "clips" and "rejects"


@dataclass(frozen=True)
class Options:
    """What a source's clips depend on besides its content."""

    detector: str
    threshold: float | None
    min_frames: int
    max_frames: int
    crf: int
    trim: int | None = None
    preset: str = "veryfast"
    short_side: int = 0
    fps: str = ""
    audio: bool = False
    copy: bool = False
    for_training: bool = False


@dataclass(frozen=True)
class Source:
    """A video: where it is, what the manifest calls it, and the digest of its content and the options."""

    path: Path
    name: str
    digest: str


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(argv)
    try:
        return split(Path(args.input), Path(args.out), options_of(args))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data_tools.split", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("input", help="a video, or a folder of videos (put -- before a name that starts with a dash)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for clips/ and their manifest")
    parser.add_argument(
        "--detector",
        choices=("shots", "adaptive", "content"),
        default="shots",
        help="shots: what no motion explains, dissolves and fades too; PySceneDetect's adaptive: change against the"
        " neighbouring frames; its content: change as such (%(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="level of a cut (shots: 1.5; adaptive: by how restless the video is, 2.1 to 3.5; content: 27)",
    )
    parser.add_argument("--min-frames", type=int, default=8, metavar="N", help="drop shorter scenes (%(default)s)")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=0,
        metavar="N",
        help="divide longer scenes evenly and mark them `resplit` (0: never)",
    )
    parser.add_argument(
        "--trim",
        type=int,
        metavar="N",
        help="leave out dissolves and fades, and N frames on either side of every cut (default: leave out nothing)",
    )
    add_encoding_arguments(parser)
    return parser.parse_args(argv)


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="veryfast", choices=PRESETS, help="x264 preset (%(default)s)")
    parser.add_argument("--short-side", type=int, default=0, metavar="PX", help="reduce to this short side (0: keep)")
    parser.add_argument("--fps", default="", metavar="RATE", help="frames a second, such as 24 or 30000/1001 (keep)")
    parser.add_argument("--audio", action="store_true", help="keep the sound, as AAC")
    parser.add_argument("--copy", action="store_true", help="copy instead of encoding where cuts fall on key frames")
    parser.add_argument(
        "--for-training",
        action="store_true",
        help="clips that are read fast: short side 256 unless --short-side says otherwise, quick to decode",
    )
    parser.add_argument("--crf", type=int, default=18, help="x264 quality of the clips, 0 (best) to 51 (%(default)s)")


def options_of(args: argparse.Namespace) -> Options:
    """Check the numbers; DataError names the option."""
    if args.threshold is not None and not args.threshold > 0:
        raise DataError(f"--threshold {args.threshold}: expected a number above 0")
    if args.min_frames < 1:
        raise DataError(f"--min-frames {args.min_frames}: expected at least 1")
    if args.max_frames and args.max_frames < args.min_frames:
        raise DataError(f"--max-frames {args.max_frames}: expected 0 or at least --min-frames {args.min_frames}")
    if not 0 <= args.crf <= 51:
        raise DataError(f"--crf {args.crf}: expected 0 to 51")
    if args.trim is not None and args.trim < 0:
        raise DataError(f"--trim {args.trim}: expected 0 or more frames")
    if args.short_side and args.short_side < 16:
        raise DataError(f"--short-side {args.short_side}: expected 0 or at least 16 pixels")
    try:
        wrong = args.fps != "" and not 0 < Fraction(args.fps) <= 1000
    except (ValueError, ZeroDivisionError):
        wrong = True
    if wrong:
        raise DataError(f"--fps {args.fps}: expected a number or a fraction, such as 24 or 30000/1001")
    return Options(**{field.name: getattr(args, field.name) for field in fields(Options)})


def encoding_of(options: Options) -> Encoding:
    from opensora_repro.data.cut import TRAINING_SIDE, Encoding

    return Encoding(
        crf=options.crf,
        preset=options.preset,
        short_side=options.short_side or (TRAINING_SIDE if options.for_training else 0),
        fps=Fraction(options.fps) if options.fps else None,
        audio=options.audio,
        copy=options.copy and not options.for_training,
        fast_decode=options.for_training,
    )


def split(root: Path, out: Path, options: Options) -> int:
    """Split every source, then write the manifest and the rejects; returns the exit status."""
    paths, others = find_videos(root, out)
    for folder in (out / "clips", out / "sources"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    sources = [Source(path, name, digest_of(path, options)) for path, name in paths]
    todo = [source.path for source in sources if read_record(out, source) is None]
    with progress(todo) as on_frame:
        records = [read_record(out, source) or split_source(source, out, options, on_frame) for source in sources]
    clips, rejects = collect(sources, records)
    write_tables(out, clips, rejects)
    print(f"{len(sources)} videos, {len(clips)} clips, {len(rejects)} rejected, {others} other files: {out}")
    if not clips:
        raise DataError(f"{root}: no clip came out; the reasons are in {out / 'rejects.parquet'}")
    return 0


def find_videos(root: Path, out: Path) -> tuple[list[tuple[Path, str]], int]:
    """Return the videos with their names (paths from INPUT on, with /), sorted, and how many other files there are."""
    if root.is_file():
        return [(root, root.name)], 0
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder")
    within = out.resolve()
    files = [p for p in root.rglob("*") if not p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    files = [p for p in files if within not in p.absolute().parents and not p.name.startswith(".")]
    videos = sorted(p for p in files if p.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise DataError(f"{root}: no video in this folder (looked for {' '.join(sorted(VIDEO_SUFFIXES))})")
    return [(path, path.relative_to(root).as_posix()) for path in videos], len(files) - len(videos)


def split_source(source: Source, out: Path, options: Options, on_frame: Callable[[], Any]) -> Record:
    """Detect, cut, verify; then record the source as finished. A source that cannot be read is recorded as rejected."""
    from opensora_repro.data.cut import cut_clips
    from opensora_repro.data.scenes import plan_spans, scan_video
    from opensora_repro.data.video import DecodeError

    limits = {"min_frames": options.min_frames, "max_frames": options.max_frames}
    try:
        scan = scan_video(source.path, detector=options.detector, threshold=options.threshold, on_frame=on_frame)
        spans = plan_spans(len(scan.times), scan.cuts, transitions=scan.transitions, trim=options.trim, **limits)
        kept = [(s, out / "clips" / f"{clip_id(source, s)}.mp4") for s in spans if len(s) >= options.min_frames]
        cut_clips(source.path, scan, kept, encoding=encoding_of(options), on_frame=on_frame)
        short = [span for span in spans if len(span) < options.min_frames]
        clips = [clip_row(target, scan, span) for span, target in kept]
        rejects = [reject_row(f"{len(s)} frames, --min-frames is {options.min_frames}", s.start, s.end) for s in short]
        record = {"clips": clips, "rejects": rejects}
    except DecodeError as error:
        record = {"clips": [], "rejects": [reject_row(str(error).removeprefix(f"{source.path}: "))]}
    write_text(record_path(out, source), json.dumps(record))
    return record


def clip_id(source: Source, span: Span) -> str:
    """The id follows from the source's content and the span, so that a clip keeps it wherever the files go."""
    return f"{source.digest.split('-')[0]}-{span.start:06d}-{span.end:06d}"


def reject_row(reason: str, start: int | None = None, end: int | None = None) -> Row:
    return {"start_frame": start, "end_frame": end, "reason": reason}


def clip_row(path: Path, scan: Scan, span: Span) -> Row:
    from opensora_repro.data.video import average_rate, probe

    info = probe(path)
    rate = average_rate(scan.times[span.start : span.end], scan.time_base)
    return {
        "id": path.stem,
        "path": path.name,
        "caption": "",
        "num_frames": info.num_frames,
        "fps": (rate if info.num_frames == len(span) else 0) or info.fps,
        "height": info.height,
        "width": info.width,
        "start_frame": span.start,
        "end_frame": span.end,
        "start_time": scan.seconds(span.start),
        "end_time": scan.seconds(span.end),
        "resplit": span.resplit,
    }


def digest_of(path: Path, options: Options) -> str:
    """Return CONTENT-OPTIONS digests: the name of a source's record."""
    content = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    except OSError:  # a folder, a dangling link, no permission: told when it is decoded
        content.update(os.fsencode(path))
    how = hashlib.blake2b(json.dumps([METHOD, asdict(options)]).encode(), digest_size=4)
    return f"{content.hexdigest()}-{how.hexdigest()}"


def record_path(out: Path, source: Source) -> Path:
    return out / "sources" / f"{source.digest}.json"


def read_record(out: Path, source: Source) -> Record | None:
    """Return a finished source's rows, or None if it is not finished or one of its clips has gone."""
    try:
        record: Record = json.loads(record_path(out, source).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if all((out / "clips" / row["path"]).is_file() for row in record["clips"]) else None


def write_text(path: Path, text: str) -> None:
    unfinished = beside(path)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def collect(sources: list[Source], records: list[Record]) -> tuple[list[Row], list[Row]]:
    """Join the sources' rows; of sources with the same content the first is kept."""
    clips: list[Row] = []
    rejects: list[Row] = []
    owner: dict[str, str] = {}
    for source, record in zip(sources, records, strict=True):
        first = owner.setdefault(source.digest, source.name) if record["clips"] else source.name
        if first != source.name:
            rejects.append({**reject_row(f"same content as {first}"), "source": source.name})
            continue
        clips += [{**row, "source": source.name, "path": f"clips/{row['path']}"} for row in record["clips"]]
        rejects += [{**row, "source": source.name} for row in record["rejects"]]
    return clips, rejects


def write_tables(out: Path, clips: list[Row], rejects: list[Row]) -> None:
    import pandas as pd

    from opensora_repro.data.manifest import write_table

    whole = {"start_frame": "Int64", "end_frame": "Int64"}  # or whole-file rejects would make them floats
    write_table(pd.DataFrame(clips, columns=list(CLIP_COLUMNS)), out / "manifest.parquet")
    write_table(pd.DataFrame(rejects, columns=list(REJECT_COLUMNS)).astype(whole), out / "rejects.parquet")


@contextmanager
def progress(paths: list[Path]) -> Iterator[Callable[[], Any]]:
    """Show a bar over the frames of the sources still to do, each decoded twice: once to detect, once to cut."""
    from tqdm import tqdm

    total = 2 * sum(count_packets(path) for path in paths)
    with tqdm(total=total, desc="splitting", unit="frame", disable=not paths or None, mininterval=0.5) as bar:
        yield bar.update


def count_packets(path: Path) -> int:
    from opensora_repro.data.video import DecodeError, frame_index

    try:
        return frame_index(path).num_packets
    except (DecodeError, OSError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
