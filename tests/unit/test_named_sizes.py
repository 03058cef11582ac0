"""Sizes by name against the published tables, and what `stages.sample` says of names that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from opensora_repro.config import Config, ConfigError, SampleConfig
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.sampling.named_sizes import FRAMES, frames_of_seconds, named_size, parse_frames
from stages import sample


def test_ratios_find_their_rows(golden_1_2_dir: Path) -> None:
    """Every name of a ratio but 50:27, 1.85, which is published at the row of 2.08; the nearest one is 1.89."""
    golden = json.loads((golden_1_2_dir / "aspect.json").read_text(encoding="utf-8"))
    for resolution in ("144p", "240p", "480p", "720p", "4k"):
        for name, row in golden["ratio_names"].items():
            row = "1.89" if name == "50:27" else row
            assert list(named_size(resolution, name, whole=False)) == golden["tables"][resolution][row], name
    assert named_size("512", "1:1", whole=False) == (512, 512)
    assert named_size("240p", "9:16", whole=False) == (240, 426)
    assert named_size("240p", "9:16", whole=True) == (240, 424)


def test_frame_names(golden_1_2_dir: Path) -> None:
    golden = json.loads((golden_1_2_dir / "aspect.json").read_text(encoding="utf-8"))["num_frames_names"]
    assert {name: FRAMES[name] for name in golden if name in FRAMES} == {
        name: frames for name, frames in golden.items() if name in FRAMES
    }
    assert {"2s", "4s", "8s", "16s", "1x", "2x", "4x", "8x"} <= golden.keys() & FRAMES.keys()
    assert parse_frames("4s") == 102 and parse_frames("17") == 17
    with pytest.raises(ValueError, match="invalid literal"):
        parse_frames("3s")


@pytest.mark.parametrize(("seconds", "frames"), [(2, 51), (4, 102), (8, 204), (16, 408), (0.5, 17), (1 / 24, 17)])
def test_seconds_of_1_2_are_whole_chunks(seconds: float, frames: int) -> None:
    cfg = Config(sample=SampleConfig(fps=24))
    assert frames_of_seconds(cfg, STDiT3Config(), seconds) == frames
    other = round(24 * seconds)
    assert frames_of_seconds(cfg, STDiT2Config(), seconds) == other
    at_8 = replace(cfg, sample=SampleConfig(fps=8))
    assert frames_of_seconds(at_8, STDiT3Config(), seconds) == max(1, round(8 * seconds))
    assert frames_of_seconds(at_8, STDiTConfig(), seconds) == max(1, round(8 * seconds))


@pytest.mark.parametrize(
    ("resolution", "ratio", "said"),
    [
        ("481p", "9:16", "--resolution 481p: expected one of 144p, 256, 240p"),
        ("480p", "0.56", "--aspect-ratio 0.56: expected HEIGHT:WIDTH, such as 9:16"),
        ("480p", "16:0", "--aspect-ratio 16:0: expected HEIGHT:WIDTH"),
        ("480p", "1:5", "--aspect-ratio 1:5: the table of 480p has height / width from 0.38 to 2.08"),
    ],
)
def test_names_that_are_none(resolution: str, ratio: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        named_size(resolution, ratio, whole=False)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "0"], "--seconds 0: expected more than 0"),
        (["--seconds", "nan"], "--seconds nan: expected more than 0"),
        (["--seconds", "2", "--num-frames", "4s"], "--seconds and --num-frames both say how long: give one"),
        (["--num-frames", "3s"], "--num-frames 3s: expected a number, or one of 1x, 2x"),
        (["--num-frames", "0"], "--num-frames 0: expected at least 1"),
        (["--resolution", "240p", "--width", "64"], "--resolution stands for --height and --width"),
        (["--aspect-ratio", "9:16"], "--aspect-ratio 9:16: give --resolution, too"),
        (["--aesthetic", "11"], "--aesthetic 11: expected a number from 1 to 10"),
        (["--aesthetic", "high"], "--aesthetic high: expected a number from 1 to 10"),
        (["--motion", "-1"], "--motion -1: expected a number from 0 on"),
        (["--camera", " "], "--camera: expected words, such as pan left"),
    ],
)
def test_mistakes_are_seen_before_any_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    command = [str(tmp_path / "weights.pth"), "--prompt", "a cat", "--out", str(tmp_path / "out"), *options]
    assert sample.main(command) == 2
    assert said in capsys.readouterr().err
