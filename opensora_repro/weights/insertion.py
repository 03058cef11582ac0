"""From an image model to a video model that still is that image model: on every frame, or on every still clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from opensora_repro.errors import TrainingError
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.models.stdit import STDiT
from opensora_repro.weights.layouts import KERNEL

TOLERANCE = 1e-5  # of the largest output, float32: two orders of summation apart
FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")


def inflate(weights: Mapping[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Give an image model's patches `frames` frames, by ViViT's central frame initialisation (arXiv 2103.15691, 4.2).

    The kernel is placed on the central frame, with zeros on the others; every frame of a patch is given out alike.
    """
    kernel = weights[KERNEL]  # [D, C, 1, pH, pW]
    tubelet = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[3:])
    tubelet[:, :, frames // 2] = kernel[:, :, 0]
    alike = {key: repeat(weights[key], "n ... -> (t n) ...", t=frames) for key in FINAL if key in weights}
    return {**weights, KERNEL: tubelet, **alike}


@torch.no_grad()
def assert_equals_image_model(model: CaptionedModel) -> float:
    """Compare with the image model of the same weights on a small random video; return the relative difference.

    The difference is max |video - image| / max |image| over 3 square frames, each as long as a patch. Raises
    TrainingError above `TOLERANCE`.
    """
    image_model = image_twin(model)
    device, cfg = next(model.parameters()).device, model.cfg
    generator = torch.Generator().manual_seed(0)
    side = 4 * max(cfg.patch_size[1:])
    images = torch.randn(2, 3, cfg.in_channels, 1, side, side, generator=generator).to(device)
    text = torch.randn(2, cfg.model_max_length, cfg.caption_channels, generator=generator).to(device)
    mask = torch.arange(cfg.model_max_length)[None] < torch.tensor([[cfg.model_max_length], [1]])
    timestep, mask = torch.tensor([10.0, 900.0], device=device), mask.to(device)

    still, length = "b t c 1 h w -> b c (t p) h w", cfg.patch_size[0]
    video = model(repeat(images, still, p=length), timestep, text, mask)
    text, mask, timestep = (repeat(x, "b ... -> (b t) ...", t=3) for x in (text, mask, timestep))
    expected = image_model(rearrange(images, "b t c 1 h w -> (b t) c 1 h w"), timestep, text, mask)
    expected = repeat(rearrange(expected, "(b t) ... -> b t ...", t=3), still, p=length)
    difference = float((video - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"after inserting temporal attention the video model differs from the image model by {difference:.1e} of "
            f"its largest output (allowed {TOLERANCE:.0e}): was the image model trained with other model settings?"
        )
    return difference


def image_twin(model: CaptionedModel) -> STDiT:
    """The image model of the video model's tensors: without temporal attention, patches of their central frame."""
    frames, rows, columns = model.cfg.patch_size
    with torch.device("meta"):
        twin = STDiT(replace(model.cfg, temporal_attention=False, patch_size=(1, rows, columns)))
    shared = {name: value for name, value in model.state_dict().items() if ".attn_temp." not in name}
    shared[KERNEL] = shared[KERNEL][:, :, frames // 2, None]
    shared |= {key: shared[key][: len(shared[key]) // frames] for key in FINAL}
    twin.load_state_dict(shared, assign=True)
    return twin.train(model.training)
