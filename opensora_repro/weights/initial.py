"""First values of tensors that a model has and the weights it begins from have not, each from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.models.layers import rotary_frequencies
from opensora_repro.weights.files import NULL_CAPTION, ROTARY

if TYPE_CHECKING:
    from opensora_repro.weights.families import Network


def fill_initial(model: Network, key: str, value: Tensor, seed: Sequence[int]) -> None:
    """Fill a state dict's tensor as a new model of the kind has it; a null caption is zero until it is known."""
    module, _, kind = key.rpartition(".")
    if key == ROTARY:
        value.copy_(rotary_frequencies(2 * len(value)))
    elif key == NULL_CAPTION or kind == "bias":
        value.zero_()
    elif module.endswith("_norm"):
        value.fill_(1.0)
    elif kind.startswith("scale_shift_table"):
        draw_normal(value, value.shape[1] ** -0.5, seed)
    else:
        assert isinstance(model, CaptionedModel), "DiT begins from no other model's weights"
        std = model.initial_std(module)
        if std is None:
            draw_xavier_uniform(value, seed)
        elif std:
            draw_normal(value, std, seed)
        else:
            value.zero_()


def draw_normal(value: Tensor, std: float, seed: Sequence[int]) -> None:
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    value.copy_(torch.from_numpy(generator.standard_normal(value.numel(), np.float32)).view_as(value) * std)


def draw_xavier_uniform(weight: Tensor, seed: Sequence[int]) -> None:
    """As torch.nn.init.xavier_uniform_, from a faster generator: 28 blocks' draws would take as long as the copying."""
    bound = math.sqrt(6 / sum(weight.shape))
    generator = np.random.SFC64(np.random.SeedSequence(seed))
    for part in weight.view(-1).split(1 << 17):  # small enough for a core's cache
        bits = generator.random_raw(-(-len(part) // 2)).view(np.int32)
        torch.mul(torch.from_numpy(bits)[: len(part)], bound / 2**31, out=part)
