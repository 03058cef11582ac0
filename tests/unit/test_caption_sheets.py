"""Captions typed into a spreadsheet: the list to fill in, what spreadsheets make of it, and rows that are told."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from data_tools import caption
from opensora_repro.data.caption.join import captions_of
from opensora_repro.errors import DataError
from tests.frames import read_table, write_manifest

NAMES = ["12345678901234e5", "=sum", "c"]
TYPED = ["Ein Süßer, der läuft; schnell", 'She says "hi"', "=a dog\nin two lines"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [{"id": name, "path": str(tmp_path / "clips" / f"{at}.mp4"), "caption": "", "num_frames": 20, "fps": 10.0,
             "height": 48, "width": 64, "source": "-walk.mp4" if at < 2 else "b.mp4", "start_time": 2.0 * at,
             "end_time": 2.0 * at + 2}
            for at, name in enumerate(NAMES)]  # fmt: skip
    write_manifest(pd.DataFrame(rows), tmp_path / "split" / "manifest.parquet")
    return tmp_path / "split" / "manifest.parquet"


def template_of(manifest: Path, path: Path) -> list[list[str]]:
    assert caption.main([str(manifest), "--template", str(path)]) == 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def test_the_template_comes_back_however_it_is_saved(manifest: Path, tmp_path: Path) -> None:
    header, *rows = template_of(manifest, tmp_path / "t.csv")
    assert header == ["id", "path", "source", "shows", "caption"]
    assert rows[0] == [NAMES[0], "clips/0.mp4", "'-walk.mp4", "0:00:00.0 to 0:00:02.0, 64x48", ""]
    assert not any(field.startswith(("=", "-", "+", "@")) for row in rows for field in row)  # no formulas
    for row, text in zip(rows, TYPED, strict=True):
        row[-1] = text
    rows[0][0] = "1.23E+19"  # what a spreadsheet takes the id for; the path is still there
    rows += [["", "", "", "", ""], [" "]]
    expected = [TYPED[0], TYPED[1], "=a dog in two lines"]
    clips = pd.read_parquet(manifest).assign(path=lambda f: [str(tmp_path / "clips" / f"{n}.mp4") for n in range(3)])
    for delimiter in ",;\t":
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            for ending in ("\r\n", "\n", "\r"):
                with open(tmp_path / "filled.csv", "w", encoding=encoding, newline="") as file:
                    quoting = csv.QUOTE_ALL if ending == "\r" else csv.QUOTE_MINIMAL
                    writer = csv.writer(file, delimiter=delimiter, lineterminator=ending, quoting=quoting)
                    writer.writerows([header, *rows])
                found = captions_of(tmp_path / "filled.csv", clips.to_dict("records"))
                assert [(c.text, c.reason) for c in found] == [(text, "") for text in expected]
    (tmp_path / "filled.csv").write_text("sep=;\r\nSource;Caption\r\nb.mp4;typed, by hand\r\n")
    assert [*captions_of(tmp_path / "filled.csv", clips.to_dict("records"))][2].text == "typed, by hand"


def test_a_template_is_not_written_over_and_captions_that_are_there_stay(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template_of(manifest, tmp_path / "t.csv")
    assert "3 clips, 3 without a caption" in capsys.readouterr().out
    before = (tmp_path / "t.csv").read_bytes()
    for options, reason in (
        ([str(manifest), "--template", str(tmp_path / "t.csv")], "is there already, perhaps filled in"),
        ([str(manifest), "--template", str(tmp_path / "t.xlsx")], "expected the name of a .csv file"),
        ([str(manifest), "--template", str(tmp_path / "u.csv"), "--sidecar", "x"], "--template and --sidecar"),
        ([str(tmp_path), "--template", str(tmp_path / "u.csv")], "add --out DIR"),
        ([str(manifest), "--sidecar", "x"], "--out DIR is missing"),
    ):
        assert caption.main(options) == 2
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1
    assert (tmp_path / "t.csv").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["split", "t.csv"]
    frame = read_table(manifest).assign(caption=["=one", "", "three"])
    write_manifest(frame, tmp_path / "split" / "more.parquet")
    assert [row[-1] for row in template_of(tmp_path / "split" / "more.parquet", tmp_path / "v.csv")[1:]] == [
        "'=one", "", "three"
    ]  # fmt: skip
    assert next(iter(captions_of(tmp_path / "v.csv", frame.to_dict("records")))).text == "=one"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("c,fine\nb,a dog, a cat\n", r"row 2 \(line 3\): 3 fields, the header has 2: put a caption with commas"),
        ('"c","two\nlines"\nb\n', r"row 2 \(line 4\): 1 field, the header has 2: caption is missing"),
        ('c,"a \\"red\\" car"\n', r"row 1 \(line 2\): quotes are escaped by backslashes"),
        ('c,fine\nb,"the end \\""\na,"x"\n', r"row 2 \(line 3\): quotes are escaped by backslashes"),
        ('c,a \\"red\\" car\n', r"row 1 \(line 2\): quotes are escaped by backslashes"),
        ('c,"Hello" she says\n', r"row 1 \(line 2\): a quote is not closed or text follows it"),
        ('c,x\nb,"never closed\nd,y\n', r"row 2 \(line 3\): a quote is not closed"),
        ("c,S\xfc\xdfer\n".encode("cp1252"), r"line 2 is no UTF-8 text; save it as CSV UTF-8"),
        ("c,x\n".encode("utf-16-le"), "is no UTF-8 text; save it as CSV UTF-8"),
        (b"PK\x03\x04", "is a spreadsheet or an archive"),
    ],
)
def test_rows_that_would_shift_or_swallow_fields(tmp_path: Path, content: str | bytes, reason: str) -> None:
    header = b"" if content[:2] == b"PK" else b"id,caption\n"
    data = header + (content.encode() if isinstance(content, str) else content)
    (tmp_path / "l.csv").write_bytes(data)
    with pytest.raises(DataError, match=reason) as raised:
        captions_of(tmp_path / "l.csv", [])
    assert "\n" not in str(raised.value)


def test_fields_that_look_wrong_and_are_not(tmp_path: Path) -> None:
    rows = ['c,"C:\\dir\\",x', 'd,"he said ""hi""",x', 'e, "a, b"', "f,it's 5\" wide,,,", 'g,"back\\""slash"']
    (tmp_path / "l.csv").write_text("id,caption,more\n" + "\n".join(rows) + "\n")
    clips = [{"id": name, "path": f"/{name}.x"} for name in "cdefg"]
    found = [c.text for c in captions_of(tmp_path / "l.csv", clips)]
    assert found == ["C:\\dir\\", 'he said "hi"', "a, b", "it's 5\" wide", 'back\\"slash']


def test_a_manifests_rows_are_looked_at_too(tmp_path: Path) -> None:
    """The first row's extra field would make pandas take the first column for an index."""
    header = "id,path,caption,num_frames,fps,height,width\n"
    (tmp_path / "m.csv").write_text(header + "a,a.mp4,a dog, a cat,8,8,16,16\n")
    with pytest.raises(DataError, match=r"row 1 \(line 2\): 8 fields, the header has 7"):
        read_table(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text(header + 'a,a.mp4,"a \\"red\\" dog",8,8,16,16\n')
    with pytest.raises(DataError, match=r"row 1 \(line 2\): quotes are escaped by backslashes"):
        read_table(tmp_path / "m.csv")
