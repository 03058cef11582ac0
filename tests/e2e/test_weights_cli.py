"""`python -m stages.weights` on tiny files of every published layout: what it says, writes and refuses."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_repro.config import Config, DiffusionConfig, dump_toml
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.sampling.source import find_source
from opensora_repro.weights.catalog import load_catalog
from opensora_repro.weights.families import empty_model
from opensora_repro.weights.load import load_model_weights
from stages.weights import main
from tests.published_files import FRAMES, HEADS, PUBLISHED, ROWS, VIDEO, make_model, position_tables, publish

WITH_HEADS = ("--num-heads", str(HEADS))


def is_bare(name: str) -> bool:
    """Whether only tensors are in it: nothing tells the number of heads."""
    return "." in name


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def refused(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    capsys.readouterr()
    assert run(*args) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and captured.out == ""
    return line


# ---------------------------------------------------------------------------------------------------------------------
# list and inspect


def test_list_as_a_command(repo_dir: Path) -> None:
    command = [sys.executable, "-m", "stages.weights", "list"]
    done = subprocess.run(command, cwd=repo_dir, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for entry in load_catalog():
        (line,) = [line for line in lines if line.split()[0:1] == [entry.name]]
        assert f"  {entry.licence}" in line and entry.about in line and " GB " in line
    assert lines[-1] == "fetch one: python -m stages.weights fetch NAME"


def inspected(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[dict[str, str], dict[str, str], str]:
    """(facts, the model's config, the commands that it recommends)."""
    capsys.readouterr()
    assert run("inspect", *args) == 0
    out = capsys.readouterr().out
    facts = dict(re.findall(r"^ *(file|layout|tensors|tables|made at|samples)  (.+)$", out, re.MULTILINE))
    model = dict(re.findall(r"^ *model\.(\w+) = (.+)$", out, re.MULTILINE))
    return facts, model, out[out.index("sample it:") :]


# name -> layout, tables, what it was made at, how it samples, and whether stages train from it
INSPECTED = {
    "pixart.pth": (
        "PixArt-alpha (torch, under 'state_dict')", "pos_embed", "4x4 places", "1 frame(s), 64x64; dpm, 20", True
    ),
    "pixart-ms.pth": (  # STDiT2
        "PixArt-alpha 1024-MS (torch, under 'state_dict')", "pos_embed", "4x4 places", "1 frame(s), 64x64; dpm", True
    ),
    "stdit.pth": (
        "Open-Sora STDiT (torch)", "pos_embed", "4x4 places and 6 frames", "6 frame(s), 64x64; iddpm, 100", True
    ),
    "dit.pt": ("DiT (torch)", "pos_embed", "4x4 places", "1 frame(s), 64x64; iddpm, 250", False),
    "latte.pt": (
        "Latte (torch, under 'ema')", "pos_embed", "4x4 places and 6 frames", "6 frame(s), 64x64; iddpm, 250", False
    ),
    "diffusers-pixart": ("diffusers PixArt (safetensors)", "none", "not told", "1 frame(s), 64x64; dpm", True),
    "diffusers-dit": ("diffusers DiT (safetensors)", "none", "not told", "1 frame(s), 64x64; iddpm", False),
    "checkpoint": ("Open-Sora STDiT (safetensors)", "none", "not told", "6 frame(s), 64x64; iddpm, 100", True),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, cfg = publish(tmp_path, name), PUBLISHED[name]
    facts, model, commands = inspected(capsys, path, *(WITH_HEADS if is_bare(name) else ()))
    layout, tables, made_at, samples, trains = INSPECTED[name]
    assert facts["layout"] == layout and facts["tables"].startswith(tables)
    assert facts["made at"].startswith(made_at) and facts["samples"].startswith(samples)
    count = len(make_model(cfg).state_dict()) - (name == "diffusers-pixart")  # which has no null caption
    assert facts["tensors"].startswith(f"{count}, ") and facts["tensors"].endswith(" elements, float32")
    told = ["in_channels", "patch_size", "hidden_size", "depth", "num_heads", "pred_sigma"]
    if isinstance(cfg, STDiTConfig):
        told += ["caption_channels", "temporal_attention", "size_conditioning", "space_scale"]
    else:
        told += ["condition", "num_classes", "factorised"]
    assert {key: model[key] for key in told} == {key: str(getattr(cfg, key)) for key in told}

    prompt = '--prompt "your text"' if isinstance(cfg, STDiTConfig) else "--label 0"
    heads = "--num-heads 4 " if is_bare(name) else ""
    assert commands.startswith(f"sample it: python -m stages.sample {path} {heads}{prompt} --out OUT --seed 0\n")
    assert (f"train from it: init.weights={path}" in commands) == trains
    other = {"pixart-ms.pth": "stdit2", "pixart.pth": "stdit3", "diffusers-pixart": "stdit3"}.get(name, "none")
    assert (f"init.weights={path} with model.architecture={other}\n" in commands) == (other != "none")


def test_inspect_reads_scales_and_sizes_off_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "stdit.pth", space_scale=0.5, time_scale=2 / 3)
    facts, model, _ = inspected(capsys, path, *WITH_HEADS)
    assert model["space_scale"] == "0.5" and float(model["time_scale"]) == 2 / 3
    assert facts["tables"] == f"pos_embed [1, {ROWS**2}, 48], pos_embed_temporal [1, {FRAMES}, 48]"
    other = publish(tmp_path / "other", "stdit.pth", space_scale=1.0, time_scale=1.0)
    _, model, _ = inspected(capsys, other, *WITH_HEADS)
    assert (model["space_scale"], model["time_scale"]) == ("1.0", "1.0")


def test_inspect_takes_the_average_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path / "with space", "checkpoint")
    facts, _, commands = inspected(capsys, path)
    assert facts["file"] == str(path / "ema.safetensors") and f"'{path}'" in commands
    facts, _, _ = inspected(capsys, path, "--no-ema")
    assert facts["file"] == str(path / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if is_bare(name)])
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_an_unknown_width_asks_for_the_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    args = [command, publish(tmp_path, name)]
    if command == "convert":
        args += ["--to", "safetensors", "--out", tmp_path / "out"]
    line = refused(capsys, *args)
    assert f"{name}: " in line and "its 48 channels" in line and line.endswith("--num-heads")
    assert run(*args, *WITH_HEADS) == 0
    for heads in (5, 0, -4):
        out = ["--out", tmp_path / "other"] if command == "convert" else []
        assert f"48 channels cannot be shared among {heads}" in refused(capsys, *args, *out, "--num-heads", heads)


