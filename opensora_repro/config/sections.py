"""The sections of a run's configuration: every key's type, default and meaning, the comment on its line.

A new key is one edit, here: `make configs` writes it into every recipe and into docs/config.md.
"""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass, field
from typing import Any

from opensora_repro.errors import UserError
from opensora_repro.models.config import ARCHITECTURES, STDiTConfig, TrainedConfig


class ConfigError(UserError):
    """A mistake in a config file or an override; the message is one line meant for the user."""


# Files and folders: `~` is the user's home in them.
PATH_KEYS = (
    "run.dir", "init.weights", "data.manifest", "data.val_manifest", "data.cache", "vae.path", "text.path",
    "evaluate.features", "evaluate.clip",
)  # fmt: skip


ADDRESS_KEYS = ("data.manifest", "data.val_manifest", "data.cache")  # of these, what may lie in a store


@dataclass(frozen=True)
class RunConfig:
    dir: str = ""  # folder of the run: config, metrics, checkpoints, samples
    seed: int = 42  # of everything random


@dataclass(frozen=True)
class InitConfig:
    weights: str = ""  # weights to start from (a file, a checkpoint, a run or a fetched name); resuming needs no key


Ratios = str | tuple[float | str, ...]
Keep = float | tuple[float, float]


@dataclass(frozen=True)
class BucketConfig:
    num_frames: int  # 1: pictures (of clips, too, if all buckets have 1); else of as many x frame_interval, or at fps
    resolution: str  # a published name ("144p" to "4k", "256" to "2880"), or as many pixels as "WIDTHxHEIGHT"
    ratios: Ratios = ""  # its own: "", "square", those of a published name, or a list of "WIDTH:HEIGHT", height / width
    batch_size: int = 0  # samples a process reads at once; 0: train.batch_size
    keep: Keep = 1.0  # share taken, the rest falls to fewer pixels; [taken, looked at]: what is not, to fewer frames


@dataclass(frozen=True)
class DataConfig:
    manifest: str = ""  # Parquet or CSV of the training clips
    val_manifest: str = ""  # held-out clips for the validation loss; empty: none
    num_frames: int = 16  # frames of a sample; 1 trains on images
    frame_interval: int = 3  # take every n-th frame of the window, whatever the clip's rate
    fps: float = 0.0  # frames a second, taken by when they are shown: motion keeps its speed; 0: data.frame_interval
    frame_sampling: str = "window"  # "window" (at a random place of the clip) or "uniform" (all of the clip, evenly)
    height: int = 256  # pixels
    width: int = 256  # pixels
    flip: bool = True  # mirror half of the clips whose caption names no side and no writing
    num_workers: int = 2  # processes that prefetch
    decode_timeout: float = 120.0  # seconds after which reading a clip is ended and the clip set aside; 0: never
    draws: int = 0  # 0: a new window, crop and flip every epoch; k: cycle through k fixed ones
    cache: str = ""  # folder for encoded latents and text (needs draws > 0); empty: encode every step
    max_bad_fraction: float = 0.1  # stop when more of the samples seen than this cannot be read
    packing_tokens: int = 0  # packing: clips of all buckets share rows of at most so many tokens; 0: a step is one's
    buckets: tuple[BucketConfig, ...] = ()  # a clip goes to the largest that it fills; none: one size


@dataclass(frozen=True)
class VaeConfig:
    path: str = "stabilityai/sd-vae-ft-ema"  # hub name or local folder of an autoencoder, of images or of videos
    micro_batch_size: int = 8  # frames encoded or decoded at once; on a GPU of all clips of a step, on a CPU of one
    tile_size: int = 0  # pixels: larger frames go through in overlapping tiles, which take less memory; 0: whole


@dataclass(frozen=True)
class TextConfig:
    path: str = "DeepFloyd/t5-v1_1-xxl"  # hub name or local folder of a T5 encoder with its tokenizer
    micro_batch_size: int = 8  # captions encoded at once on a GPU; a CPU takes them one by one
    offload: bool = False  # on a GPU: keep the text encoder in host memory and stream it layer by layer
    shard: bool = False  # several processes: each holds an equal share of T5, and gathers it part by part to encode


