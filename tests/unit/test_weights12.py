"""Weights of Open-Sora 1.1 and 1.2 on disk: recognised, loaded whole or refused by name, begun from PixArt's."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_repro.config import Config, dump_toml
from opensora_repro.diffusion.flow import OPEN_SORA_1_2
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.layers import rotary_frequencies
from opensora_repro.weights.export import Grid, export
from opensora_repro.weights.families import empty_model, family_of
from opensora_repro.weights.files import NULL_CAPTION, WeightsError, find_weights, open_weights
from opensora_repro.weights.load import check_complete, load_model_weights
from opensora_repro.weights.published import describe

SIZE: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 10}
STDIT2, STDIT3 = STDiT2Config(**SIZE), STDiT3Config(**SIZE)
PIXART = STDiTConfig(**{**SIZE, "model_max_length": 6}, temporal_attention=False)
PIXART_MS = replace(PIXART, size_conditioning=True, base_size=4, space_scale=2.0)
each = pytest.mark.parametrize("cfg", [STDIT2, STDIT3], ids=lambda cfg: cfg.architecture)
ANYWHERE = Grid(frames=2, rows=2, cols=2)


def weights_of(cfg: Any, seed: int = 0) -> dict[str, Tensor]:
    """A model's tensors, none of which is zero; the frozen ones as they are."""
    torch.manual_seed(seed)
    model = family_of(cfg).network(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    found: dict[str, Tensor] = model.state_dict()
    return found


def release(folder: Path, cfg: Any, weights: dict[str, Tensor] | None = None, **facts: Any) -> Path:
    """A folder as the hub's: the weights, and what their config.json says, of the training, too."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in vars(cfg).items() if key != "architecture"}
    config |= {"drop_path": 0.0, "input_size": [None, None, None], "skip_y_embedder": False, **facts}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights or weights_of(cfg), folder / "model.safetensors")
    return folder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# Whole ones


@each
@pytest.mark.parametrize("meta", [False, True], ids=["made", "meta"])
def test_a_release_loads_whole(tmp_path: Path, cfg: Any, meta: bool) -> None:
    weights = weights_of(cfg)
    model = empty_model(cfg) if meta else family_of(cfg).network(cfg)
    report = load_model_weights(model, release(tmp_path / "release", cfg, weights))
    assert_same(model.state_dict(), weights)
    assert report.inserted == report.dropped == () and report.layout == f"Open-Sora STDiT{cfg.architecture[-1]}"


@each
def test_what_a_release_tells(tmp_path: Path, cfg: Any) -> None:
    """The network by its config.json, or, the published way, by shapes; sizes, steps and objective by its release."""
    odd = replace(cfg, input_sq_size=256, class_dropout_prob=0.2, freeze_y_embedder=True)
    told = describe(open_weights(release(tmp_path / "told", odd)))
    assert told.model == replace(odd, freeze_y_embedder=False)  # which is the training's
    save_file(weights_of(replace(cfg, qk_norm=False)), tmp_path / "bare.safetensors")
    found = describe(open_weights(tmp_path / "bare.safetensors"))
    assert found.model == found.config.model == replace(cfg, qk_norm=False)  # heads, too
    config = found.config
    sampled = (config.data.num_frames, config.data.height, config.data.width, config.sample.steps, config.sample.fps)
    if cfg.architecture == "stdit2":
        assert sampled == (16, 240, 426, 100, 8) and config.diffusion.objective == "iddpm"
        assert config.data.frame_interval == 3  # every third of 24 frames a second
    else:
        assert sampled == (51, 240, 426, 30, 24) and config.diffusion.schedule == OPEN_SORA_1_2
        assert config.vae.path == "hpcai-tech/OpenSora-VAE-v1.2"
    assert config.sample.guidance == 7.0


@each
def test_a_wrong_config_beside_them(tmp_path: Path, cfg: Any) -> None:
    folder = release(tmp_path / "typed", cfg, depth="two")
    with pytest.raises(WeightsError, match=r'config\.json: depth = "two": expected an integer'):
        open_weights(folder)
    file = open_weights(release(tmp_path / "other", cfg, hidden_size=96))
    with pytest.raises(WeightsError, match="shapes differ"):
        check_complete(file, describe(file).model)
    (folder / "config.json").write_text("{")
    assert describe(open_weights(folder)).model == cfg


@each
def test_one_key_too_few_or_too_many_is_named(tmp_path: Path, cfg: Any) -> None:
    weights = weights_of(cfg)
    for number, key in enumerate(
        ("rope.freqs", NULL_CAPTION, *(k for k in weights if k.endswith("1.attn.k_norm.weight")))
    ):
        less = {name: value for name, value in weights.items() if name != key}
        save_file(less, tmp_path / f"less{number}.safetensors")
        with pytest.raises(WeightsError, match=rf"1 are missing \(first {re.escape(key)}\)"):
            load_model_weights(empty_model(cfg), tmp_path / f"less{number}.safetensors")
    save_file({**weights, "pos_emb": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"1 are unknown \(first pos_emb\)"):
        load_model_weights(empty_model(cfg), tmp_path / "more.safetensors")


@each
def test_no_part_of_it_may_begin_anew(tmp_path: Path, cfg: Any) -> None:
    """What a start from PixArt lacks, a file of the kind itself may not."""
    kept = {key: value for key, value in weights_of(cfg).items() if "fps_embedder" not in key}
    save_file(kept, tmp_path / "some.safetensors")
    with pytest.raises(WeightsError, match=r"4 are missing|not PixArt, STDiT"):
        load_model_weights(empty_model(cfg), tmp_path / "some.safetensors")


def test_the_three_are_told_apart(tmp_path: Path) -> None:
    stdit = STDiTConfig(**SIZE)
    for weights, other in ((STDIT2, stdit), (stdit, STDIT2), (STDIT2, STDIT3), (STDIT3, STDIT2)):
        save_file(weights_of(weights), tmp_path / "weights.safetensors")
        with pytest.raises(WeightsError, match=f"this is a {other.architecture}"):
            load_model_weights(empty_model(other), tmp_path / "weights.safetensors")
    save_file(weights_of(STDIT3), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"made with model\.depth=2, model\.model_max_length=10"):
        load_model_weights(empty_model(replace(STDIT3, depth=3, model_max_length=12)), tmp_path / "weights.safetensors")


@each
def test_a_training_folder(tmp_path: Path, cfg: Any) -> None:
    """As 1.2's code leaves it: the average without buffers, the trained weights in a folder, states of other things."""
    trained, average = weights_of(cfg), weights_of(cfg, seed=1)
    step = tmp_path / "outputs" / "epoch0-global_step20"
    (step / "model").mkdir(parents=True)
    torch.save(trained, step / "model" / "pytorch_model.bin")
    for name in ("lr_scheduler", "sampler", "optimizer.bin"):
        torch.save({"last_epoch": 1}, step / name)
    buffers = ("rope.freqs", NULL_CAPTION)
    torch.save({f"module.{k}": v for k, v in average.items() if k not in buffers}, step / "ema.pt")
    for ema, expected in ((True, average | {key: trained[key] for key in buffers}), (False, trained)):
        model = empty_model(cfg)
        load_model_weights(model, step.parent, ema=ema)
        assert_same(model.state_dict(), expected)
    torch.save({"ema": average, "model": trained}, tmp_path / "both.pt")
    model = empty_model(cfg)
    assert load_model_weights(model, tmp_path / "both.pt").wrapper == "ema"
    assert_same(model.state_dict(), average)


def test_states_beside_a_lone_file(tmp_path: Path) -> None:
    save_file(weights_of(STDIT3), tmp_path / "mine.safetensors")
    for name in ("lr_scheduler.pt", "sampler.pt"):
        torch.save({}, tmp_path / name)
    assert find_weights(tmp_path) == tmp_path / "mine.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Written again


@each
@pytest.mark.parametrize("name", ["release", "weights.pth", "weights.safetensors"])
def test_export_and_back_bit_for_bit(tmp_path: Path, cfg: Any, name: str) -> None:
    cfg, weights = replace(cfg, input_sq_size=384), weights_of(cfg)
    to = "safetensors" if name.endswith(".safetensors") else "opensora"
    export(weights, cfg, ANYWHERE, to, tmp_path / name)
    if name == "release":
        assert_same(load_file(tmp_path / name / "model.safetensors"), weights)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["model_type"] == f"STDiT{cfg.architecture[-1]}" and config["hidden_size"] == 48
    elif name.endswith(".pth"):  # bare keys, no tables: as Open-Sora's code reads it
        assert_same(torch.load(tmp_path / name, weights_only=True), weights)
    found = describe(open_weights(tmp_path / name))
    assert found.model == (replace(cfg, input_sq_size=512) if name.endswith(".pth") else cfg)
    model = empty_model(cfg)
    load_model_weights(model, tmp_path / name)
    assert_same(model.state_dict(), weights)


@each
def test_a_layout_without_a_place_for_it(tmp_path: Path, cfg: Any) -> None:
    with pytest.raises(WeightsError, match=r"--to pixart: .*no place"):
        export(weights_of(cfg), cfg, ANYWHERE, "pixart", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Begun from PixArt's

STARTS: dict[str, tuple[Any, Any, str]] = {
    "stdit2": (PIXART_MS, STDIT2, "keys_diff_pixartms_to_stdit2"),
    "stdit3": (PIXART, STDIT3, "keys_diff_pixart_to_stdit3"),
}


def image_file(path: Path, cfg: Any) -> dict[str, Tensor]:
    """As PixArt-alpha's and PixArt-Sigma's: no frame axis in the patch kernel, a position table."""
    weights = weights_of(cfg)
    kernel = weights["x_embedder.proj.weight"].squeeze(2)
    torch.save({"state_dict": {**weights, "x_embedder.proj.weight": kernel, "pos_embed": torch.zeros(1, 16, 48)}}, path)
    return weights


@pytest.mark.parametrize("name", STARTS)
def test_a_start_from_pixart(tmp_path: Path, golden_1_2_dir: Path, name: str) -> None:
    source, target, golden = STARTS[name]
    diff = json.loads((golden_1_2_dir / f"{golden}.json").read_text())
    theirs = image_file(tmp_path / "image.pth", source)
    model = empty_model(target)
    report = load_model_weights(model, tmp_path / "image.pth")
    own = model.state_dict()
    assert sorted({re.sub(r"\.\d+\.", ".*.", key) for key in report.inserted}) == diff["only_in_target"]
    assert report.inserted_temporal_attention and "begins anew" in str(report)
    blocks = "spatial_blocks." if name == "stdit3" else "blocks."
    for key, value in theirs.items():
        if key != NULL_CAPTION:
            assert torch.equal(own[re.sub(r"^blocks\.", blocks, key)], value), key
    null = theirs[NULL_CAPTION]
    assert torch.equal(own[NULL_CAPTION], torch.cat([null, null[-1:].expand(4, -1)]))
    load_model_weights(shorter := empty_model(replace(target, model_max_length=3)), tmp_path / "image.pth")
    assert torch.equal(shorter.state_dict()[NULL_CAPTION], null[:3])


@pytest.mark.parametrize("name", STARTS)
def test_what_begins_anew_is_as_in_a_new_model(tmp_path: Path, name: str) -> None:
    source, target, _ = STARTS[name]
    image_file(tmp_path / "image.pth", source)
    model, new = empty_model(target), family_of(target).network(target)
    inserted = load_model_weights(model, tmp_path / "image.pth").inserted
    again = family_of(target).network(target)  # has weights already
    load_model_weights(again, tmp_path / "image.pth")
    for key in inserted:
        value, usual = model.state_dict()[key], new.state_dict()[key]
        constant = bool((usual == usual.flatten()[0]).all())
        if key == "rope.freqs" or constant:
            assert torch.equal(value, usual) and torch.equal(again.state_dict()[key], usual), key
        else:
            assert float(value.std()) == pytest.approx(float(usual.std()), rel=0.35), key
            assert float(value.mean()) == pytest.approx(0, abs=0.3 * float(value.std())), key
    assert torch.equal(model.state_dict()["rope.freqs"], rotary_frequencies(12))


def test_starts_that_do_not_fit(tmp_path: Path) -> None:
    image_file(tmp_path / "image.pth", PIXART)
    image_file(tmp_path / "image-ms.pth", PIXART_MS)
    for name, cfg in (("image.pth", STDIT2), ("image-ms.pth", STDIT3)):
        with pytest.raises(WeightsError, match=f"this is a {cfg.architecture}"):
            load_model_weights(empty_model(cfg), tmp_path / name)
    weights = torch.load(tmp_path / "image.pth", weights_only=True)["state_dict"]
    del weights["blocks.1.mlp.fc2.bias"]
    torch.save({"state_dict": weights}, tmp_path / "image.pth")
    with pytest.raises(WeightsError, match=r"are missing"):
        load_model_weights(empty_model(STDIT3), tmp_path / "image.pth")


# ---------------------------------------------------------------------------------------------------------------------
# The published key lists

KEYS = {"keys_stdit2_xl2": STDiT2Config(), "keys_stdit3_xl2": STDiT3Config()}


def expanded(golden_dir: Path, name: str) -> dict[str, Tensor]:
    """Full-size tensors of one repeated number."""
    shapes = json.loads((golden_dir / f"{name}.json").read_text())["shapes"]
    return {key: torch.tensor(0.5).expand(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", KEYS)
def test_full_size_key_lists(tmp_path: Path, golden_1_2_dir: Path, name: str) -> None:
    tensors, cfg = expanded(golden_1_2_dir, name), KEYS[name]
    state = empty_model(cfg).state_dict()
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {k: tuple(v.shape) for k, v in state.items()}
    torch.save(tensors, tmp_path / "weights.pth")
    file = open_weights(tmp_path / "weights.pth")
    assert describe(file).model == cfg
    assert check_complete(file, cfg) == []
    with pytest.raises(WeightsError, match="are unknown"):
        check_complete(file, replace(cfg, depth=27))


@pytest.mark.parametrize("target", [STDiT2Config(), STDiT3Config()], ids=lambda cfg: cfg.architecture)
def test_full_size_starts(tmp_path: Path, golden_dir: Path, golden_1_2_dir: Path, target: Any) -> None:
    """From PixArt-XL-2-1024-MS and PixArt-Sigma by their key lists: no more and no less begins anew."""
    name = {"stdit2": "keys_pixartms_xl2_opensora_1x1024", "stdit3": "keys_pixart_xl2_512_alpha"}[target.architecture]
    diff = json.loads((golden_1_2_dir / f"{STARTS[target.architecture][2]}.json").read_text())
    torch.save({"state_dict": expanded(golden_dir, name)}, tmp_path / "image.pth")
    missing = check_complete(open_weights(tmp_path / "image.pth"), target)
    assert sorted({re.sub(r"\.\d+\.", ".*.", key) for key in missing}) == diff["only_in_target"]


@each
def test_a_runs_checkpoint_keeps_its_architecture(tmp_path: Path, cfg: Any) -> None:
    (tmp_path / "config.toml").write_text(dump_toml(Config(model=cfg)))
    save_file(weights_of(cfg), tmp_path / "model.safetensors")
    found = describe(open_weights(tmp_path))
    assert found.model == found.config.model == cfg and found.family.name == cfg.architecture
