"""Tiny models of all three networks that read captions, and what they are given; none of their branches is silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.packing import PackedSTDiT, PackedSTDiT2, PackedSTDiT3
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.stdit2 import STDiT2
from opensora_repro.models.stdit3 import STDiT3

SMALL: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 8}
CONFIGS: dict[str, Any] = {
    "stdit": STDiTConfig(**SMALL),
    "pixart": STDiTConfig(**SMALL, temporal_attention=False),
    "stdit2": STDiT2Config(**SMALL),
    "stdit3": STDiT3Config(**SMALL),
}


def build(cfg: Any, packed: bool = False) -> Any:
    classes = {
        STDiTConfig: (STDiT, PackedSTDiT),
        STDiT2Config: (STDiT2, PackedSTDiT2),
        STDiT3Config: (STDiT3, PackedSTDiT3),
    }
    return classes[type(cfg)][packed](cfg)


def make_model(name: str, *, packed: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = build(replace(CONFIGS[name], **changes), packed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def conditions(cfg: Any, samples: int) -> dict[str, Tensor]:
    """What the model is told of each sample."""
    told = {
        "fps": 24.0 + torch.arange(samples),
        "height": torch.full((samples,), 96.0),
        "width": torch.full((samples,), 128.0),
        "num_frames": 17.0 + torch.arange(samples),
        "ar": torch.full((samples,), 96 / 128),
    }
    return {name: told[name] for name in getattr(cfg, "conditions", ())}


def make_inputs(
    cfg: Any, samples: int = 2, size: tuple[int, int, int] = (3, 6, 8)
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `forward` takes, by position and by name; captions of several lengths."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(samples, cfg.in_channels, *size, generator=generator)
    timestep = 1000 * torch.rand(samples, generator=generator)
    text = torch.randn(samples, 8, 16, generator=generator)
    mask = torch.arange(8) < 8 - torch.arange(samples)[:, None] % 6
    return (latents, timestep, text, mask), conditions(cfg, samples)


def some_frames(samples: int, frames: int) -> Tensor:
    """Which are generated: all but one frame, another one in each sample."""
    return torch.arange(frames) != torch.arange(samples)[:, None] % frames
