"""The layouts of published weights: brought to ours, and what their shapes and position tables tell.

Which layouts there are stands in families.py. Ours are the published state-dict keys of Open-Sora 1.0, position tables
left out: they follow from the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from opensora_repro.weights.files import NULL_CAPTION, ROTARY, TABLES, WeightsError

KERNEL = "x_embedder.proj.weight"
SIZE_KEY = "csize_embedder.mlp.0.weight"  # of models that are told the picture's size


@dataclass(frozen=True)
class Layout:
    """Whose file it is: `marks` are keys that all files of this layout have, and `absent` keys that none has."""

    title: str
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    kernel_axes: int | None = None  # of x_embedder.proj.weight; None: any
    lacks: tuple[str, ...] = ()  # patterns of our keys for which it has no place
    to_ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def to_ours(layout: Layout, tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights under our keys, position tables that are not used). Raises WeightsError."""
    weights = dict(tensors)
    try:
        if layout.to_ours is not None:
            beside = {key: weights.pop(key) for key in (NULL_CAPTION,) if key in weights}
            weights = layout.to_ours(weights) | beside
    except (KeyError, ValueError, RuntimeError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise WeightsError(f"{where}: not whole {layout.title} weights: {reason}") from None
    kernel = weights.get(KERNEL)
    if kernel is not None and kernel.ndim == 4:  # an image model's patches have no frame axis
        weights[KERNEL] = kernel.unsqueeze(2)
    tables = {key: weights.pop(key) for key in TABLES if key in weights}
    return weights, tables


def matching(keys: Iterable[str], patterns: Iterable[str]) -> list[str]:
    whole = [re.compile(pattern) for pattern in patterns]
    return [key for key in keys if any(pattern.fullmatch(key) for pattern in whole)]


# What shapes and position tables tell. Numbers of heads they do not: published models of one width have one number.
HEADS_BY_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}


def stdit_facts(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """STDiTConfig fields that the shapes of PixArt or STDiT weights (our keys) tell.

    Raises ValueError for weights that are not whole, as a part of a sentence.
    """
    with _not_whole():
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        facts = _common_facts(shapes)
        facts["caption_channels"] = shapes["y_embedder.y_proj.fc1.weight"][1]
        facts["temporal_attention"] = any(".attn_temp." in key for key in shapes)
        facts["size_conditioning"] = SIZE_KEY in shapes
        if NULL_CAPTION in shapes:
            facts["model_max_length"] = shapes[NULL_CAPTION][0]
    return facts


def stdit2_facts(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """STDiT2Config fields that the shapes of its weights tell; raises ValueError as `stdit_facts`."""
    return _rotary_facts(weights, "blocks.")


def stdit3_facts(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """STDiT3Config fields that the shapes of its weights tell; raises ValueError as `stdit_facts`."""
    return _rotary_facts(weights, "spatial_blocks.")


def _rotary_facts(weights: Mapping[str, Tensor], blocks: str) -> dict[str, Any]:
    with _not_whole():
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        facts = _common_facts(shapes, blocks)
        return facts | {
            "num_heads": facts["hidden_size"] // (2 * shapes[ROTARY][0]),
            "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
            "model_max_length": shapes[NULL_CAPTION][0],
            "qk_norm": f"{blocks}0.attn.q_norm.weight" in shapes,
        }


def dit_facts(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """DiTConfig fields that the shapes of DiT or Latte weights (our keys) tell; raises ValueError as `stdit_facts`."""
    with _not_whole():
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        facts = _common_facts(shapes)
        if "y_embedder.y_proj.fc1.weight" in shapes:
            facts |= {"condition": "text", "caption_channels": shapes[NULL_CAPTION][1]}
        else:
            facts |= {"condition": "label", "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1}
    return facts


@contextmanager
def _not_whole() -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{error.args[0]} missing") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise ValueError("tensors of shapes that no such model has") from None


def _common_facts(shapes: Mapping[str, tuple[int, ...]], blocks: str = "blocks.") -> dict[str, Any]:
    hidden_size, in_channels, *patch_size = shapes[KERNEL]
    out_channels = shapes["final_layer.linear.weight"][0] // math.prod(patch_size)
    return {
        "in_channels": in_channels,
        "patch_size": tuple(patch_size),
        "hidden_size": hidden_size,
        "depth": len({match[1] for key in shapes if (match := re.match(rf"{re.escape(blocks)}(\d+)\.", key))}),
        "mlp_ratio": shapes[f"{blocks}0.mlp.fc1.weight"][0] / hidden_size,
        "pred_sigma": out_channels == 2 * in_channels,
    }


@dataclass(frozen=True)
class Trained:
    """What a file's position tables tell about its training; None: the file has no such table."""

    rows: int | None = None  # tokens along each side, where the number of places is a square
    places: int | None = None
    frames: int | None = None
    space_scale: float | None = None
    time_scale: float | None = None

    def __str__(self) -> str:
        grid = f"{self.rows}x{self.rows} places" if self.rows else f"{self.places} places"
        parts = [] if self.places is None else [grid]
        parts += [f"{self.frames} frames"] if self.frames and self.frames > 1 else []
        return " and ".join(parts)


def trained_at(tables: Mapping[str, Tensor]) -> Trained:
    """Read the sizes and scales off stored position tables ([1, S, D] sines and cosines of index / scale)."""
    whole = {key: table for key, table in tables.items() if table.ndim == 3}
    spatial = next((whole[key] for key in ("pos_embed", "pos_embed_spatial") if key in whole), None)
    temporal = next((whole[key] for key in ("pos_embed_temporal", "temp_embed") if key in whole), None)
    places = None if spatial is None else spatial.shape[1]
    side = math.isqrt(places) if places else 0
    return Trained(
        rows=side if places and side * side == places else None,
        places=places,
        frames=None if temporal is None else temporal.shape[1],
        space_scale=None if spatial is None else _scale(spatial[0], spatial.shape[2] // 2),
        time_scale=None if temporal is None else _scale(temporal[0], temporal.shape[2]),
    )


def _scale(table: Tensor, width: int) -> float | None:
    """The scale of index / scale, read off one axis's [sin | cos], the first `width` channels of the table's row 1."""
    half = width // 2
    if len(table) < 2 or half < 1:
        return None
    slow = round(half * math.log(64, 10000))  # turns once in some 400 positions: neither wraps nor drowns in rounding
    angle = math.atan2(float(table[1, slow]), float(table[1, half + slow]))
    if not math.isfinite(angle):
        return None
    position = Fraction(angle * 10000 ** (slow / half)).limit_denominator(64)
    return float(1 / position) if position > 0 else None


def num_elements(weights: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in weights.values())


def dtype_name(weights: Mapping[str, Tensor]) -> str:
    """The dtype that most elements have, and that there are others."""
    counts: dict[torch.dtype, int] = {}
    for value in weights.values():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    most = max(counts, key=lambda dtype: counts[dtype])
    return str(most).removeprefix("torch.") + (" and others" if len(counts) > 1 else "")
