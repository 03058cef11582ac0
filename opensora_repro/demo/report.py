"""One HTML file that shows a demo run: curves, the split, sample grids, prompt adherence, every sampled video.

Self-contained: pictures and videos are inside the file, nothing is fetched. What a run does not have yet is left out,
with a line that says so.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.report.markup import data_uri, document, nothing, section
from opensora_repro.demo.curves import loss_curve
from opensora_repro.files import write_text
from opensora_repro.run_folder import METRICS_FILE, VALIDATION_FILE, JsonLines

if TYPE_CHECKING:
    import numpy as np

STAGES = {
    "stage1": ("Stage 1", "an image model: what colours and shapes look like"),
    "stage2": ("Stage 2", "temporal attention joins it: how they move"),
    "stage3": ("Stage 3", "more frames, higher resolution, the best clips"),
}
CLIPS_SHOWN = 24
THUMBNAIL_HEIGHT = 72
MAX_BYTES = 6_000_000  # of the whole file; videos beyond it are named instead of embedded
PARTS = ("colour", "shape", "direction")


def write_report(run_dir: Path, out: Path, *, title: str, summary: Mapping[str, Any]) -> None:
    """Write the report of the demo in `run_dir` to `out`.

    `summary` may hold `adherence` ({group: {colour, shape, direction: share}}), `records` (one a sampled video: group,
    caption, path, seen, agrees) and `seconds` ({part of the demo: seconds}).
    """
    page = Page(run_dir)
    records = summary.get("records", [])
    body = [
        f"<header><h1>{escape(title)}</h1>{_times(summary.get('seconds', {}))}</header>",
        section("Does it do what the text says?", _adherence(summary.get("adherence", {}), records)),
        section("How it learned", _curves(run_dir)),
        section("What it trained on", _split(run_dir)),
        *(section(f"{name}: {what}", page.samples_of(stage)) for stage, (name, what) in STAGES.items()),
        section("Every sampled video", page.gallery(records)),
    ]
    write_text(out, document(title, "\n".join(body), style=STYLE, script=SCRIPT))


class Page:
    """Embeds files as long as the page stays small enough to open anywhere."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.left = MAX_BYTES - 1_000_000  # the rest is for pictures and text

    def samples_of(self, stage: str) -> str:
        """The newest samples that training itself wrote, each picture or video with its prompt."""
        folders = sorted((self.run_dir / stage / "samples").glob("step-*"))
        if not folders:
            return nothing("no samples written yet")
        folder = folders[-1]
        files = sorted(folder.glob("[0-9]*.mp4")) or sorted(folder.glob("[0-9]*.png"))
        prompts = _prompts(self.run_dir / stage / "config.toml")
        captions = prompts if len(prompts) == len(files) else [path.stem for path in files]
        figures = [self.figure(path, escape(caption)) for path, caption in zip(files, captions, strict=True)]
        after = f"<p>After step {int(folder.name.removeprefix('step-')):,}:</p>"
        return f'{after}<div class="tiles">{"".join(figures)}</div>'

    def gallery(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Each group's videos with the caption, and what was measured in each file."""
        if not records:
            return nothing("nothing sampled yet")
        parts = []
        for group in dict.fromkeys(record["group"] for record in records):
            own = [record for record in records if record["group"] == group]
            figures = [self.figure(Path(r["path"]), _verdict(r)) for r in own]
            parts.append(f"<h3>{escape(group)}</h3>")
            parts.append(f'<div class="tiles">{"".join(figures)}</div>')
        return "".join(parts)

    def figure(self, path: Path, caption: str) -> str:
        """A picture or a looping video; `caption` is HTML."""
        content = path.read_bytes() if path.is_file() else b""
        size = len(content) * 4 // 3
        if not content or size > self.left:
            reason = "file is missing" if not content else "left out, the page would grow too large"
            inner = f'<p class="none">{escape(path.name)}: {reason}</p>'
        elif path.suffix == ".png":
            inner = f'<img src="{data_uri("image/png", content)}" alt="">'
        else:
            source = data_uri("video/mp4", content)
            inner = f'<video src="{source}" loop muted playsinline controls preload="none"></video>'
        if size <= self.left:
            self.left -= size
        return f"<figure>{inner}<figcaption>{caption}</figcaption></figure>"


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _times(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    listed = ", ".join(f"{escape(name)} {value / 60:.1f}" for name, value in seconds.items())
    return f'<p class="quiet">{sum(seconds.values()) / 60:.1f} minutes on this machine ({listed}).</p>'


def _adherence(table: Mapping[str, Mapping[str, float]], records: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return nothing("not measured yet")
    rows = []
    for group, shares in table.items():
        count = sum(record["group"] == group for record in records)
        cells = "".join(
            f'<td><span class="bar" style="--share:{shares[p]:.4f}">{shares[p]:.2f}</span></td>' for p in PARTS
        )
        rows.append(f"<tr><th>{escape(group)}</th>{cells}<td>{count or ''}</td></tr>")
    head = "".join(f"<th>{part}</th>" for part in PARTS)
    return (
        "<p>Share of sampled videos that show the right colour, shape and direction, measured from the pixels of the "
        "written files. Training never saw the combinations called never trained.</p>"
        f"<table><tr><th></th>{head}<th>videos</th></tr>{''.join(rows)}</table>"
    )


def _curves(run_dir: Path) -> str:
    figures = []
    for stage, (name, _) in STAGES.items():
        training = _points(run_dir / stage / METRICS_FILE)
        validation = _points(run_dir / stage / VALIDATION_FILE)
        figures.append(f"<figure>{loss_curve(training, validation)}<figcaption>{name}</figcaption></figure>")
    key = (
        '<p class="quiet">Loss by step: <b class="train">line</b> training, <b class="val">dots</b> held-out clips.</p>'
    )
    return f'{key}<div class="curves">{"".join(figures)}</div>'


def _split(run_dir: Path) -> str:
    """The clips of the first source files: where each came from, its first, middle and last frame, its caption."""
    path = run_dir / "manifest.parquet"
    if not path.is_file():
        return nothing("no clips yet")
    from opensora_repro.data.manifest import read_manifest

    clips = read_manifest(path)
    sources = list(dict.fromkeys(clips["source"]))
    videos = "1 long video" if len(sources) == 1 else f"{len(sources)} long videos"
    text = f"<p>{videos}, cut into {len(clips)} clips at the scene changes.</p>"
    shown = clips.sort_values(["source", "start_frame"]).head(CLIPS_SHOWN)
    parts = [text]
    for source, own in shown.groupby("source", sort=False):
        rows: list[dict[str, Any]] = [dict(zip(own.columns, row, strict=True)) for row in own.itertuples(index=False)]
        parts.append(f"<h3>{escape(Path(str(source)).name)}</h3>{_timeline(rows)}")
        parts.append(f'<div class="tiles wide">{"".join(map(_clip, rows))}</div>')
    return "".join(parts)


def _timeline(clips: Sequence[Mapping[str, Any]]) -> str:
    """A bar of the source's frames, one piece a clip."""
    pieces = "".join(
        f'<span style="flex:{int(c["end_frame"]) - int(c["start_frame"])}" title="{escape(str(c["caption"]))}"></span>'
        for c in clips
    )
    return f'<div class="timeline">{pieces}</div>'


def _clip(clip: Mapping[str, Any]) -> str:
    from opensora_repro.data.video import DecodeError, read_frames

    count = int(clip["num_frames"])
    step = max(1, (count - 1) // 2)
    try:
        frames = read_frames(clip["path"], start=0, count=min(3, count), step=step).numpy()
        picture = f'<img src="{_strip(frames)}" alt="">'
    except (DecodeError, OSError) as error:
        picture = f'<p class="none">{escape(str(error))}</p>'
    span = f"frames {int(clip['start_frame'])} to {int(clip['end_frame'])}"
    return f"<figure>{picture}<figcaption>{escape(str(clip['caption']))}<br><small>{span}</small></figcaption></figure>"


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


def _verdict(record: Mapping[str, Any]) -> str:
    """The caption and what was measured: each part right, or what was seen instead."""
    agrees, seen = record["agrees"], record["seen"]
    right = all(agrees[part] for part in PARTS)
    wrong = ", ".join(f"{part}: {seen[part] or 'none seen'}" for part in PARTS if not agrees[part])
    mark = '<b class="ok">as asked</b>' if right else f'<b class="no">{escape(wrong)}</b>'
    return f"{escape(record['caption'])}<br><small>{mark}</small>"


# ---------------------------------------------------------------------------------------------------------------------
# Small things


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


STYLE = """
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
video { width: 100%; border-radius: 6px; display: block; background: #000; }
.timeline { display: flex; gap: 2px; height: 10px; margin-bottom: .7rem; }
.timeline span { background: var(--accent); border-radius: 2px; opacity: .75; }
.timeline span:nth-child(even) { opacity: .4; }
svg .train { fill: none; stroke: var(--accent); stroke-width: 1.6; }
svg .val { fill: var(--second); } b.train { color: var(--accent); } b.val { color: var(--second); }
"""

# Browsers allow some dozens of live players on a page: a video plays while in view and gives its player back after.
SCRIPT = """
if ("IntersectionObserver" in window) {
  const watch = new IntersectionObserver(entries => entries.forEach(entry => {
    if (entry.isIntersecting) entry.target.play().catch(() => {});
    else { entry.target.pause(); entry.target.load(); }
  }));
  document.querySelectorAll("video").forEach(video => { video.removeAttribute("controls"); watch.observe(video); });
}
"""
