"""The sections of stage 0's configuration: an autoencoder, its losses, and a text encoder of one's own captions.

What it shares with the other stages has the same sections, keys and meanings there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from opensora_repro.config.sections import (
    AlarmsConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EmaConfig,
    InitConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrackConfig,
    TrainConfig,
    ValidationConfig,
)

AUTOENCODER_PATH_KEYS = ("model.image", "loss.lpips_path")


@dataclass(frozen=True)
class AutoencoderModelConfig:
    kind: str = "image"  # "image" (diffusers' AutoencoderKL) or "video" (1.2's temporal one, on a frozen image one)
    image: str = ""  # video: folder of the frozen image autoencoder, such as runs/stage0/vae
    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level; an image is halved from one to the next
    layers_per_block: int = 2  # residual blocks of a level (video: 4 are published); an image's decoder has one more
    latent_channels: int = 4  # values of a latent; video: the image autoencoder's
    norm_groups: int = 32  # of GroupNorm; divides each of the channels
    attention: bool = True  # image: attention in the middle, as Stable Diffusion's; false: every size costs its pixels
    frozen_encoder: bool = False  # image: train the decoder alone; latents stay those of init.weights


@dataclass(frozen=True)
class ReconstructionConfig:
    target: str = "pixels"  # what is compared by L1: "pixels"; video: or "latents" of frames, 1.2's first stages
    kl: float = 1e-6  # weight of the KL divergence to a unit Gaussian, both counted in sums over a frame as published
    image_latents: float = 0.0  # video: weight of L1 between an image's latents and the frozen one's (1.2's stage 1: 1)
    latent_noise: float = 0.0  # noise added to latents before decoding, up to so many of their standard deviations
    lpips: float = 0.1  # weight of LPIPS, where lpips_path is set
    lpips_path: str = ""  # folder with torchvision's VGG16 (and LPIPS's own lin weights, else channels count alike)
    discriminator: float = 0.0  # weight of a patch discriminator's hinge loss; 0: none
    discriminator_start: int = 0  # step from which it trains and counts
    discriminator_adaptive: bool = True  # its weight times the ratio of both gradients at the decoder's last layer
    discriminator_channels: int = 64  # of its first layer
    discriminator_layers: int = 3  # that halve the picture


@dataclass(frozen=True)
class MixtureConfig:
    image_share: float = 0.0  # video: share of the micro-batches that are cut to their first frame (1.2: 0.2)
    random_length: bool = False  # video: cut the others to a random length from 1 to data.num_frames (1.2's last: 33)


@dataclass(frozen=True)
class CaptionModelConfig:
    vocab_size: int = 0  # make RUN/text, too: a tokenizer of the captions' most frequent words; 0: none
    hidden_size: int = 64  # of its T5 encoder: model.caption_channels of the later stages
    depth: int = 2  # layers
    num_heads: int = 4  # attention heads


@dataclass(frozen=True)
class HeldOutConfig:
    every: int = 0  # steps between validations: PSNR and SSIM, and a grid of sources beside reconstructions; 0: never
    max_samples: int = 64  # held-out clips used; without data.val_manifest, of the training clips


@dataclass(frozen=True)
class AutoencoderConfig:
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    text: CaptionModelConfig = field(default_factory=CaptionModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def shared(self) -> Config:
        """What the parts of a run that all stages have are given: loop, data, optimizer, checkpoints."""
        return Config(
            run=self.run,
            data=self.data,
            optim=self.optim,
            train=self.train,
            ema=self.ema,
            checkpoint=self.checkpoint,
            validation=ValidationConfig(every=self.validation.every, max_samples=self.validation.max_samples),
            alarms=self.alarms,
            track=self.track,
            parallel=self.parallel,
        )

    @property
    def spatial_stride(self) -> int:
        """Pixels of an image autoencoder's latent, each way."""
        return int(2 ** (len(self.model.channels) - 1))