def test_other_heads_than_the_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "diffusers-pixart")
    assert "--num-heads 6: " in refused(capsys, "inspect", path, "--num-heads", 6)


def test_open_soras_dit_and_latte_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "latte.pt")
    assert run("convert", path, *WITH_HEADS, "--to", "opensora", "--out", tmp_path / "latte.pth") == 0
    assert "say which with --family" in refused(capsys, "inspect", tmp_path / "latte.pth", *WITH_HEADS)
    for family, factorised in (("latte", "True"), ("dit", "False")):
        _, model, commands = inspected(capsys, tmp_path / "latte.pth", *WITH_HEADS, "--family", family)
        assert model["factorised"] == factorised and f"--family {family} --label 0" in commands


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_what_is_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    more = ["--to", "safetensors", "--out", tmp_path / "out"] if command == "convert" else []
    (tmp_path / "text.pth").write_text("some words\n")
    assert "text.pth: is neither a torch nor a" in refused(capsys, command, tmp_path / "text.pth", *more)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    assert "these are not PixArt, STDiT, DiT or Latte" in refused(capsys, command, tmp_path / "resnet.pth", *more)
    assert "none.pth: no such weights file, checkpoint or run" in refused(capsys, command, tmp_path / "none.pth", *more)
    several = refused(capsys, command, tmp_path, *more)
    assert "2 weights files in this folder (resnet.pth, text.pth): name one of them" in several
    (tmp_path / "empty").mkdir()
    assert "no weights in this folder" in refused(capsys, command, tmp_path / "empty", *more)
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_was_taken_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "stdit.pth")
    weights = torch.load(path, weights_only=True)
    torch.save({"module": {f"module._orig_mod.{key}": value for key, value in weights.items()}}, path)
    assert run("inspect", path, *WITH_HEADS) == 0
    out = capsys.readouterr().out
    assert "layout  Open-Sora STDiT (torch, under 'module')" in out
    assert "names  module. and _orig_mod. taken off the names" in out


