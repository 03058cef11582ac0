"""From pixels to tokens: what an autoencoder and the model's patches make of a clip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.config import Config, ConfigError
from opensora_repro.files import here_or_shipped
from opensora_repro.frozen.geometry import (
    IMAGE_KIND,
    OPEN_SORA_KIND,
    OPEN_SORA_VAE,
    Geometry,
    geometry_of,
    kind_in,
)
from opensora_repro.frozen.hub import HUB_NAME, in_cache
from opensora_repro.models.config import ModelConfig

# Of the Stable Diffusion autoencoders
PUBLISHED = Geometry(IMAGE_KIND, latent_channels=4, spatial_stride=8)

Strides = tuple[int, int, int]  # frames, rows and columns a latent


@dataclass(frozen=True)
class Grid:
    """Tokens of one sample: so many frames of so many places."""

    frames: int
    places: int

    @property
    def tokens(self) -> int:
        return self.frames * self.places


def latent_shape(cfg: Config, strides: Strides | None = None) -> tuple[int, int, int, int]:
    """[C, T, h, w] of a sample's latents; `strides` are those of `vae.path` unless given. Raises ConfigError."""
    geometry, data = autoencoder_geometry(cfg.vae.path), cfg.data
    _, rows, columns = strides or (0, geometry.spatial_stride, geometry.spatial_stride)
    if not strides:
        geometry.check_frames(data.num_frames, "data.num_frames")
    for key, pixels, stride in (("height", data.height, rows), ("width", data.width, columns)):
        if pixels % stride:
            raise ConfigError(f"data.{key} = {pixels}: expected a multiple of {stride}, the autoencoder's stride")
    return (
        cfg.model.in_channels,
        latent_frames(cfg, data.num_frames, strides),
        data.height // rows,
        data.width // columns,
    )


def latent_frames(cfg: Config, num_frames: int, strides: Strides | None = None) -> int:
    if strides:  # alone, they tell of an autoencoder that is causal in time: a first frame alone, then groups
        return 1 + -(-(num_frames - 1) // strides[0])
    return autoencoder_geometry(cfg.vae.path).latent_frames(num_frames)


def token_grid(model: ModelConfig, shape: tuple[int, ...]) -> Grid:
    """Tokens of latents [C, T, h, w]; what does not fill a patch is padded."""
    frames, rows, columns = (-(-size // patch) for size, patch in zip(shape[1:], model.patch_size, strict=True))
    return Grid(frames, rows * columns)


def autoencoder_kind(path: str) -> str:
    """The class of an autoencoder; an image autoencoder's for what cannot be read."""
    if path == OPEN_SORA_VAE:
        return OPEN_SORA_KIND
    return kind_in(_config_file(path).parent, read_model_config(path))


def autoencoder_geometry(path: str) -> Geometry:
    """By its config.json; that of the published image autoencoders for what cannot be read."""
    try:
        return geometry_of(read_model_config(path), autoencoder_kind(path))
    except (KeyError, TypeError, ValueError):
        return PUBLISHED


def read_model_config(path: str) -> dict[str, Any]:
    """Config.json of a local folder, or of a hub name that this machine has; nothing for what cannot be read."""
    try:
        content = json.loads(_config_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _config_file(path: str) -> Path:
    """Where it lies, if it does."""
    folder = here_or_shipped(path)
    cached = in_cache(path) if not folder.exists() and HUB_NAME.fullmatch(path) else None
    return (cached or folder) / "config.json"
