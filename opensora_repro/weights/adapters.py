"""Low-rank adapters (LoRA) as peft saves them: read, held against a model, and added to its weights."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.models.config import ModelConfig, targeted_layers
from opensora_repro.run_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    EMA_FILE,
    STATE_FILE,
    list_checkpoints,
    list_steps,
)
from opensora_repro.weights.families import Network, empty_model
from opensora_repro.weights.files import WeightsError, recorded_sha256
from opensora_repro.weights.load import all_finite

PREFIX = "base_model.model."  # of peft's names, before the model's own
ENDS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# What peft can do besides, and how it is written where it is not done; `use_rslora` is
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "lora_bias": (False, None), "modules_to_save": ([], None),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """By the name of each adapted layer its matrices A [rank, in] and B [out, rank]; `scale` B A joins its weight."""

    path: Path
    file: Path
    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    weight: float = 1.0  # what the user multiplies it with

    @property
    def digest(self) -> list[Any]:
        """What decides what it does to a model."""
        return [recorded_sha256(self.file), self.scale * self.weight]

    def __str__(self) -> str:
        return f"adapter {self.path}, {len(self.pairs)} layers, x {self.weight:g}"


def saved_name(parameter: str) -> str:
    """As peft saves a parameter of a model that it has put adapters into."""
    return PREFIX + parameter.replace(".default.", ".")


def adapter_config(cfg: Config) -> str:
    """adapter_config.json: what peft needs to put a run's adapters into its model again."""
    lora = cfg.lora
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": cfg.init.weights,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": target_pattern(cfg),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }
    return json.dumps(content, indent=2) + "\n"


def target_pattern(cfg: Config) -> str:
    """What the full names of the adapted layers match, and no others."""
    model, targets = cfg.model, cfg.lora.targets
    layers = dict.fromkeys(name for spans in model.block_spans for name in targeted_layers(model, targets, spans))
    return rf"(\w+_)?blocks\.\d+\.({'|'.join(map(re.escape, layers))})"


def read_adapter(spec: str, *, ema: bool = True) -> Adapter:
    """`PATH` or `PATH:weight`: a run with [lora] (its newest checkpoint), a checkpoint, a folder of peft's, its file.

    `ema`: of our checkpoints the averaged adapters. Raises WeightsError.
    """
    head, _, tail = spec.rpartition(":")
    path, weight = Path(spec).expanduser(), 1.0
    if not path.exists() and head:
        with contextlib.suppress(ValueError):
            path, weight = Path(head).expanduser(), float(tail)
    if not math.isfinite(weight):
        raise WeightsError(f"--lora {spec}: expected a finite weight")
    file = _file_of(path, ema)
    pairs = _pairs(file)
    return Adapter(path, file, pairs, _scale(file.parent / ADAPTER_CONFIG_FILE, pairs), weight)


def has_adapter(folder: Path) -> bool:
    """Whether this is a checkpoint of a run with [lora]."""
    return (folder / ADAPTER_FILE).is_file() and (folder / STATE_FILE).is_file()


def _file_of(path: Path, ema: bool) -> Path:
    if path.is_file():
        return path
    steps = list_checkpoints(path) or list_steps(path)
    folder = steps[-1] if steps else path
    file = folder / (EMA_FILE if ema and has_adapter(folder) else ADAPTER_FILE)
    if (folder / ADAPTER_FILE).is_file() and file.is_file():
        return file
    expected = f"a run with [lora], its checkpoint, or a folder with {ADAPTER_FILE} and {ADAPTER_CONFIG_FILE}"
    raise WeightsError(f"--lora {path}: no adapter there: expected {expected}")


def _pairs(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name = key.replace(".default.", ".")
                end = next((end for end in ENDS if name.endswith(end)), None)
                if not name.startswith(PREFIX) or end is None:
                    raise WeightsError(
                        f"{file}: {key} is no LoRA of a linear layer as peft names it (expected {PREFIX}LAYER"
                        f"{' and '.join(ENDS)}): merge it into its model with the program that made it"
                    )
                layer = name.removeprefix(PREFIX).removesuffix(end)
                found.setdefault(layer, {})[ENDS[end]] = opened.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot be read as safetensors ({' '.join(str(error).split())})") from None
    for layer, parts in found.items():
        shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
        a, b = shapes.get("A", []), shapes.get("B", [])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise WeightsError(f"{file}: {layer} has {shapes}: expected lora_A [rank, in] and lora_B [out, rank]")
        if not all(map(all_finite, parts.values())):
            raise WeightsError(f"{file}: the adapter of {layer} holds values that are not finite (NaN or infinite)")
    if not found:
        raise WeightsError(f"{file}: no adapters in it")
    return {layer: (parts["A"], parts["B"]) for layer, parts in found.items()}


def _scale(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """alpha / rank of the config beside the file. Raises WeightsError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(
            f"{path}: cannot be read as the config of a LoRA, without which nobody knows its alpha"
        ) from None
    other = next((key for key, none in PLAIN.items() if config.get(key) not in none), None)
    if kind != "LORA" or other is not None:
        told = f"peft_type = {kind}" if other is None else f"{other} = {config[other]}"
        raise WeightsError(f"{path}: {told}: expected a plain LoRA of linear layers")
    if any(len(a) != rank for a, _ in pairs.values()):
        raise WeightsError(f"{path}: r = {rank} is not the rank of the matrices beside it")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_adapters(adapters: Sequence[Adapter], model: ModelConfig) -> None:
    """Raise WeightsError where one is of another model's layers."""
    shapes = {name: value.shape for name, value in empty_model(model).state_dict().items()}
    for adapter in adapters:
        for layer, (a, b) in adapter.pairs.items():
            here, there = shapes.get(f"{layer}.weight"), torch.Size([b.shape[0], a.shape[1]])
            if here != there:
                told = "has no such layer" if here is None else f"has {list(here)} there"
                raise WeightsError(
                    f"--lora {adapter.path}: made for another model: {layer} {list(there)}, this one {told}"
                )


@torch.no_grad()
def add_adapters(model: Network, adapters: Sequence[Adapter]) -> None:
    """Add them up into the model's float32 weights, layer by layer, which then compute what weights and adapters do."""
    weights = model.state_dict()
    for adapter in adapters:
        for layer, (a, b) in adapter.pairs.items():
            weight = weights[f"{layer}.weight"]
            weight += (b.to(weight) @ a.to(weight)) * (adapter.scale * adapter.weight)
