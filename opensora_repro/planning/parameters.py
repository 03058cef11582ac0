"""Parameters of PixArt and the STDiTs by formula; tests hold the sums against the models themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opensora_repro.config import LoraConfig
from opensora_repro.models.config import ModelConfig, TrainedConfig, targeted_layers

TIMESTEP_CHANNELS = 256  # of the sinusoid, see models/layers.py, which needs torch


def count_parameters(cfg: TrainedConfig) -> int:
    """All of them, as published counts have them: those that are never trained among them."""
    dim, volume = cfg.hidden_size, math.prod(cfg.patch_size)
    embedded = sum(2 * width for width, _ in scalar_embedders(cfg))
    outside_biases = dim + 2 * dim + modulations(cfg) * dim + 2 * dim + embedded + volume * cfg.out_channels
    outside = outside_weights(cfg) + outside_biases + 2 * dim
    return cfg.depth * sum(_block(cfg, spans) for spans in cfg.block_spans) + outside + _frequencies(cfg)


def trained_parameters(cfg: TrainedConfig) -> int:
    """Those that a run trains, and keeps gradients, moments and an average of."""
    if cfg.only_train_temporal:
        return cfg.depth * sum(_block(cfg, spans) for spans in cfg.block_spans if spans == ("time",))
    captions = caption_weights(cfg) + 2 * cfg.hidden_size if cfg.freeze_y_embedder else 0
    return count_parameters(cfg) - _frequencies(cfg) - captions


def adapter_parameters(cfg: TrainedConfig, lora: LoraConfig) -> int:
    """Those of the adapters, which a run with [lora] trains alone."""
    layers = [targeted_layers(cfg, lora.targets, spans).values() for spans in cfg.block_spans]
    return cfg.depth * lora.rank * sum(inside + out for kind in layers for inside, out in kind)


def _block(cfg: TrainedConfig, spans: Sequence[str]) -> int:
    """Of a block with these self-attentions."""
    dim = cfg.hidden_size
    rows = (len(spans) + 2) * dim  # biases of the layers that end a branch
    gains = 2 * len(spans) * (dim // cfg.num_heads) if cfg.qk_norm else 0
    return block_weights(cfg, spans) + column_biases(cfg, spans) + rows + modulations(cfg) * dim + gains


def cut_parameters(cfg: TrainedConfig) -> int:
    """What tensor parallelism shares out: the blocks' matrices, and the biases of those cut by columns."""
    return cfg.depth * sum(block_weights(cfg, spans) + column_biases(cfg, spans) for spans in cfg.block_spans)


def column_biases(cfg: TrainedConfig, spans: Sequence[str]) -> int:
    """Biases of a block's layers that begin a branch: queries, keys, values, and the MLP's wide ones."""
    return (3 * len(spans) + 3) * cfg.hidden_size + mlp_width(cfg)


def token_weights(cfg: TrainedConfig, spans: Sequence[str]) -> int:
    """Elements of a block's matrices that every token is multiplied with."""
    dim = cfg.hidden_size
    return len(spans) * 4 * dim**2 + 2 * dim**2 + 2 * dim * mlp_width(cfg)


def block_weights(cfg: TrainedConfig, spans: Sequence[str]) -> int:
    """Elements of all of a block's matrices, those for the caption's keys and values among them."""
    return token_weights(cfg, spans) + 2 * cfg.hidden_size**2


def outside_weights(cfg: TrainedConfig) -> int:
    """Elements of the matrices of embedders and final layer."""
    patch = cfg.hidden_size * math.prod(cfg.patch_size)
    scalars = sum(scalar_weights(width) for width, _ in scalar_embedders(cfg))
    return timestep_weights(cfg) + scalars + caption_weights(cfg) + patch * (cfg.in_channels + cfg.out_channels)


def input_weights(cfg: TrainedConfig) -> int:
    """Of these, the ones that data is multiplied with: no gradient flows through them."""
    dim = cfg.hidden_size
    sinusoids = TIMESTEP_CHANNELS * (dim + sum(width for width, _ in scalar_embedders(cfg)))
    return sinusoids + dim * (cfg.caption_channels + math.prod(cfg.patch_size) * cfg.in_channels)


def modulations(cfg: TrainedConfig) -> int:
    """Vectors that a block's table and the timestep give it: three a branch; STDiT's two attentions share theirs."""
    return 9 if "num_frames" in cfg.conditions else 6


def timestep_weights(cfg: TrainedConfig) -> int:
    """Elements of the matrices that make the modulation of a timestep."""
    return TIMESTEP_CHANNELS * cfg.hidden_size + (1 + modulations(cfg)) * cfg.hidden_size**2


def scalar_embedders(cfg: TrainedConfig) -> tuple[tuple[int, int], ...]:
    """(width, numbers a sample) of each embedder of a number beside the timestep's."""
    dim = cfg.hidden_size
    size = ((dim // 3, 2), (dim // 3, 1)) if cfg.size_conditioning or "ar" in cfg.conditions else ()
    return (*size, *((dim, 1) for name in ("fps", "num_frames") if name in cfg.conditions))


def scalar_weights(width: int) -> int:
    return TIMESTEP_CHANNELS * width + width**2


def caption_weights(cfg: TrainedConfig) -> int:
    return cfg.caption_channels * cfg.hidden_size + cfg.hidden_size**2


def mlp_width(cfg: ModelConfig) -> int:
    return int(cfg.hidden_size * cfg.mlp_ratio)


def _frequencies(cfg: TrainedConfig) -> int:
    """The frozen ones of rotary positions."""
    return cfg.hidden_size // cfg.num_heads // 2 if cfg.rotary else 0
