"""From pixels to tokens: what an autoencoder and the model's patches make of a clip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opensora_repro.config import Config, ConfigError
from opensora_repro.files import here_or_shipped
from opensora_repro.models.config import ModelConfig

PUBLISHED_STRIDES = (1, 8, 8)  # of the Stable Diffusion autoencoders, which take frames one by one

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
    frames, rows, columns = strides or autoencoder_strides(cfg.vae.path)
    data = cfg.data
    for key, pixels, stride in (("height", data.height, rows), ("width", data.width, columns)):
        if pixels % stride:
            raise ConfigError(f"data.{key} = {pixels}: expected a multiple of {stride}, the autoencoder's stride")
    return (
        cfg.model.in_channels,
        1 + -(-(data.num_frames - 1) // frames),  # causal in time: a first frame alone, then groups
        data.height // rows,
        data.width // columns,
    )


def token_grid(model: ModelConfig, shape: tuple[int, ...]) -> Grid:
    """Tokens of latents [C, T, h, w]; what does not fill a patch is padded."""
    frames, rows, columns = (-(-size // patch) for size, patch in zip(shape[1:], model.patch_size, strict=True))
    return Grid(frames, rows * columns)


def autoencoder_strides(path: str) -> Strides:
    """From a local folder's config.json; the published autoencoders' for a hub name."""
    try:
        stride = 2 ** (len(read_model_config(path)["block_out_channels"]) - 1)
    except (KeyError, TypeError):
        return PUBLISHED_STRIDES
    return (1, stride, stride)


def read_model_config(path: str) -> dict[str, Any]:
    """A local folder's config.json; nothing for a hub name or a file that cannot be read."""
    try:
        content = json.loads((here_or_shipped(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
