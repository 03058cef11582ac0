"""One HTML file about a dataset: what went through its tools, what came out, what was dropped and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensora_repro.data.report import charts
from opensora_repro.data.report.charts import histogram, number
from opensora_repro.data.report.groups import Group, Groups
from opensora_repro.data.report.markup import document, nothing, section, shown, slug
from opensora_repro.data.report.sources import Source
from opensora_repro.data.report.stages import SOURCES_COUNTED, Counts
from opensora_repro.data.report.summary import CHARACTERS, WORDS, Classes, Numbers, Summary
from opensora_repro.data.report.thumbnails import Strip

MAX_PICTURES = 3_500_000  # bytes of all pictures; what is beyond is named instead of shown
REASONS_SHOWN = 25  # of each stage
SOURCES_SHOWN = 200
COMPARED = re.compile(r"\s*\(?\s*([A-Za-z_]\w*)\s*\)?\s*(?:<=?|>=?|==|!=)")
Row = Mapping[str, Any]


@dataclass
class Report:
    """What the page tells; rows are of the tables, with whatever columns these have."""

    stages: list[tuple[str, Counts]]
    rules: dict[str, list[dict[str, Any]]]  # of the stages that filter
    columns: Summary
    columns_of: str  # the stage whose table `columns` tells of
    before: str  # the stage whose rows are drawn behind; "" for none
    clips: list[dict[str, Any]]
    scores: list[str]  # columns to show with every clip
    words: list[tuple[str, int]]
    words_of: int  # captions that were looked at
    duplicates: Groups | None = None
    flags: Groups | None = None
    strips: dict[str, dict[str, Strip]] = field(default_factory=dict)  # of "clips" and "duplicates", by path
    links: dict[str, str] = field(default_factory=dict)  # addresses of the clips, by path
    sources: list[Source] = field(default_factory=list)  # the most interesting first


def page(report: Report) -> str:
    """Return the page as one HTML document."""
    pictures = _Pictures()
    parts = {
        "Through the line": _funnel(report),
        "Sources": _source_rows(report),
        "Clips": _clips(report, pictures),
        "Columns": _columns(report),
        "Captions": _captions(report),
        "Near-duplicates": _duplicates(report, pictures),
        "Rules": _rules(report),
        "Rejected": _rejects(report),
    }
    parts = {heading: content for heading, content in parts.items() if content}
    links = "".join(f'<a href="#{slug(heading)}">{shown(heading)}</a>' for heading in parts)
    header = f"<header><h1>Dataset report</h1>{_headline(report)}<nav>{links}</nav></header>"
    body = "\n".join([header, *(section(heading, content) for heading, content in parts.items())])
    return document("Dataset report", body, style=STYLE + charts.STYLE, plays_files=True)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page


def _headline(report: Report) -> str:
    last = report.stages[-1][1]
    seconds = f", {clock(last.seconds)} of video" if last.seconds is not None else ""
    sources = f", from {_sources(last.sources)} sources" if last.sources else ""
    rejected = sum(counts.rejected for _, counts in report.stages)
    return f"<p>{last.rows:,} rows{seconds}{sources}; {rejected:,} rejected on the way.</p>"


def _funnel(report: Report) -> str:
    most_rows = max((counts.rows for _, counts in report.stages), default=0)
    most_seconds = max((counts.seconds or 0.0 for _, counts in report.stages), default=0.0)
    lines = []
    for name, counts in report.stages:
        played = clock(counts.seconds) if counts.seconds is not None else ""
        link = f'<a href="#{slug("rejected " + name)}">{counts.rejected:,}</a>' if counts.rejected else "0"
        reason = counts.reasons.ranked()[0].text if counts.rejected and counts.reasons.ranked() else ""
        lines.append(
            f"<tr><th>{shown(name)}</th>{_bar(counts.rows, most_rows, f'{counts.rows:,}')}"
            f"{_bar(counts.seconds or 0.0, most_seconds, played)}<td>{_sources(counts.sources)}</td>"
            f"<td>{link}</td><td>{shown(reason, 80)}</td></tr>"
        )
    head = "<tr><th>stage</th><th>rows out</th><th>video</th><th>sources</th><th>rejected</th><th>mostly</th></tr>"
    return f'<table class="funnel">{head}{"".join(lines)}</table>'


def _source_rows(report: Report) -> str:
    """A row a source video: those that gave no clip first, then by what was lost."""
    if not report.sources:
        return ""
    most = max(source.kept + source.num_lost for source in report.sources)
    lines = []
    for source in report.sources[:SOURCES_SHOWN]:
        reasons = sorted(source.lost.values(), key=lambda reason: -reason.count)
        why = "<br>".join(f"{shown(reason.text, 160)} <small>{reason.count:,}</small>" for reason in reasons[:3])
        kept = _bar(source.kept, most, f"{source.kept:,}")
        played = clock(source.seconds) if source.seconds else ""
        lines.append(
            f"<tr><th>{shown(source.name, 120)}</th>{kept}<td>{played}</td>"
            f"<td>{source.num_lost:,}</td><td>{why}</td></tr>"
        )
    empty = sum(source.kept == 0 for source in report.sources)
    told = f"{_sources(len(report.sources))} sources, {empty:,} of them without a clip that was kept"
    hidden = len(report.sources) - SOURCES_SHOWN
    told += f"; the first {SOURCES_SHOWN:,} here, those with the most losses" if hidden > 0 else ""
    head = "<tr><th>source</th><th>clips kept</th><th>video</th><th>rows lost</th><th>mostly why</th></tr>"
    return f'<p>{told}.</p><table class="sources">{head}{"".join(lines)}</table>'


def _clips(report: Report, pictures: _Pictures) -> str:
    if not report.clips:
        return nothing("no row to show")
    strips = report.strips.get("clips", {})
    tiles = "".join(
        _tile(row, report.scores, strips, pictures, report.links.get(str(row.get("path")), "")) for row in report.clips
    )
    total = report.stages[-1][1].rows
    told = f"<p>{len(report.clips):,} of {total:,}, evenly spread; three moments of each, and the clip to play.</p>"
    return f'{told}<div class="tiles strips">{tiles}</div>'


def _columns(report: Report) -> str:
    key = f'<b class="now">{shown(report.columns_of)}</b>'
    if report.before:
        key += f', behind it <b class="before">{shown(report.before)}</b>; dashed: thresholds of the filter'
    marks = _thresholds(report.rules)
    drawn = [_histogram(column, marks.get(column.name, [])) for column in report.columns.numbers]
    listed = [_classes(column) for column in report.columns.classes]
    if not drawn and not listed:
        return ""
    told = f'<p class="quiet">Rows by value: {key}. The outermost bins hold what lies beyond them.</p>'
    return f'{told}<div class="charts">{"".join(drawn)}</div><div class="charts">{"".join(listed)}</div>'


def _histogram(column: Numbers, marks: Sequence[float]) -> str:
    facts = (
        f"{number(column.low)} to {number(column.high)}, mean {number(column.mean)}, median {number(column.median)}"
        + (f", missing {column.missing:,}" if column.missing else "")
    )
    drawing = histogram(column.edges, column.counts, before=column.before, marks=marks)
    return f"<figure><h3>{shown(column.name, 80)}</h3>{drawing}<figcaption><small>{facts}</small></figcaption></figure>"


def _classes(column: Classes) -> str:
    total = sum(count for _, count in column.counts) + column.others + column.missing
    extra = [("(other values)", column.others), ("(missing)", column.missing)]
    rows = [*column.counts, *((text, count) for text, count in extra if count)]
    lines = "".join(
        f"<tr><td>{shown(text, 60) or '(empty)'}</td>{_bar(count, total, f'{count:,}')}</tr>" for text, count in rows
    )
    return f"<figure><h3>{shown(column.name, 80)}</h3><table>{lines}</table></figure>"


def _captions(report: Report) -> str:
    parts = []
    if lengths := [c for c in report.columns.numbers if c.name in (WORDS, CHARACTERS)]:
        told = "; ".join(
            f"{number(c.low)} to {number(c.high)} {c.name.partition(', ')[2]}, median {number(c.median)}"
            for c in lengths
        )
        parts.append(f"<p>Lengths: {told}.</p>")
    if report.words:
        parts.append(f"<p>In how many of {report.words_of:,} captions a word occurs:</p>")
        items = "".join(f"<li>{shown(word, 40)} <small>{count:,}</small></li>" for word, count in report.words)
        parts.append(f'<ul class="words">{items}</ul>')
    elif report.words_of:
        parts.append(nothing("every caption is empty"))
    if report.flags and report.flags.rows:
        parts.append(f"<h3>Flagged: {report.flags.rows:,}</h3>")
        parts += [_flag(group) for group in report.flags.largest]
    return "".join(parts)


def _flag(group: Group) -> str:
    lines = "".join(
        f'<li><bdi dir="auto">{shown(row.get("caption") or "(empty)", 300)}</bdi> <small>{shown(row.get("id"))}</small>'
        "</li>"
        for row in group.rows
    )
    return f'<h4><b class="no">{shown(group.value, 80)}</b> {group.count:,}</h4><ul>{lines}</ul>'


def _duplicates(report: Report, pictures: _Pictures) -> str:
    groups = report.duplicates
    if groups is None:
        return ""
    if not groups.rows:
        return nothing("no two clips look the same")
    strips = report.strips.get("duplicates", {})
    told = f"<p>{groups.rows:,} clips look like another one; the largest groups, the best clip's id above each:</p>"
    parts = [told]
    for group in groups.largest:
        tiles = "".join(_tile(row, [], strips, pictures) for row in group.rows)
        more = f" <small>{len(group.rows)} of {group.count:,} shown</small>" if group.count > len(group.rows) else ""
        parts.append(f'<h3>{shown(group.value, 80)}{more}</h3><div class="tiles strips">{tiles}</div>')
    return "".join(parts)


def _rules(report: Report) -> str:
    parts = []
    for stage, rules in report.rules.items():
        lines = "".join(
            f"<tr><td><code>{shown(rule['rule'])}</code></td><td>{_cell(rule.get('threshold'))}</td>"
            + "".join(f"<td>{_cell(rule.get(key))}</td>" for key in ("dropped_alone", "dropped_in_order", "missing"))
            + "</tr>"
            for rule in rules
        )
        head = "<tr><th>rule</th><th>threshold</th><th>drops alone</th><th>dropped in order</th><th>missing</th></tr>"
        parts.append(f"<h3>{shown(stage)}</h3><table>{head}{lines}</table>")
    return "".join(parts)


def _rejects(report: Report) -> str:
    parts = []
    for name, counts in report.stages:
        ranked = counts.reasons.ranked()
        if not ranked:
            continue
        lines = "".join(
            f"<tr><td>{shown(reason.text)}</td>{_bar(reason.count, counts.rejected, f'{reason.count:,}')}"
            f"<td><small>{_examples(reason.text, reason.examples)}</small></td></tr>"
            for reason in ranked[:REASONS_SHOWN]
        )
        more = len(ranked) - REASONS_SHOWN
        rest = f'<p class="quiet">and {more:,} rarer reasons</p>' if more > 0 else ""
        anchor = slug("rejected " + name)
        head = "<tr><th>reason</th><th>rows</th><th>such as</th></tr>"
        parts.append(f'<h3 id="{anchor}">{shown(name)}: {counts.rejected:,}</h3><table>{head}{lines}</table>{rest}')
    return "".join(parts) or nothing("nothing was rejected")


def _examples(text: str, examples: Sequence[tuple[str, str]]) -> str:
    told = [shown(name, 90) + (f" ({shown(own, 120)})" if own != text else "") for name, own in examples if name or own]
    return "<br>".join(told)


# ---------------------------------------------------------------------------------------------------------------------
# Clips


class _Pictures:
    """Embeds pictures as long as the page stays small enough to open anywhere."""

    def __init__(self) -> None:
        self.left = MAX_PICTURES

    def show(self, strip: Strip | None) -> str:
        if not strip or "error" in strip:
            return nothing(f"no picture: {(strip or {}).get('error', 'no path')}")
        code = str(strip["jpeg"])
        if len(code) > self.left:
            return nothing("left out, the page would grow too large")
        self.left -= len(code)
        return f'<img src="data:image/jpeg;base64,{code}" alt="" loading="lazy">'


def _tile(row: Row, scores: Sequence[str], strips: Mapping[str, Strip], pictures: _Pictures, address: str = "") -> str:
    """One clip: its picture, a player where there is an `address`, caption, size and scores."""
    path = row.get("path")
    caption = row.get("caption") or ""
    text = f'<bdi dir="auto">{shown(caption, 240)}</bdi>' if caption else '<span class="none">no caption</span>'
    told = [_facts(row), *(f"{shown(name, 40)} {_cell(row[name], 3)}" for name in scores if row.get(name) is not None)]
    flag = f' <b class="no">{shown(row["caption_flag"], 40)}</b>' if row.get("caption_flag") else ""
    strip = strips.get(path) if isinstance(path, str) else None
    picture = pictures.show(strip)
    if address and strip and "error" not in strip and row.get("num_frames") != 1:
        picture += f'<video controls loop muted playsinline preload="metadata" src="{address}"></video>'
    small = f"<small>{' · '.join(part for part in told if part)}<br>{shown(row.get('id'), 80)}</small>"
    return f"<figure>{picture}<figcaption>{text}{flag}<br>{small}</figcaption></figure>"


def _facts(row: Row) -> str:
    frames, fps, height, width = (_number(row.get(name)) for name in ("num_frames", "fps", "height", "width"))
    parts = [f"{width:.0f}×{height:.0f}"] if height and width else []
    parts += [f"{frames / fps:.1f} s, {number(fps)} fps"] if frames and fps else []
    return " · ".join(parts)


def _thresholds(rules: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the filters' thresholds by the column they are compared with."""
    found: dict[str, list[float]] = {}
    for rule in (rule for own in rules.values() for rule in own):
        threshold, match = _number(rule.get("threshold")), COMPARED.match(rule["rule"])
        if threshold is not None and match:
            found.setdefault(match[1], []).append(threshold)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Small things