@dataclass(frozen=True)
class DiffusionConfig:
    objective: str = "iddpm"  # "iddpm" or "flow"
    logit_mean: float = 0.0  # flow: timesteps are sigmoid(normal(mean, std)) before the shift
    logit_std: float = 1.0  # flow: see logit_mean
    shift: float = 0.0  # flow: above 0, the shift towards noise; 0: by the numbers of tokens and frames, 6 at most
    schedule: str = ""  # flow: "open_sora_1_2", its direction and its shift by pixels and frames; "": this project's
    transform_scale: float = 1.0  # flow with schedule "open_sora_1_2": factor of its shift
    timestep_sampling: str = ""  # iddpm: "uniform" or "speed"; flow: "logit-normal", "uniform", "discrete"; "": first


@dataclass(frozen=True)
class FrameMasksConfig:
    """Shares of training samples of which some latent frames are given, as a condition, by how they are chosen.

    Open-Sora 1.2 calls them alike, but for interpolate, its "intepolate"; 1.1 writes "mask_" before each.
    """

    quarter_random: float = 0.0  # share of samples given up to a quarter of their frames, together, anywhere
    quarter_head: float = 0.0  # share given up to a quarter of their frames, the first ones (to go on with a clip)
    quarter_tail: float = 0.0  # share given up to a quarter of their frames, the last ones
    quarter_head_tail: float = 0.0  # share given up to a quarter at the start, and as many at the end
    image_random: float = 0.0  # share given one frame anywhere
    image_head: float = 0.0  # share given the first frame (image to video)
    image_tail: float = 0.0  # share given the last frame
    image_head_tail: float = 0.0  # share given the first and the last frame
    random: float = 0.0  # share given each frame with a probability that is drawn from 0.1 to 0.9
    interpolate: float = 0.0  # share given every second frame
    noise: float = 0.0  # most noise that given frames carry, 0 to 1: against drift where clips are chained

    def shares(self) -> dict[str, float]:
        """By mode; what they leave of 1 are samples of which no frame is given."""
        return {mode: share for mode, share in asdict(self).items() if mode != "noise"}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685), trained in place of the weights, which init.weights gives."""

    rank: int = 0  # of the adapters beside each layer, which are trained instead of the weights (LoRA); 0: none
    alpha: float = 16.0  # adapters add alpha / rank times their product
    targets: tuple[str, ...] = ()  # layers of blocks by name or part: "attn", "cross_attn.q_linear", "fc1"; none: all
    dropout: float = 0.0  # share of what adapters read of tokens that is dropped in training


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 2e-5  # AdamW's learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    eps: float = 1e-8  # AdamW's
    weight_decay: float = 0.0  # AdamW's
    warmup_steps: int = 0  # scheduler: linear warm-up over the first n steps
    decay_steps: int = 0  # scheduler: linear decay to zero over the last n steps
    clip_norm: float = 1.0  # gradient clipping: the largest norm; 0: recorded, not clipped
    in_backward: bool = False  # one process: update each weight as soon as its gradient is complete, and free that
    offload: bool = False  # on a GPU: keep Adam's moments and the average (EMA) in host memory, stream them


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # samples a process reads at once
    accumulation: int = 1  # gradient accumulation: micro-batches a step
    dtype: str = "bf16"  # autocast dtype: "bf16" or "fp32"; weights and optimizer stay float32
    kernels: str = "auto"  # "eager" (torch's operations), "triton" (fused ones), "auto": triton on a GPU
    compile: str = "auto"  # torch.compile of the blocks: "on", "off", "auto": on a GPU, each layer whole on a process
    activation_checkpointing: str = "full"  # "none", "full" (blocks run again), "selective" (but for costly products)
    offload_activations: bool = False  # on a GPU: what checkpointing keeps of a block's input waits in host memory
    overlap: bool = True  # on a GPU: prefetch, encoding the next micro-batch beside the training; takes memory for both
    max_bad_steps: int = 5  # stop after this many non-finite steps in a row


@dataclass(frozen=True)
class EmaConfig:
    decay: float = 0.9999  # of the exponential moving average: min(decay, (1 + n) / (10 + n)) after n updates; 0: none


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    background: bool = False  # write behind the training, which waits for a copy in host memory alone
    keep_best: str = ""  # a metric, such as "loss", whose best checkpoint stays, at RUN/checkpoints/best; "": none


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 0  # steps between validations; 0: never
    timesteps: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the loss, as shares of the range
    max_samples: int = 64  # held-out clips used


# Metrics of an evaluation by which one checkpoint is better than another; a name may end with @NOISE_LEVEL.
LOWER_IS_BETTER = (
    "loss", "frechet", "kernel", "flicker", "motion_distance", "static", "blank", "noise", "memorised",
    "reconstruction_frechet", "lpips",
)  # fmt: skip
HIGHER_IS_BETTER = ("caption_gap", "motion_gap", "clip_score", "text_match", "psnr", "ssim")


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 0  # steps between evaluations of the averaged weights on data.val_manifest's clips; 0: never
    clips: int = 32  # held-out clips whose loss is measured, and what captions and frames' order are worth in it
    samples: int = 16  # videos sampled from the first of these clips' captions, and looked at; 0: none
    steps: int = 0  # denoising steps of these samples; 0: sample.steps
    features: str = ""  # for Frechet and kernel distances: "own" (trained on the spot), or a local model; "": none
    clip: str = ""  # for CLIP scores: hub name or local folder of a CLIP model; "": none


@dataclass(frozen=True)
class SampleConfig:
    every: int = 0  # steps between samples during training; 0: never
    prompts: tuple[str, ...] = ()  # what to sample during training
    sampler: str = "iddpm"  # "iddpm", "ddim" or "dpm"; flow models: "ab2", "heun" (second order), else "euler"
    steps: int = 100  # denoising steps
    guidance: float = 7.0  # classifier-free guidance scale (cfg_scale); 1: none
    fps: int = 0  # frames a second of the written videos; 0: data.fps, or 8 without


ALARMS = (
    "noise", "flat", "motion", "text", "overfitting", "loss", "gradient", "saturation", "average", "repeats",
    "throughput",
)  # fmt: skip


@dataclass(frozen=True)
class AlarmsConfig:
    stop: tuple[str, ...] = ()  # end the run, its steps saved, at any of these: "noise", ... (docs/report.md has all)
    off: tuple[str, ...] = ()  # of these nothing is said
    epochs: int = 100  # passes over the training clips from which on "repeats" says so; 0: never


@dataclass(frozen=True)
class TrackConfig:
    wandb: str = ""  # project at Weights & Biases that gets curves and samples (extra "track"); empty: nothing leaves


@dataclass(frozen=True)
class ParallelConfig:
    engine: str = "torch"  # "torch" or "colossalai"
    plugin: str = "ddp"  # "ddp"; of torch "fsdp"; of colossalai "zero1", "zero2", "hybrid" (ZeRO-1, tensor parallelism)
    tp_size: int = 1  # processes that share each weight matrix, by attention heads
    sp_size: int = 1  # processes that share each sample's frames
    timeout: int = 600  # seconds without progress after which a run of several processes is ended


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: TrainedConfig = field(default_factory=STDiTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    frame_masks: FrameMasksConfig = field(default_factory=FrameMasksConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def section_classes(architecture: str = STDiTConfig.architecture) -> dict[str, Any]:
    """The class of each section, by name; `model.architecture` says which one [model] has."""
    return {**typing.get_type_hints(Config), "model": ARCHITECTURES[architecture]}


def validates(cfg: Config) -> bool:
    """Whether a run measures the loss of held-out samples."""
    return cfg.validation.every > 0 and bool(cfg.data.val_manifest)


def sample_fps(cfg: Config) -> float:
    """Frames a second of the videos that are sampled."""
    return cfg.sample.fps or cfg.data.fps or 8


def encodes_always(cfg: Config) -> bool:
    """Whether a run needs the frozen models even when the cache holds every sample."""
    return not cfg.data.cache or cfg.sample.every > 0 or validates(cfg) or cfg.evaluate.every > 0


def encodes_after_start(cfg: Config) -> bool:
    """Whether a run needs the frozen models still once it trains."""
    return not cfg.data.cache or cfg.sample.every > 0 or (cfg.evaluate.every > 0 and cfg.evaluate.samples > 0)
