"""Read the golden cases: reference weights, inputs, outputs and gradients of the published code."""

from __future__ import annotations

import importlib.util
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora_repro.models.config import DiTConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.stdit2 import STDiT2
from opensora_repro.models.stdit3 import STDiT3


@dataclass
class Case:
    """One golden case: its JSON and its tensors."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under `prefix.`, by the rest of their name."""
        return {k.removeprefix(prefix + "."): v for k, v in self.tensors.items() if k.startswith(prefix + ".")}


def load_case(golden_dir: Path, name: str) -> Case:
    tensors = golden_dir / f"{name}.safetensors"
    info = json.loads((golden_dir / f"{name}.json").read_text())
    return Case(info, load_file(tensors) if tensors.is_file() else {})


def model_config(info: dict[str, Any], *, temporal_attention: bool) -> STDiTConfig:
    """Return our config for a reference constructor's arguments; latent size is not among ours."""
    return STDiTConfig(**_known_values(info, STDiTConfig), temporal_attention=temporal_attention)


def dit_config(info: dict[str, Any], *, factorised: bool) -> DiTConfig:
    """Return our config for a reference constructor's arguments; its condition is "text" or "label_<classes>"."""
    condition, _, classes = info["config"]["condition"].partition("_")
    number = {"num_classes": int(classes)} if classes else {}
    return DiTConfig(**_known_values(info, DiTConfig) | number | {"condition": condition}, factorised=factorised)


def _known_values(info: dict[str, Any], config: type) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in info["config"].items() if key in known}


def build_model(case: Case) -> STDiT:
    """Return the case's model with the reference weights."""
    model = STDiT(model_config(case.info, temporal_attention="STDiT" in case.info["kind"]))
    model.load_state_dict(case.group("param"))
    return model


# The models of Open-Sora 1.1 and 1.2


def video_config(info: dict[str, Any]) -> STDiT2Config | STDiT3Config:
    """Return our config for the reference constructor's arguments; v1.1.0 knew one order of rotary and norm alone."""
    if "STDiT3" in info["kind"]:
        return STDiT3Config(**_known_values(info, STDiT3Config))
    return STDiT2Config(**_known_values(info, STDiT2Config))


def new_video_model(cfg: STDiT2Config | STDiT3Config) -> STDiT2 | STDiT3:
    return STDiT3(cfg) if isinstance(cfg, STDiT3Config) else STDiT2(cfg)


def build_video_model(case: Case) -> STDiT2 | STDiT3:
    """Return the case's model with the reference weights."""
    model = new_video_model(video_config(case.info))
    model.load_state_dict(case.group("param"))
    return model


def video_inputs(case: Case, cfg: STDiT2Config | STDiT3Config) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `forward` takes, by position and by name."""
    given = case.tensors
    drop = given["in.rand"] < cfg.class_dropout_prob if "in.rand" in given else None
    named = {name: given[f"in.{name}"] for name in cfg.conditions}
    named |= {"frame_mask": given.get("in.x_mask"), "drop_text": drop}
    return (given["in.x"], given["in.timestep"], given["in.y"], given.get("in.mask")), named


def recipe_model(cfg: STDiT2Config | STDiT3Config, case: Case, recipe: ModuleType) -> STDiT2 | STDiT3:
    """A model of the case's weights, which recipe.py beside the cases gives by their names."""
    model = new_video_model(cfg)
    weights = {
        key: torch.from_numpy(recipe.weight(case.info["seed"], key, tuple(value.shape)))
        for key, value in model.state_dict().items()
        if key not in recipe.FIXED
    }
    model.load_state_dict(weights, strict=False)
    return model.eval()


