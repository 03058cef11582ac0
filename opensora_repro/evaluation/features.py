"""Videos as vectors of a frozen model: I3D, video transformers, image models and CLIP frame by frame."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import interpolate

from opensora_repro.config import ConfigError
from opensora_repro.files import Sha256Memo
from opensora_repro.frozen.clip import ClipModel, clip_fingerprint, find_clip, load_clip
from opensora_repro.frozen.image_encoder import ImageEncoder, find_image_encoder, prepared
from opensora_repro.frozen.pretrained import FrozenModel, ModelNotFound, check_complete, find_folder, read_object

OWN = "own"  # the name of the model that is trained on the spot
KEY = "features"
FRAMES = 8  # of a clip, evenly, that image models see
I3D_SIDE = 224  # pixels that an I3D without its own scaling takes


class FeatureModel(Protocol):
    """`name` for people, `fingerprint` of all that decides the vectors."""

    name: str
    fingerprint: str

    def features(self, videos: Sequence[np.ndarray]) -> Tensor:
        """Return float32 [N, F, D] of uint8 videos [T, H, W, 3] of one size: F vectors each, 1 or one a frame."""


def open_features(path: str, device: torch.device, *, key: str = f"--{KEY}") -> FeatureModel:
    """The model of a local file or folder, or of the hub's cache; never `OWN`. Raises ConfigError, ModelNotFound."""
    file = Path(path).expanduser()
    if file.is_file():
        return TorchScriptFeatures(file, device, key=key)
    kind = _kind_of(path, key)
    if kind is ImageFeatures:
        return ImageFeatures(find_image_encoder(path, key=key, device=str(device)), path)
    return ClipFeatures(path, device, key=key) if kind is ClipFeatures else VideoFeatures(path, device, key=key)


def check_features(path: str, *, key: str) -> None:
    """Look at what `open_features` would open, without reading it in. Raises ConfigError, ModelNotFound."""
    file = Path(path).expanduser()
    if file.is_file():
        names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
        if not any(name.endswith("/constants.pkl") for name in names):
            raise ConfigError(f"{key}={file}: no TorchScript file, as torch.jit.save writes it")
        return
    kind = _kind_of(path, key)
    if kind is ImageFeatures:
        find_image_encoder(path, key=key)
    elif kind is ClipFeatures:
        find_clip(path, key=key)
    else:
        _find_video_model(lambda *_, **__: None, path, key).part(_video_config)


def _kind_of(path: str, key: str) -> type[FeatureModel]:
    """Whose folder it is. Raises ModelNotFound."""
    folder = find_folder(path, key=key, kind="TorchScript file, or a folder of a timm, CLIP or video model")
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{key}={path}: {error}") from None
    if "architecture" in config:
        return ImageFeatures
    return ClipFeatures if config.get("model_type") == "clip" else VideoFeatures


def evenly(video: np.ndarray, num_frames: int) -> np.ndarray:
    """`num_frames` frames from the first to the last; of a shorter video some come again."""
    picked: np.ndarray = video[np.linspace(0, len(video) - 1, num_frames).round().astype(int)]
    return picked


