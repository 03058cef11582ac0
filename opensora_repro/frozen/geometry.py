"""What an autoencoder makes of a clip's size, from its config.json alone. Needs no torch.

Known are AutoencoderKL, which takes frames one by one, Open-Sora 1.2's, and the causal ones of diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.models.autoencoder_config import TemporalVAEConfig, VideoAutoencoderConfig

IMAGE_KIND, OPEN_SORA_KIND = "AutoencoderKL", "VideoAutoencoderPipeline"
CAUSAL_KINDS = (
    "AutoencoderKLCogVideoX", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
)  # fmt: skip
OPEN_SORA_VAE = "hpcai-tech/OpenSora-VAE-v1.2"
COG_BATCH = 8  # frames that CogVideoX's takes at once; two latents
# Of AutoencoderKL, as its constructor has it: OpenSora-VAE-v1.2's config need not repeat SDXL's layout.
SDXL_LAYOUT: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Geometry:
    """Strides, and which numbers of frames come back as they went in."""

    kind: str  # the class in config.json
    latent_channels: int
    spatial_stride: int  # pixels a latent
    temporal_stride: int = 1  # frames a latent
    chunk: int | None = None  # frames that are encoded without the others
    period: int = 1  # one frame is exact, and what leaves one of the remainders over this
    remainders: tuple[int, ...] = (0,)

    def latent_frames(self, num_frames: int) -> int:
        """Latents of a clip of so many frames."""
        whole, rest = divmod(num_frames, self.chunk or num_frames)
        return whole * -(-(self.chunk or num_frames) // self.temporal_stride) + -(-rest // self.temporal_stride)

    def latent_spans(self, num_frames: int) -> list[range]:
        """Frames that each latent covers: what is before a clip or a chunk fills up its first latent."""
        found = []
        for first in range(0, num_frames, self.chunk or num_frames):
            end = min(first + (self.chunk or num_frames), num_frames)
            starts = range(
                end - -(-(end - first) // self.temporal_stride) * self.temporal_stride, end, self.temporal_stride
            )
            found += [range(max(start, first), start + self.temporal_stride) for start in starts]
        return found

    def tile(self, tile_size: int) -> int:
        """`vae.tile_size` in latents: two at least, or nothing would overlap; 0: no tiles."""
        return max(2, tile_size // self.spatial_stride) if tile_size else 0

    def is_exact(self, num_frames: int) -> bool:
        """Whether decoding gives as many frames as were encoded."""
        return num_frames == 1 or num_frames % self.period in self.remainders

    def check_frames(self, num_frames: int, where: str) -> None:
        """Raise ConfigError, which names `where` the number stands and the closest that are exact."""
        if self.is_exact(num_frames):
            return
        below = next(n for n in range(num_frames, 0, -1) if self.is_exact(n))
        above = next(n for n in range(num_frames, num_frames + self.period + 1) if self.is_exact(n))
        rule = " or ".join(f"{self.period}k + {rest}" if rest else f"{self.period}k" for rest in self.remainders)
        raise ConfigError(f"{where}: an {self.kind} takes {rule} frames, not {num_frames}: set {below} or {above}")


def kind_of(config: Mapping[str, Any]) -> str:
    """The class that a config.json describes; one that names none is an AutoencoderKL's, unless it has two parts.

    OpenSora-VAE-v1.2's names its class as transformers' do.
    """
    names = [config.get("_class_name"), config.get("model_type"), *_listed(config.get("architectures"))]
    if OPEN_SORA_KIND in names or "OpenSoraVAE_V1_2" in names or "vae_temporal" in config:
        return OPEN_SORA_KIND
    return str(config.get("_class_name") or IMAGE_KIND)


def kind_in(folder: Path, config: Mapping[str, Any]) -> str:
    """As kind_of; where it is not known, Open-Sora's if the weights have its names."""
    kind = kind_of(config)
    if kind in (IMAGE_KIND, *CAUSAL_KINDS) and "_class_name" in config:
        return kind
    return OPEN_SORA_KIND if any(name.startswith("temporal_vae.") for name in _stored_names(folder)) else kind


