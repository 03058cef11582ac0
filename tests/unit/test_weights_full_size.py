"""Full-size files in every published layout, made from the published key lists."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.load_weights import write_file
from opensora_repro.models.dit import dit_xl_2, latte_xl_2
from opensora_repro.models.stdit import pixart_ms_xl_2, pixart_xl_2, stdit_xl_2
from opensora_repro.weights.export import Grid, position_tables
from opensora_repro.weights.families import recognise
from opensora_repro.weights.files import WeightsError, open_weights
from opensora_repro.weights.load import LoadReport, check_complete, load_model_weights
from opensora_repro.weights.published import describe

# Key list, wrapper, the model it is for, its layout, and whether temporal attention must be inserted.
FILES: dict[str, tuple[str, Callable[[], Any], str, bool]] = {
    "keys_pixart_xl2_256_alpha": ("state_dict", pixart_xl_2, "PixArt-alpha", False),
    "keys_pixart_xl2_512_alpha": ("state_dict", stdit_xl_2, "PixArt-alpha", True),
    "keys_pixart_xl2_opensora_16x256": ("", pixart_xl_2, "Open-Sora PixArt", False),
    "keys_pixartms_xl2_opensora_1x1024": ("", pixart_ms_xl_2, "Open-Sora PixArt-MS", False),
    "keys_stdit_xl2_16x256x256": ("", stdit_xl_2, "Open-Sora STDiT", False),
    "keys_stdit_xl2_16x512x512": ("ema", stdit_xl_2, "Open-Sora STDiT", False),
    "keys_dit_xl2_256_fb": ("", dit_xl_2, "DiT", False),
    "keys_dit_xl2_opensora_label": ("", dit_xl_2, "Open-Sora DiT or Latte", False),
    "keys_latte_xl2_ucf101_vchitect": ("ema", lambda: latte_xl_2(num_classes=101), "Latte", False),
    "keys_latte_xl2_opensora_label101": ("", lambda: latte_xl_2(num_classes=101), "Open-Sora DiT or Latte", False),
}


def published_shapes(golden_dir: Path, name: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((golden_dir / f"{name}.json").read_text())["shapes"]
    return shapes


def write_repeated(path: Path, shapes: dict[str, list[int]], wrapper: str) -> dict[str, float]:
    """A file of full-size tensors that each repeat one number, stored once; returns the numbers."""
    numbers = {key: (number % 1000) / 1000 for number, key in enumerate(shapes)}
    tensors = {key: torch.tensor(numbers[key]).expand(shape) for key, shape in shapes.items()}
    torch.save({wrapper: tensors} if wrapper else tensors, path)
    return numbers


@pytest.mark.parametrize("name", FILES)
def test_full_size_layouts_fit(golden_dir: Path, tmp_path: Path, name: str) -> None:
    wrapper, build, layout, _ = FILES[name]
    write_repeated(tmp_path / "weights", published_shapes(golden_dir, name), wrapper)
    with torch.device("meta"):
        cfg = build().cfg
    file = open_weights(tmp_path / "weights")
    assert (recognise(file.tensors, name).title, file.wrapper) == (layout, wrapper)
    check_complete(file, cfg)
    with pytest.raises(WeightsError, match="are unknown"):
        check_complete(file, replace(cfg, depth=27))


LARGEST = [
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ("keys_pixart_xl2_512_alpha", "keys_dit_xl2_256_fb")
]


@pytest.mark.parametrize("name", ["keys_stdit_xl2_16x512x512", *LARGEST])
def test_full_size_files_load(golden_dir: Path, tmp_path: Path, name: str) -> None:
    wrapper, build, layout, inserts = FILES[name]
    numbers = write_repeated(tmp_path / "weights", published_shapes(golden_dir, name), wrapper)
    with torch.device("meta"):
        model = build()
    report: LoadReport = load_model_weights(model, tmp_path / "weights")
    assert (report.layout, report.wrapper) == (layout, wrapper)
    inserted = [key for key in model.state_dict() if ".attn_temp." in key] if inserts else []
    assert list(report.inserted) == inserted and len(inserted) in (0, 112)
    for key, value in model.state_dict().items():
        if key not in inserted:
            assert_filled(key, value, numbers[key])


def assert_filled(key: str, value: Tensor, number: float) -> None:
    flat = value.flatten()
    assert flat[0] == flat[-1] == torch.tensor(number), key
    assert flat[:: max(1, flat.numel() // 97)].eq(number).all(), key


@pytest.mark.parametrize("name", [name for name in FILES if name != "keys_pixart_xl2_512_alpha"])
def test_a_bare_file_tells_its_model(golden_dir: Path, tmp_path: Path, name: str) -> None:
    """With the tables that published files carry, the size, the scales and DiT or Latte are read off the file."""
    wrapper, build, _, _ = FILES[name]
    with torch.device("meta"):
        expected = build().cfg
    shapes = published_shapes(golden_dir, name)
    tensors = {key: torch.tensor(0.5).expand(shape) for key, shape in shapes.items()}
    rows = round(shapes.get("pos_embed", shapes.get("pos_embed_spatial"))[1] ** 0.5)  # type: ignore[index]
    frames = shapes.get("pos_embed_temporal", shapes.get("temp_embed", [1, 1, 1]))[1]
    tables = position_tables(expected, Grid(frames, rows, rows))
    for table, names in (("spatial", ("pos_embed", "pos_embed_spatial")), ("", ("pos_embed_temporal", "temp_embed"))):
        values = next(value for key, value in tables.items() if ("temporal" in key) == (not table))
        tensors |= {key: values for key in names if key in shapes}
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "weights")
    family = "latte" if name == "keys_latte_xl2_opensora_label101" else None
    found = describe(open_weights(tmp_path / "weights"), family=family)
    assert found.model == expected
    assert (found.config.data.height, found.config.data.width) == (rows * 16, rows * 16)
    assert found.config.data.num_frames == frames


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["pixart", "stdit2", "stdit3"])
def test_loading_needs_little_more_memory_than_the_model(tmp_path: Path, repo_dir: Path, layout: str) -> None:
    """STDiT-XL/2 from a PixArt-XL/2 .pth, and 1.1's and 1.2's as released, in float32, in a process of its own."""
    write_file(tmp_path / "weights", layout)
    command = [sys.executable, "-m", "benchmarks.load_weights", "--side", "ours", "--layout", layout]
    command += ["--file", str(tmp_path / "weights")]
    done = subprocess.run(command, cwd=repo_dir, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    (tmp_path / "weights").unlink()
    assert result["bytes"] > 3.0e9
    assert result["peak_bytes"] <= 1.3 * result["bytes"]
