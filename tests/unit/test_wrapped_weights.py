"""Weights as training leaves them: wrapped, renamed, beside arguments, as a LoRA, damaged, in folders of any name."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import re
import sys
import types
import uuid
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_repro.config import Config, DataConfig, DiffusionConfig, dump_toml
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.planning.positions import source_config
from opensora_repro.sampling.source import find_source
from opensora_repro.weights.files import WeightsError, open_weights
from opensora_repro.weights.load import load_model_weights
from tests.unit.test_weights import (
    IMAGE,
    LABELS,
    TINY,
    Trap,
    assert_same_weights,
    check_error,
    image_layout,
    make_model,
    save_checkpoint,
    video_layout,
)

# ---------------------------------------------------------------------------------------------------------------------
# Names and containers

Weights = dict[str, Tensor]
Rename = Callable[[str], str]
INSIDE = "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."


def within(name: str, word: str) -> str:
    """As wrapping each block by itself, and its MLP once more, renames it."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return name
    return ".".join([*parts[:2], word.rstrip("."), *parts[2:]]).replace("mlp.", f"mlp.{word}")


# name -> how each key is renamed, and the words that the report must say
RENAMED: dict[str, tuple[Rename, tuple[str, ...]]] = {
    "data parallel": (lambda key: f"module.{key}", ("module.",)),
    "compiled": (lambda key: f"_orig_mod.{key}", ("_orig_mod.",)),
    "compiled, then data parallel": (lambda key: f"module._orig_mod.{key}", ("module.", "_orig_mod.")),
    "data parallel, then compiled": (lambda key: f"_orig_mod.module.{key}", ("_orig_mod.", "module.")),
    "blocks compiled": (lambda key: within(key, "_orig_mod."), ("_orig_mod.",)),
    "FSDP": (lambda key: f"_fsdp_wrapped_module.{within(key, INSIDE)}", ("_fsdp_wrapped_module.", "_orig_mod.")),
    "checkpointed blocks": (lambda key: within(key, "_checkpoint_wrapped_module."), ("_checkpoint_wrapped_module.",)),
    "a trainer's": (lambda key: f"model.{key}", ("model.",)),
    "a trainer's average": (lambda key: f"ema_model.module.{key}", ("ema_model.", "module.")),
    "a pipeline's": (lambda key: f"model.diffusion_model.{key}", ("model.", "diffusion_model.")),
    "somebody's": (lambda key: f"module.net.module.{key}", ("module.", "net.module.")),
    "all at once": (
        lambda key: f"module.model._orig_mod.module.{within(key, '_orig_mod.')}",
        ("module.", "model.", "_orig_mod."),
    ),
}


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("kind", ["torch", "safetensors", "state dict"])
def test_wrappers_words_are_taken_off_and_told(tmp_path: Path, name: str, kind: str) -> None:
    rename, words = RENAMED[name]
    source = make_model()
    weights = {rename(key): value for key, value in video_layout(source).items()}
    path: Any = tmp_path / "weights"
    if kind == "torch":
        torch.save({"state_dict": weights}, path)
    elif kind == "safetensors":
        save_file(weights, path)
    else:
        path = weights
    model = STDiT(TINY)
    report = load_model_weights(model, path)
    assert_same_weights(model, source)
    (note,) = report.notes
    assert note.endswith(" taken off the names") and all(word in note for word in words)
    assert note in str(report) and json.loads(json.dumps(asdict(report)))["notes"] == [note]


