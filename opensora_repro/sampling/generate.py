"""Prompts to pixels: encode the condition, sample latents, decode the frames."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.sample_frames import interval_of
from opensora_repro.data.sampler import keyed_generator
from opensora_repro.diffusion.samplers import EVERYWHERE, CallContext, LatentSampler, PrepareText, Watch, num_calls
from opensora_repro.errors import TrainingError
from opensora_repro.frozen.text import ClassLabels, ConditionEncoder, EncodedPrompts
from opensora_repro.models.captioned import conditions_of
from opensora_repro.models.config import ModelConfig
from opensora_repro.models.layers import is_plain
from opensora_repro.parallel.sequence import FrameParallel
from opensora_repro.sampling.graphs import StepGraphs

if TYPE_CHECKING:
    from opensora_repro.diffusion.frame_masks import GivenFrames
    from opensora_repro.frozen.autoencoder import Autoencoder
    from opensora_repro.sampling.speedups import Speedups
    from opensora_repro.weights.families import Network


MIN_GRAPH_STEPS = 10  # fewer do not pay for the recording of a CUDA graph
FRAMES_CONVERTED = 4  # at once, from float32: of a whole video, a copy is the largest tensor there is


class NotFinite(TrainingError):
    """A sample came out as no picture; the message is one line meant for the user."""


Progress = Callable[[int, int], None]  # (denoising steps done, in all), over all batches


def check_fit(
    cfg: Config,
    vae: Autoencoder,
    encoder: ConditionEncoder | EncodedPrompts,
    model: ModelConfig | None = None,
) -> None:
    """Raise ConfigError unless the frozen models fit the model and the size of `cfg.data` both; None: `cfg.model`."""
    model = model or cfg.model
    stride = vae.spatial_stride
    num_frames, height, width = cfg.data.num_frames, cfg.data.height, cfg.data.width
    if min(num_frames, height, width) < 1:
        raise ConfigError(f"frames, height and width must be positive, got {num_frames}, {height} and {width}")
    # A model that is told its pixels is told those that make no whole latent, too: 426 of 53 latents, as published.
    if min(height, width) < stride or (not model.conditions and (height % stride or width % stride)):
        raise ConfigError(f"height {height} and width {width} must be multiples of {stride}, the autoencoder's stride")
    vae.check_frames(num_frames, "num_frames")
    if model.square and height != width:
        raise ConfigError(f"height {height} and width {width} must be equal: DiT and Latte make squares alone")
    if model.in_channels != vae.latent_channels:
        raise ConfigError(
            f"model.in_channels = {model.in_channels}: the autoencoder {cfg.vae.path} has {vae.latent_channels}"
        )
    if model.conditioning == "class":
        if not isinstance(encoder, ClassLabels) or encoder.num_classes != model.num_classes:
            raise ConfigError(f"model.num_classes = {model.num_classes}: the prompts are not read as their numbers")
    elif isinstance(encoder, ClassLabels):
        raise ConfigError("the model is conditioned on text: its prompts are no class numbers")
    elif model.caption_channels != encoder.channels:
        raise ConfigError(
            f"model.caption_channels = {model.caption_channels}: "
            f"the text encoder {cfg.text.path} has {encoder.channels}"
        )


def generate(
    model: Network,
    vae: Autoencoder,
    encoder: ConditionEncoder | EncodedPrompts,
    cfg: Config,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    progress: Progress | None = None,
    forward: Callable[..., Tensor] | None = None,
    share: tuple[int, int] = (0, 1),
    only: Sequence[int] | None = None,
    given: GivenFrames | None = None,
    clip: int = 0,
    negative: str = "",
    watch: Watch | None = None,
    speedups: Speedups | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, video) for every prompt in turn; video is uint8 [num_frames, height, width, 3].

    `only` are the numbers of the prompts to sample; None: all.

    Size, sampler, its steps and guidance are those of `cfg.data` and `cfg.sample`; of the model, its own config says.
    `given`: frames that every sample starts from, latents [1, Cz, T', h, w] and ratios [1, T'].
    `watch` is shown each batch's steps, see `LatentSampler`. `speedups`: what its caches and its guidance leave out.
    `negative`: a text that guidance leads away from, in place of the null caption.

    Sample i's noise is keyed by (seed, i) alone, of a long video by the number of the `clip`, too; so the batch size
    and the other prompts change it by rounding at most.
    The model runs in evaluation mode, under the caller's autocast; `forward` calls it where it is spread over
    processes. `share` (r, n) leaves all but every n-th batch of prompts, from the r-th on, to others. Raises
    ConfigError for models or a size that do not fit, NotFinite where the model or the autoencoder gives no finite
    values.
    """
    check_fit(cfg, vae, encoder, model.cfg)
    data, sample = cfg.data, cfg.sample
    shape = vae.latent_shape(data.num_frames, data.height, data.width)
    todo = range(len(prompts)) if only is None else only
    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    batches = batches[share[0] :: share[1]]
    device = next(model.parameters()).device
    null, null_mask = encode_negative(encoder, negative) if negative else (None, None)
    caches = None if speedups is None else speedups.caches()
    graphs = caches is None and captures(model, forward, device.type, sample.steps)
    call_context: CallContext = StepGraphs() if graphs else nullcontext
    sampler = LatentSampler(
        cfg.diffusion,
        sample.sampler,
        steps=sample.steps,
        guidance=sample.guidance,
        guidance_interval=speedups.guidance_interval or EVERYWHERE if speedups is not None else EVERYWHERE,
        patch_size=model.cfg.patch_size,
        prepare_text=_text_preparation(model, forward),
        call_context=call_context,
        null_mask=null_mask,
        watch=watch,
    )
    size = (data.num_frames, data.height, data.width)
    for done, indices in enumerate(batches):
        condition, mask = encoder.encode([prompts[i] for i in indices])
        with (
            evaluating(model),
            nullcontext() if caches is None else caches(model, num_calls(sample.sampler, sample.steps)),
        ):
            latents = replace(sampler, progress=_counted(progress, done, len(batches)))(
                forward or model,
                condition.to(device),
                mask,
                model.null_condition() if null is None else null,
                shape=shape,
                generators=[keyed_generator(seed, clip, str(i), "sample") for i in indices],
                size=size,
                conditions=_told(model, cfg, size, len(indices)) if model.cfg.conditions else {},
                given=None if given is None else given.of(len(indices)),
            )
        for i, latent in zip(indices, latents, strict=True):
            if not latent.isfinite().all():
                raise NotFinite(f"sample {i}: the model's latents are not finite{_advice(cfg)}")
            yield i, decode(vae, latent, num_frames=data.num_frames)


