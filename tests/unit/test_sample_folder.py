"""The folder of samples: what counts as done, what refuses, what is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.config import ConfigError
from opensora_repro.sampling.sample_folder import SampleFolder

SETTINGS: dict[str, Any] = {
    "checkpoint": "runs/a/checkpoints/step-00000020",
    "weights_sha256": "ab",
    "seed": 0,
    "num_frames": 6,
    "guidance": 7.0,
    "model": {"num_heads": 4, "patch_size": (1, 2, 2)},
}
PROMPTS = ["a red circle", "a blue square", "häßlich 円"]


def folder(path: Path, *prompts: str, gif: bool = False, **changes: Any) -> SampleFolder:
    return SampleFolder(path, {**SETTINGS, **changes}, prompts or PROMPTS, gif=gif)


def fill(path: Path, *numbers: int, suffix: str = "mp4", prompts: list[str] = PROMPTS, **changes: Any) -> None:
    path.mkdir(exist_ok=True)
    for i in numbers:
        (path / f"{i:04d}.{suffix}").write_bytes(b"video")
    folder(path, *prompts, **changes).write(numbers)


def test_an_empty_folder_has_nothing_done(tmp_path: Path) -> None:
    assert folder(tmp_path / "absent").finished() == []
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "logs").mkdir()
    assert folder(tmp_path).finished() == []


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    fill(tmp_path, 0, 2)
    record = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert record["prompts"] == PROMPTS and record["seed"] == 0
    assert record["samples"] == [{"file": f"{i:04d}.mp4", "prompt": PROMPTS[i]} for i in (0, 2)]
    assert folder(tmp_path).finished() == [0, 2]
    assert folder(tmp_path, checkpoint="elsewhere/the-same").finished() == [0, 2]  # where it lies is no setting
    (tmp_path / "0001.mp4").write_bytes(b"video")  # whole, as files appear; its process was killed before it said so
    assert folder(tmp_path).finished() == [0, 1, 2]
    (tmp_path / "0000.mp4").unlink()
    assert folder(tmp_path).finished() == [1, 2]


def test_more_prompts_or_fewer_go_on(tmp_path: Path) -> None:
    fill(tmp_path, 0, 1, 2)
    longer = folder(tmp_path, *PROMPTS, "a fourth")
    assert longer.finished() == [0, 1, 2]
    shorter = folder(tmp_path, PROMPTS[0])
    assert shorter.finished() == [0]
    shorter.write([0])
    record = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert record["prompts"] == PROMPTS and [entry["file"] for entry in record["samples"]] == [
        "0000.mp4", "0001.mp4", "0002.mp4",
    ]  # fmt: skip


def test_a_gif_is_part_of_a_sample(tmp_path: Path) -> None:
    fill(tmp_path, 0, 1, 2)
    assert folder(tmp_path, gif=True).finished() == []
    (tmp_path / "0001.gif").write_bytes(b"gif")
    assert folder(tmp_path, gif=True).finished() == [1]
    fill(tmp_path / "still", 0, suffix="png", num_frames=1)
    assert folder(tmp_path / "still", gif=True, num_frames=1).finished() == [0]


OTHERS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "seed": ({"seed": 4}, PROMPTS, "seed = 0 there, 4 here"),
    "weights": ({"weights_sha256": "cd"}, PROMPTS, "weights_sha256 = 'ab' there, 'cd' here"),
    "within": ({"model": {"num_heads": 8, "patch_size": (1, 2, 2)}}, PROMPTS, "model.num_heads = 4 there, 8 here"),
    "stills": ({"num_frames": 1}, PROMPTS, "num_frames = 6 there, 1 here"),
    "a newer setting": ({"shift": 3.0}, PROMPTS, "shift is not told there, 3.0 here"),
    "a prompt": ({}, [PROMPTS[0], "a green star"], "prompt 1 = 'a blue square' there, 'a green star' here"),
    "their order": ({}, PROMPTS[::-1], "prompt 0 = 'a red circle' there"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_samples_of_other_settings_refuse(tmp_path: Path, name: str) -> None:
    changes, prompts, message = OTHERS[name]
    fill(tmp_path, 0)
    before = (tmp_path / "samples.json").read_bytes()
    with pytest.raises(ConfigError, match="holds samples of other settings: ") as error:
        folder(tmp_path, *prompts, **changes).finished()
    assert message in str(error.value) and "--overwrite" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "samples.json").read_bytes() == before


def test_an_empty_file_is_no_sample(tmp_path: Path) -> None:
    fill(tmp_path, 0, 1)
    (tmp_path / "0000.mp4").write_bytes(b"")
    assert folder(tmp_path).finished() == [1]


@pytest.mark.parametrize("damage", [{"samples": "x"}, {"samples": [1]}, {"samples": [{}]}, {"prompts": None}])
def test_a_record_of_another_shape_refuses(tmp_path: Path, damage: dict[str, Any]) -> None:
    fill(tmp_path, 0)
    record = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    (tmp_path / "samples.json").write_text(json.dumps(record | damage))
    with pytest.raises(ConfigError, match=r"samples\.json there is not this command's; .* --overwrite"):
        folder(tmp_path).finished()


@pytest.mark.parametrize("content", [None, b"half a fi", b"[]", b"\xff\xfe", b'{"seed": 0}'])
def test_files_of_nobody_knows_what_refuse(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "0001.mp4").write_bytes(b"somebody's")
    if content is not None:
        (tmp_path / "samples.json").write_bytes(content)
    with pytest.raises(ConfigError, match="--overwrite"):
        folder(tmp_path).finished()
    folder(tmp_path).clear()
    folder(tmp_path).write([])
    assert json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))["samples"] == []


def test_clearing_takes_what_the_record_knows_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, 0, 1, 2)
    (tmp_path / "0001.gif").write_bytes(b"gif")
    (tmp_path / "mine.mp4").write_bytes(b"mine")
    (tmp_path.parent / "0000.mp4").write_bytes(b"outside")
    record = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    record["samples"] += [{"file": name} for name in ("../0000.mp4", "mine.mp4", "logs", 3)]
    (tmp_path / "samples.json").write_text(json.dumps(record))
    folder(tmp_path, seed=4).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.mp4"]
    assert (tmp_path.parent / "0000.mp4").exists()
