"""`python -m stages.sample` on published files of every layout, with tiny frozen models: pixels and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opensora_repro.models.config import STDiTConfig
from opensora_repro.weights.files import NULL_CAPTION_FILE
from stages.sample import main
from tests.published_files import PUBLISHED, publish
from tests.sample_home import PROMPTS, check_mistake, decode


@pytest.fixture(scope="module")
def published(home: Path) -> Path:
    """A folder with weights of every published layout, for the text encoder of `home`."""
    for name, cfg in PUBLISHED.items():
        publish(home / "published", name, **({"caption_channels": 64} if isinstance(cfg, STDiTConfig) else {}))
    return home / "published"


def words(home: Path, name: str) -> list[str]:
    """The options that tiny weights need: what the published ones say by their width, and small frozen models."""
    options = ["--vae", str(home / "vae"), "--text", str(home / "text"), "--height", "32", "--width", "32"]
    options += ["--steps", "3", "--dtype", "fp32", "--device", "cpu", "--seed", "3"]
    return options + (["--num-heads", "4"] if "." in name else [])


def sample_published(home: Path, source: Path, out: Path, *args: str, condition: tuple[str, ...]) -> np.ndarray:
    """The one sample's frames [T, H, W, 3]."""
    assert main([str(source), *condition, "--out", str(out), *words(home, source.name), *args]) == 0
    (name,) = {path.name for path in out.iterdir()} - {"samples.json"}
    if name == "0000.mp4":
        return decode(out / name)
    assert name == "0000.png"
    return np.asarray(Image.open(out / name))[None].astype(int)


TEXT, LABEL = ("--prompt", PROMPTS[0]), ("--label", "7")
# name -> its condition, the number of frames of a sample, and the release's sampler, steps and guidance
RELEASES = {
    "pixart.pth": (TEXT, 1, ("dpm", 20, 4.5)),
    "pixart-ms.pth": (TEXT, 1, ("dpm", 20, 4.5)),
    "stdit.pth": (TEXT, 6, ("iddpm", 100, 7.0)),
    "dit.pt": (LABEL, 1, ("iddpm", 250, 4.0)),
    "latte.pt": (LABEL, 6, ("iddpm", 250, 7.0)),
    "diffusers-pixart": (TEXT, 1, ("dpm", 20, 4.5)),
    "diffusers-dit": (LABEL, 1, ("iddpm", 250, 4.0)),
}


@pytest.mark.parametrize("name", RELEASES)
def test_published_weights(home: Path, published: Path, tmp_path: Path, name: str) -> None:
    condition, frames, (sampler, _, guidance) = RELEASES[name]
    first = sample_published(home, published / name, tmp_path / "a", condition=condition)
    assert first.shape == (frames, 32, 32, 3)
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    expected = {"checkpoint": str(published / name), "seed": 3, "sampler": sampler, "steps": 3, "guidance": guidance}
    assert {key: record[key] for key in expected} == expected
    assert record["samples"] == [{"file": f"0000.{'png' if frames == 1 else 'mp4'}", "prompt": condition[1]}]

    again = sample_published(home, published / name, tmp_path / "b", condition=condition)
    assert np.array_equal(first, again)
    other = ("--label", "2") if condition is LABEL else ("--prompt", PROMPTS[1])
    weights = publish(tmp_path / "other", name, seed=1, **({"caption_channels": 64} if condition is TEXT else {}))
    changes = [
        (published / name, ("--seed", "4"), condition),
        (published / name, (), other),
        (weights, (), condition),
    ]
    for number, (source, args, asked) in enumerate(changes):
        changed = sample_published(home, source, tmp_path / f"c{number}", *args, condition=asked)
        assert np.abs(changed - first).max() > 8, (source, args, asked)


def test_weights_of_our_own_in_another_layout_make_the_same_pixels(home: Path, tmp_path: Path) -> None:
    from stages.weights import main as convert

    out = tmp_path / "flat"
    assert convert(["convert", str(home / "iddpm"), "--to", "safetensors", "--out", str(out)]) == 0
    frames = ["--num-frames", "4", "--sampler", "dpm", "--guidance", "2"]
    before = sample_published(home, home / "iddpm", tmp_path / "a", *frames, condition=TEXT)
    after = sample_published(home, out, tmp_path / "b", *frames, condition=TEXT)
    assert np.array_equal(before, after)