def encode_negative(encoder: ConditionEncoder | EncodedPrompts, text: str) -> tuple[Tensor, Tensor | None]:
    """A text for the place of the null condition, [L, Ct], and its own mask [L], in host memory; None for CLIP's."""
    condition, mask = encoder.encode([text])
    return condition[0], None if mask is None else mask[0]


def _told(model: Network, cfg: Config, size: tuple[int, int, int], num_samples: int) -> dict[str, Tensor]:
    """What else the model is told of each sample."""
    rate = sample_fps(cfg) if size[0] > 1 else 0.0
    fps = torch.full((num_samples,), rate, device=next(model.parameters()).device)
    return conditions_of(model.cfg, size, fps, frame_interval=interval_of(cfg.data))


def captures(model: nn.Module, forward: Callable[..., Tensor] | None, device_type: str, steps: int) -> bool:
    """Whether to sample through `StepGraphs`: on a GPU, where `forward` (None: the model) is the whole model itself.

    Processes that share a sample wait for each other within the call, and a wrapper may have the weights in pieces.
    """
    whole = forward in (None, model) and all(is_plain(m) for m in model.modules() if isinstance(m, nn.Linear))
    return device_type == "cuda" and whole and steps >= MIN_GRAPH_STEPS


def _advice(cfg: Config) -> str:
    """What to try, as far as it was not tried."""
    remedies = ["fp32 (--dtype fp32)"] if cfg.train.dtype == "bf16" else []
    remedies += ["less guidance"] if cfg.sample.guidance > 1 else []
    remedies += ["more steps"] if cfg.diffusion.objective == "flow" or cfg.sample.sampler == "dpm" else []
    return f" after {cfg.sample.steps} steps; try {', '.join([*remedies, 'an earlier checkpoint'])}"


def _text_preparation(model: Network, forward: Callable[..., Tensor] | None) -> PrepareText | None:
    """The model's own, where `forward` calls the very model; a wrapper may have its weights in pieces."""
    called = forward.module if isinstance(forward, FrameParallel) else forward
    return getattr(model, "prepare_text", None) if called in (None, model) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _counted(progress: Progress | None, batches_done: int, num_batches: int) -> Progress | None:
    """A batch's steps as a part of all batches'."""
    if progress is None:
        return None
    return lambda done, total: progress(batches_done * total + done, num_batches * total)


@torch.no_grad()
def decode(vae: Autoencoder, latent: Tensor, *, num_frames: int) -> np.ndarray:
    """One sample alone, so that its neighbours never change it: latents [C, T', h, w] -> uint8 [T, H, W, 3].

    Raises NotFinite.
    """
    video = vae.decode(rearrange(latent, "c t h w -> 1 c t h w"), num_frames=num_frames)[0]  # [3, T, H, W] in [-1, 1]
    frames = np.empty((*video.shape[1:], 3), np.uint8)
    for first in range(0, num_frames, FRAMES_CONVERTED):
        part = video[:, first : first + FRAMES_CONVERTED]
        if not part.isfinite().all():
            raise NotFinite("the autoencoder made pixels that are not finite of finite latents: are its weights whole?")
        pixels = ((part.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        frames[first : first + FRAMES_CONVERTED] = rearrange(pixels, "c t h w -> t h w c").cpu().numpy()
    return frames


class ProgressBar:
    """Shows `generate`'s progress on stderr once the work has taken two seconds."""

    def __init__(self, label: str, *, shown: bool = True) -> None:
        from tqdm import tqdm

        interval = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants few lines
        self._bar = tqdm(desc=label, unit="step", delay=2, mininterval=interval, disable=not shown)

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()
