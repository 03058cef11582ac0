"""The autoencoders that stage 0 trains: built from the config, or opened; written as `vae.path` has them.

Either kind has one face: videos [B, 3, T, H, W] in [-1, 1] to moments [B, 2 Cz, T', h, w], and latents back to videos.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.config import AutoencoderConfig, AutoencoderModelConfig, ConfigError, InitConfig
from opensora_repro.files import replacing
from opensora_repro.frozen.autoencoder import KIND, SD_LATENT_SCALE, WEIGHTS
from opensora_repro.frozen.geometry import OPEN_SORA_KIND, open_sora_config
from opensora_repro.frozen.pretrained import FrozenModel, check_complete
from opensora_repro.frozen.video_vae import OPEN_SORA_WEIGHTS, load_open_sora
from opensora_repro.models.autoencoder_config import TemporalVAEConfig, VideoAutoencoderConfig
from opensora_repro.models.video_autoencoder import VideoAutoencoder
from opensora_repro.training.autoencoder.picture_start import start_as_picture

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

INITIAL_LOGVAR = -8.0  # a posterior that starts wide hides the picture and stalls the first hundreds of steps
RESULT = "vae"  # folder in the run's, for `vae.path`


class ImageAutoencoder:
    """diffusers' AutoencoderKL on every frame of a video by itself."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae: Any = vae
        self.latent_channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        module: nn.Module = self.vae
        return module

    @property
    def last_layer(self) -> Tensor:
        """The weight that the adaptive weight of a discriminator is measured at."""
        weight: Tensor = self.vae.decoder.conv_out.weight
        return weight

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[Cz, T', h, w] of a video."""
        return self.latent_channels, frames, height // self.stride, width // self.stride

    def moments(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] to means and log-variances [B, 2 Cz, T, h, w]."""
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        return rearrange(self.vae.encode(frames).latent_dist.parameters, "(b t) c h w -> b c t h w", b=len(video))

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, Cz, T, h, w] to [B, 3, T, H, W]; not clamped."""
        frames = rearrange(latents, "b c t h w -> (b t) c h w")
        return rearrange(self.vae.decode(frames).sample, "(b t) c h w -> b c t h w", t=num_frames)

    def to(self, device: torch.device) -> ImageAutoencoder:
        self.vae.to(device)
        return self

    def save(self, folder: Path, mean: Tensor, std: Tensor) -> None:
        """Write the folder that `vae.path` takes; mean and deviation of the latents are float32 [Cz] each."""
        if self.vae.encoder.conv_in.weight.requires_grad:  # else a model of these latents knows them by their factor
            # One for all channels, as `scaling_factor` means in diffusers: of the deviation around the common mean.
            spread = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
            self.vae.register_to_config(scaling_factor=1 / float(spread))
        with replacing(folder) as unfinished, _quietly():
            self.vae.save_pretrained(unfinished, safe_serialization=True)


class TemporalAutoencoder:
    """1.2's video autoencoder, of which the temporal part is trained and the image part is not."""

    def __init__(self, whole: VideoAutoencoder, image_config: dict[str, Any]) -> None:
        self.whole, self.image_config = whole, image_config
        whole.spatial_vae.eval().requires_grad_(False)
        self.latent_channels = whole.cfg.temporal.embed_dim
        self.stride = 2 ** (len(image_config["block_out_channels"]) - 1)

    @property
    def module(self) -> nn.Module:
        return self.whole.temporal_vae

    @property
    def last_layer(self) -> Tensor:
        weight: Tensor = self.whole.temporal_vae.decoder.conv_out.conv.weight
        return weight

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return self.latent_channels, self.whole.cfg.latent_frames(frames), height // self.stride, width // self.stride

    def frame_latents(self, video: Tensor) -> Tensor:
        """What the image part makes of [B, 3, T, H, W], scaled: [B, C, T, h, w]."""
        return self.whole.spatial_vae.encode(video, None) * self.whole.cfg.latent_scale

    def moments(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] to [B, 2 Cz, T', h, w]."""
        return self.whole.encode_moments(video)

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        return self.whole.decode_codes(latents, num_frames=num_frames)

    def decode_frames(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, Cz, T', h, w] to the image part's latents [B, C, T, h, w], scaled."""
        return self.whole.decode_codes_to_latents(latents, num_frames=num_frames)

    def to(self, device: torch.device) -> TemporalAutoencoder:
        self.whole.to(device)
        return self

    def save(self, folder: Path, mean: Tensor, std: Tensor) -> None:
        """In the layout of hpcai-tech/OpenSora-VAE-v1.2, with `latent_scale` beside shift and scale."""
        from safetensors.torch import save_file

        for buffer, values in ((self.whole.shift, mean), (self.whole.scale, std)):
            buffer.copy_(values.reshape(buffer.shape))
        cfg = self.whole.cfg
        told = {
            "model_type": OPEN_SORA_KIND,
            "vae_2d": {key: value for key, value in self.image_config.items() if not key.startswith("_")},
            "vae_temporal": asdict(cfg.temporal),
            "micro_frame_size": cfg.micro_frame_size,
            "latent_scale": cfg.latent_scale,
            "shift": mean.tolist(),
            "scale": std.tolist(),
        }
        state = {key: value.contiguous() for key, value in self.whole.state_dict().items()}
        with replacing(folder) as unfinished:
            unfinished.mkdir(parents=True)
            save_file(state, unfinished / OPEN_SORA_WEIGHTS[0])
            (unfinished / "config.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


Trained: TypeAlias = "ImageAutoencoder | TemporalAutoencoder"


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers and diffusers draw a bar for writing a file."""
    from huggingface_hub import utils

    bars: Any = utils
    disabled = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            bars.enable_progress_bars()


def build_autoencoder(cfg: AutoencoderConfig) -> Trained:
    """The autoencoder at the run's start: that of `init.weights`, or drawn at random by `run.seed`.

    Raises ConfigError, ModelNotFound.
    """
    return build_temporal(cfg) if cfg.model.kind == "video" else build_image(cfg)


def check_models(cfg: AutoencoderConfig) -> None:
    """Refuse what `build_autoencoder` would by the folders' config.json alone. Raises ConfigError, ModelNotFound."""
    if cfg.model.kind == "video":
        image = frozen_image(cfg.model.image, "model.image").config
        whole = temporal_config(cfg.model, image.get("latent_channels", 4), image.get("scaling_factor"))
        check_image_latents(cfg, whole)
        if cfg.init.weights:
            frozen_temporal(init_folder(cfg.init), whole)
    elif cfg.init.weights:
        check_same_model(frozen_image(init_folder(cfg.init), "init.weights").config, cfg.model)


def build_temporal(cfg: AutoencoderConfig) -> TemporalAutoencoder:
    image = frozen_image(cfg.model.image, "model.image").model
    whole = temporal_config(cfg.model, image.config.latent_channels, image.config.get("scaling_factor"))
    check_image_latents(cfg, whole)
    if cfg.init.weights:
        model = frozen_temporal(init_folder(cfg.init), whole).model
        return TemporalAutoencoder(model, dict(image.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        model = VideoAutoencoder(whole, image)
    moments: Any = model.temporal_vae.quant_conv.conv
    with torch.no_grad():
        moments.weight[cfg.model.latent_channels :] = 0.0
        moments.bias[cfg.model.latent_channels :] = INITIAL_LOGVAR
    return TemporalAutoencoder(model, dict(image.config))


def temporal_config(
    cfg: AutoencoderModelConfig, image_channels: int, scaling_factor: float | None
) -> VideoAutoencoderConfig:
    """1.2's sizes for `[model]`: time is halved twice where there are three levels, at the last of them."""
    first, *_ = cfg.channels
    if any(channels % first for channels in cfg.channels):
        raise ConfigError(f"model.channels = {list(cfg.channels)}: expected multiples of the first with kind video")
    halved = len(cfg.channels) - 1
    temporal = TemporalVAEConfig(
        in_out_channels=image_channels,
        latent_embed_dim=cfg.latent_channels,
        embed_dim=cfg.latent_channels,
        filters=first,
        num_res_blocks=cfg.layers_per_block,
        channel_multipliers=tuple(channels // first for channels in cfg.channels),
        temporal_downsample=tuple(level >= halved - 2 for level in range(halved)),
        num_groups=cfg.norm_groups,
    )
    channels = cfg.latent_channels
    return VideoAutoencoderConfig(
        temporal=temporal,
        latent_scale=float(scaling_factor or SD_LATENT_SCALE),
        shift=(0.0,) * channels,
        scale=(1.0,) * channels,
    )


def check_image_latents(cfg: AutoencoderConfig, whole: VideoAutoencoderConfig) -> None:
    """An image's latents can be compared with the frozen one's only where they have the same channels."""
    if cfg.loss.image_latents and whole.temporal.in_out_channels != whole.temporal.embed_dim:
        raise ConfigError(
            f"loss.image_latents = {cfg.loss.image_latents}: expected 0, or model.latent_channels = "
            f"{whole.temporal.in_out_channels} as model.image has"
        )


def frozen_temporal(path: str, expected: VideoAutoencoderConfig) -> FrozenModel[VideoAutoencoder]:
    """A video autoencoder in 1.2's layout, in float32, to be read. Raises ModelNotFound, ConfigError."""

    def load(folder: str, **options: Any) -> VideoAutoencoder:
        return load_open_sora(
            Path(folder), frozen.config, micro_batch_size=4, device="cpu", dtype=torch.float32
        ).requires_grad_(True)

    kind = "VideoAutoencoderPipeline of Open-Sora 1.2"
    frozen: FrozenModel[VideoAutoencoder] = FrozenModel(
        load, path, key="init.weights", kind=kind, weights=OPEN_SORA_WEIGHTS
    )
    found = frozen.read(open_sora_config).temporal
    if replace(found, activation_fn=expected.temporal.activation_fn) != expected.temporal:
        raise ConfigError(f"init.weights = {path} has {found}: [model] means {expected.temporal}")
    return frozen


def build_image(cfg: AutoencoderConfig) -> ImageAutoencoder:
    if cfg.init.weights:
        frozen = frozen_image(init_folder(cfg.init), "init.weights")
        check_same_model(frozen.config, cfg.model)
        vae = frozen.model
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed)
            vae = draw_image(cfg.model)
    if cfg.train.activation_checkpointing == "full":
        vae.enable_gradient_checkpointing()
    if cfg.model.frozen_encoder:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    return ImageAutoencoder(vae.train())


def draw_image(cfg: AutoencoderModelConfig) -> Any:
    """An AutoencoderKL from torch's global generator, as `picture_start` has it where that is possible."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which diffusers imports, see frozen/autoencoder.py
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {}
    if not cfg.attention and "mid_block_add_attention" in inspect.signature(AutoencoderKL).parameters:
        settings["mid_block_add_attention"] = False
    levels = len(cfg.channels)
    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.layers_per_block,
        latent_channels=cfg.latent_channels,
        norm_num_groups=cfg.norm_groups,
        **settings,
    )
    if not cfg.attention and not settings:  # diffusers before 0.30 cannot leave it out: it says nothing
        for block in (vae.encoder.mid_block, vae.decoder.mid_block):
            block.attentions.requires_grad_(False)
            for parameter in block.attentions[0].to_out.parameters():
                parameter.zero_()
    start_as_picture(vae)
    vae.quant_conv.weight.data[cfg.latent_channels :] = 0.0
    vae.quant_conv.bias.data[cfg.latent_channels :] = INITIAL_LOGVAR
    return vae


def init_folder(cfg: InitConfig) -> str:
    """The folder of an autoencoder, or the one in the folder of a run."""
    inside = Path(cfg.weights) / RESULT
    return str(inside) if (inside / "config.json").is_file() else cfg.weights


def frozen_image(path: str, key: str) -> FrozenModel[Any]:
    """A local or cached AutoencoderKL in float32, trainable, to be read. Raises ModelNotFound."""

    def load(folder: str, **options: Any) -> Any:
        from diffusers import AutoencoderKL

        options = {**options, "torch_dtype": torch.float32, "output_loading_info": True}
        vae, info = AutoencoderKL.from_pretrained(folder, **options)
        check_complete(info)
        return vae

    frozen: FrozenModel[Any] = FrozenModel(load, path, key=key, kind=KIND, weights=WEIGHTS)
    name = frozen.config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise frozen.unusable(ValueError(f"config.json describes {name}"))
    return frozen


def check_same_model(found: Mapping[str, Any], cfg: AutoencoderModelConfig) -> None:
    """Raise ConfigError where `init.weights`, whose config.json this is, has another architecture than `[model]`."""
    for key, there in (  # what a file leaves out is diffusers' default
        ("channels", tuple(found.get("block_out_channels", (64,)))),
        ("layers_per_block", found.get("layers_per_block", 1)),
        ("latent_channels", found.get("latent_channels", 4)),
        ("norm_groups", found.get("norm_num_groups", 32)),
        ("attention", found.get("mid_block_add_attention", True)),
    ):
        here = getattr(cfg, key)
        if there != here:
            raise ConfigError(f"model.{key} = {_toml(here)}: init.weights has {_toml(there)}; set model.{key} to it")


def _toml(value: Any) -> str:
    return json.dumps(value)
