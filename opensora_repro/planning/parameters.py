"""Parameters of PixArt and STDiT by formula; tests hold the sums against the model itself."""

from __future__ import annotations

import math

from opensora_repro.models.config import ModelConfig, STDiTConfig

TIMESTEP_CHANNELS = 256  # of the sinusoid, see models/layers.py, which needs torch


def count_parameters(cfg: STDiTConfig) -> int:
    """Everything that is trained."""
    dim, volume = cfg.hidden_size, math.prod(cfg.patch_size)
    tables = 6 * cfg.depth * dim + 2 * dim
    rows = (_attentions(cfg) + 2) * dim  # biases of the layers that end a branch
    size_biases = 4 * (dim // 3) if cfg.size_conditioning else 0
    outside_biases = dim + 2 * dim + 6 * dim + 2 * dim + size_biases + volume * cfg.out_channels
    blocks = cfg.depth * (block_weights(cfg) + column_biases(cfg) + rows)
    return blocks + outside_weights(cfg) + outside_biases + tables


def cut_parameters(cfg: STDiTConfig) -> int:
    """What tensor parallelism shares out: the blocks' matrices, and the biases of those cut by columns."""
    return cfg.depth * (block_weights(cfg) + column_biases(cfg))


def column_biases(cfg: STDiTConfig) -> int:
    """Biases of a block's layers that begin a branch: queries, keys, values, and the MLP's wide ones."""
    return (3 * _attentions(cfg) + 3) * cfg.hidden_size + mlp_width(cfg)


def token_weights(cfg: STDiTConfig) -> int:
    """Elements of a block's matrices that every token is multiplied with."""
    dim = cfg.hidden_size
    return _attentions(cfg) * 4 * dim**2 + 2 * dim**2 + 2 * dim * mlp_width(cfg)


def block_weights(cfg: STDiTConfig) -> int:
    """Elements of all of a block's matrices, those for the caption's keys and values among them."""
    return token_weights(cfg) + 2 * cfg.hidden_size**2


def outside_weights(cfg: STDiTConfig) -> int:
    """Elements of the matrices of embedders and final layer."""
    patch = cfg.hidden_size * math.prod(cfg.patch_size)
    size = 2 * size_weights(cfg)  # one embedder for height and width, one for their ratio
    return timestep_weights(cfg) + size + caption_weights(cfg) + patch * (cfg.in_channels + cfg.out_channels)


def input_weights(cfg: STDiTConfig) -> int:
    """Of these, the ones that data is multiplied with: no gradient flows through them."""
    dim = cfg.hidden_size
    sinusoids = TIMESTEP_CHANNELS * (dim + (2 * (dim // 3) if cfg.size_conditioning else 0))
    return sinusoids + dim * (cfg.caption_channels + math.prod(cfg.patch_size) * cfg.in_channels)


def timestep_weights(cfg: STDiTConfig) -> int:
    """Elements of the matrices that make the modulation of a timestep."""
    return TIMESTEP_CHANNELS * cfg.hidden_size + 7 * cfg.hidden_size**2


def size_weights(cfg: STDiTConfig) -> int:
    """Of one of the two embedders of a picture's size; each gives a third of the width."""
    third = cfg.hidden_size // 3
    return TIMESTEP_CHANNELS * third + third**2 if cfg.size_conditioning else 0


def caption_weights(cfg: STDiTConfig) -> int:
    return cfg.caption_channels * cfg.hidden_size + cfg.hidden_size**2


def mlp_width(cfg: ModelConfig) -> int:
    return int(cfg.hidden_size * cfg.mlp_ratio)


def _attentions(cfg: STDiTConfig) -> int:
    return 2 if cfg.temporal_attention else 1
