"""LPIPS (Zhang et al. 2018, arXiv:1801.03924): distance of two frames in the channels of an image classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_repro.config import ConfigError

# torchvision's VGG16: number in `features` and channels of each convolution, a stage a row; stages end in a pooling
STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's colours, for values from -1 to 1


class Lpips(nn.Module):
    """Sum over VGG16's five stages of the weighted squared distance between features of unit length, mean over places.

    Nothing of it is trained.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: dict[str, Tensor], lin: list[Tensor] | None) -> None:
        """`vgg`: `features.N.weight` and `.bias`; `lin`: [C] of each stage, None: every channel counts alike."""
        super().__init__()
        self.convolutions = nn.ModuleDict()
        channels = 3
        for number, width in (place for stage in STAGES for place in stage):
            layer = nn.Conv2d(channels, width, 3, padding=1)
            layer.load_state_dict({name: vgg[f"features.{number}.{name}"] for name in ("weight", "bias")})
            self.convolutions[str(number)] = layer
            channels = width
        lin = lin or [torch.full((stage[-1][1],), 1 / stage[-1][1]) for stage in STAGES]
        for index, weights in enumerate(lin):
            self.register_buffer(f"lin{index}", weights.float().reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, found: Tensor, source: Tensor) -> Tensor:
        """Frames [N, 3, H, W] in [-1, 1]; returns [N]."""
        x = torch.cat([found, source])  # [2 N, 3, H, W]
        x = (x - self.shift) / self.scale
        total = x.new_zeros(len(found))
        for index, stage in enumerate(STAGES):
            if index:
                x = F.max_pool2d(x, 2)
            for number, _ in stage:
                x = F.relu(self.convolutions[str(number)](x))
            unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            total = total + (getattr(self, f"lin{index}") * (first - second).square()).sum(dim=1).mean(dim=(1, 2))
        return total


def load_lpips(path: str) -> Lpips:
    """LPIPS of the weights in a folder: VGG16 in torchvision's layout and, if there, LPIPS's own `lin` weights.

    Raises ConfigError. Pickles are opened with weights_only.
    """
    tensors = _tensors(Path(path))
    keys = [f"features.{number}.{name}" for stage in STAGES for number, _ in stage for name in ("weight", "bias")]
    lacking = [key for key in keys if key not in tensors]
    if lacking:
        raise ConfigError(f"loss.lpips_path = {path}: no VGG16 in torchvision's layout (no {lacking[0]})")
    lin = [tensors[key] for key in (f"lin{index}.model.1.weight" for index in range(len(STAGES))) if key in tensors]
    try:
        return Lpips(tensors, [weights.flatten() for weights in lin] if len(lin) == len(STAGES) else None)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"loss.lpips_path = {path}: its VGG16 has other shapes ({reason})") from None


def _files(path: str) -> list[Path]:
    """The files of weights in a folder. Raises ConfigError where there is none."""
    found = sorted(file for file in Path(path).glob("*") if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if not found:
        raise ConfigError(f"loss.lpips_path = {path}: no folder with a file of weights (.safetensors or .pth)")
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in _files(str(folder)):
        try:
            whole = file.suffix == ".safetensors"
            tensors |= load_file(file) if whole else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of safetensors, pickle, zip and torch, each with its own class
            raise ConfigError(f"loss.lpips_path: {file} cannot be read ({type(error).__name__})") from None
    return tensors