# ---------------------------------------------------------------------------------------------------------------------
# verify


def test_verify_compares_a_checkpoint_with_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish(tmp_path, "checkpoint")
    digest = hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps({"sha256": {"ema.safetensors": digest}}))
    assert run("verify", folder) == 0
    (folder / "state.json").write_text(json.dumps({"sha256": {"ema.safetensors": digest[::-1]}}))
    for command in (["verify"], ["convert", "--to", "opensora", "--out", tmp_path / "out.pth"]):
        assert "damaged or changed since it was written" in refused(capsys, *command, folder)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_verify_reads_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = publish(tmp_path, name)
    assert run("verify", path, *WITH_HEADS) == 0
    *hashes, last = capsys.readouterr().out.splitlines()
    file = {"checkpoint": path / "ema.safetensors"}.get(name, path)
    file = path / "diffusion_pytorch_model.safetensors" if name.startswith("diffusers") else file
    assert hashes == [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}"]
    assert last.startswith(f"{file}: whole ") and last.endswith(" tensors, all finite")


def damaged(path: Path, key: str, value: float | None) -> Path:
    """The file with a number in its tensor `key` changed, or without the tensor."""
    content = torch.load(path, weights_only=True)
    weights = content.get("state_dict", content.get("ema", content))
    if value is None:
        del weights[key]
    else:
        weights[key].view(-1)[-1] = value
    torch.save(content, path)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["pixart.pth", "latte.pt"])
def test_verify_names_a_tensor_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    path = damaged(publish(tmp_path, name), "blocks.1.attn.qkv.bias", value)
    line = refused(capsys, "verify", path, *WITH_HEADS, code=1)
    assert str(path) in line and "not finite" in line and "blocks.1.attn.qkv.bias" in line
    line = refused(capsys, "convert", path, *WITH_HEADS, "--to", "safetensors", "--out", tmp_path / "out")
    assert "not finite" in line and "blocks.1.attn.qkv.bias" in line and not (tmp_path / "out").exists()


def test_verify_reads_a_diffusers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "diffusers-pixart")
    weights = load_file(path / "diffusion_pytorch_model.safetensors")
    weights["transformer_blocks.1.attn1.to_k.bias"][3] = float("nan")
    save_file(weights, path / "diffusion_pytorch_model.safetensors")
    assert "blocks.1.attn.qkv.bias" in refused(capsys, "verify", path, code=1)


MISSING = [
    ("stdit.pth", "blocks.1.mlp.fc2.weight"),
    ("stdit.pth", "blocks.1.attn_temp.qkv.bias"),
    ("stdit.pth", "y_embedder.y_embedding"),
    ("stdit.pth", "x_embedder.proj.weight"),  # these tell what the model is
    ("pixart.pth", "final_layer.linear.weight"),
    ("pixart.pth", "y_embedder.y_proj.fc1.weight"),
    ("dit.pt", "y_embedder.embedding_table.weight"),
    ("latte.pt", "blocks.0.mlp.fc1.weight"),
]


@pytest.mark.parametrize(("name", "key"), MISSING)
def test_verify_and_convert_name_a_missing_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str
) -> None:
    path = damaged(publish(tmp_path, name), key, None)
    for command in (["verify"], ["convert", "--to", "safetensors", "--out", tmp_path / "out"]):
        line = refused(capsys, *command, path, *WITH_HEADS)
        assert str(path) in line and key in line and "missing" in line
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_verify_notes_another_file_of_a_published_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = next(entry for entry in load_catalog() if entry.files[0].sha256 and not entry.folder)
    path = publish(tmp_path, "stdit.pth").rename(tmp_path / published.name)
    assert run("verify", path, *WITH_HEADS) == 0
    expected = f"note: the published {published.name} has another sha256, {published.files[0].sha256}"
    assert expected in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# convert

TARGETS = {
    "pixart.pth": ("pixart", "opensora", "diffusers", "safetensors"),
    "pixart-ms.pth": ("pixart", "opensora", "diffusers", "safetensors"),
    "stdit.pth": ("opensora", "safetensors"),
    "dit.pt": ("opensora", "diffusers", "safetensors"),
    "latte.pt": ("opensora", "safetensors"),
    "diffusers-pixart": ("diffusers",),
    "diffusers-dit": ("opensora", "diffusers", "safetensors"),
    "checkpoint": ("opensora", "safetensors"),
}
PAIRS = [(name, to) for name, targets in TARGETS.items() for to in targets]