HOLDERS: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "module": (lambda w: {"module": w, "lr": 0.1}, "module"),
    "nested": (lambda w: {"epoch": 1, "module": {"state_dict": {"model": w}, "steps": 3}}, "module.state_dict.model"),
    "an average within": (lambda w: {"model": {"ema": w, "decay": 0.9}}, "model.ema"),
    "ordered": (lambda w: {"state_dict": OrderedDict(w)}, "state_dict"),
    "an empty average": (lambda w: {"ema": {}, "model": w}, "model"),
    "settings called ema": (lambda w: {"ema": {"decay": 0.9999}, "model": w}, "model"),
    "somebody's": (lambda w: {"generator": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "generator"),
    "somebody's average": (
        lambda w: {"params": {"a.b": torch.zeros(2)}, "params_ema": w, "step": torch.tensor(3)},
        "params_ema",
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_nested_containers(tmp_path: Path, name: str) -> None:
    wrap, wrapper = HOLDERS[name]
    source = make_model()
    torch.save(wrap({f"module.{key}": value for key, value in video_layout(source).items()}), tmp_path / "w.pt")
    model = STDiT(TINY)
    report = load_model_weights(model, tmp_path / "w.pt")
    assert_same_weights(model, source)
    assert report.wrapper == wrapper and f"under '{wrapper}'" in str(report)


def test_of_two_holders_without_a_known_name_none_is_guessed(tmp_path: Path) -> None:
    weights = video_layout(make_model())
    torch.save({"generator": weights, "critic": {"a.b": torch.zeros(2)}}, tmp_path / "w.pt")
    check_error(tmp_path / "w.pt", "expected tensors by name, found 'generator'")


def test_words_are_whole_and_only_wrappers() -> None:
    """Parts of a model that are merely called alike stay what they are: they are told as unknown."""
    weights = video_layout(make_model())
    for key in ("model_head.weight", "blocks.0.model.weight", "blocks.0.module.weight", "modules.0.weight"):
        message = check_error({**weights, key: torch.zeros(2)}, "1 are unknown")
        assert f"(first {key})" in message


def test_both_copies_in_one_file_are_told_apart(tmp_path: Path) -> None:
    """As exponential-average modules save themselves: both copies, their counters, no buffers in the average."""
    trained, average = make_model(), make_model(seed=1)
    average.y_embedder.y_embedding.copy_(trained.y_embedder.y_embedding)
    averaged = {f"ema_model.{key}": value for key, value in average.state_dict().items() if "y_embedding" not in key}
    counters = {"initted": torch.tensor([True]), "step": torch.tensor([100])}
    save_file({f"model.{key}": value for key, value in trained.state_dict().items()} | averaged | counters,
              tmp_path / "both.safetensors")  # fmt: skip
    for ema, expected, kind in ((True, average, "averaged"), (False, trained, "trained")):
        model = STDiT(TINY)
        report = load_model_weights(model, tmp_path / "both.safetensors", ema=ema)
        assert_same_weights(model, expected)
        words, left_out, choice = report.notes
        assert words == "ema_model. and model. taken off the names"
        assert left_out == "initted and step left out (no weights)"
        assert choice.startswith(f"the {kind} of two copies taken")
        assert ("1 tensors of the trained one" in choice) == ema


def test_an_average_of_parameters_takes_its_buffers_from_the_trained_weights(tmp_path: Path) -> None:
    trained, average = make_model(), make_model(seed=1)
    average.y_embedder.y_embedding.copy_(trained.y_embedder.y_embedding)
    parameters = {key: value.detach() for key, value in average.named_parameters()}
    model = {f"module.{key}": value for key, value in video_layout(trained).items()}
    torch.save({"model": model, "ema": parameters}, tmp_path / "both.pt")
    loaded = STDiT(TINY)
    report = load_model_weights(loaded, tmp_path / "both.pt")
    assert_same_weights(loaded, average)
    assert report.wrapper == "ema" and report.dropped == ("pos_embed", "pos_embed_temporal")


def test_names_that_clash_are_refused() -> None:
    weights = video_layout(make_model())
    key = "blocks.0.mlp.fc1.weight"
    message = check_error({**weights, f"module.{key}": weights[key] + 1}, f"are both {key}")
    assert f"{key} and module.{key} are both {key}, once wrappers' words are taken off" in message


def test_names_spread_over_shards_are_taken_off_together(tmp_path: Path) -> None:
    trained, average = make_model(), make_model(seed=1)
    index = {}
    for number, (word, model) in enumerate((("model", trained), ("ema_model", average))):
        part = {f"{word}.{key}": value for key, value in model.state_dict().items()}
        save_file(part, tmp_path / f"{number}.safetensors")
        index |= dict.fromkeys(part, f"{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for ema, expected in ((True, average), (False, trained)):
        loaded = STDiT(TINY)
        load_model_weights(loaded, tmp_path, ema=ema)
        assert_same_weights(loaded, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What else a pickle holds


def dit_file(model: DiT, average: DiT, **more: Any) -> dict[str, Any]:
    """As DiT's own training saves: both copies, the optimizer's state, the command line."""
    optimizer = torch.optim.AdamW(model.parameters())
    content = {"model": image_layout(model), "ema": image_layout(average), "opt": optimizer.state_dict()}
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=1000, data_path="/data", cfg_scale=None)
    return {**content, "args": args, **more}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_dit_training_files(tmp_path: Path, legacy: bool) -> None:
    trained, average = make_model(LABELS), make_model(LABELS, seed=1)
    before = set(torch.serialization.get_safe_globals())
    torch.save(dit_file(trained, average), tmp_path / "0400000.pt", _use_new_zipfile_serialization=not legacy)
    for ema, expected in ((True, average), (False, trained)):
        model = DiT(LABELS)
        report = load_model_weights(model, tmp_path / "0400000.pt", ema=ema)
        assert_same_weights(model, expected)
        assert report.layout == "DiT" and report.wrapper == ("ema" if ema else "model")
    assert set(torch.serialization.get_safe_globals()) == before  # other loads stay as strict as they were


BESIDE: dict[str, Any] = {
    "paths": {"out": pathlib.PurePosixPath("runs/1"), "data": Path("/data")},
    "numbers of numpy": {"loss": np.float64(0.5), "step": np.int64(3), "seen": np.arange(4), "names": np.array(["a"])},
    "generators' states": np.random.get_state(),
    "namespaces": types.SimpleNamespace(a=1, b=argparse.Namespace(c=[1, {"d": (2, None)}])),
    "times": {"began": datetime.datetime(2023, 1, 1), "took": datetime.timedelta(1)},
    "default dicts": defaultdict(list, {"a": [1]}),
    "other plain values": [frozenset([1]), range(3), slice(1), Decimal("1"), Fraction(1, 3), uuid.UUID(int=1)],
}


@pytest.mark.parametrize("name", BESIDE)
def test_plain_things_beside_the_weights(tmp_path: Path, name: str) -> None:
    source = make_model(IMAGE)
    torch.save({"state_dict": image_layout(source), "args": BESIDE[name]}, tmp_path / "w.pth")
    model = STDiT(IMAGE)
    load_model_weights(model, tmp_path / "w.pth")
    assert_same_weights(model, source)


class Container:
    """Pickles as OmegaConf's containers do: a state with types in it. It is not installed here."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __getstate__(self) -> dict[str, Any]:
        return {"_content": self.content, "_parent": None, "_metadata": {"ref_type": Any, "object_type": dict}}


class Easy(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("base", "module", "name"),
    [
        (Container, "omegaconf.dictconfig", "DictConfig"),
        (Easy, "easydict", "EasyDict"),
        (Easy, "yacs.config", "CfgNode"),
    ],
)
def test_containers_of_packages_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: type, module: str, name: str
) -> None:
    source = make_model(IMAGE)
    kind = type(name, (base,), {"__module__": module})
    with monkeypatch.context() as installed:
        for package in (module.partition(".")[0], module):
            installed.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, kind)
        args = kind({"model": "Latte-XL/2", "lr": 1e-4, "deep": kind({"sizes": [1, 2]})})
        torch.save({"ema": image_layout(source), "args": args}, tmp_path / "w.pth")
    model = STDiT(IMAGE)
    load_model_weights(model, tmp_path / "w.pth")
    assert_same_weights(model, source)


class Learner:
    """A class of somebody's code."""


def test_other_classes_are_named_with_what_to_do(tmp_path: Path) -> None:
    torch.save({"state_dict": image_layout(make_model(IMAGE)), "learner": Learner()}, tmp_path / "w.pth")
    message = check_error(tmp_path / "w.pth", "refused: this pickle asks for", cfg=IMAGE)
    assert (
        "test_wrapped_weights.Learner" in message and "save its tensors alone (safetensors.torch.save_file)" in message
    )


class Hidden:
    """Within what is read as data, a call."""

    def __init__(self, path: str, call: str) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Any, ...]:
        if self.call == "eval":
            return eval, (f"open({self.path!r}, 'w')",)
        if self.call == "system":
            import os

            return os.system, (f"touch {self.path}",)
        return getattr, (Trap(self.path), "write")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", ["open", "eval", "system", "getattr"])
def test_a_namespace_does_not_open_the_door(tmp_path: Path, call: str, legacy: bool) -> None:
    created = str(tmp_path / "created")
    trap = Trap(created) if call == "open" else Hidden(created, call)
    content = dit_file(make_model(LABELS), make_model(LABELS), extra=argparse.Namespace(deep=[trap]))
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    check_error(tmp_path / "evil.pt", "refused: this pickle asks for", cfg=LABELS)
    assert not Path(created).exists()


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs


def lora(down: str, up: str, prefix: str = "", *, alpha: bool = False) -> Weights:
    weights = {}
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1"):
        name = prefix + (layer.replace(".", "_") if prefix.endswith("lora_unet_") else layer)
        weights |= {f"{name}.{down}.weight": torch.zeros(4, 48), f"{name}.{up}.weight": torch.zeros(48, 4)}
        weights |= {f"{name}.alpha": torch.tensor(4.0)} if alpha else {}
    return weights


LORAS: dict[str, Any] = {
    "PEFT": lora("lora_A", "lora_B", "base_model.model."),
    "PEFT, named": lora("lora_A.default", "lora_B.default", "base_model.model."),
    "diffusers": lora("lora_A", "lora_B", "transformer."),
    "diffusers, older": lora("lora.down", "lora.up", "transformer."),
    "attention processors": {
        f"transformer_blocks.0.attn1.processor.to_q_lora.{part}.weight": torch.zeros(4, 4) for part in ("down", "up")
    },
    "kohya": lora("lora_down", "lora_up", "lora_unet_", alpha=True),
    "LoHa": {f"lora_unet_blocks_0_attn_qkv.hada_w{n}_{side}": torch.zeros(4, 4) for n in "12" for side in "ab"},
    "LoKr": {"blocks.0.attn.qkv.lokr_w1": torch.zeros(4, 4), "blocks.0.attn.qkv.lokr_w2": torch.zeros(12, 12)},
    "by number": lora("qkv_lora1.down", "proj_lora2.up"),
    "cloneofsimo's": {"unet:0:up": torch.zeros(4, 4), "unet:0:down": torch.zeros(4, 4)},
    "rotations": {"base_model.model.blocks.0.attn.qkv.oft_r": torch.zeros(4, 4)},
    "scales": {"base_model.model.blocks.0.attn.qkv.ia3_l": torch.zeros(4, 1)},
    "differences": {"diffusion_model.blocks.0.attn.qkv.diff": torch.zeros(4, 4)},
    "LyCORIS": {"lycoris_blocks_0_attn_qkv.a1.weight": torch.zeros(4, 4)},
    "not merged": {**make_model(IMAGE).state_dict(), **lora("lora_A", "lora_B")},
    "in a container": {"state_dict": lora("lora_down", "lora_up", "module."), "step": 3},
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_called_one(tmp_path: Path, name: str) -> None:
    torch.save(LORAS[name], tmp_path / "w.pt")
    message = check_error(tmp_path / "w.pt", "w.pt: this is a LoRA", cfg=IMAGE)
    assert "merge it into its model" in message


def test_a_folder_of_peft(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(LORAS["PEFT"], tmp_path / "adapter_model.safetensors")
    check_error(tmp_path, "adapter_model.safetensors: this is a LoRA", cfg=IMAGE)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize(
    "name", ["PixArt-XL-2-256x256.pth", "mine.safetensors", "0400000.pt", "x.bin", "last.ckpt", "model.safetensors"]
)
def test_a_config_and_one_file_make_a_folder(tmp_path: Path, name: str) -> None:
    source = make_model()
    if name.endswith("safetensors"):
        save_file(source.state_dict(), tmp_path / name)
    else:
        torch.save(video_layout(source), tmp_path / name)
    torch.save({}, tmp_path / "optimizer.pt")
    config = Config(model=TINY, data=DataConfig(num_frames=5), diffusion=DiffusionConfig(objective="flow"))
    (tmp_path / "config.toml").write_text(dump_toml(config))
    model = STDiT(TINY)
    assert load_model_weights(model, tmp_path).files == (str(tmp_path / name),)
    assert_same_weights(model, source)
    found = find_source(tmp_path)
    assert found.config == config and found.model == TINY  # what the file does not tell: the heads, flow, the frames
    assert source_config(str(tmp_path)) == config


def test_a_foreign_config_beside_a_file_says_nothing(tmp_path: Path) -> None:
    torch.save(video_layout(make_model()), tmp_path / "mine.pth")
    (tmp_path / "config.toml").write_text('baseURL = "https://example.org/"\n')
    assert open_weights(tmp_path / "mine.pth").config is None


def test_the_folder_of_checkpoints(tmp_path: Path) -> None:
    config = Config(model=TINY)
    for step in (900, 1000):
        folder = save_checkpoint(tmp_path / f"run/checkpoints/step-{step:08d}", make_model(), make_model(seed=step))
        (folder / "config.toml").write_text(dump_toml(config))
    (tmp_path / "run/config.toml").write_text(dump_toml(config))
    model = STDiT(TINY)
    load_model_weights(model, tmp_path / "run/checkpoints")
    assert_same_weights(model, make_model(seed=1000))
    for path in (tmp_path / "run/checkpoints", tmp_path / "run"):
        assert find_source(path).path == tmp_path / "run/checkpoints/step-00001000"
        assert source_config(str(path)) == config


def test_copies_of_checkpoints_under_other_names_are_nobodys(tmp_path: Path) -> None:
    for name in ("step-00000900", "step-00000900-backup", "step-final", "step-00001000 (copy)"):
        save_checkpoint(tmp_path / "run/checkpoints" / name, make_model(), make_model(seed=len(name)))
    model = STDiT(TINY)
    for path in (tmp_path / "run", tmp_path / "run/checkpoints"):
        (file,) = load_model_weights(model, path).files
        assert Path(file).parent.name == "step-00000900"
    (file,) = load_model_weights(model, tmp_path / "run/checkpoints/step-final").files
    assert Path(file).parent.name == "step-final"


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(dump_toml(Config(model=TINY)))
    check_error(tmp_path, r"no checkpoint in this run yet \(looked for checkpoints/step-\*\)")
    with pytest.raises(WeightsError, match="no checkpoint in this run yet"):
        find_source(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("meta", [False, True], ids=["made", "meta"])
def test_tensors_that_are_not_finite_are_named(tmp_path: Path, value: float, dtype: torch.dtype, meta: bool) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in video_layout(make_model()).items()}
    weights["blocks.1.mlp.fc2.weight"][7, 5] = value
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    message = r"w\.pth: blocks\.1\.mlp\.fc2\.weight holds values that are not finite"
    if not meta:
        check_error(tmp_path / "w.pth", message)
        return
    with torch.device("meta"):
        model = STDiT(TINY)
    with pytest.raises(WeightsError, match=message):
        load_model_weights(model, tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_floating_point_of_any_width_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {key: value.to(dtype) for key, value in video_layout(make_model()).items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = STDiT(TINY)
    load_model_weights(model, tmp_path / "w.safetensors")
    key = "blocks.1.mlp.fc2.weight"
    assert torch.equal(model.state_dict()[key], weights[key].float())
    weights[key] = torch.full_like(weights[key].float(), float("nan")).to(dtype)
    save_file(weights, tmp_path / "nan.safetensors")
    check_error(tmp_path / "nan.safetensors", "fc2.weight holds values that are not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_what_is_no_floating_point_is_refused(dtype: torch.dtype) -> None:
    weights = video_layout(make_model())
    weights["blocks.0.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"].to(dtype)
    check_error(weights, rf"blocks\.0\.mlp\.fc1\.weight holds {str(dtype)[6:]}, expected floating-point numbers")


def test_large_values_are_finite() -> None:
    """Whatever their sum would be."""
    weights = {key: value.half() for key, value in make_model().state_dict().items()}
    weights["blocks.1.mlp.fc2.weight"].fill_(60000.0)
    model = STDiT(TINY)
    load_model_weights(model, weights)
    assert model.blocks[1].mlp.fc2.weight.eq(60000).all()


def test_a_table_that_is_not_finite_tells_nothing(tmp_path: Path) -> None:
    weights = image_layout(make_model(IMAGE)) | {"pos_embed": torch.full((1, 16, 48), float("nan"))}
    model = STDiT(IMAGE)
    assert "positions are index / 1" in load_model_weights(model, weights).positions


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors"])
def test_a_file_that_is_not_what_was_written(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path / "step-00000001", make_model(), make_model(seed=1))
    (folder / "state.json").write_text(json.dumps({"sha256": {name: "0" * 64}}))
    message = f"{name}: damaged or changed since it was written"
    check_error(folder / name, message)
    if name == "ema.safetensors":
        check_error(folder, message)
    else:
        load_model_weights(STDiT(TINY), folder)
    (folder / name).rename(tmp_path / name)
    load_model_weights(STDiT(TINY), tmp_path / name)


@pytest.mark.parametrize("state", ["", '{"schema_version": 1, "sha'])
def test_a_damaged_record_of_a_checkpoint_vouches_for_nothing(tmp_path: Path, state: str) -> None:
    folder = save_checkpoint(tmp_path / "step-00000001", make_model(), make_model(seed=1))
    (folder / "state.json").write_text(state)
    check_error(folder, r"state\.json: damaged, so that nobody knows whether ema\.safetensors is what was written")
    (folder / "state.json").unlink()
    load_model_weights(STDiT(TINY), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files that look like weights


def a_program(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def an_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/model.bin", b"123")


def of_numpy(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def foreign_facts(told: str) -> Callable[[Path], None]:
    return lambda path: save_file(make_model().state_dict(), path, {"opensora_repro.model": told})


LIKE_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "TorchScript": (a_program, "is a TorchScript program, not weights"),
    "an archive": (an_archive, "is an archive, not weights: unpack it"),
    "numpy's": (of_numpy, "is an archive, not weights"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes(99)), "is a GGUF file, whose weights are quantised"),
    "no facts": (foreign_facts("none"), "its metadata's opensora_repro.model is no JSON object"),
    "a list of facts": (foreign_facts("[1]"), "its metadata's opensora_repro.model is no JSON object"),
    "heads as text": (foreign_facts('{"num_heads": "4"}'), "it says num_heads = '4' of its model: expected an integer"),
}


def test_no_memory_to_read_them_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(video_layout(make_model()), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(1 << 50))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        open_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name", LIKE_WEIGHTS)
def test_what_only_looks_like_weights_is_told_in_one_line(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, name: str
) -> None:
    make, message = LIKE_WEIGHTS[name]
    make(tmp_path / "w.pt")
    recwarn.clear()
    with pytest.raises(WeightsError, match=rf"w\.pt: {re.escape(message)}"):
        find_source(tmp_path / "w.pt")
    assert not recwarn.list
