"""Load weights of the PixArt / STDiT family: ours, plain safetensors and the published .pth files.

What a file may lack or carry too much is an explicit list; anything else stops with one line, so that nobody trains
from noise by accident.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opensora_repro.models.stdit import POSITION_TABLES, STDiT

# Keys under which training scripts keep the weights: PixArt; Latte and DiT; others.
WRAPPERS = ("state_dict", "ema", "model")


class WeightsError(ValueError):
    """Weights that are absent, unreadable or made for another model; the message is one line meant for the user."""


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, what kept its initial value and what was left in the file."""

    source: str
    loaded: tuple[str, ...]
    inserted: tuple[str, ...]  # temporal attention that the file, an image model, does not have; its output is zero
    dropped: tuple[str, ...]  # position tables, which follow from the config

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} tensors loaded"
        if self.inserted:
            text += f", temporal attention inserted at zero ({len(self.inserted)} tensors)"
        return text + (f", dropped {', '.join(self.dropped)}" if self.dropped else "")


def load_model_weights(model: STDiT, source: str | Path | Mapping[str, Any], *, ema: bool = True) -> LoadReport:
    """Copy weights into `model`; PixArt weights in an STDiT insert the temporal attention at zero.

    `source` is a state dict, a .safetensors or .pth/.pt file, one of our checkpoints or a run, whose newest checkpoint
    is taken. `ema` prefers a checkpoint's averaged weights. Raises WeightsError.
    """
    if isinstance(source, Mapping):
        name, raw = "state dict", source
    else:
        path = find_weights(source, ema=ema)
        name, raw = str(path), read_state_dict(path)
    weights = to_published_layout(raw, name)
    dropped = tuple(key for key in POSITION_TABLES if key in weights)
    weights = {key: value for key, value in weights.items() if key not in POSITION_TABLES}
    inserted = _check_fit(model, weights, name)
    model.load_state_dict(weights, strict=not inserted)
    if inserted:
        zero_temporal_attention(model)
    return LoadReport(name, tuple(weights), inserted, dropped)


def zero_temporal_attention(model: STDiT) -> None:
    """Make the temporal branches' output zero: the video model then treats every frame as an image."""
    for name, parameter in model.named_parameters():
        if ".attn_temp.proj." in name:
            torch.nn.init.zeros_(parameter)


def find_weights(path: str | Path, *, ema: bool = True) -> Path:
    """Return the weights file that `path` means: itself, a checkpoint's, or that of a run's newest checkpoint."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such weights file, checkpoint or run")
    steps = [folder for folder in path.glob("checkpoints/step-*") if (folder / "model.safetensors").is_file()]
    folder = max(steps, key=lambda step: int(step.name.removeprefix("step-"))) if steps else path
    for name in ("ema.safetensors", "model.safetensors") if ema else ("model.safetensors",):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{path}: neither model.safetensors nor checkpoints/step-*/model.safetensors in this folder")


def read_state_dict(path: Path) -> Mapping[str, Any]:
    """Read a .safetensors file or, never running code from it, a pickled one; unwrap the latter."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _load_pickle(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: not a readable weights file ({reason})") from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    return content


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written by torch < 1.6, which cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def to_published_layout(weights: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the tensors by name, an image model's patch kernel [D, C, H, W] with its frame axis added."""
    stray = next((key for key, value in weights.items() if not isinstance(value, Tensor)), None)
    if stray is not None or not weights:
        raise WeightsError(f"{name}: expected tensors by name, found {'nothing' if stray is None else repr(stray)}")
    result = dict(weights)
    kernel = result.get("x_embedder.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        result["x_embedder.proj.weight"] = kernel.unsqueeze(2)
    return result


def _check_fit(model: STDiT, weights: Mapping[str, Tensor], name: str) -> tuple[str, ...]:
    """Return the temporal keys that `weights` lacks, all or none; raise WeightsError at any other difference."""
    expected = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    other = [key for key in expected if key in weights and weights[key].shape != expected[key]]
    temporal = [key for key in expected if ".attn_temp." in key]
    if not extra and not other and (not missing or missing == temporal):
        return tuple(missing)

    parts = []
    if other:
        key = other[0]
        shapes = f"{list(weights[key].shape)} there, {list(expected[key])} in the model"
        parts.append(f"{len(other)} shapes differ (first {key}: {shapes})")
    if missing:
        parts.append(f"{len(missing)} tensors are missing (first {missing[0]})")
    if extra:
        parts.append(f"{len(extra)} are unknown (first {extra[0]})")
    raise WeightsError(f"{name} does not fit the model: {'; '.join(parts)}{_advice(model, weights)}")


def _advice(model: STDiT, weights: Mapping[str, Tensor]) -> str:
    """Name the config keys under which the weights would fit, or say whose weights they are not."""
    facts = _facts(weights)
    if not facts:
        return "; these are not PixArt or STDiT weights"
    changes = [f"model.{key}={value}" for key, value in facts.items() if value != getattr(model.cfg, key)]
    return f"; the weights were made with {', '.join(changes)}" if changes else ""


def _facts(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the STDiTConfig fields that tensor shapes tell; empty when these are other weights."""
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    try:
        hidden_size, in_channels, *patch_size = shapes["x_embedder.proj.weight"]
        model_max_length, caption_channels = shapes["y_embedder.y_embedding"]
        out_channels = shapes["final_layer.linear.weight"][0] // math.prod(patch_size)
        mlp_ratio = shapes["blocks.0.mlp.fc1.weight"][0] / hidden_size
    except (KeyError, ValueError):
        return {}
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "in_channels": in_channels,
        "patch_size": tuple(patch_size),
        "hidden_size": hidden_size,
        "depth": len(blocks),
        "mlp_ratio": mlp_ratio,
        "caption_channels": caption_channels,
        "model_max_length": model_max_length,
        "pred_sigma": out_channels == 2 * in_channels,
        "temporal_attention": any(".attn_temp." in key for key in shapes),
    }
