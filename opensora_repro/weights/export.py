"""Write weights in the layouts that other tools read: Open-Sora's and PixArt's .pth, diffusers' folders, safetensors.

Values never change: loading what was written gives the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opensora_repro.files import replacing
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.layers import spatial_positions, temporal_positions
from opensora_repro.weights.diffusers_layout import (
    dit_diffusers_config,
    dit_to_diffusers,
    pixart_diffusers_config,
    pixart_to_diffusers,
)
from opensora_repro.weights.files import FACTS_KEY, NULL_CAPTION_FILE, WeightsError
from opensora_repro.weights.layouts import KERNEL
from opensora_repro.weights.unwrap import NULL_CAPTION

FORMATS = ("opensora", "pixart", "diffusers", "safetensors")


@dataclass(frozen=True)
class Grid:
    """Tokens of a sample, for the position tables that published files carry."""

    frames: int
    rows: int
    cols: int


def export(weights: Mapping[str, Tensor], model: STDiTConfig | DiTConfig, grid: Grid, to: str, out: Path) -> None:
    """Write `weights` (our keys) as `to`, one of FORMATS: a file, or for diffusers a folder, that must not exist yet.

    Raises WeightsError where the layout has no place for the model, OSError when the disk has none.
    """
    if out.exists():
        raise WeightsError(f"{out}: exists already; move it away, or name another --out")
    _check_place(model, to)
    if isinstance(model, STDiTConfig) and NULL_CAPTION not in weights and to != "diffusers":
        raise WeightsError(f"--to {to}: it needs a null caption, and these weights (diffusers') have none")
    try:
        with replacing(out) as unfinished:
            if to == "safetensors":
                size = {"sample_size": _sample_size(model, grid), "sample_frames": grid.frames}
                facts = {"format": "pt", FACTS_KEY: json.dumps(asdict(model) | size)}
                save_file(_contiguous(weights), unfinished, facts)
            elif to == "diffusers":
                _write_diffusers(weights, model, grid, unfinished)
            elif to == "pixart":
                torch.save({"state_dict": _image_layout(weights, model, grid)}, unfinished)
            else:
                torch.save({**weights, **position_tables(model, grid)}, unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: torch, safetensors and Python differ
        raise OSError(f"{out}: cannot be written ({' '.join(str(error).split())[:200]})") from error


def position_tables(model: STDiTConfig | DiTConfig, grid: Grid) -> dict[str, Tensor]:
    """The buffers of Open-Sora's models, float32 [1, S, D] and [1, T, D], under their names there."""
    dim, scales = model.hidden_size, (1.0, 1.0)
    name, base_size = "pos_embed_spatial", None
    if isinstance(model, STDiTConfig):
        name, scales = "pos_embed", (model.space_scale, model.time_scale)
        if not model.temporal_attention:
            base_size = model.base_size or math.isqrt(grid.rows * grid.cols)
    spatial = spatial_positions(dim, grid.rows, grid.cols, scale=scales[0], base_size=base_size)
    temporal = temporal_positions(dim, grid.frames, scale=scales[1])
    return {name: spatial.float()[None], "pos_embed_temporal": temporal.float()[None]}


def _check_place(model: STDiTConfig | DiTConfig, to: str) -> None:
    text = isinstance(model, STDiTConfig)
    if to == "pixart" and not text:
        raise WeightsError("--to pixart: these are DiT or Latte weights, expected PixArt's; use opensora or diffusers")
    if to in ("pixart", "diffusers") and isinstance(model, STDiTConfig) and model.temporal_attention:
        raise WeightsError(
            f"--to {to}: it has no place for temporal attention (a video model); use opensora or safetensors"
        )
    if to == "diffusers" and isinstance(model, DiTConfig) and (model.factorised or model.condition != "label"):
        raise WeightsError("--to diffusers: its DiT knows classes and single images only; use opensora or safetensors")
    if to in ("pixart", "diffusers") and (model.patch_size[0] != 1 or model.mlp_ratio != 4):
        raise WeightsError(f"--to {to}: it has patches of one frame and model.mlp_ratio=4 only")


def _image_layout(weights: Mapping[str, Tensor], model: STDiTConfig | DiTConfig, grid: Grid) -> dict[str, Tensor]:
    """As PixArt-alpha saves an image model: no frame axis in the patch kernel, one position table."""
    tables = position_tables(model, grid)
    return {**weights, KERNEL: weights[KERNEL].squeeze(2), "pos_embed": tables["pos_embed"]}


def _write_diffusers(weights: Mapping[str, Tensor], model: STDiTConfig | DiTConfig, grid: Grid, folder: Path) -> None:
    facts: dict[str, Any] = {
        "depth": model.depth,
        "num_heads": model.num_heads,
        "hidden_size": model.hidden_size,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "patch_size": model.patch_size,
        "sample_size": _sample_size(model, grid),
    }
    if isinstance(model, STDiTConfig):
        config = pixart_diffusers_config(
            **facts,
            caption_channels=model.caption_channels,
            space_scale=model.space_scale,
            size_conditioning=model.size_conditioning,
        )
        tensors = pixart_to_diffusers(weights)
    else:
        config = dit_diffusers_config(**facts, num_classes=model.num_classes)
        tensors = dit_to_diffusers(weights)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_contiguous(tensors), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    if NULL_CAPTION in weights:
        save_file({NULL_CAPTION: weights[NULL_CAPTION].contiguous()}, folder / NULL_CAPTION_FILE, {"format": "pt"})


def _sample_size(model: STDiTConfig | DiTConfig, grid: Grid) -> int:
    """Latents along a side; PixArt's positions stretch to it."""
    side = (isinstance(model, STDiTConfig) and model.base_size) or math.isqrt(grid.rows * grid.cols)
    return side * model.patch_size[1]


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: no two of one memory, as the parts of a joined weight and repeated ones are."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        whole = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        address = value.untyped_storage().data_ptr()
        result[key] = value if whole and address not in seen else value.clone(memory_format=torch.contiguous_format)
        seen.add(address)
    return result
