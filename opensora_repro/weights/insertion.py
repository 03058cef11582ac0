"""The proof that a video model just made from an image model still is that image model on every frame."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange, repeat

from opensora_repro.errors import TrainingError
from opensora_repro.models.stdit import STDiT

TOLERANCE = 1e-5  # of the largest output, float32: two orders of summation apart


@torch.no_grad()
def assert_equals_image_model(model: STDiT) -> float:
    """Compare with the image model of the same weights on a small random video; return the relative difference.

    The difference is max |video - image| / max |image| over 3 square frames. Raises TrainingError above `TOLERANCE`.
    """
    image_model = image_twin(model)
    device, cfg = next(model.parameters()).device, model.cfg
    generator = torch.Generator().manual_seed(0)
    side = 4 * max(cfg.patch_size[1:])
    frames = 3 * cfg.patch_size[0]
    latents = torch.randn(2, cfg.in_channels, frames, side, side, generator=generator).to(device)
    text = torch.randn(2, cfg.model_max_length, cfg.caption_channels, generator=generator).to(device)
    mask = torch.arange(cfg.model_max_length)[None] < torch.tensor([[cfg.model_max_length], [1]])
    timestep, mask = torch.tensor([10.0, 900.0], device=device), mask.to(device)

    video = model(latents, timestep, text, mask)
    images = rearrange(latents, "b c (t p) h w -> (b t) c p h w", p=cfg.patch_size[0])
    text, mask, timestep = (repeat(x, "b ... -> (b t) ...", t=3) for x in (text, mask, timestep))
    expected = rearrange(image_model(images, timestep, text, mask), "(b t) c p h w -> b c (t p) h w", t=3)
    difference = float((video - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"after inserting temporal attention the video model differs from the image model by {difference:.1e} of "
            f"its largest output (allowed {TOLERANCE:.0e}): was the image model trained with other model settings?"
        )
    return difference


def image_twin(model: STDiT) -> STDiT:
    """The image model that shares the video model's tensors, all but the temporal attention."""
    with torch.device("meta"):
        twin = STDiT(replace(model.cfg, temporal_attention=False))
    shared = {name: value for name, value in model.state_dict().items() if ".attn_temp." not in name}
    twin.load_state_dict(shared, assign=True)
    return twin.train(model.training)
