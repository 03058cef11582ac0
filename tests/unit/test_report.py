"""The report: its numbers are those of the tables, and what is in the tables stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import Markup

from data_tools import report
from opensora_repro.data.report.markup import TEMPLATES, render, shown
from opensora_repro.data.report.rows import spread
from opensora_repro.data.report.stages import Reasons, find_stages, normal
from opensora_repro.data.report.summary import BINS, bin_edges, frequent_words, summarize
from opensora_repro.data.tables import BATCH_ROWS, open_table
from opensora_repro.data.write import write_video

VOID = {"meta", "img", "br", "path"}
TAGS = set(
    re.findall(
        r"\w+",
        "html head meta title style body header h1 h2 h3 h4 p nav a section table tr th td span small b br figure"
        " figcaption img video bdi svg path rect text ul li code div",
    )
)
NASTY = (
    "</style><script>alert(1)</script>",
    "\"' onerror='alert(1)' x=\"",
    "<img src=x onerror=alert(1)>",
    "</title></section><b>bold",
    "&lt;script&gt; &#x3c;",
    "safe\u202egnp.exe\u2066 hidden\u200b \x00\x1b[31m\x7f",
    "<!-- -->]]><![CDATA[",
    "javascript:alert(1)",
    "line\nbreak\r\n\ttab",
)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID or tag == "path":  # which is either closed in place or holds a title
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def write(folder: Path, rows: list[dict], rejects: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
    empty = pd.DataFrame({"id": [], "stage": [], "reason": []}, dtype=str)
    (pd.DataFrame(rejects) if rejects else empty).to_parquet(folder / "rejects.parquet")
    return folder


def clip(name: str, **more: object) -> dict:
    return {"id": name, "path": f"{name}.mp4", "caption": "", "num_frames": 24, "fps": 12.0, "height": 36, "width": 64,
            "source": "film.mp4", **more}  # fmt: skip


def make_page(out: Path, *inputs: Path, clips: int = 0) -> Page:
    options = ["--out", str(out), "--clips", str(clips), "--workers", "1"]
    assert report.main([*map(str, inputs), *options]) == 0
    return Page(out / "report.html")


def allowed(page: Page) -> None:
    """Nothing of the page runs, fetches or leads anywhere, whatever the tables hold."""
    assert {tag for tag, _ in page.tags} <= TAGS
    names = {name for _, attrs in page.tags for name in attrs}
    assert not [name for name in names if name.startswith("on") or name in ("srcset", "action", "background")]
    for tag, attrs in page.tags:  # pictures are in the page, clips beside it, under names that are paths alone
        form = r"(\.\./)*[\w.%/~-]+" if tag == "video" else "data:image/jpeg;base64,.*"
        assert re.fullmatch(form, attrs.get("src", "data:image/jpeg;base64," if tag != "video" else "")), attrs
    assert all(attrs.get("href", "#").startswith("#") for _, attrs in page.tags)
    assert not re.search(r"url\(|@import|://", page.source)
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    styles = [attrs["style"] for _, attrs in page.tags if "style" in attrs]
    assert all(re.fullmatch(r"--share:[01]\.\d{4}", style) for style in styles)
    hidden = re.compile("[\u202a-\u202e\u2066-\u2069\u200b\x00-\x09\x0b-\x1f\x7f\ud800-\udfff]")
    assert not hidden.search(page.source)


def test_what_others_wrote_stays_text(tmp_path: Path) -> None:
    rows = [
        clip(f"{i}{text}", caption=text, caption_flag=text, source=text, duplicate_group=text, **{f"{text}": 0.5 * i})
        for i, text in enumerate(NASTY)
    ]
    rejects = [{"id": text, "stage": text, "reason": text, "source": text} for text in NASTY]
    folder = write(tmp_path / "a <b>'\"", rows, rejects)
    rules = [{"rule": text, "threshold": text, "dropped_alone": 1, "dropped_in_order": text} for text in NASTY]
    (folder / "filter.json").write_text(json.dumps({"rules": rules}), encoding="utf-8")
    page = make_page(tmp_path / "out", folder, clips=9)
    allowed(page)
    for text in NASTY[:5]:
        assert page.text.count(text) >= 5, text
    assert "safe\\u202egnp.exe\\u2066 hidden\\u200b \\x00\\x1b[31m\\x7f" in page.text
    assert "line break tab" in page.text


def test_each_source_has_a_row_with_what_it_lost(tmp_path: Path) -> None:
    film, short, gone = "my films/a.mp4", "short.mov", "gone.mp4"
    split = write(
        tmp_path / "split",
        [clip(f"c{i}", source=film if i else short) for i in range(4)],
        [{"id": "x", "stage": "split", "source": gone, "path": "", "reason": "no video stream"}]
        + [
            {"id": f"y{i}", "stage": "split", "source": film, "path": f"y{i}.mp4", "reason": f"{i} frames"}
            for i in (1, 2)
        ],
    )
    rejects = [{"id": "c0", "stage": "filter", "source": short, "path": "c0.mp4", "reason": "motion > 0.01"}]
    kept = write(tmp_path / "filter", [clip(f"c{i}", source=film) for i in (1, 2, 3)], rejects)
    page = make_page(tmp_path / "out", split, kept)
    rows = re.findall(r"<tr><th>([^<]*)</th>(.*?)</tr>", page.source.split('class="sources"')[1].split("</table>")[0])[
        1:
    ]
    told = [[re.sub(r"<[^>]+>", " ", part).strip() for part in cells.split("</td>")] for _, cells in rows]
    assert [name for name, _ in rows] == [gone, short, film]  # those without a clip first
    assert [cells[0] for cells in told] == ["0", "0", "3"]
    assert [cells[2] for cells in told] == ["1", "1", "2"]
    assert told[1][3] == "filter: motion &gt; 0.01  1" and told[2][3] == "split: # frames  2"
    assert "3 sources, 2 of them without a clip that was kept" in page.text
    assert "my films/a.mp4 · y1.mp4" in page.text  # a reject's source and path


def test_clips_are_played_from_where_they_lie(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "filter"
    names = ["javascript:alert(1)", "a & 'b'?#%41", "视频"]
    folder.mkdir(parents=True)
    for name in names:
        write_video(folder / f"{name}.mp4", np.zeros((3, 36, 64, 3), np.uint8), fps=12)
    write(folder, [clip(name, num_frames=3) for name in names])
    page = make_page(tmp_path / "data" / "page", folder, clips=3)
    allowed(page)
    players = [attrs["src"] for tag, attrs in page.tags if tag == "video"]
    assert [(tmp_path / "data" / "page" / unquote(src)).is_file() for src in players] == [True] * 3
    assert not any(urlsplit(src).scheme or urlsplit(src).netloc for src in players)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A Parquet file may hold anything under a column of text: nothing checks it when it is read."""
    raw = pa.array([b"ok", b"\xff\xfe<b>", b"\xed\xa0\x80 lone surrogate"], pa.binary())
    table = pa.table({name: pa.Array.from_buffers(pa.string(), 3, raw.buffers()) for name in ("id", "caption", "kind")})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "manifest.parquet")
    page = make_page(tmp_path / "out", tmp_path / "in", clips=3)
    allowed(page)
    assert "\ufffd\ufffd<b>" in page.text and "lone surrogate" in page.text


