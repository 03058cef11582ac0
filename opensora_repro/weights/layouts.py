"""The layouts of published weights: brought to ours, and what their shapes and position tables tell.

Which layouts there are stands in families.py. Ours are the published state-dict keys of Open-Sora 1.0, position tables
left out: they follow from the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opensora_repro.weights.files import NULL_CAPTION, ROTARY

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
