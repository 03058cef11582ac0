"""One HTML file that shows a demo run: curves, the split, sample grids, prompt adherence, every sampled video.

Self-contained: pictures and videos are inside the file, nothing is fetched. What a run does not have yet is left out,
with a line that says so.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.report.markup import data_uri, render
from opensora_repro.demo.given import PARTS as GIVEN_PARTS
from opensora_repro.demo.given import TASKS, rows_of
from opensora_repro.files import write_text
from opensora_repro.report.curves import Chart, Series, chart
from opensora_repro.run_folder import METRICS_FILE, VALIDATION_FILE, JsonLines

if TYPE_CHECKING:
    import numpy as np

TEMPLATE = Path(__file__).with_name("templates") / "demo.html"
STAGES = {
    "stage1": ("Stage 1", "an image model: what colours and shapes look like"),
    "stage2": ("Stage 2", "temporal attention joins it: how they move"),
    "stage3": ("Stage 3", "more frames, three formats and single images, the best clips"),
}
CLIPS_SHOWN = 24
THUMBNAIL_HEIGHT = 72
MAX_BYTES = 6_000_000  # of the whole file; videos beyond it are named instead of embedded
PARTS = ("colour", "shape", "direction")


@dataclass(frozen=True)
class Figure:
    """A picture or a video as an address, or the reason why it is not shown."""

    name: str
    caption: str
    address: str
    reason: str
    is_picture: bool


@dataclass(frozen=True)
class StagePart:
    """What the page tells of one stage."""

    name: str
    what: str
    curve: Chart | None
    step: int  # of its newest samples
    samples: list[Figure]


@dataclass(frozen=True)
class Clips:
    """The clips a run trained on; those that are shown, by their source's name."""

    count: int
    num_sources: int
    shown: list[tuple[str, list[dict[str, Any]]]]


def write_report(run_dir: Path, out: Path, *, title: str, summary: Mapping[str, Any]) -> None:
    """Write the report of the demo in `run_dir` to `out`.

    `summary` may hold `adherence` ({group and format: {colour, shape, direction: share}}), `records` (one a sampled
    video: group, format, caption, path, seen, agrees), `given` (likewise of each sample with given frames: task,
    caption, path, given, seen, agrees), `seventh` (shares of a colour that an adapter taught, and of the six with it)
    and `seconds` ({part of the demo: seconds}).
    """
    page, records, given = Page(run_dir), summary.get("records", []), summary.get("given", [])
    values = {
        "title": title,
        "seconds": summary.get("seconds", {}),
        "parts": PARTS,
        "adherence": summary.get("adherence", {}),
        "seventh": summary.get("seventh", {}),
        "counts": Counter(map(group_of, records)),
        "clips": _clips(run_dir / "train.parquet"),
        "stages": [page.stage(*stage) for stage in STAGES.items()],
        "given_parts": GIVEN_PARTS,
        "given": rows_of(given),
        "given_gallery": page.given(given),
        "gallery": page.gallery(records),
        "plays_files": False,
    }
    write_text(out, render(TEMPLATE, **values))


def group_of(record: Mapping[str, Any]) -> str:
    """The row of the table that a video counts in."""
    return f"{record['group']} {record['format']}"


