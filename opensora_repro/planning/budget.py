"""A run's arithmetic put together: work, memory, layouts, time, cost, and what the trained model's samples take."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_repro.config import Config
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.buckets import as_heaviest, as_one_size, buckets_of
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.encoders import FrozenSizes, frozen_sizes
from opensora_repro.planning.flops import Products, forward_products
from opensora_repro.planning.gpus import Gpu
from opensora_repro.planning.memory import largest_sizes
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.placement import Fit, Fitter, candidates
from opensora_repro.planning.sizes import Strides, latent_frames, latent_shape, token_grid

SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Question:
    """What a plan is made for."""

    gpu: Gpu
    gpus: int
    utilisation: float  # model FLOPs over the peak
    utilisation_from: str  # "given", "assumed", or where it was measured
    clips: int | None = None
    price_per_gpu_hour: float | None = None
    strides: Strides | None = None  # of another autoencoder than vae.path


@dataclass(frozen=True)
class Work:
    """Sizes of a sample and a step. FLOPs count a multiplication and its addition as two."""

    parameters: int
    latents: tuple[int, int, int, int]  # [C, T, h, w]
    tokens_a_sample: int
    samples_a_step: int
    tokens_a_step: int
    forward_flops: int  # of one sample
    step_flops: float  # forward and backward of all samples, nothing twice
    recomputed_flops: float  # a step's, by activation checkpointing
    encoder_flops: float  # a step's, by autoencoder and text encoder
    run_flops: float  # model and encoders, nothing twice
    run_tokens: int
    epochs: float | None


@dataclass(frozen=True)
class Time:
    utilisation: float
    utilisation_from: str
    busy: float  # share of the peak that the GPU reaches, with what is computed twice
    step_seconds: float
    run_seconds: float
    gpu_hours: float
    tokens_a_second_a_gpu: float
    samples_a_second: float
    cost: float | None


@dataclass(frozen=True)
class Inference:
    """Sampling with the config's sampler, on one GPU."""

    evaluations: int  # forward passes a clip, guidance's included
    transformer_flops: float
    text_flops: float
    decode_flops: float
    clip_flops: float
    clip_seconds: float
    clip_duration: float  # seconds of video, as sampled
    clips_a_gpu_hour: float
    video_minutes_a_gpu_hour: float
    cost_a_clip: float | None
    break_even_clips: float  # whose sampling takes as many FLOPs as the training did


@dataclass(frozen=True)
class Budget:
    gpu: Gpu
    gpus: int
    work: Work
    configured: Fit
    layouts: tuple[Fit, ...]
    time: Time
    inference: Inference

    @property
    def smallest(self) -> Fit | None:
        """The first layout that fits, the simplest one."""
        return next((fit for fit in self.layouts if fit.fits), None)


def make_budget(cfg: Config, question: Question) -> Budget:
    """Work and time of the heaviest bucket's steps, and memory of those that need the most.

    Raises ConfigError, and EngineError where the config's own layout does not divide the GPUs.
    """
    frames = min(latent_frames(cfg, bucket.num_frames, question.strides) for bucket in buckets_of(cfg))
    least_frames = -(-frames // cfg.model.patch_size[0])
    fitter = Fitter(cfg, question.gpu, question.gpus, least_frames, largest_sizes(cfg, question.strides))
    cfg = as_heaviest(cfg)
    mesh = Mesh(0, question.gpus, cfg.parallel.tp_size, cfg.parallel.sp_size)
    peak = question.gpu.peak(cfg.train.dtype)
    shape = latent_shape(cfg, question.strides)
    grid = token_grid(cfg.model, shape)
    frozen, parameters = frozen_sizes(cfg), count_parameters(cfg.model)
    products = forward_products(cfg.model, grid)
    samples = cfg.train.batch_size * cfg.train.accumulation * mesh.data_size
    step, again, encoding = step_flops(cfg, products, frozen, samples)
    work = Work(
        parameters=parameters,
        latents=shape,
        tokens_a_sample=grid.tokens,
        samples_a_step=samples,
        tokens_a_step=samples * grid.tokens,
        forward_flops=products.forward_flops,
        step_flops=step,
        recomputed_flops=again,
        encoder_flops=encoding,
        run_flops=cfg.train.steps * (step + encoding),
        run_tokens=cfg.train.steps * samples * grid.tokens,
        epochs=cfg.train.steps * samples / question.clips if question.clips else None,
    )
    return Budget(
        gpu=question.gpu,
        gpus=question.gpus,
        work=work,
        configured=fitter.try_layout(cfg.parallel),
        layouts=tuple(fitter.try_layout(parallel) for parallel in candidates(cfg, question.gpus)),
        time=_time(cfg, question, work, peak),
        inference=_inference(cfg, question, products, frozen, work.run_flops, peak),
    )


def step_flops(cfg: Config, products: Products, frozen: FrozenSizes, samples: int) -> tuple[float, float, float]:
    """For so many samples: the model's forward and backward, what is computed again, and the encoders'."""
    again = products.recomputed_flops(cfg.train.activation_checkpointing)
    encoding = 0.0 if cfg.data.cache else frozen.encode_flops + frozen.text_flops
    return float(samples * products.training_flops), float(samples * again), samples * encoding


def bucket_costs(cfg: Config) -> list[tuple[int, float]]:
    """Tokens of a sample of each of `buckets_of`, and all FLOPs of `step_flops` for it. Raises ConfigError."""
    found = []
    for bucket in buckets_of(cfg):
        own = as_one_size(cfg, bucket)
        grid = token_grid(own.model, latent_shape(own))
        found.append((grid.tokens, sum(step_flops(own, forward_products(own.model, grid), frozen_sizes(own), 1))))
    return found


def _time(cfg: Config, question: Question, work: Work, peak: float) -> Time:
    useful = work.step_flops + work.encoder_flops
    step = useful / (question.gpus * peak * question.utilisation)
    hours = question.gpus * step * cfg.train.steps / SECONDS_AN_HOUR
    price = question.price_per_gpu_hour
    return Time(
        utilisation=question.utilisation,
        utilisation_from=question.utilisation_from,
        busy=question.utilisation * (useful + work.recomputed_flops) / useful,
        step_seconds=step,
        run_seconds=step * cfg.train.steps,
        gpu_hours=hours,
        tokens_a_second_a_gpu=work.tokens_a_step / step / question.gpus,
        samples_a_second=work.samples_a_step / step,
        cost=None if price is None else price * hours,
    )


def _inference(
    cfg: Config, question: Question, products: Products, frozen: FrozenSizes, run_flops: float, peak: float
) -> Inference:
    evaluations = cfg.sample.steps * (1 if cfg.sample.guidance == 1 else 2)
    transformer = float(evaluations * products.forward_flops)
    clip = transformer + frozen.text_flops + frozen.decode_flops
    seconds = clip / (peak * question.utilisation)
    duration = cfg.data.num_frames / sample_fps(cfg)
    price = question.price_per_gpu_hour
    return Inference(
        evaluations=evaluations,
        transformer_flops=transformer,
        text_flops=frozen.text_flops,
        decode_flops=frozen.decode_flops,
        clip_flops=clip,
        clip_seconds=seconds,
        clip_duration=duration,
        clips_a_gpu_hour=SECONDS_AN_HOUR / seconds,
        video_minutes_a_gpu_hour=SECONDS_AN_HOUR / seconds * duration / 60,
        cost_a_clip=None if price is None else price * seconds / SECONDS_AN_HOUR,
        break_even_clips=run_flops / clip,
    )