class TorchScriptFeatures:
    """A TorchScript file of a video network, such as the I3D that FVD is told with."""

    def __init__(self, file: Path, device: torch.device, *, key: str) -> None:
        self.name, self.device, self.where = file.name, device, f"{key}={file}"
        self.fingerprint = Sha256Memo()(file)
        try:
            self.model: Any = torch.jit.load(str(file), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{self.where}: no TorchScript file ({str(error).splitlines()[0][:120]})") from None
        self.options = {a.name: True for a in self.model.forward.schema.arguments if a.name in I3D_OPTIONS}

    @torch.no_grad()
    def features(self, videos: Sequence[np.ndarray]) -> Tensor:
        """Files that scale themselves take values from 0 to 255, others 224 pixels and values from -1 to 1."""
        pixels = torch.from_numpy(np.stack(videos)).to(self.device).float()
        pixels = rearrange(pixels, "n t h w c -> n c t h w")  # [N, 3, T, H, W]
        if "rescale" not in self.options:
            shape = (pixels.shape[2], I3D_SIDE, I3D_SIDE)
            pixels = interpolate(pixels / 127.5 - 1, shape, mode="trilinear", align_corners=False)
        try:
            found = self.model(pixels, **self.options)
        except RuntimeError as error:
            shown = str(error).strip().splitlines()[-1][:160]
            raise ConfigError(f"{self.where}: does not take clips {list(pixels.shape[1:])} ({shown})") from None
        return found.float().cpu().reshape(len(videos), 1, -1)


I3D_OPTIONS = ("rescale", "resize", "return_features")  # what StyleGAN-V's file is told


class VideoFeatures:
    """A video model of transformers, such as VideoMAE: the mean of its last layer's tokens."""

    def __init__(self, path: str, device: torch.device, *, key: str) -> None:
        self.name, self.device = path, device
        self.frozen = _find_video_model(self._load, path, key)
        self.fingerprint = self.frozen.fingerprint(Sha256Memo())

    def _load(self, folder: str, **options: Any) -> Any:
        from transformers import AutoModel

        _video_config(folder, **options)
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
        check_complete(info)
        return model.float().to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, videos: Sequence[np.ndarray]) -> Tensor:
        model = self.frozen.model
        mean, std = _colours(self.frozen.folder)
        size = model.config.image_size
        frames = [evenly(video, model.config.num_frames) for video in videos]
        pixels = [torch.cat([prepared(frame, size, mean, std) for frame in video]) for video in frames]
        tokens = model(pixel_values=torch.stack(pixels).to(self.device)).last_hidden_state  # [N, L, D]
        return reduce(tokens, "n l d -> n 1 d", "mean").float().cpu()


def _find_video_model(load: Callable[..., Any], path: str, key: str) -> FrozenModel[Any]:
    return FrozenModel(load, path, key=key, kind="transformers video model", weights=("model.safetensors",))


def _video_config(folder: str, **options: Any) -> None:
    """Raise ValueError for the config of a model that takes no videos."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **options)
    if not hasattr(config, "num_frames"):
        raise ValueError(f"a {config.model_type} takes no videos (its config has no num_frames)")


def _colours(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """ImageNet's, unless the folder's preprocessor says others."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    try:
        told = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        return told["image_mean"], told["image_std"]
    except (OSError, ValueError, KeyError, TypeError):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class ImageFeatures:
    """A model of timm, frame by frame: its vectors before the classifier, as FID takes them."""

    def __init__(self, frozen: FrozenModel[ImageEncoder], name: str) -> None:
        self.frozen, self.name = frozen, name
        self.fingerprint = frozen.fingerprint(Sha256Memo())

    @torch.no_grad()
    def features(self, videos: Sequence[np.ndarray]) -> Tensor:
        encoder = self.frozen.model
        found = []
        for video in videos:
            frames = evenly(video, min(FRAMES, len(video)))
            pixels = torch.cat([prepared(frame, encoder.image_size, encoder.mean, encoder.std) for frame in frames])
            found.append(encoder.model(pixels.to(encoder.device)).float().cpu())
        return torch.stack(found)


class ClipFeatures:
    """CLIP, frame by frame, and of captions: vectors of length 1."""

    def __init__(self, path: str, device: torch.device, *, key: str) -> None:
        self.name = path
        self.fingerprint = clip_fingerprint(path, key=key, hash_file=Sha256Memo())
        self.model: ClipModel = load_clip(path, key=key, device=str(device))

    def features(self, videos: Sequence[np.ndarray]) -> Tensor:
        return torch.stack(
            [self.model.embed_pictures(list(evenly(video, min(FRAMES, len(video))))) for video in videos]
        )


def all_features(model: FeatureModel, videos: Sequence[np.ndarray], batch_size: int) -> Tensor:
    """As `FeatureModel.features`, a few videos at a time; [0, 0, 0] of none."""
    parts = [model.features(videos[i : i + batch_size]) for i in range(0, len(videos), batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, 0, 0)


def as_set(features: Tensor) -> Tensor:
    """[N, F, D] -> [N F, D], of which a distance is told."""
    return rearrange(features, "n f d -> (n f) d")


class Tower(nn.Sequential):
    """Videos [N, 3, T, H, W] in [-1, 1] -> [N, width]: the layers of the model that is trained on the spot."""

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for number, out in enumerate((16, 32, width)):
            stride = (1 if number == 0 else 2, 2, 2)
            layers += [nn.Conv3d(channels, out, 3, stride=stride, padding=1), nn.GroupNorm(4, out), nn.GELU()]
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool3d((1, 2, 2)), nn.Flatten(), nn.Linear(4 * width, width))
