"""An AutoencoderKL's size and work, from its config.json: parameters and FLOPs exactly, memory as counted on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opensora_repro.config import Config
from opensora_repro.planning.sizes import autoencoder_geometry

PUBLISHED_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
# Feature maps at full size, each of the first width, that are alive at the largest moment (counted on a CPU).
MAPS_ENCODING, MAPS_DECODING = 5, 6
TILE_OVERLAP = 4  # as frozen/tiles.py has it, which needs torch


@dataclass(frozen=True)
class AutoencoderSizes:
    """FLOPs are of one forward pass."""

    vae_parameters: int
    encode_flops: float  # a sample's frames
    decode_flops: float
    encoding_values: int  # alive at once while a GPU encodes a micro-batch, `vae.micro_batch_size` frames at a time
    encoding_values_alone: int  # the same of one clip after the other, as a CPU encodes
    decoding_values: int  # a clip's frames, so many at a time
    decoded_values: int  # of pixels, which these become
    unfolded_values: int  # what a CPU copies together for a convolution of few channels in three dimensions


def image_autoencoder_sizes(vae: dict[str, Any], cfg: Config) -> AutoencoderSizes:
    """Of an AutoencoderKL with such a config.json."""
    frames = cfg.data.num_frames
    (rows, row_tiles), (columns, column_tiles) = tiles(cfg)
    values = rows * columns * vae["block_out_channels"][0]  # of the largest feature map of a frame, or its tile
    alone, together = (min(cfg.vae.micro_batch_size, count) for count in (frames, frames * cfg.train.batch_size))
    encoder, decoder = list(_encoder(vae)), list(_decoder(vae))
    passes = 2.0 * frames * row_tiles * column_tiles
    return AutoencoderSizes(
        vae_parameters=sum(layer.parameters for layer in encoder + decoder),
        encode_flops=passes * sum(layer.products(rows, columns) for layer in encoder),
        decode_flops=passes * sum(layer.products(rows, columns) for layer in decoder),
        encoding_values=MAPS_ENCODING * together * values,
        encoding_values_alone=MAPS_ENCODING * alone * values,
        decoding_values=MAPS_DECODING * alone * values,
        decoded_values=3 * alone * rows * columns,
        unfolded_values=0,
    )


def tiles(cfg: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of rows and columns each: a tile's pixels, and how many tiles; as frozen/tiles.py cuts, but for rounding."""
    geometry = autoencoder_geometry(cfg.vae.path)
    tile = geometry.tile(cfg.vae.tile_size) * geometry.spatial_stride

    def along(side: int) -> tuple[int, int]:
        if not tile or side <= tile:
            return side, 1
        return tile, 1 + -(-(side - tile) // (tile - tile // TILE_OVERLAP))

    return along(cfg.data.height), along(cfg.data.width)


@dataclass(frozen=True)
class Layer:
    """A convolution (or, with size 1, a linear layer at every place), its norm, and attention over all places."""

    before: int  # channels
    after: int
    size: int = 3  # of the kernel
    shrunk: int = 1  # the output's height and width are the frame's over this
    norm: bool = False  # GroupNorm of the input
    attends: bool = False

    @property
    def parameters(self) -> int:
        return self.before * self.after * self.size**2 + self.after + 2 * self.before * self.norm

    def products(self, height: int, width: int) -> int:
        """Multiply-accumulates for a frame of so many pixels."""
        places = (height // self.shrunk) * (width // self.shrunk)
        return places * (self.before * self.after * self.size**2 + 2 * places * self.after * self.attends)


def _encoder(cfg: dict[str, Any]) -> Iterator[Layer]:
    widths, shrunk = cfg["block_out_channels"], 1
    yield Layer(3, widths[0])
    for level, (before, after) in enumerate(pairwise([widths[0], *widths])):
        for i in range(cfg["layers_per_block"]):
            yield from _residual(before if i == 0 else after, after, shrunk)
        if level < len(widths) - 1:
            shrunk *= 2
            yield Layer(after, after, shrunk=shrunk)
    yield from _middle(widths[-1], shrunk, attends=cfg.get("mid_block_add_attention", True))
    moments = 2 * cfg["latent_channels"]
    yield Layer(widths[-1], moments, shrunk=shrunk, norm=True)
    yield Layer(moments, moments, 1, shrunk)


def _decoder(cfg: dict[str, Any]) -> Iterator[Layer]:
    widths, latent = cfg["block_out_channels"][::-1], cfg["latent_channels"]
    shrunk = 2 ** (len(widths) - 1)
    yield Layer(latent, latent, 1, shrunk)
    yield Layer(latent, widths[0], shrunk=shrunk)
    yield from _middle(widths[0], shrunk, attends=cfg.get("mid_block_add_attention", True))
    for level, (before, after) in enumerate(pairwise([widths[0], *widths])):
        for i in range(cfg["layers_per_block"] + 1):
            yield from _residual(before if i == 0 else after, after, shrunk)
        if level < len(widths) - 1:
            shrunk //= 2
            yield Layer(after, after, shrunk=shrunk)
    yield Layer(widths[-1], 3, norm=True)


def _residual(before: int, after: int, shrunk: int) -> Iterator[Layer]:
    yield Layer(before, after, shrunk=shrunk, norm=True)
    yield Layer(after, after, shrunk=shrunk, norm=True)
    if before != after:
        yield Layer(before, after, 1, shrunk)


def _middle(width: int, shrunk: int, *, attends: bool) -> Iterator[Layer]:
    yield from _residual(width, width, shrunk)
    if attends:
        yield Layer(width, 3 * width, 1, shrunk, norm=True)  # queries, keys and values
        yield Layer(width, width, 1, shrunk, attends=True)
    yield from _residual(width, width, shrunk)
