"""Tiny weights on disk in the layouts in which the real ones are published: the same keys, wrappers and tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_repro.config import Config, DataConfig, dump_toml
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.layers import spatial_positions, temporal_positions
from opensora_repro.models.stdit import STDiT
from opensora_repro.weights.diffusers_layout import (
    dit_diffusers_config,
    dit_to_diffusers,
    pixart_diffusers_config,
    pixart_to_diffusers,
)

HEADS = 4  # of all these models; no published model has 48 channels, so that files alone do not tell
ROWS = 4  # tokens along each side of the frames that the position tables are for
FRAMES = 6
IMAGE = STDiTConfig(
    hidden_size=48, depth=2, num_heads=HEADS, caption_channels=32, model_max_length=8, temporal_attention=False
)
MS = replace(IMAGE, size_conditioning=True, base_size=ROWS, space_scale=2.0)
VIDEO = replace(IMAGE, temporal_attention=True, space_scale=0.5, time_scale=2 / 3)
LABELS = DiTConfig(hidden_size=48, depth=2, num_heads=HEADS, num_classes=10)
LATTE = replace(LABELS, factorised=True)

# name -> what it is a model of
PUBLISHED: dict[str, STDiTConfig | DiTConfig] = {
    "pixart.pth": IMAGE,
    "pixart-ms.pth": MS,
    "stdit.pth": VIDEO,
    "dit.pt": LABELS,
    "latte.pt": LATTE,
    "diffusers-pixart": IMAGE,
    "diffusers-dit": LABELS,
    "checkpoint": VIDEO,
}


def make_model(cfg: STDiTConfig | DiTConfig, seed: int = 0) -> Any:
    """A model none of whose branches is silent."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = (STDiT(cfg) if isinstance(cfg, STDiTConfig) else DiT(cfg)).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def publish(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write one of PUBLISHED, its config changed, into `folder`; return its path.

    The diffusers folders have no null caption; a checkpoint's average is another model, of the seed after.
    """
    cfg = replace(PUBLISHED[name], **changes)
    model = make_model(cfg, seed)
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if name.startswith("diffusers"):
        _write_diffusers(path, cfg, model)
    elif name == "checkpoint":
        path.mkdir()
        config = Config(model=cfg, data=DataConfig(num_frames=FRAMES, height=64, width=64))
        (path / "config.toml").write_text(dump_toml(config))
        save_file(model.state_dict(), path / "model.safetensors")
        save_file(make_model(cfg, seed + 1).state_dict(), path / "ema.safetensors")
    else:
        torch.save(_content(name, cfg, model), path)
    return path


def _content(name: str, cfg: STDiTConfig | DiTConfig, model: Any) -> dict[str, Any]:
    weights: dict[str, Tensor] = dict(model.state_dict())
    spatial, temporal = position_tables(cfg)
    if name == "stdit.pth":
        return {**weights, "pos_embed": spatial, "pos_embed_temporal": temporal}
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].squeeze(2)
    weights["pos_embed"] = spatial
    if name == "dit.pt":
        return weights
    if name == "latte.pt":
        return {"model": {key: torch.zeros(1) for key in weights}, "ema": {**weights, "temp_embed": temporal}}
    return {"state_dict": weights, "epoch": 3}


def position_tables(cfg: STDiTConfig | DiTConfig) -> tuple[Tensor, Tensor]:
    """Float32 [1, ROWS * ROWS, D] and [1, FRAMES, D]."""
    space, time = (cfg.space_scale, cfg.time_scale) if isinstance(cfg, STDiTConfig) else (1.0, 1.0)
    spatial = spatial_positions(cfg.hidden_size, ROWS, ROWS, scale=space)
    return spatial.float()[None], temporal_positions(cfg.hidden_size, FRAMES, scale=time).float()[None]


def _write_diffusers(folder: Path, cfg: STDiTConfig | DiTConfig, model: Any) -> None:
    sample_size = ROWS * cfg.patch_size[1]
    if isinstance(cfg, STDiTConfig):
        config, tensors = pixart_diffusers_config(cfg, sample_size), pixart_to_diffusers(model.state_dict())
    else:
        config, tensors = dit_diffusers_config(cfg, sample_size), dit_to_diffusers(model.state_dict())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "diffusion_pytorch_model.safetensors")
