"""Every example does what it says."""

from __future__ import annotations

import ast
import json
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from opensora_repro.data.tables import open_table
from opensora_repro.data.write import write_png, write_video
from tests.sample_home import make_home

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(manifest: Path) -> list[dict[str, Any]]:
    return [row for batch in open_table(manifest).batches() for row in batch.to_pylist()]


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "picture_manifest.py", "colourfulness.py", "sample.ipynb",
    }  # fmt: skip


def test_a_folder_of_pictures_becomes_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from opensora_repro.data.manifest import read_manifest

    main, pictures, manifest = load("picture_manifest").main, tmp_path / "pictures", tmp_path / "data/manifest.parquet"
    assert main([str(pictures), str(manifest)]) == 2
    assert capsys.readouterr().err == f"error: {pictures}: no pictures in this folder\n"
    (pictures / "more").mkdir(parents=True)
    for name in ("a", "more/b"):
        write_png(pictures / f"{name}.png", np.full((24, 32, 3), 90, dtype=np.uint8))
        (pictures / f"{name}.txt").write_text(f"picture {name}\n")
    assert main([str(pictures), str(manifest)]) == 0
    assert len(read_manifest(manifest)) == 2
    size = {"num_frames": 1, "fps": 0.0, "height": 24, "width": 32}
    assert rows_of(manifest)[1] == {
        "id": "more/b.png", "path": "../pictures/more/b.png", "caption": "picture more/b", **size
    }  # fmt: skip
    (pictures / "a.txt").unlink()
    assert main([str(pictures), str(manifest)]) == 2
    assert capsys.readouterr().err == f"error: {pictures / 'a.txt'}: No such file or directory\n"
    (pictures / "a.txt").write_text("picture a\n")
    (pictures / "a.png").write_bytes(b"")
    assert main([str(pictures), str(manifest)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {pictures / 'a.png'}: ")


def test_a_dataset_tool_in_forty_lines(tmp_path: Path) -> None:
    _, _, code = (EXAMPLES / "colourfulness.py").read_text(encoding="utf-8").split('"""', 2)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    picture = np.full((6, 32, 32, 3), 128, dtype=np.uint8)
    write_video(videos / "grey.mp4", picture, 8)
    picture[:, :, :16], picture[:, :, 16:] = (255, 0, 0), (0, 0, 255)
    write_video(videos / "colours.mp4", picture, 8)
    main = load("colourfulness").main
    assert main([str(videos), "--out", str(out)]) == 0
    found = {Path(row["path"]).name: row for row in rows_of(out / "manifest.parquet")}
    assert found["grey.mp4"]["colourfulness"] < 5 < 100 < found["colours.mp4"]["colourfulness"]
    assert (out / found["grey.mp4"]["path"]).is_file()
    (videos / "grey.mp4").unlink()
    again = tmp_path / "again"
    assert main([str(out / "manifest.parquet"), "--out", str(again)]) == 0
    (rejected,) = rows_of(again / "rejects.parquet")
    assert (rejected["id"], rejected["stage"]) == (found["grey.mp4"]["id"], "colourfulness")


def run_notebook(path: Path, settings: dict[str, Any]) -> list[Any]:
    """The values that the code cells show, run in order; `settings` take the place of its parameters."""
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        *before, last = ast.parse("".join(cell["source"])).body
        if not isinstance(last, ast.Expr):
            before.append(last)
        exec(compile(ast.Module(before, []), path.name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
        if "parameters" in cell["metadata"].get("tags", ()):
            assert settings.keys() <= names.keys()
            names.update(settings)
    return shown


def test_the_notebook_samples_and_shows_videos(tmp_path: Path) -> None:
    make_home(tmp_path)
    prompts = ["a red <b>circle</b>", "a blue square"]
    settings = {"source": str(tmp_path / "flow"), "out": str(tmp_path / "out"), "prompts": prompts}
    (gallery,) = run_notebook(EXAMPLES / "sample.ipynb", {**settings, "options": ["--device", "cpu"]})
    page = gallery._repr_html_()
    assert page.count("<video") == 2 == page.count("data:video/mp4;base64,")
    assert "a red &lt;b&gt;circle&lt;/b&gt;" in page and "a blue square" in page
    assert not any(cell.get("outputs") for cell in json.loads((EXAMPLES / "sample.ipynb").read_text())["cells"])
