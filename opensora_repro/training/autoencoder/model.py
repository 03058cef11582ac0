"""The autoencoders that stage 0 trains: built from the config, or opened where they begin; written as `vae.path` has it.

Either kind has one face: videos [B, 3, T, H, W] in [-1, 1] to moments [B, 2 Cz, T', h, w], and latents back to videos.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.config import AutoencoderConfig, AutoencoderModelConfig, ConfigError, InitConfig
from opensora_repro.files import replacing
from opensora_repro.frozen.pretrained import FrozenModel, check_complete
from opensora_repro.frozen.vae import KIND, WEIGHTS
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
        frames = rearrange(video, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        return rearrange(self.vae.encode(frames).latent_dist.parameters, "(b t) c h w -> b c t h w", b=len(video))

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, Cz, T, h, w] to [B, 3, T, H, W]; not clamped."""
        frames = rearrange(latents, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        return rearrange(self.vae.decode(frames).sample, "(b t) c h w -> b c t h w", t=num_frames)

    def save(self, folder: Path, *, latent_std: float) -> None:
        """Write the folder that `vae.path` takes; `latent_std` of the means becomes its `scaling_factor`."""
        self.vae.register_to_config(scaling_factor=1 / latent_std)
        with replacing(folder) as unfinished:
            self.vae.save_pretrained(unfinished, safe_serialization=True)


def build_autoencoder(cfg: AutoencoderConfig) -> ImageAutoencoder:
    """The autoencoder at the run's start: that of `init.weights`, or drawn at random by `run.seed`.

    Raises ConfigError, ModelNotFound.
    """
    if cfg.init.weights:
        vae = open_image(init_folder(cfg.init), "init.weights")
        check_same_model(vae, cfg.model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed)
            vae = draw_image(cfg.model)
    if cfg.train.activation_checkpointing == "full":
        vae.enable_gradient_checkpointing()
    return ImageAutoencoder(vae.train().to(memory_format=torch.channels_last))


def draw_image(cfg: AutoencoderModelConfig) -> Any:
    """An AutoencoderKL from torch's global generator, as `picture_start` has it where that is possible."""
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


def open_image(path: str, key: str) -> Any:
    """A local or cached AutoencoderKL in float32, trainable. Raises ModelNotFound."""

    def load(folder: str, **options: Any) -> Any:
        from diffusers import AutoencoderKL

        vae, info = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True, **options)
        check_complete(info)
        return vae

    return FrozenModel(load, path, key=key, kind=KIND, weights=WEIGHTS).get()


def check_same_model(vae: Any, cfg: AutoencoderModelConfig) -> None:
    """Raise ConfigError where `init.weights` has another architecture than `[model]`."""
    found = vae.config
    for key, there in (
        ("channels", tuple(found.block_out_channels)),
        ("layers_per_block", found.layers_per_block),
        ("latent_channels", found.latent_channels),
        ("norm_groups", found.norm_num_groups),
        ("attention", bool(getattr(found, "mid_block_add_attention", True))),
    ):
        here = getattr(cfg, key)
        if there != here:
            raise ConfigError(f"model.{key} = {_toml(here)}: init.weights has {_toml(there)}; set model.{key} to it")


def _toml(value: Any) -> str:
    import json

    return json.dumps(value)