def told(path: Path, name: str) -> dict[str, Any]:
    """What must be said of `path`, which holds the weights of `name`, to use it."""
    bare = path.is_file() and (path.suffix != ".safetensors") and path.parent.name != "checkpoint"
    family = "latte" if name == "latte.pt" else "dit"
    return {"num_heads": HEADS, "family": family} if bare else {}


def loaded(path: Path, name: str) -> Any:
    source = find_source(path, **told(path, name))
    model = empty_model(source.model)
    load_model_weights(model, source.weights)
    return model.eval()


@pytest.mark.parametrize(("name", "to"), PAIRS)
def test_converted_weights_are_the_same(tmp_path: Path, name: str, to: str) -> None:
    path, out = publish(tmp_path / "in", name), tmp_path / "new folder" / f"out.{to}"
    assert run("convert", path, "--to", to, "--out", out, *(WITH_HEADS if is_bare(name) else ())) == 0
    assert [item.name for item in out.parent.iterdir()] == [out.name]
    original, copy = loaded(path, name), loaded(out, name)
    weights = original.state_dict()
    assert list(copy.state_dict()) == list(weights)
    for key, value in copy.state_dict().items():
        assert torch.equal(value, weights[key]), key

    # And they mean the same model: positions, heads and order of frames too.
    frames = FRAMES if name in ("stdit.pth", "checkpoint", "latte.pt") else 1
    latents = torch.randn(1, 4, frames, 2 * ROWS, 2 * ROWS)
    condition = torch.tensor([3]) if isinstance(PUBLISHED[name], DiTConfig) else torch.randn(1, 8, 32)
    with torch.no_grad():
        expected = original(latents, torch.tensor([400.0]), condition)
        assert expected.abs().max() > 0.1
        found = copy(latents, torch.tensor([400.0]), condition)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "diffusers-pixart"])
def test_a_safetensors_file_tells_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, out = publish(tmp_path, name), tmp_path / "out.safetensors"
    heads = WITH_HEADS if is_bare(name) else ()
    assert run("convert", path, "--to", "safetensors", "--out", out, *heads) == 0
    before, model, commands = inspected(capsys, path, *heads)
    after, same_model, same_commands = inspected(capsys, out)
    assert same_model == model and after["samples"] == before["samples"]
    assert same_commands.splitlines()[0] == commands.splitlines()[0].replace(str(path), str(out)).replace(
        "--num-heads 4 ", ""
    )


def test_converted_files_carry_their_tables(tmp_path: Path) -> None:
    """As Open-Sora's own code wants them, for the size that the source was made at."""
    path = publish(tmp_path, "stdit.pth")
    assert run("convert", path, *WITH_HEADS, "--to", "opensora", "--out", tmp_path / "out.pth") == 0
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(content) == list(torch.load(path, weights_only=True))
    for key, table in zip(("pos_embed", "pos_embed_temporal"), position_tables(VIDEO), strict=True):
        torch.testing.assert_close(content[key], table, rtol=0, atol=2e-3)
    assert (tmp_path / "out.pth").stat().st_size < 1.1 * path.stat().st_size  # no tensor drags a whole file along

    image = publish(tmp_path, "pixart.pth")
    assert run("convert", image, *WITH_HEADS, "--to", "pixart", "--out", tmp_path / "image.pth") == 0
    (wrapper, copy), (_, original) = (
        next(iter(torch.load(file, weights_only=True).items())) for file in (tmp_path / "image.pth", image)
    )
    assert wrapper == "state_dict" and list(copy) == list(original)
    assert all(torch.equal(copy[key], value) for key, value in original.items())


