"""Frozen image encoders of timm, such as DINOv2: pictures as vectors, for what looks the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from opensora_repro.frozen.pretrained import FrozenModel, HashFile

KIND = "timm model as its hub holds them (config.json, model.safetensors)"
WEIGHTS = ("model.safetensors",)


class ImageEncoder:
    """A model of timm without its classifier, and the size and colours of the pictures it takes."""

    def __init__(self, model: Any, device: str) -> None:
        """Raises ValueError for a model of other pictures than square ones in colour."""
        from timm.data import resolve_model_data_config

        taken = resolve_model_data_config(model)
        channels, self.image_size, width = taken["input_size"]
        if channels != 3 or self.image_size != width:
            raise ValueError(
                f"it takes pictures of {channels}x{self.image_size}x{width}, expected square ones in colour"
            )
        self.model, self.device = model.float().to(device).eval().requires_grad_(False), device
        self.mean, self.std = taken["mean"], taken["std"]

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Return unit vectors, float32 [N, D], of uint8 pictures [H, W, 3] of any sizes, all in one batch."""
        if not len(pictures):
            return torch.empty(0, 0)
        pixels = torch.cat([prepared(picture, self.image_size, self.mean, self.std) for picture in pictures])
        return unit(self.model(pixels.to(self.device)))


def find_image_encoder(path: str, *, key: str, device: str = "cpu") -> FrozenModel[ImageEncoder]:
    """Find a local folder or a hub name in the cache; `key` names the option in errors. Raises ModelNotFound."""

    def load(folder: str, **_: Any) -> ImageEncoder:
        import timm
        from timm.models import PretrainedCfg

        told = {**found.config, **found.config.get("pretrained_cfg", {})}  # older files hold all at the top
        known = {item.name for item in fields(PretrainedCfg)} - {"url", "file", "hf_hub_id", "source"}
        config = PretrainedCfg(file=f"{folder}/{WEIGHTS[0]}", **{name: told[name] for name in known & set(told)})
        # With the classifier that the file has, so that timm wants all of its weights
        model = timm.create_model(
            str(told["architecture"]),
            pretrained=True,
            pretrained_cfg=config,
            **{"num_classes": config.num_classes, **found.config.get("model_args", {})},
        )
        model.reset_classifier(0)
        return ImageEncoder(model, device)

    found = FrozenModel(load, path, key=key, kind=KIND, weights=WEIGHTS)
    return found


def image_encoder_fingerprint(path: str, *, key: str, hash_file: HashFile) -> str:
    """Return a hash of the model's files without reading it in. Raises ModelNotFound."""
    return find_image_encoder(path, key=key).fingerprint(hash_file)


def prepared(picture: np.ndarray, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale the short side of uint8 [H, W, 3], cut the middle, normalise: float32 [1, 3, size, size]."""
    pixels = torch.tensor(picture).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    height, width = pixels.shape[2:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    middle = pixels[:, :, top : top + size, left : left + size] / 255
    return (middle - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(1, 3, 1, 1)


def unit(vectors: Tensor) -> Tensor:
    """Return float32 vectors [N, D] of length 1, on the CPU."""
    return normalize(vectors.float(), dim=-1).cpu()
