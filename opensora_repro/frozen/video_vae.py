"""Frozen autoencoders of videos: those of diffusers that are causal in time, and Open-Sora 1.2's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_repro.frozen.autoencoder import Autoencoder, load_from_diffusers
from opensora_repro.frozen.geometry import OPEN_SORA_KIND, image_config, open_sora_config
from opensora_repro.frozen.pretrained import FrozenModel
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.video_autoencoder import VideoAutoencoder

if TYPE_CHECKING:
    from opensora_repro.config import VaeConfig

WEIGHTS = ("diffusion_pytorch_model.safetensors",)  # as diffusers names them
OPEN_SORA_WEIGHTS = ("model.safetensors",)
MOCHI = "AutoencoderKLMochi"
MEASURED = ("AutoencoderKLWan", MOCHI)  # whose config has each channel's mean and standard deviation


class VideoVAE(Autoencoder):
    """A causal autoencoder of diffusers, one clip after the other: neighbours never change a clip.

    What is done in time is the class's own: CogVideoX takes 8 frames at once, and remembers the convolutions' past;
    Wan 4, with which nothing changes; HunyuanVideo 17, 12 apart, and fades from one to the next; LTX and Mochi all.
    """

    def __init__(self, frozen: FrozenModel[Any], kind: str, dtype: torch.dtype, tile_size: int = 0) -> None:
        super().__init__(frozen, kind, dtype, tile_size)
        if kind == MOCHI:
            self.pixel_dtype = torch.float32
        self._statistics = frozen.read(self._read_statistics)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the encoder's latents, float32 [Cz or 1, 1, 1, 1]."""
        if self._statistics[0].device != device:  # once: a step waits for no copy
            mean, std = self._statistics
            self._statistics = to_device(mean, device), to_device(std, device)
        return self._statistics

    def _read_statistics(self, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.geometry.kind == "AutoencoderKLLTXVideo":  # lie among the weights
            mean, std = stored(self.frozen.files, ("latents_mean", "latents_std"))
        else:
            told = _channels(config, "latents_mean", self.geometry.kind)
            mean = torch.tensor([config.get("shift_factor") or 0.0]) if told is None else told
            told = _channels(config, "latents_std", self.geometry.kind)
            std = torch.ones(1) if told is None else told
        factor = config.get("scaling_factor")
        if factor is None and self.geometry.kind in ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"):
            raise ValueError("config.json has no number scaling_factor")
        shape = (-1, 1, 1, 1)
        for values in (mean, std):
            if len(values) not in (1, self.latent_channels):
                raise ValueError(f"{len(values)} means of latents for {self.latent_channels} channels")
        if not (std > 0).all():
            raise ValueError("a latent's standard deviation is not above 0")
        return mean.float().view(shape), std.float().view(shape) / float(1.0 if factor is None else factor)

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = self.statistics(z.device)
        return (z - mean) / std

    @torch.no_grad()
    def encode_moments(self, video: Tensor) -> Tensor:
        """Pixels beyond whole latents, at the right and at the bottom, are not seen."""
        stride = self.spatial_stride
        height, width = (size // stride * stride for size in video.shape[-2:])
        there = self._there(video[None, ..., :height, :width], self.pixel_dtype)
        return self._encoded(self._moments, there)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        assert latents.shape[2] == self.latent_frames(num_frames)
        mean, std = self.statistics(latents.device)
        clips = (latents.float() * std + mean).split(1)
        decoded = [self._decoded(lambda z: self._pixels(z, num_frames), self._there(z)) for z in clips]
        videos = decoded[0] if len(decoded) == 1 else torch.cat(decoded)  # one, of 720p gigabytes, is not copied
        assert videos.shape[2] == num_frames
        return videos.clamp_(-1.0, 1.0)

    def _there(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the weights' device; in their dtype unless another is given."""
        weight = next(self.vae.parameters())
        return x.to(weight.device, dtype or weight.dtype)

    def _moments(self, video: Tensor) -> Tensor:
        """[1, 3, T, H, W] -> float32 [1, 2 * Cz, T', h, w]."""
        with torch.autocast(video.device.type, enabled=False):  # the weights' dtype decides, not the caller's
            moments: Tensor = self.vae.encode(video).latent_dist.parameters
        return moments.float()

    def _pixels(self, z: Tensor, num_frames: int) -> Tensor:
        """The encoder's latents [1, Cz, T', h, w] -> float32 [1, 3, num_frames, H, W]."""
        timestep = {}
        if self.frozen.config.get("timestep_conditioning"):  # LTX's later decoders also remove noise; there is none
            timestep["temb"] = torch.zeros(1, device=z.device, dtype=z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            pixels: Tensor = self.vae.decode(z, **timestep).sample
        return pixels.float()


class OpenSoraVAE(VideoVAE):
    """Open-Sora 1.2's. The frames' latents are means where the published pipeline samples them.

    So a clip's moments are the same each time, and can be kept.
    """

    def _read_statistics(self, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
        shift, scale = stored(self.frozen.files, ("shift", "scale"))
        return shift.float().view(-1, 1, 1, 1), scale.float().view(-1, 1, 1, 1)

    @torch.no_grad()
    def encode_moments(self, video: Tensor) -> Tensor:
        """Of pixels beyond whole latents, the image autoencoder's convolutions see some."""
        return self._encoded(self._moments, self._there(video[None]))[0]

    def _moments(self, video: Tensor) -> Tensor:
        with torch.autocast(video.device.type, enabled=False):
            moments: Tensor = self.vae.encode_moments(video)
        return moments.float()

    def _pixels(self, z: Tensor, num_frames: int) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            pixels: Tensor = self.vae.decode_codes(z, num_frames=num_frames)
        return pixels.float()


def stored(files: Sequence[Path], names: Sequence[str]) -> list[Tensor]:
    """Tensors of the safetensors among the files, without the others. Raises ValueError."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in set(names) & set(tensors.keys())}
    for name in names:
        if name not in found:
            raise ValueError(f"the weights have no {name}")
    return [found[name] for name in names]


def _channels(config: dict[str, Any], key: str, kind: str) -> Tensor | None:
    """A number a channel; None where the config may have none. Raises ValueError."""
    values = config.get(key)
    if values is None and kind in MEASURED:
        raise ValueError(f"config.json has no numbers {key}")
    return None if values is None else torch.tensor(values, dtype=torch.float32)


def load_open_sora(
    folder: Path, config: dict[str, Any], *, micro_batch_size: int, device: torch.device | str, dtype: torch.dtype
) -> VideoAutoencoder:
    """Built on no device, it takes the file's own tensors. Raises ValueError where keys or shapes differ."""
    import inspect

    from diffusers import AutoencoderKL

    known = inspect.signature(AutoencoderKL.__init__).parameters
    with torch.device("meta"):
        image_vae = AutoencoderKL(**{key: value for key, value in image_config(config).items() if key in known})
        model = VideoAutoencoder(open_sora_config(config), image_vae, micro_batch_size=micro_batch_size)
    state = _state(folder)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [key for key in sorted(expected.keys() | state.keys()) if key not in state or key not in expected]
    wrong += [key for key, shape in expected.items() if key in state and state[key].shape != shape]
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing, left over or misshapen, first {wrong[0]}")
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} is not finite")
    model.load_state_dict(state, assign=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def _state(folder: Path) -> dict[str, Tensor]:
    import json

    from safetensors.torch import load_file

    index = folder / f"{OPEN_SORA_WEIGHTS[0]}.index.json"
    names = [OPEN_SORA_WEIGHTS[0]]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def open_video_vae(kind: str, cfg: VaeConfig, device: torch.device | str, dtype: torch.dtype) -> VideoVAE:
    """As open_vae, for a kind that is no AutoencoderKL's. Raises ModelNotFound."""
    if kind == OPEN_SORA_KIND:

        def load_own(path: str, **options: Any) -> Any:
            return load_open_sora(
                Path(path), opened.config, micro_batch_size=cfg.micro_batch_size, device=device, dtype=dtype
            )

        opened: FrozenModel[Any] = FrozenModel(
            load_own, cfg.path, key="vae.path", kind="VideoAutoencoderPipeline of Open-Sora 1.2",
            weights=OPEN_SORA_WEIGHTS,
        )  # fmt: skip
        return OpenSoraVAE(opened, kind, dtype, cfg.tile_size)

    def load(path: str, **options: Any) -> Any:
        vae = load_from_diffusers(kind, path, device, dtype, options)
        if kind == MOCHI:
            # It takes sines of the pixels times 402 and 804, of which nothing is right once they are bfloat16.
            vae.encoder.fourier_features.register_forward_hook(lambda module, given, out: out.to(dtype))
        return vae

    frozen = FrozenModel(load, cfg.path, key="vae.path", kind=f"diffusers {kind}", weights=WEIGHTS)
    return VideoVAE(frozen, kind, dtype, cfg.tile_size)