def test_diffusers_own_model_loads_what_was_written(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    path, out = publish(tmp_path, "pixart.pth"), tmp_path / "folder"
    assert run("convert", path, *WITH_HEADS, "--to", "diffusers", "--out", out) == 0
    theirs = PixArtTransformer2DModel.from_pretrained(out, local_files_only=True).eval()
    ours = loaded(out, "pixart.pth")
    latents, text = torch.randn(1, 4, 2 * ROWS, 2 * ROWS), torch.randn(1, 8, 32)
    with torch.no_grad():
        expected = theirs(
            latents, text, timestep=torch.tensor([400]), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ).sample
        torch.testing.assert_close(ours(latents[:, :, None], torch.tensor([400]), text)[:, :, 0], expected)


def test_a_checkpoints_positions_stay_what_they_were(tmp_path: Path) -> None:
    """base_size is what decides in diffusers' layout, whatever size the run's samples have."""
    cfg = replace(PUBLISHED["pixart.pth"], base_size=3)
    model = make_model(cfg)
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "config.toml").write_text(dump_toml(Config(model=cfg)))
    save_file(model.state_dict(), tmp_path / "step" / "model.safetensors")
    out = tmp_path / "folder"
    assert run("convert", tmp_path / "step", "--to", "diffusers", "--out", out) == 0
    assert json.loads((out / "config.json").read_text())["sample_size"] == 6
    latents, text = torch.randn(1, 4, 1, 16, 16), torch.randn(1, 8, 32)
    with torch.no_grad():
        expected = model(latents, torch.tensor([400.0]), text)
        assert torch.equal(loaded(out, "pixart.pth")(latents, torch.tensor([400.0]), text), expected)


def test_a_flow_model_is_written_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "checkpoint")
    (path / "config.toml").write_text(dump_toml(Config(model=VIDEO, diffusion=DiffusionConfig(objective="flow"))))
    assert run("convert", path, "--to", "safetensors", "--out", tmp_path / "flow.safetensors") == 0
    assert "diffusion.objective=flow" in capsys.readouterr().out
    ordinary = publish(tmp_path / "iddpm", "checkpoint")
    assert run("convert", ordinary, "--to", "safetensors", "--out", tmp_path / "iddpm.safetensors") == 0
    assert "note" not in capsys.readouterr().out


REFUSED = [
    ("stdit.pth", "pixart", "no place for temporal attention"),
    ("latte.pt", "diffusers", "classes and single images only"),
    ("latte.pt", "pixart", "expected PixArt's"),
    ("dit.pt", "pixart", "expected PixArt's"),
    ("diffusers-pixart", "pixart", "needs a null caption"),
    ("diffusers-pixart", "opensora", "needs a null caption"),
    ("diffusers-pixart", "safetensors", "needs a null caption"),
]


@pytest.mark.parametrize(("name", "to", "message"), REFUSED)
def test_refusals_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, to: str, message: str
) -> None:
    path = publish(tmp_path, name)
    heads = WITH_HEADS if is_bare(name) else ()
    line = refused(capsys, "convert", path, "--to", to, "--out", tmp_path / "new" / "out", *heads)
    assert line.startswith(f"error: --to {to}: ") and message in line
    assert list(tmp_path.iterdir()) == [path]


def test_what_exists_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "pixart.pth")
    before = path.read_bytes()
    (tmp_path / "folder").mkdir()
    for out in (path, tmp_path / "folder"):
        line = refused(capsys, "convert", path, "--to", "pixart", "--out", out, *WITH_HEADS)
        assert f"{out}: exists already" in line
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [tmp_path / "folder", path]


@pytest.mark.parametrize("to", ["opensora", "diffusers", "safetensors"])
def test_a_write_that_fails_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    def fill_disk(content: object, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = publish(tmp_path, "pixart.pth")
    monkeypatch.setattr("opensora_repro.weights.export.torch.save", fill_disk)
    monkeypatch.setattr("opensora_repro.weights.export.save_file", fill_disk)
    line = refused(capsys, "convert", path, "--to", to, "--out", tmp_path / "out", *WITH_HEADS, code=1)
    assert f"{tmp_path / 'out'}: cannot be written" in line and "No space left on device" in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("to", ["opensora", "diffusers", "safetensors"])
def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    """A real limit on the size of files, which torch and safetensors report with errors of their own."""
    path, out = publish(tmp_path, "pixart.pth"), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        line = refused(capsys, "convert", path, "--to", to, "--out", out, *WITH_HEADS, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"error: {out}: cannot be written (")
    assert list(tmp_path.iterdir()) == [path]
