"""Memory of sampling, for one process: from the sizes of the models and of what is asked of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opensora_repro.config import Config
from opensora_repro.models.config import ModelConfig
from opensora_repro.planning.encoders import frozen_sizes, text_values
from opensora_repro.planning.image_encoders import AutoencoderSizes
from opensora_repro.planning.memory import FLOAT, HALF
from opensora_repro.planning.parameters import mlp_width
from opensora_repro.planning.sizes import latent_shape, token_grid
from opensora_repro.process import KEPT_BYTES

LATENTS_ALIVE = 6  # noise, the last ones, both halves' outputs, their mixture, a sampler's memory; all float32
PIXELS_ALIVE = 3  # float32: the decoded parts, joined, clamped
FRAMES_CONVERTED = 4  # as sampling/generate.py has it, which needs torch
HELD = 3  # times what maps and pixels of a part take, a CPU's process keeps of freed memory, as far as it may


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes. Denoising and decoding take turns."""

    weights: float  # of the model, float32
    frozen: float  # weights of autoencoder and text encoder
    denoising: float
    decoding: float

    @property
    def peak(self) -> float:
        return self.weights + self.frozen + max(self.denoising, self.decoding)


def sampling_memory(
    cfg: Config,
    model: ModelConfig,
    parameters: int,
    *,
    batch_size: int,
    device_type: str,
    reads_t5: bool,
    sp_size: int = 1,
    world_size: int = 1,
) -> SamplingMemory:
    """`cfg` has the samples' size and the frozen models' folders, `parameters` are the model's.

    At the widest moment of a block, its MLP, there are alive: the residual stream and its norm in float32, the branch's
    input, and two tensors of the MLP's width. Raises ConfigError where the size is no multiple of the autoencoder's
    stride.
    """
    half = cfg.train.dtype == "bf16"
    shape = latent_shape(cfg)
    grid = token_grid(model, shape)
    rows = batch_size * (1 if cfg.sample.guidance == 1 else 2)  # classifier-free guidance: both halves at once
    tokens = rows * -(-grid.frames // sp_size) * grid.places
    values = tokens * (model.hidden_size + 2 * mlp_width(model))
    streams = 2 * FLOAT * tokens * model.hidden_size
    latents = LATENTS_ALIVE * FLOAT * rows * math.prod(shape)
    copies = HALF * parameters if half else 0  # autocast's
    denoising = streams + (HALF if half else FLOAT) * values + latents + copies

    sizes = frozen_sizes(cfg)
    size = HALF if half and device_type == "cuda" else FLOAT
    t5 = replace(cfg.text, offload=cfg.text.offload and device_type == "cuda")
    text = text_values(t5, sizes, world_size) if reads_t5 else 0
    decoding = decoding_memory(cfg, sizes, size, device_type) + FLOAT * batch_size * math.prod(shape)
    return SamplingMemory(
        FLOAT * parameters, float(size * (sizes.vae_parameters + text)), float(denoising), float(decoding)
    )


def decoding_memory(cfg: Config, sizes: AutoencoderSizes, size: int, device_type: str) -> int:
    """Bytes beside latents and weights while a clip becomes float32 pixels, and these bytes; `size`: of a value.

    Measured with processes on a CPU, see docs/weights.md; on a GPU it is unmeasured.
    """
    data = cfg.data
    frame = 3 * FLOAT * data.height * data.width
    video, part = data.num_frames * frame, FLOAT * sizes.decoded_values
    maps, held = size * sizes.decoding_values, 0
    if device_type == "cpu":
        maps += size * sizes.unfolded_values
        held = min(KEPT_BYTES, HELD * (maps + part))
    if part >= video:
        return held + maps + PIXELS_ALIVE * video
    converted = video // FLOAT + PIXELS_ALIVE * min(FRAMES_CONVERTED, data.num_frames) * frame
    return held + video + maps + PIXELS_ALIVE * part + converted
