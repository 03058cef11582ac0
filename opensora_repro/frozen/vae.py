"""Open the frozen autoencoder that a config names, of images or of videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opensora_repro.frozen.autoencoder import KIND, WEIGHTS, Autoencoder, FrameVAE, load_from_diffusers
from opensora_repro.frozen.geometry import IMAGE_KIND, kind_in
from opensora_repro.frozen.pretrained import FrozenModel, find_folder

if TYPE_CHECKING:
    from opensora_repro.config import VaeConfig


def open_vae(cfg: VaeConfig, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder `cfg.path`, a local folder or a hub name; its weights are read when first needed.

    Its config.json says which it is. Raises ModelNotFound for what can be seen without them.
    """
    kind = _kind_in(find_folder(cfg.path, key="vae.path", kind=KIND))
    if kind != IMAGE_KIND:
        from opensora_repro.frozen.video_vae import open_video_vae

        return open_video_vae(kind, cfg, device, dtype)

    def load(path: str, **options: Any) -> Any:
        return load_from_diffusers(IMAGE_KIND, path, device, dtype, options)

    frozen = FrozenModel(load, cfg.path, key="vae.path", kind=KIND, weights=WEIGHTS)
    return FrameVAE(frozen, cfg.micro_batch_size, dtype, cfg.tile_size)


def _kind_in(folder: Path) -> str:
    """As kind_in; for a config.json that cannot be read an AutoencoderKL's, whose opening says what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return IMAGE_KIND
    return kind_in(folder, config) if isinstance(config, dict) else IMAGE_KIND