def check_autoencoder(cfg: AutoencoderConfig) -> None:
    """Raise ConfigError on a value that cannot work. What all stages share is checked with theirs."""

    def require(name: str, holds: bool, expected: str) -> None:
        section, key = name.split(".")
        if not holds:
            value: Any = getattr(getattr(cfg, section), key)
            raise ConfigError(f"{name} = {json.dumps(value)}: expected {expected}")

    model, loss, mixture = cfg.model, cfg.loss, cfg.mixture
    require("model.kind", model.kind in ("image", "video"), "one of image, video")
    require("model.channels", bool(model.channels) and min(model.channels, default=0) >= 1, "one or more above 0")
    for name in ("model.layers_per_block", "model.latent_channels", "model.norm_groups", "loss.discriminator_channels",
                 "loss.discriminator_layers", "text.hidden_size", "text.depth", "text.num_heads"):  # fmt: skip
        section, key = name.split(".")
        require(name, getattr(getattr(cfg, section), key) >= 1, "at least 1")
    for name in ("kl", "image_latents", "latent_noise", "lpips", "discriminator", "discriminator_start"):
        require(f"loss.{name}", getattr(loss, name) >= 0, "0 or more")
    require("text.vocab_size", cfg.text.vocab_size >= 0, "0 or more")
    divides = all(channels % model.norm_groups == 0 for channels in model.channels)
    require("model.norm_groups", divides, f"a divisor of each of model.channels = {list(model.channels)}")
    require("loss.target", loss.target in ("pixels", "latents"), "one of pixels, latents")
    require("mixture.image_share", 0 <= mixture.image_share <= 1, "a share from 0 to 1")
    require("text.num_heads", cfg.text.hidden_size % cfg.text.num_heads == 0, "a divisor of text.hidden_size")
    _check_kind(cfg, require)
    _check_shared(cfg, require)


def _check_kind(cfg: AutoencoderConfig, require: Any) -> None:
    model, loss = cfg.model, cfg.loss
    if model.kind == "video":
        require("model.frozen_encoder", not model.frozen_encoder, 'false with model.kind = "video"')
        require("model.image", bool(model.image), 'the folder of an image autoencoder with model.kind = "video"')
        if loss.target == "latents":
            for key in ("discriminator", "lpips_path", "latent_noise"):
                require(f"loss.{key}", not getattr(loss, key), 'none with loss.target = "latents" (it sees pixels)')
        return
    require("init.weights", bool(cfg.init.weights) or not model.frozen_encoder, "what model.frozen_encoder keeps")
    require("model.image", not model.image, 'none with model.kind = "image" (init.weights starts from another one)')
    require("loss.target", loss.target == "pixels", 'pixels with model.kind = "image"')
    require("loss.image_latents", not loss.image_latents, '0 with model.kind = "image"')
    require("mixture.image_share", not cfg.mixture.image_share, '0 with model.kind = "image": each frame is an image')
    require("mixture.random_length", not cfg.mixture.random_length, 'false with model.kind = "image"')
    stride = cfg.spatial_stride
    for side in () if cfg.data.buckets else ("height", "width"):
        fits = getattr(cfg.data, side) % stride == 0
        require(f"data.{side}", fits, f"a multiple of {stride}, the stride of {len(model.channels)} model.channels")


def _check_shared(cfg: AutoencoderConfig, require: Any) -> None:
    """Keys of the shared sections that stage 0 has no use for must not seem to have one."""
    train, parallel = cfg.train, cfg.parallel
    best = cfg.checkpoint.keep_best in ("", "psnr", "ssim")
    require("checkpoint.keep_best", best, "psnr, ssim or none in stage 0")
    require("data.cache", not cfg.data.cache, "none in stage 0, which encodes anew every step (data.draws holds clips)")
    require("data.packing_tokens", not cfg.data.packing_tokens, "0 in stage 0")
    require("train.compile", train.compile != "on", "auto or off in stage 0")
    require("train.activation_checkpointing", train.activation_checkpointing != "selective", "none or full in stage 0")
    require("train.offload_activations", not train.offload_activations, "false in stage 0")
    require("optim.in_backward", not cfg.optim.in_backward, "false in stage 0")
    require("parallel.engine", parallel.engine == "torch", "torch in stage 0")
    require("parallel.plugin", parallel.plugin == "ddp", "ddp in stage 0 (the models are small)")
    for name in ("tp_size", "sp_size"):
        require(f"parallel.{name}", getattr(parallel, name) == 1, "1 in stage 0")