def _number(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and isinstance(value, int | float) else None


def _cell(value: object, digits: int = 4) -> str:
    known = _number(value)
    return number(known, digits) if known is not None else shown("" if value is None else value, 60)


def _bar(value: float, most: float, text: str) -> str:
    return f'<td><span class="bar" style="--share:{value / most if most else 0:.4f}">{text}</span></td>'


def _sources(count: int) -> str:
    return f"over {count:,}" if count >= SOURCES_COUNTED else f"{count:,}" if count else ""


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds, as far as they count."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours:,}:{minutes:02d}:{whole % 60:02d} h" if hours else f"{minutes}:{whole % 60:02d} min"


STYLE = """
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; } a { color: var(--accent); }
h4 { margin: .8rem 0 .2rem; font-size: .95rem; font-weight: 400; } code { font-size: .9em; overflow-wrap: anywhere; }
.funnel, .sources { width: 100%; } .funnel td:nth-child(2), .funnel td:nth-child(3) { width: 24%; }
.sources th:first-child { font-weight: 400; overflow-wrap: anywhere; } .sources td:nth-child(2) { width: 16%; }
.tiles video { width: 100%; height: 8.5rem; margin-top: .25rem; border-radius: 6px; background: #000; display: block; }
@media (max-width: 40rem) { body { padding: .8rem .5rem 3rem; } section { padding: .7rem .6rem; }
  table { font-size: .84rem; } th, td { padding-right: .45rem; } td .bar, .bar { min-width: 2.6rem; padding: 0 .2rem; }
  .funnel :is(th, td):nth-child(6) { display: none; } .sources td:last-child { min-width: 9rem; }
  .sources th:first-child { min-width: 7rem; }
  .tiles.strips { grid-template-columns: 1fr; } }
th, td { vertical-align: top; }
td { overflow-wrap: anywhere; } td .bar { min-width: 5rem; }
.tiles.strips { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem .9rem; }
.charts { display: grid; gap: 1rem 1.6rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.charts + .charts { margin-top: 1.2rem; } .charts h3 { margin: 0 0 .2rem; } .charts table { width: 100%; }
b.now { color: var(--accent); } b.before { color: var(--quiet); }
.words { display: flex; flex-wrap: wrap; gap: .2rem .9rem; list-style: none; margin: 0; padding: 0; }
bdi { unicode-bidi: isolate; }
"""