def _stored_names(folder: Path) -> list[str]:
    """Of the tensors in model.safetensors; none where that cannot be read."""
    try:
        with open(folder / "model.safetensors", "rb") as file:
            return list(json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 24))))
    except (OSError, ValueError):
        return []


def geometry_of(config: Mapping[str, Any], kind: str) -> Geometry:
    """Of the `kind` that the config is of. Raises ValueError for one that is not known, or without what is needed."""
    if kind == OPEN_SORA_KIND:
        cfg, image = open_sora_config(config), image_config(config)
        stride = 2 ** (len(image["block_out_channels"]) - 1)
        return Geometry(kind, cfg.temporal.embed_dim, stride, cfg.temporal.stride, cfg.micro_frame_size)
    if kind not in (IMAGE_KIND, *CAUSAL_KINDS):
        raise ValueError(f"{kind} is not known; known are {', '.join((IMAGE_KIND, *CAUSAL_KINDS, OPEN_SORA_KIND))}")
    if kind == IMAGE_KIND:
        return Geometry(
            kind, _number(config, "latent_channels"), 2 ** (len(_numbers(config, "block_out_channels")) - 1)
        )
    channels = _number(config, "z_dim" if kind == "AutoencoderKLWan" else "latent_channels")
    space, time = _causal_strides(kind, config)
    if kind == "AutoencoderKLCogVideoX":
        if time != 4:
            raise ValueError(f"temporal_compression_ratio {time} is not known, 4 is")
        return Geometry(kind, channels, space, time, period=COG_BATCH, remainders=(0, 1))
    return Geometry(kind, channels, space, time, period=time, remainders=(1 % time,))


def _causal_strides(kind: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels and frames a latent."""
    if kind == "AutoencoderKLCogVideoX":
        time = config.get("temporal_compression_ratio", 4)
        return 2 ** (len(_numbers(config, "block_out_channels")) - 1), int(time)
    if kind == "AutoencoderKLWan":
        halvings = sum(map(bool, _list(config, "temperal_downsample")))
        space = 2 ** len(_list(config, "temperal_downsample")) * (config.get("patch_size") or 1)
        return space, 2**halvings
    if kind == "AutoencoderKLHunyuanVideo":
        return int(config.get("spatial_compression_ratio") or 8), int(config.get("temporal_compression_ratio") or 4)
    if kind == "AutoencoderKLLTXVideo":
        both = 2 ** sum(map(bool, _list(config, "spatio_temporal_scaling")))
        space = config.get("spatial_compression_ratio") or _number(config, "patch_size") * both
        return int(space), int(config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * both)
    return math.prod(_numbers(config, "spatial_expansions")), math.prod(_numbers(config, "temporal_expansions"))


def open_sora_config(config: Mapping[str, Any]) -> VideoAutoencoderConfig:
    """Of OpenSora-VAE-v1.2's config.json: what it does not tell is as published. Raises ValueError."""
    told = _object(config, "vae_temporal")
    known = {name: _as_tuple(told[name]) for name in TemporalVAEConfig.__dataclass_fields__ if name in told}
    others = ("micro_frame_size", "latent_scale", "shift", "scale")
    sizes = {name: _as_tuple(config[name]) for name in others if name in config}
    return VideoAutoencoderConfig(temporal=TemporalVAEConfig(**known), **sizes)


def image_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the AutoencoderKL within an OpenSora-VAE-v1.2."""
    told = _object(config, "vae_2d")
    # Where it says from which model it was taken, its layout is that one's.
    return {**SDXL_LAYOUT, **told} if "block_out_channels" in told else SDXL_LAYOUT


def _object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int:
        raise ValueError(f"config.json has no number {name}")
    return value


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    value = config.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"config.json has no list {name}")
    return value


def _numbers(config: Mapping[str, Any], name: str) -> list[int]:
    value = config.get(name)
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise ValueError(f"config.json has no numbers {name}")
    return value
