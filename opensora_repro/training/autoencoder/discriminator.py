"""A patch discriminator (Isola et al. 2017, arXiv:1611.07004) and its hinge loss, weighted as in VQGAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

MAX_RATIO = 1e4  # of the adaptive weight (Esser et al. 2021, arXiv:2012.09841)


class PatchDiscriminator(nn.Module):
    """Says of overlapping patches of a frame whether they are real: above 0, or not."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            stride = 2 if index < num_layers else 1
            wider = min(2 * width, 8 * channels)
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1), nn.GroupNorm(1, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [N, 3, H, W] to logits of patches [N, 1, h, w]."""
        logits: Tensor = self.layers(frames)
        return logits

    def judged(self, frames: Tensor) -> Tensor:
        """Mean logit of each frame, [N], as seen by those who are judged: gradients reach the frames alone."""
        fixed = {name: value.detach() for name, value in self.named_parameters()}
        logits: Tensor = functional_call(self, fixed, (frames,))
        return logits.mean(dim=(1, 2, 3))

    def loss(self, found: Tensor, source: Tensor) -> Tensor:
        """The hinge loss of each pair of frames, [N]: gradients reach the discriminator alone."""
        real, fake = self(source.detach()), self(found.detach())
        losses: Tensor = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3))
        return losses


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Norm of the reconstruction's gradient at the decoder's last weight over that of the adversarial loss; [] each."""
    first, second = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (first / (second + 1e-4)).clamp(max=MAX_RATIO).detach()
