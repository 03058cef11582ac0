"""Multiplications of the models, by formula: exactly what torch's FlopCounterMode counts, without running anything.

One multiplication with its addition is two operations (FLOPs) here, as chips are rated; the DiT and PixArt papers
count it as one. Softmax, norms, activations and modulation are left out, as they are everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opensora_repro.models.config import (
    DiTConfig,
    ModelConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TrainedConfig,
    is_costly,
)
from opensora_repro.planning.parameters import (
    TIMESTEP_CHANNELS,
    caption_weights,
    mlp_width,
    scalar_embedders,
    scalar_weights,
    timestep_weights,
    token_weights,
)
from opensora_repro.planning.sizes import Grid


@dataclass(frozen=True)
class Products:
    """Multiply-accumulates of one sample's forward pass."""

    blocks: int
    outside: int  # embedders and the final layer
    inputs: int  # of `outside`: layers that read data, of which a backward pass wants no gradient
    costly: int = 0  # of `blocks`: whose results selective activation checkpointing keeps
    untrained: int = 0  # of a backward pass through all: what is left out where only a part is trained
    idle: int = 0  # of `blocks`: through which no backward pass goes,
    idle_costly: int = 0  # and of `costly`

    @property
    def forward_flops(self) -> int:
        return 2 * (self.blocks + self.outside)

    @property
    def training_flops(self) -> int:
        """Forward and backward: the model FLOPs that utilisation is measured by."""
        return 2 * (3 * (self.blocks + self.outside) - self.inputs - self.untrained)

    def recomputed_flops(self, checkpointing: str) -> int:
        """What activation checkpointing adds: of every block's forward pass, what is not kept."""
        blocks, costly = self.blocks - self.idle, self.costly - self.idle_costly
        return 2 * {"none": 0, "selective": blocks - costly, "full": blocks}[checkpointing]


def forward_products(cfg: ModelConfig, grid: Grid) -> Products:
    return PRODUCTS[type(cfg)](cfg, grid)


def _stdit_products(cfg: TrainedConfig, grid: Grid) -> Products:
    dim, text, tokens = cfg.hidden_size, cfg.model_max_length, grid.tokens
    blocks = costly = 0
    for spans in cfg.block_spans:
        seen = sum(attended(cfg, grid, spans))
        blocks += tokens * (token_weights(cfg, spans) + 2 * dim * seen) + text * 2 * dim**2
        costly += _costly_products(cfg, grid, spans)
    patch = dim * math.prod(cfg.patch_size)
    scalars = scalar_embedders(cfg)
    sinusoids = TIMESTEP_CHANNELS * (dim + sum(width * numbers for width, numbers in scalars))
    inputs = tokens * patch * cfg.in_channels + sinusoids + text * cfg.caption_channels * dim
    outside = tokens * patch * (cfg.in_channels + cfg.out_channels) + text * caption_weights(cfg)
    outside += timestep_weights(cfg) + sum(scalar_weights(width) * numbers for width, numbers in scalars)
    found = Products(cfg.depth * blocks, outside, inputs, cfg.depth * costly)
    if cfg.only_train_temporal:
        return _of_temporal_blocks(cfg, grid, found)
    if not cfg.freeze_y_embedder:
        return found
    # Neither the caption MLP nor what every block makes of its result asks for gradients of their input.
    untrained = text * (cfg.caption_channels * dim + 2 * dim**2) + cfg.depth * len(cfg.block_spans) * text * 2 * dim**2
    return replace(found, untrained=untrained)


def _of_temporal_blocks(cfg: TrainedConfig, grid: Grid, found: Products) -> Products:
    """Where these alone are trained: gradients pass through all blocks but the first, which comes before them.

    Of the frozen ones they leave out the weights', and everywhere those of the captions, which are frozen, too.
    """
    dim, tokens, text = cfg.hidden_size, grid.tokens, cfg.model_max_length * 2 * cfg.hidden_size**2
    last = tokens * dim * math.prod(cfg.patch_size) * cfg.out_channels  # the final layer
    needed, idle, idle_costly = found.outside + last, 0, 0
    for spans in cfg.block_spans:
        weights, attention = tokens * token_weights(cfg, spans), tokens * 2 * dim * sum(attended(cfg, grid, spans))
        if spans == ("time",):
            needed += cfg.depth * (3 * (weights + attention) + 2 * text)
        else:
            idle, idle_costly = weights + attention + text, _costly_products(cfg, grid, spans)
            needed += idle + (cfg.depth - 1) * (2 * weights + 3 * attention + text)
    untrained = 3 * (found.blocks + found.outside) - found.inputs - needed
    return replace(found, untrained=untrained, idle=idle, idle_costly=idle_costly)


def attended(cfg: TrainedConfig, grid: Grid, spans: Sequence[str]) -> tuple[int, ...]:
    """Tokens that a token looks at in each of a block's attentions."""
    lengths = {"space": grid.places, "time": grid.frames, "space_time": grid.tokens}
    return (*(lengths[span] for span in spans), cfg.model_max_length)


def _costly_products(cfg: TrainedConfig, grid: Grid, spans: Sequence[str]) -> int:
    """Of one block; as models/recompute.py decides, call by call."""
    dim, wide = cfg.hidden_size, mlp_width(cfg)
    found = dim * wide if is_costly(wide, dim) else 0
    found += sum(2 * dim * seen for seen in attended(cfg, grid, spans) if is_costly(2 * seen, dim))
    return grid.tokens * found


def _dit_products(cfg: DiTConfig, grid: Grid) -> Products:
    dim, tokens = cfg.hidden_size, grid.tokens
    # Latte's blocks take turns: within a frame, then over time.
    spans = (grid.places, grid.frames) if cfg.factorised else (tokens, tokens)
    seen = sum(spans[i % 2] for i in range(cfg.depth))
    block = tokens * (4 * dim**2 + 2 * dim * mlp_width(cfg)) + 6 * dim**2
    patch = dim * math.prod(cfg.patch_size)
    caption = cfg.caption_channels * dim if cfg.condition == "text" else 0
    inputs = tokens * patch * cfg.in_channels + TIMESTEP_CHANNELS * dim + caption
    outside = inputs + dim**2 + (dim**2 if caption else 0) + tokens * patch * cfg.out_channels + 2 * dim**2
    return Products(cfg.depth * block + tokens * 2 * dim * seen, outside, inputs)


PRODUCTS: dict[type[Any], Callable[[Any, Grid], Products]] = {
    STDiTConfig: _stdit_products,
    STDiT2Config: _stdit_products,
    STDiT3Config: _stdit_products,
    DiTConfig: _dit_products,
}
