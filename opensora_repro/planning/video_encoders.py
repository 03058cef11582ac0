"""Autoencoders of videos: Open-Sora 1.2's by formula, those of diffusers by estimate.

An estimate scales what was counted of the class at its published size: parameters and FLOPs (with torch's counter, on
64x64 pixels; attention grows faster, and is a few hundredths of them at 720p) with the square of its width, feature
maps with the width. Feature maps were counted on a CPU, at an eighth of the published widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opensora_repro.config import Config
from opensora_repro.frozen.geometry import OPEN_SORA_KIND, image_config, open_sora_config
from opensora_repro.models.autoencoder_config import TemporalVAEConfig
from opensora_repro.planning.image_encoders import AutoencoderSizes, image_autoencoder_sizes, tiles
from opensora_repro.planning.sizes import autoencoder_geometry, autoencoder_kind, read_model_config

# Feature maps of Open-Sora 1.2's temporal part, each of the first width at full length, at its largest moments.
MAPS_ENCODING, MAPS_DECODING = 6, 12
# Values of a kernel; torch unfolds an input whose channels, frames and rows multiply to no more (oneDNN takes others)
KERNEL, UNFOLDED = 27, 20480


def video_autoencoder_sizes(cfg: Config) -> AutoencoderSizes:
    config = read_model_config(cfg.vae.path)
    kind = autoencoder_kind(cfg.vae.path)
    return _open_sora(config, cfg) if kind == OPEN_SORA_KIND else _estimate(kind, config, cfg)


# ---------------------------------------------------------------------------------------------------------------------
# Open-Sora 1.2's


@dataclass(frozen=True)
class Conv:
    """A convolution over frames of latents, of which `frames` go on for each that comes out of the encoder."""

    before: int
    after: int
    frames: int
    size: int = 3
    bias: bool = False
    norm: bool = False  # GroupNorm of the input

    @property
    def weights(self) -> int:
        return self.before * self.after * self.size**3

    @property
    def parameters(self) -> int:
        return self.weights + self.after * self.bias + 2 * self.before * self.norm


def _open_sora(config: dict[str, Any], cfg: Config) -> AutoencoderSizes:
    """The frames' part, then the temporal one, which takes turns with it. Clips are encoded one by one."""
    sizes, image = open_sora_config(config), dict(image_config(config))
    frames_part = image_autoencoder_sizes(image, cfg)
    temporal, data = sizes.temporal, cfg.data
    stride = autoencoder_geometry(cfg.vae.path).spatial_stride
    rows, columns = tiles(cfg)
    places = (rows[0] // stride) * (columns[0] // stride)
    latents = places * rows[1] * columns[1] * sizes.latent_frames(data.num_frames)
    encoder, decoder = list(_temporal_encoder(temporal)), list(_temporal_decoder(temporal))
    padded = max(-(-chunk // temporal.stride) for chunk in sizes.chunks(data.num_frames)) * temporal.stride
    values = places * padded * temporal.filters
    return AutoencoderSizes(
        vae_parameters=frames_part.vae_parameters + sum(conv.parameters for conv in encoder + decoder),
        encode_flops=frames_part.encode_flops + 2.0 * latents * sum(conv.weights * conv.frames for conv in encoder),
        decode_flops=frames_part.decode_flops + 2.0 * latents * sum(conv.weights * conv.frames for conv in decoder),
        encoding_values=max(frames_part.encoding_values_alone, MAPS_ENCODING * values),
        encoding_values_alone=max(frames_part.encoding_values_alone, MAPS_ENCODING * values),
        decoding_values=max(frames_part.decoding_values, MAPS_DECODING * values),
        decoded_values=3 * data.num_frames * rows[0] * columns[0],
        unfolded_values=0,
    )


def _temporal_encoder(cfg: TemporalVAEConfig) -> Iterator[Conv]:
    frames, halvings = cfg.stride, (*cfg.temporal_downsample, False)
    yield Conv(cfg.in_out_channels, cfg.filters, frames)
    for (before, after), halves in zip(pairwise((cfg.filters, *cfg.widths)), halvings, strict=True):
        yield from _residual(before, after, frames, cfg.num_res_blocks)
        if halves:
            frames //= 2
            yield Conv(after, after, frames, bias=True)
    yield from _residual(cfg.widths[-1], cfg.widths[-1], frames, cfg.num_res_blocks)
    yield Conv(cfg.widths[-1], 2 * cfg.latent_embed_dim, frames, 1, bias=True, norm=True)
    yield Conv(2 * cfg.latent_embed_dim, 2 * cfg.embed_dim, frames, 1, bias=True)


def _temporal_decoder(cfg: TemporalVAEConfig) -> Iterator[Conv]:
    widths, frames, doublings = cfg.widths[::-1], 1, (*cfg.temporal_downsample[::-1], False)
    yield Conv(cfg.embed_dim, cfg.latent_embed_dim, frames, 1, bias=True)
    yield Conv(cfg.latent_embed_dim, widths[0], frames, bias=True)
    yield from _residual(widths[0], widths[0], frames, cfg.num_res_blocks)
    for (before, after), doubles in zip(pairwise((widths[0], *widths)), doublings, strict=True):
        yield from _residual(before, after, frames, cfg.num_res_blocks)
        if doubles:
            yield Conv(after, 2 * after, frames, bias=True)
            frames *= 2
    yield Conv(widths[-1], cfg.in_out_channels, frames, bias=True, norm=True)


def _residual(before: int, after: int, frames: int, blocks: int) -> Iterator[Conv]:
    for number in range(blocks):
        first = before if number == 0 else after
        yield Conv(first, after, frames, norm=True)
        yield Conv(after, after, frames, norm=True)
        if first != after:
            yield Conv(first, after, frames, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Those of diffusers


@dataclass(frozen=True)
class Counted:
    """Of a class at its published size. FLOPs are a pixel's: of a first frame, and of each that follows."""

    width: int
    parameters: int
    encode: tuple[float, float]
    decode: tuple[float, float]
    # Values alive a pixel at most, over the first width: some, and some a frame of those that are alive together
    encoding: tuple[float, float]
    decoding: tuple[float, float]
    at_once: int = 1 << 30  # frames alive together
    width_key: str = "block_out_channels"


COUNTED = {
    "AutoencoderKLCogVideoX": Counted(
        128, 215_583_907, (13.83e6, 8.70e6), (21.70e6, 18.54e6), (16, 6.6), (23, 17.8), at_once=9
    ),
    "AutoencoderKLWan": Counted(
        96, 126_892_531, (6.66e6, 5.01e6), (10.75e6, 8.45e6), (2, 9.2), (7, 11.4), at_once=4, width_key="base_dim"
    ),
    "AutoencoderKLHunyuanVideo": Counted(
        128, 246_478_803, (12.27e6, 12.25e6), (28.07e6, 23.2e6), (3, 5.2), (4, 9.2), at_once=17
    ),
    "AutoencoderKLLTXVideo": Counted(128, 419_193_649, (1.54e6, 0.82e6), (1.75e6, 0.87e6), (1, 0.44), (1, 0.5)),
    "AutoencoderKLMochi": Counted(
        128, 459_748_611, (6.95e6, 4.18e6), (94.9e6, 15.9e6), (3, 5.1), (28, 5.1),
        width_key="decoder_block_out_channels",
    ),
}  # fmt: skip


def _estimate(kind: str, config: dict[str, Any], cfg: Config) -> AutoencoderSizes:
    counted, data = COUNTED[kind], cfg.data
    width = config.get(counted.width_key, counted.width)
    width = width[0] if isinstance(width, list) else width
    share = (width / counted.width) ** 2
    sides = tiles(cfg)
    area = sides[0][0] * sides[1][0]
    pixels, frames = area * sides[0][1] * sides[1][1], data.num_frames
    alive = min(frames, counted.at_once)

    def values(part: tuple[float, float]) -> int:
        return int(width * area * (part[0] + part[1] * alive))

    encoding, attended = values(counted.encoding), 0
    if kind == "AutoencoderKLHunyuanVideo":  # a mask of all places of the frames together
        geometry = autoencoder_geometry(cfg.vae.path)
        attended = (geometry.latent_frames(alive) * area // geometry.spatial_stride**2) ** 2
    return AutoencoderSizes(
        vae_parameters=int(share * counted.parameters),
        encode_flops=share * pixels * (counted.encode[0] + counted.encode[1] * (frames - 1)),
        decode_flops=share * pixels * (counted.decode[0] + counted.decode[1] * (frames - 1)),
        encoding_values=encoding + attended,
        encoding_values_alone=encoding + attended,
        decoding_values=values(counted.decoding) + attended,
        decoded_values=3 * area * frames,
        unfolded_values=KERNEL * width * alive * area if width * alive * sides[0][0] <= UNFOLDED else 0,
    )