class Page:
    """Embeds files as long as the page stays small enough to open anywhere."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.left = MAX_BYTES - 1_000_000  # the rest is for pictures and text

    def stage(self, stage: str, words: tuple[str, str]) -> StagePart:
        """A stage's losses, and the newest samples that training itself wrote, each with its prompt."""
        folder = self.run_dir / stage
        training, held_out = (_points(folder / name) for name in (METRICS_FILE, VALIDATION_FILE))
        lines = [Series("training", training), Series("held-out clips", held_out, 1, dots=True)]
        curve = chart(words[0], lines, from_zero=True)
        newest = max((folder / "samples").glob("step-*"), default=None)
        if newest is None:
            return StagePart(*words, curve, 0, [])
        files = sorted(newest.glob("[0-9]*.mp4")) or sorted(newest.glob("[0-9]*.png"))
        prompts = _prompts(folder / "config.toml")
        captions = prompts if len(prompts) == len(files) else [path.stem for path in files]
        samples = [self.figure(path, caption) for path, caption in zip(files, captions, strict=True)]
        return StagePart(*words, curve, int(newest.name.removeprefix("step-")), samples)

    def gallery(self, records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Figure, str]]]:
        """Videos by group and format, and what was measured in the file where that is not what was asked for."""
        groups: dict[str, list[tuple[Figure, str]]] = {group_of(record): [] for record in records}
        for group, videos in groups.items():
            for record in (record for record in records if group_of(record) == group):
                videos.append((self.figure(Path(record["path"]), record["caption"]), _wrong(record)))
        return groups

    def given(self, records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[list[Figure], str]]]:
        """By task what each sample was given and what became of it, and what in that is not as asked."""
        tasks: dict[str, list[tuple[list[Figure], str]]] = {}
        for record in records:
            files = [self.figure(Path(path), "given →") for path in record["given"]]
            files.append(self.figure(Path(record["path"]), record["caption"]))
            tasks.setdefault(TASKS[record["task"]], []).append((files, _wrong(record)))
        return tasks

    def figure(self, path: Path, caption: str) -> Figure:
        """A picture or a video, while there is room for it."""
        content = path.read_bytes() if path.is_file() else b""
        size, is_picture = len(content) * 4 // 3, path.suffix == ".png"
        if not content or size > self.left:
            reason = "file is missing" if not content else "left out, the page would grow too large"
            return Figure(path.name, caption, "", reason, is_picture)
        self.left -= size
        return Figure(path.name, caption, data_uri("image/png" if is_picture else "video/mp4", content), "", is_picture)


def _wrong(record: Mapping[str, Any]) -> str:
    """What a file shows where that is not what was asked for."""
    return ", ".join(
        f"{part}: {record['seen'][part] or 'none seen'}" for part, ok in record["agrees"].items() if not ok
    )


def _clips(path: Path) -> Clips | None:
    """The clips of the first source files: where each came from, its first, middle and last frame, its caption."""
    if not path.is_file():
        return None
    from opensora_repro.data.manifest import read_manifest

    clips = read_manifest(path)
    shown: dict[str, list[dict[str, Any]]] = {}
    ordered = clips.sort_by([("source", "ascending"), ("start_frame", "ascending")])
    for clip in ordered.slice(0, CLIPS_SHOWN).to_pylist():
        picture, reason = _picture(clip["path"], int(clip["num_frames"]))
        shown.setdefault(str(clip["source"]), []).append({**clip, "picture": picture, "reason": reason})
    return Clips(len(clips), len(clips["source"].unique()), [(Path(source).name, own) for source, own in shown.items()])


def _picture(path: str, count: int) -> tuple[str, str]:
    """A clip's first, middle and last frame as an address, or the reason why there are none."""
    from opensora_repro.data.video import DecodeError, read_frames

    step = max(1, (count - 1) // 2)
    try:
        return _strip(read_frames(path, start=0, count=min(3, count), step=step).numpy()), ""
    except (DecodeError, OSError) as error:
        return "", str(error)


def _strip(frames: np.ndarray) -> str:
    """Frames uint8 [T, H, W, 3] side by side, as a small JPEG."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.concatenate(list(frames), axis=1))
    height = min(THUMBNAIL_HEIGHT, picture.height)
    picture = picture.resize((max(1, picture.width * height // picture.height), height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data_uri("image/jpeg", data.getvalue())


def _points(path: Path) -> list[tuple[float, float]]:
    """(step, loss) of every line that has both; skipped steps have no loss."""
    lines: Iterable[Mapping[str, Any]] = JsonLines(path).read()
    return [(float(line["step"]), float(line["loss"])) for line in lines if line.get("loss") is not None]


def _prompts(config: Path) -> list[str]:
    from opensora_repro.config import ConfigError, load_recorded

    try:
        return list(load_recorded(config).sample.prompts)
    except ConfigError:
        return []