def load_recipe(golden_dir: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", golden_dir / "recipe.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def check_rule(key: str, value: Tensor, rule: str) -> None:
    """Compare a drawn tensor with 'zeros', 'ones', 'xavier_uniform(bound x)' or 'random std x absmax y'."""
    if rule in ("zeros", "ones"):
        assert value.eq(rule == "ones").all(), key
    elif bound := re.fullmatch(r"xavier_uniform\(bound ([\d.]+)\)", rule):
        limit = float(bound[1])
        assert 0.98 * limit <= value.abs().max().item() <= limit + 1e-4, key
        assert value.std().item() == pytest.approx(limit / 3**0.5, rel=0.03), key
    else:
        std, largest = map(float, re.fullmatch(r"random std ([\d.]+) absmax ([\d.]+)", rule).groups())
        # both sides are samples: allow four standard errors, more for small tensors
        assert value.std().item() == pytest.approx(std, rel=4 / value.numel() ** 0.5 + 0.01), key
        assert value.abs().max().item() == pytest.approx(largest, rel=0.5), key


def check_video_case(model: STDiT2 | STDiT3, case: Case) -> None:
    """Assert that outputs, activations and gradients are the case's.

    At given frames the reference's final layer slips; `out_clean` is without it, and there ours has to be.
    """
    tolerances, expected_acts = case.info["tolerances"], case.group("act")
    inputs, named = video_inputs(case, model.cfg)
    with_gradients = [inputs[0].requires_grad_(), inputs[2].requires_grad_()]
    acts = module_outputs(model, list(expected_acts))
    out = model(*inputs, **named)
    assert out.dtype == torch.float32
    assert relative_error(out, case.tensors.get("out_clean", case["out"])) <= tolerances["out_rel"]
    generated = case.tensors.get("in.x_mask")
    for key, expected in expected_acts.items():
        got = reference_layout(key, acts[key])
        if key == "final_layer" and generated is not None:
            got, expected = (x.unflatten(1, (generated.shape[1], -1))[generated] for x in (got, expected))
        assert relative_error(got, expected) <= tolerances["out_rel"], key
    if "gout" not in case.tensors:
        return
    (out * case["gout"]).sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    grads |= dict(zip(("input.x", "input.y"), (x.grad for x in with_gradients), strict=True))
    assert set(case.group("grad")) == set(case.info["grads"])
    for key, expected in case.group("grad").items():
        assert relative_error(grads[key], expected) <= tolerances["grad_rel"], key


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude, as the golden tolerances mean it."""
    assert got.shape == expected.shape, f"{list(got.shape)} != {list(expected.shape)}"
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def rms_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


# Weights of the full-size cases: an integer hash of the key and the flat index (xl_recipe.md).


def hashed_std(name: str, shape: tuple[int, ...]) -> float:
    fan_in = int(np.prod(shape[1:]))
    endings = {"scale_shift_table": 0.2, "bias": 0.05, "y_embedding": 1.0, "embedding_table.weight": 0.5}
    for ending, std in endings.items():
        if name.endswith(ending):
            return std
    return (0.5 if name.startswith("t_block") or "adaLN" in name else 1.0) / fan_in**0.5


def fill_hashed(tensor: Tensor, name: str, std: float) -> None:
    """Overwrite a contiguous float32 tensor with the values that belong to `name`."""
    out = tensor.detach().view(-1).numpy()
    seed = np.uint32(zlib.crc32(name.encode()))
    scale = np.float32(np.sqrt(3.0) * std)
    chunk = 1 << 16  # stays in the processor's cache through all passes
    index = np.arange(chunk, dtype=np.uint32) * np.uint32(0x9E3779B1)
    with np.errstate(over="ignore"):
        for start in range(0, out.size, chunk):
            part = out[start : start + chunk]
            offset = np.uint32((start * 0x9E3779B1 + int(seed)) & 0xFFFFFFFF)
            h = index[: part.size] + offset
            h ^= h >> np.uint32(16)
            h *= np.uint32(0x85EBCA6B)
            h ^= h >> np.uint32(13)
            h *= np.uint32(0xC2B2AE35)
            h ^= h >> np.uint32(16)
            np.multiply(h >> np.uint32(8), np.float32(2.0**-23), out=part, casting="unsafe", dtype=np.float32)
            part -= np.float32(1)
            part *= scale


def hashed_tensor(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    tensor = torch.empty(shape)
    fill_hashed(tensor, name, std)
    return tensor


def hashed_model(cfg: STDiTConfig | DiTConfig) -> STDiT | DiT:
    """Return a model whose every parameter and the null caption come from the hash; nothing is drawn twice."""
    with torch.device("meta"):
        model = DiT(cfg) if isinstance(cfg, DiTConfig) else STDiT(cfg)
    model.to_empty(device="cpu")
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(fill_hashed, value, name, hashed_std(name, tuple(value.shape)))
            for name, value in model.state_dict().items()
        ]
        for job in jobs:
            job.result()
    return model.eval()


def module_outputs(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return a dict that the next forward pass fills with the outputs of the named submodules."""
    outputs: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, out, name=name: outputs.update({name: out.detach()}))
    return outputs


def reference_layout(name: str, value: Tensor) -> Tensor:
    """Lay one of our activations out as the reference's: it flattens frames and places into one axis."""
    if name.endswith("attn_temp") or (name.startswith("temporal_blocks.") and name.endswith(".attn")):
        return rearrange(value, "b t s d -> (b s) t d")
    if name.endswith(".attn"):
        return rearrange(value, "b t s d -> (b t) s d")
    if name == "y_embedder":
        return rearrange(value, "b l d -> b 1 l d")
    return rearrange(value, "b t s d -> b (t s) d") if value.ndim == 4 else value