def test_without_a_null_caption_the_empty_text_is_taken(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opensora_repro.config import TextConfig
    from opensora_repro.frozen.text import open_text_encoder

    found = sample_published(home, published / "diffusers-pixart", tmp_path / "a", condition=TEXT)
    assert "no null caption in them: the empty text is encoded instead" in capsys.readouterr().out

    folder = tmp_path / "complete"
    shutil.copytree(published / "diffusers-pixart", folder)
    text = open_text_encoder(TextConfig(path=str(home / "text")), 120, "cpu", torch.float32)
    for caption, same in (("", True), ("a red circle", False)):
        encoded, _ = text.encode([caption])
        save_file({"y_embedder.y_embedding": encoded[0]}, folder / NULL_CAPTION_FILE)
        with_caption = sample_published(home, folder, tmp_path / f"b{same}", condition=TEXT)
        assert "no null caption" not in capsys.readouterr().out
        assert np.array_equal(found, with_caption) == same
    unguided = [
        sample_published(home, source, tmp_path / f"c{i}", "--guidance", "1", condition=TEXT)
        for i, source in enumerate((published / "diffusers-pixart", folder))
    ]
    assert np.array_equal(*unguided)  # which needs no null caption


def test_a_text_conditioned_dit_reads_clip(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.unit.test_conditions import CHANNELS, make_tiny_clip

    clip = make_tiny_clip(tmp_path / "clip")
    path = publish(tmp_path, "dit.pt", condition="text", caption_channels=CHANNELS)
    args = ("--text", str(clip), "--guidance", "100")  # so tiny a model hardly minds its prompt
    images = [
        sample_published(home, path, tmp_path / f"{i}", *args, condition=("--prompt", prompt))
        for i, prompt in enumerate(("red", "red", "a blue square"))
    ]
    assert np.array_equal(images[0], images[1]) and np.abs(images[0] - images[2]).max() > 8
    check_mistake([str(path), "--label", "1", *words(home, path.name)], "conditioned on text", tmp_path, capsys)
    check_mistake([str(path), *TEXT, *words(home, path.name)], "cannot be loaded as a", tmp_path, capsys)


@pytest.mark.parametrize("name", RELEASES)
def test_dry_run_of_published_weights(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    condition, frames, (sampler, steps, guidance) = RELEASES[name]
    options = ["--vae", str(home / "vae"), "--text", str(home / "text"), "--device", "cpu", "--dry-run"]
    options += ["--num-heads", "4"] if "." in name else []
    assert main([str(published / name), *condition, "--out", str(tmp_path / "out"), *options]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["checkpoint"] == str(published / name) and shown["prompts"] == "1"
    assert (shown["num_frames"], shown["height"], shown["width"]) == (str(frames), "64", "64")
    assert (shown["sampler"], shown["steps"], float(shown["guidance"])) == (sampler, str(steps), guidance)
    assert int(shown["parameters"].replace(",", "")) > 100_000
    assert not (tmp_path / "out").exists()


CONDITIONS = {
    "a label for a text model": ("pixart.pth", ("--label", "7"), "pixart.pth is conditioned on text, give --prompt"),
    "a label for a video model": ("stdit.pth", ("--label", "7"), "stdit.pth is conditioned on text, give --prompt"),
    "words for a class model": ("dit.pt", ("--prompt", "a cat"), "prompt 'a cat': expected a class number, 0 to 9"),
    "words for Latte": ("latte.pt", ("--prompt", "a cat"), "prompt 'a cat': expected a class number, 0 to 9"),
    "T5 spread where there is none": ("dit.pt", ("--label", "7", "--shard-text"), "dit.pt has no T5 that could"),
    "one class too many": ("dit.pt", ("--label", "10"), "prompt '10': expected a class number, 0 to 9"),
    "a negative class": ("dit.pt", ("--label=-1",), "prompt '-1': expected a class number, 0 to 9"),
    "no class": ("diffusers-dit", ("--label", ""), "--label: prompt 1 is empty"),
    "no number": ("diffusers-dit", ("--label", "cat"), "prompt 'cat': expected a class number, 0 to 9"),
    "one of several": ("latte.pt", ("--label", "1", "--label", "99"), "prompt '99': expected a class number, 0 to 9"),
    "not square": ("dit.pt", ("--label", "1", "--width", "48"), "must be equal: DiT and Latte make squares alone"),
    "led away": ("dit.pt", ("--label", "1", "--negative", "grey"), "is conditioned on a class, it reads no text"),
    "other heads": ("pixart.pth", ("--prompt", "x", "--num-heads", "5"), "cannot be shared among 5 attention heads"),
    "euler": ("dit.pt", ("--label", "1", "--sampler", "euler"), "this iddpm model needs iddpm, ddim or dpm"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_mistakes_with_published_weights(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source, args, message = CONDITIONS[name]
    check_mistake([str(published / source), *words(home, source), *args], message, tmp_path, capsys)


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_published_weights_of_an_unknown_width(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: list[str]
) -> None:
    args = [str(published / "stdit.pth"), "--prompt", "x", *dry_run]
    check_mistake(args, "its 48 channels have: give them with --num-heads", tmp_path, capsys)


def test_damaged_published_weights(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (published / "pixart.pth").read_bytes()
    path = tmp_path / "pixart.pth"
    path.write_bytes(content[:-5000])
    check_mistake([str(path), *TEXT, *words(home, path.name)], "pixart.pth: damaged or cut off", tmp_path, capsys)
    weights = torch.load(published / "pixart.pth", weights_only=True)
    del weights["state_dict"]["blocks.1.mlp.fc2.bias"]
    torch.save(weights, path)
    check_mistake([str(path), *TEXT, *words(home, path.name)], "first blocks.1.mlp.fc2.bias", tmp_path, capsys)