def test_a_template_shows_what_is_invisible_and_allows_its_own_script_alone(tmp_path: Path) -> None:
    (tmp_path / "t.html").write_text("{{ text }}|{{ safe }}|{{ nil }}", encoding="utf-8")
    page = render(tmp_path / "t.html", text="a\u200db\u202ec \ud800 <b>\n'", safe=Markup("<i>"), nil=None)
    assert page == "a\u200db\\u202ec \\ud800 &lt;b&gt; &#39;|<i>|"
    assert shown("x" * 50, 10) == "x" * 9 + "…"
    child = "{% extends 'document.html' %}{% block script %}let a = '<&';{% endblock %}"
    (tmp_path / "t.html").write_text(child, encoding="utf-8")
    page = render(tmp_path / "t.html", title="t", plays_files=False)
    (script,) = re.findall("<script>(.*)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert script == "let a = '<&';" and f"script-src 'sha256-{digest}'" in page
    assert "script-src" not in render(TEMPLATES / "document.html", title="t", plays_files=False)


def test_counts_through_the_line(tmp_path: Path) -> None:
    first = write(
        tmp_path / "1-probe",
        [clip(str(i), source=f"{i}.mp4", num_frames=120) for i in range(4)],
        [{"id": "x", "stage": "probe", "reason": f"damaged: holds {i} of 90 frames", "source": f"bad{i}.mp4"}
         for i in range(20)] + [{"id": "y", "stage": "probe", "reason": "the file is empty", "source": "none.mp4"}],
    )  # fmt: skip
    second = write(tmp_path / "2-split", [clip(f"c{i}", source=f"{i % 3}.mp4") for i in range(9)])
    page = make_page(tmp_path / "out", first, second)
    cells = re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", page.source)
    found = {name: re.sub(r"<[^>]+>", "|", row) for name, row in cells}
    assert [part for part in found["probe"].split("|") if part][:4] == ["4", "40.0 s", "4", "21"]
    assert [part for part in found["split"].split("|") if part] == ["9", "18.0 s", "3", "0"]
    assert "9 rows, 18.0 s of video, from 3 sources; 21 rejected" in page.text
    assert "damaged: holds # of # frames" in page.text
    assert "bad0.mp4 (damaged: holds 0 of 90 frames)" in page.text


def test_reasons() -> None:
    assert normal("5 frames, --min-frames is 8") == "# frames, --min-frames is #"
    assert normal("same content as a, b.mp4") == "same content as …"
    assert normal("cannot read 'x y' in dir/film 7.webm") == "cannot read … in dir/film …"
    few = Reasons()
    few.add(pa.record_batch({"reason": ["motion > 0.5", "motion > 0.9", None], "id": ["a", "b", "c"]}))
    assert {r.text: (r.count, r.examples) for r in few.ranked()} == {
        "motion > 0.5": (1, [("a", "motion > 0.5")]),
        "motion > 0.9": (1, [("b", "motion > 0.9")]),
        "no reason given": (1, [("c", "no reason given")]),
    }
    many = Reasons()
    for start in (0, 7, 14):
        many.add(pa.record_batch({"reason": [f"{i % 20} frames" for i in range(start, start + 7)], "id": ["x"] * 7}))
    (only,) = many.ranked()
    assert (only.text, only.count, len(only.examples)) == ("# frames", 21, 3)


def test_columns_are_counted_over_all_batches(tmp_path: Path) -> None:
    """More rows than a batch holds; outliers, missing and infinite values; against numpy on the whole columns."""
    rows = BATCH_ROWS + 5000
    rng = np.random.default_rng(0)
    normal_values = rng.normal(10, 2, rows)
    normal_values[::1000] = 1e6
    holes = np.where(rng.random(rows) < 0.1, np.nan, normal_values)
    holes[7] = np.inf
    frame = pd.DataFrame({
        "id": [str(i) for i in range(rows)], "value": normal_values, "holes": holes,
        "small": rng.integers(0, 25, rows), "few": rng.integers(3, 6, rows) * 8, "fixed": 0.5, "never": np.nan,
        "kind": np.where(np.arange(rows) % 3 == 0, "a", "b"), "yes": np.arange(rows) % 2 == 0,
        "num_frames": rng.integers(8, 999, rows), "fps": 24.0, "caption": "two words", "lists": [[1]] * rows,
    })  # fmt: skip
    frame.to_parquet(tmp_path / "manifest.parquet")
    table, half = open_table(tmp_path / "manifest.parquet"), tmp_path / "half.parquet"
    frame[::2].to_parquet(half)
    seen: list[int] = []
    summary = summarize(table, seen.append, open_table(half))
    numbers = {column.name: column for column in summary.numbers}
    classes = {column.name: column for column in summary.classes}
    assert list(numbers) == ["value", "holes", "small", "num_frames", "duration"]
    assert set(classes) == {"few", "fixed", "kind", "yes", "fps", "caption, words", "caption, characters"}
    value = numbers["value"]
    assert (value.count, value.missing, value.high) == (rows, 0, 1e6)
    assert value.mean == pytest.approx(normal_values.mean())
    assert value.median == pytest.approx(np.median(normal_values), abs=0.1)
    assert value.edges[-1] < 30 and len(value.counts) == BINS
    assert (
        value.counts.tolist()
        == np.histogram(np.clip(normal_values, value.edges[0], value.edges[-1]), value.edges)[0].tolist()
    )
    assert value.before is not None and value.before.sum() == len(frame[::2])
    assert (
        numbers["holes"].count + numbers["holes"].missing
        == rows
        == numbers["holes"].counts.sum() + numbers["holes"].missing
    )
    assert numbers["small"].counts.tolist() == np.bincount(frame["small"]).tolist()
    assert numbers["duration"].high == pytest.approx(998 / 24)
    assert dict(classes["few"].counts) == {str(k): v for k, v in frame["few"].value_counts().items()}
    assert classes["kind"].counts == [("b", rows - -(-rows // 3)), ("a", -(-rows // 3))]
    assert dict(classes["yes"].counts) == {"true": -(-rows // 2), "false": rows // 2}
    assert sum(seen) == 2 * (rows + len(frame[::2]))


def test_bins_hold_what_they_should() -> None:
    assert bin_edges(2, 2, np.array([2.0])).tolist() == [1.5, 2.5]
    assert len(bin_edges(0.1, 0.1, np.array([0.1, 0.1]))) == BINS + 1
    edges = bin_edges(-1e300, 1e300, np.linspace(-1e300, 1e300, 50))
    assert np.isfinite(edges).all() and (np.diff(edges) > 0).all()


def test_filter_flags_duplicates_and_words(tmp_path: Path) -> None:
    rows = [clip(f"c{i}", motion=i / 10, caption=f"A red car and number{i} on the road") for i in range(10)]
    for i, row in enumerate(rows):
        row |= {"duplicate_group": ["c0", None][i % 2], "caption_flag": "refusal" if i == 3 else ""}
    score = write(tmp_path / "score", rows)
    kept = write(
        tmp_path / "filter", rows[5:], [{"id": f"c{i}", "stage": "filter", "reason": "motion > 0.45"} for i in range(5)]
    )
    rule = {"rule": "motion > 0.45", "threshold": 0.45, "dropped_alone": 5, "dropped_in_order": 5, "missing": 0}
    (kept / "filter.json").write_text(json.dumps({"rules": [rule]}))
    page = make_page(tmp_path / "out", score, kept)
    assert sum(tag == "path" and attrs.get("class") == "mark" for tag, attrs in page.tags) == 1
    assert {attrs["class"] for tag, attrs in page.tags if tag == "rect"} == {"now", "before"}
    assert "Flagged: 1" in page.text and "refusal 1" in page.text
    assert "5 clips look like another one" in page.text and "4 of 5 shown" in page.text
    assert "In how many of 5 captions a word occurs" in page.text and "red 5" in page.text
    assert frequent_words(["The red car's car", "a RED"], 2) == [("red", 2), ("car", 1)]


def test_clips_are_shown_and_their_pictures_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [clip(f"c{i}", caption=f"clip {i}", motion=0.25, num_frames=6) for i in range(6)]
    folder = write(tmp_path / "in", rows)
    for i in range(5):
        write_video(folder / f"c{i}.mp4", np.full((6, 36, 64, 3), 40 * i, np.uint8), 12)
    page = make_page(tmp_path / "out", folder, clips=3)
    assert re.findall(r"clip \d", page.text)[:3] == ["clip 1", "clip 3", "clip 5"]
    assert "motion 0.25" in page.text and "64×36 · 0.5 s, 12 fps" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert "no picture: no such file" in page.text
    allowed(page)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    make_page(tmp_path / "out", folder, clips=3)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert f"1 stage, 6 rows, 0 rejected: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out


def test_single_manifests_and_empty_ones(tmp_path: Path) -> None:
    pd.DataFrame([clip("a"), clip("b")]).to_csv(tmp_path / "list.csv", index=False)
    none = write(tmp_path / "none", [clip("x")][:0], [{"id": "x", "stage": "none", "reason": "all bad"}])
    page = make_page(tmp_path / "out", tmp_path / "list.csv", none)
    assert "all bad" in page.text and "0 rows; 1 rejected" in page.text
    assert [stage.name for stage in find_stages([str(none), str(none)])] == ["none", "none (2)"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    nothing = write(tmp_path / "nothing", [clip("x")][:0])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for options, message in (
        ([str(tmp_path / "gone")], "no such folder or manifest"),
        ([str(tmp_path / "empty")], "holds no manifest.parquet"),
        ([str(nothing)], "nothing to report"),
        ([str(tmp_path / "bad.parquet")], "cannot be read as parquet"),
        ([str(nothing), "--clips", "-1"], "--clips -1"),
    ):
        assert report.main([*options, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_spread() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(10, 0) == []
