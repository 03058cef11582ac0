"""Weights under which an untrained AutoencoderKL already is a codec: latents are the shrunken picture's colours.

From weights at random, most of a short training goes into finding out where a latent lies and which colour it has. Here
the chain of first and last convolutions, shortcuts, strides and upsamplings carries the three colours through, halved
by means on the way in, doubled by nearest neighbours on the way out, and every residual branch begins at zero. What is
left at random feeds what training adds.

Both halves end in GroupNorm and SiLU, which would bend this. So a value v travels as the pair (v, -v), for which
SiLU(v) - SiLU(-v) = v, and its group of channels has a constant pair so large that the group's deviation is nearly that
constant's: colours change it by three percent at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONSTANT = 3.0  # of the large pair; larger, weights that read it would move much by a step
COLOUR_VARIANCE = 0.25  # of values from -1 to 1
# Brightness and two colour differences, orthogonal; differences are small in films, so they are given more of the range
OPPONENTS = ((0.577, 0.577, 0.577), (0.707, 0.0, -0.707), (0.408, -0.816, 0.408))
GAINS = (1.0, 4.0, 4.0)


@dataclass(frozen=True)
class Places:
    """Which channels of a level carry what."""

    pairs: tuple[tuple[int, int], ...]  # of the three colours: v, -v
    constants: tuple[tuple[int, int], ...]  # a pair in each of their groups
    unused: tuple[int, ...]  # the rest of these groups, which must stay zero
    gain: float  # of the group norm

    @staticmethod
    def of(channels: int, groups: int) -> Places | None:
        """None where the groups have no room."""
        size = channels // groups
        room = size // 2 - 1  # colours that a group takes beside its constant
        if room < 1 or -(-3 // room) > groups:
            return None
        used = -(-3 // room)
        pairs = tuple((size * (n // room) + 2 * (n % room), size * (n // room) + 2 * (n % room) + 1) for n in range(3))
        constants = tuple((size * (g + 1) - 2, size * (g + 1) - 1) for g in range(used))
        taken = {place for pair in pairs + constants for place in pair}
        colours = min(room, 3)
        variance = 2 * (CONSTANT**2 + colours * COLOUR_VARIANCE) / size
        return Places(pairs, constants, tuple(sorted(set(range(used * size)) - taken)), variance**-0.5)


def has_room(channels: Sequence[int], groups: int, latent_channels: int) -> bool:
    """Whether a model of these sizes can begin so."""
    return latent_channels >= 3 and all(Places.of(width, groups) is not None for width in channels)


@torch.no_grad()
def start_as_picture(vae: Any) -> bool:
    """Set an AutoencoderKL's weights so, in place; False, and nothing is changed, where its groups have no room."""
    cfg = vae.config
    if not has_room(cfg.block_out_channels, cfg.norm_num_groups, cfg.latent_channels):
        return False
    levels = [Places.of(channels, cfg.norm_num_groups) for channels in cfg.block_out_channels]
    places = [found for found in levels if found is not None]
    for module in vae.modules():
        if hasattr(module, "conv1") and hasattr(module, "conv2"):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    for half in (vae.encoder, vae.decoder):
        for attention in getattr(half.mid_block, "attentions", None) or ():
            if attention is not None:
                for parameter in attention.to_out.parameters():
                    nn.init.zeros_(parameter)
    opponents = torch.tensor(OPPONENTS) * torch.tensor(GAINS)[:, None]  # [latent, colour]
    _encoder(vae, places, opponents)
    _decoder(vae, places, torch.linalg.inv(opponents))
    return True


def _encoder(vae: Any, places: list[Places], opponents: Tensor) -> None:
    first, last, latents = places[0], places[-1], vae.config.latent_channels
    _enter(vae.encoder.conv_in, first, torch.eye(3))
    before = first
    for block, own in zip(vae.encoder.down_blocks, places, strict=True):
        _shortcuts(block.resnets, before, own)
        for layer in block.downsamplers or ():
            _carry(layer.conv, own, own, taps=[(row, column, 0.25) for row in (0, 1) for column in (0, 1)])
        before = own
    _leave(vae.encoder.conv_out, last, opponents)
    vae.encoder.conv_out.weight[latents:] = 0.0
    vae.encoder.conv_out.bias[latents:] = 0.0
    vae.quant_conv.weight.copy_(torch.eye(2 * latents)[:, :, None, None])
    vae.quant_conv.bias[:latents] = 0.0


def _decoder(vae: Any, places: list[Places], colours: Tensor) -> None:
    latents = vae.config.latent_channels
    vae.post_quant_conv.weight.copy_(torch.eye(latents)[:, :, None, None])
    nn.init.zeros_(vae.post_quant_conv.bias)
    _enter(vae.decoder.conv_in, places[-1], colours)
    before = places[-1]
    for block, own in zip(vae.decoder.up_blocks, reversed(places), strict=True):
        _shortcuts(block.resnets, before, own)
        for layer in block.upsamplers or ():
            _carry(layer.conv, own, own, taps=[(1, 1, 1.0)])
        before = own
    _leave(vae.decoder.conv_out, places[0], torch.eye(3))


def _shortcuts(resnets: Any, before: Places, own: Places) -> None:
    for resnet in resnets:
        if resnet.conv_shortcut is not None:
            _carry(resnet.conv_shortcut, before, own, taps=[(0, 0, 1.0)])
        before = own


def _carry(conv: nn.Conv2d, before: Places, own: Places, taps: list[tuple[int, int, float]]) -> None:
    """Colours pass through; the constants are made anew, so that no border pads them away."""
    _clear(conv, own)
    for there, here in zip(before.pairs, own.pairs, strict=True):
        for source, target in zip(there, here, strict=True):
            for row, column, weight in taps:
                conv.weight[target, source, row, column] = weight


def _enter(conv: nn.Conv2d, own: Places, mix: Tensor) -> None:
    """From the first channels, mixed, to pairs; `mix` [3, 3] by colour and channel."""
    _clear(conv, own)
    for row, (plus, minus) in zip(mix, own.pairs, strict=True):
        conv.weight[plus, :3, 1, 1], conv.weight[minus, :3, 1, 1] = row, -row


def _leave(conv: nn.Conv2d, own: Places, mix: Tensor) -> None:
    """From pairs, normed and bent, to the first channels; `mix` [3, 3] by channel and colour."""
    conv.weight[:3] = 0.0
    conv.bias[:3] = 0.0  # type: ignore[index]
    for colour, (plus, minus) in enumerate(own.pairs):
        weights = mix[:, colour] / own.gain
        conv.weight[:3, plus, 1, 1], conv.weight[:3, minus, 1, 1] = weights, -weights


def _clear(conv: nn.Conv2d, own: Places) -> None:
    """Zero what writes to the pairs and to the rest of their groups; let the constants be constant."""
    assert conv.bias is not None
    held = [place for pair in own.pairs + own.constants for place in pair] + list(own.unused)
    conv.weight[held] = 0.0
    conv.bias[held] = 0.0
    for plus, minus in own.constants:
        conv.bias[plus], conv.bias[minus] = CONSTANT, -CONSTANT
