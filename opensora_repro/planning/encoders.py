"""The frozen models' sizes and work, from their config.json: an autoencoder and a T5 text encoder.

For hub names these are the published models that the recipes use. Autoencoders are counted in image_encoders.py and in
video_encoders.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensora_repro.config import Config, TextConfig
from opensora_repro.frozen.geometry import IMAGE_KIND
from opensora_repro.planning.image_encoders import PUBLISHED_VAE, AutoencoderSizes, image_autoencoder_sizes
from opensora_repro.planning.sizes import autoencoder_kind, read_model_config
from opensora_repro.planning.video_encoders import video_autoencoder_sizes

PUBLISHED_T5 = {
    "d_kv": 64,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}
T5_SIZES = {  # of T5 1.1, whose hub names end in them
    "small": {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8},
    "base": {"d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 24},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24},
}


@dataclass(frozen=True)
class FrozenSizes(AutoencoderSizes):
    """Both frozen models of a config."""

    text_parameters: int
    text_part: int  # parameters of the largest part of T5 that is gathered at once where it is spread
    text_flops: float  # a caption


def frozen_sizes(cfg: Config) -> FrozenSizes:
    size = T5_SIZES.get(cfg.text.path.rpartition("-")[2], T5_SIZES["xxl"])
    text = {**PUBLISHED_T5, **size, **read_model_config(cfg.text.path)}
    return FrozenSizes(
        **vars(autoencoder_sizes(cfg)),
        text_parameters=t5_parameters(text),
        text_part=max(text["vocab_size"] * text["d_model"], _t5_layer(text) + 2 * text["d_model"]),
        text_flops=2.0 * t5_products(text, cfg.model.model_max_length),
    )


def autoencoder_sizes(cfg: Config) -> AutoencoderSizes:
    if autoencoder_kind(cfg.vae.path) != IMAGE_KIND:
        return video_autoencoder_sizes(cfg)
    return image_autoencoder_sizes({**PUBLISHED_VAE, **read_model_config(cfg.vae.path)}, cfg)


def text_values(cfg: TextConfig, sizes: FrozenSizes, processes: int) -> float:
    """Weights of T5 in the memory of a process's device.

    With `text.shard` a share, and of one part all twice: as it arrives from the others, and as it is used.
    """
    if cfg.offload:
        return 0
    if not cfg.shard or processes == 1:
        return sizes.text_parameters
    return sizes.text_parameters / processes + 2 * sizes.text_part


# ---------------------------------------------------------------------------------------------------------------------
# T5


def t5_parameters(cfg: dict[str, Any]) -> int:
    dim, norms = cfg["d_model"], 2 * cfg["d_model"]
    biases = cfg["relative_attention_num_buckets"] * cfg["num_heads"]
    return int(cfg["vocab_size"] * dim + cfg["num_layers"] * (_t5_layer(cfg) + norms) + biases + dim)


def t5_products(cfg: dict[str, Any], length: int) -> int:
    """Multiply-accumulates for one caption of so many tokens."""
    attention = 2 * length * cfg["num_heads"] * cfg["d_kv"]
    return int(cfg["num_layers"] * length * (_t5_layer(cfg) + attention))


def _t5_layer(cfg: dict[str, Any]) -> int:
    gated = "gated" in cfg["feed_forward_proj"]
    return int(cfg["d_model"] * (4 * cfg["num_heads"] * cfg["d_kv"] + (3 if gated else 2) * cfg["d_ff"]))
