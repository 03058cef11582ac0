"""Make the demo's autoencoder: `python -m opensora_repro.demo.autoencoder --out checkpoints/demo/vae`.

A small diffusers `AutoencoderKL` (8 x 8 pixels a latent) is fitted to drawn frames of the shape world. Two things make
its latents easy to generate: the KL term keeps them near unit variance, and the decoder is shown latents with extra
noise, so that a latent which is only nearly right still decodes to a whole, crisp shape.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.files import replacing

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

CHANNELS = (16, 16, 48, 96)
LATENT_CHANNELS = 4
KL_WEIGHT = 1e-3
FOREGROUND_WEIGHT = 4.0  # how much more a pixel of the shape counts than one of the background
MAX_LATENT_NOISE = 0.4  # extra noise in standard deviations of the latents, drawn per picture from [0, this]
NOISE_RAMP = (0.2, 0.6)  # shares of the run between which the extra noise grows from nothing
INITIAL_LOGVAR = -4.0  # a posterior that starts wide hides the picture and stalls the first hundreds of steps
SIZES = (64, 96)  # picture sides, in turn
PICTURES = 4096  # drawn for each size before training
CROP = 32  # side of the crops around the shape that the first part of the run sees
CROP_SHARE = 0.75  # of the run: crops are cheap and full of outlines
SAVE_EVERY = 500


def build_autoencoder() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    levels = len(CHANNELS)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )
    # Every layer is local, so that any picture size works: the middle's attention, which diffusers before 0.30 cannot
    # leave out, says nothing.
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        block.attentions.requires_grad_(False)
        for parameter in block.attentions[0].to_out.parameters():
            parameter.zero_()
    vae.quant_conv.bias.data[LATENT_CHANNELS:] = INITIAL_LOGVAR
    return vae


def draw_batch(rng: Any, *, count: int, size: int) -> torch.Tensor:
    """Return `count` random frames as float32 [count, 3, size, size] in [-1, 1]."""
    import numpy as np
    import torch
    from einops import rearrange

    from opensora_repro.demo.shapes import motions, render

    everything = motions()
    pictures = []
    for _ in range(count):
        radius = rng.uniform(0.13, 0.23)
        margin = radius * 0.9
        centre = (rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin))
        background = tuple(int(v) for v in np.clip(rng.integers(4, 44) + rng.integers(-6, 7, size=3), 0, 48))
        motion = everything[rng.integers(len(everything))]
        pictures.append(render(motion, centre, radius, background, width=size, height=size))  # type: ignore[arg-type]
    frames = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1.0
    return rearrange(frames, "b h w c -> b c h w").contiguous()


def crop_around_shape(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut a CROP x CROP window whose middle is a random pixel of the shape, moved inside the picture."""
    import torch

    inside = (picture.amax(dim=0) > 0.0).nonzero()
    row, col = inside[torch.randint(len(inside), (1,), generator=generator)[0]].tolist()
    limit = picture.shape[-1] - CROP
    top, left = (min(max(0, middle - CROP // 2), limit) for middle in (row, col))
    return picture[:, top : top + CROP, left : left + CROP]


def loss_of(
    vae: AutoencoderKL, pictures: torch.Tensor, max_noise: float, generator: torch.Generator
) -> tuple[Any, dict[str, float]]:
    """Reconstruction through a noised latent, plus the weighted KL divergence to a unit Gaussian."""
    import torch

    posterior = vae.encode(pictures).latent_dist
    level = torch.rand(len(pictures), 1, 1, 1, generator=generator) * max_noise * posterior.mean.detach().std()
    noise = torch.randn(posterior.mean.shape, generator=generator)
    extra = torch.randn(posterior.mean.shape, generator=generator)
    latents = posterior.mean + posterior.std * noise + level * extra
    error = vae.decode(latents).sample - pictures
    weight = 1.0 + (FOREGROUND_WEIGHT - 1.0) * (pictures.amax(dim=1, keepdim=True) > 0.0)
    reconstruction = (weight * (error.abs() + error.square())).mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    facts = {
        "l1": float(error.detach().abs().mean()),
        "kl": float(kl.detach()),
        "std": float(posterior.std.detach().mean()),
        "scale": float(posterior.mean.detach().std()),
    }
    return reconstruction + KL_WEIGHT * kl, facts


def fit(vae: AutoencoderKL, out: Path, *, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Train in place, saving now and then; the learning rate warms up over 100 steps, then falls along a cosine."""
    import math

    import numpy as np
    import torch
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    drawn = {size: draw_batch(rng, count=PICTURES, size=size) for size in sorted(set(SIZES))}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        start, full = NOISE_RAMP
        max_noise = MAX_LATENT_NOISE * min(1.0, max(0.0, (step / steps - start) / (full - start)))
        size = SIZES[step % len(SIZES)]
        count = max(1, batch_size * min(SIZES) ** 2 // size**2)  # about as many pixels a step
        if step < CROP_SHARE * steps:
            chosen = torch.randint(PICTURES, (2 * batch_size,), generator=generator)
            pictures = torch.stack([crop_around_shape(picture, generator) for picture in drawn[size][chosen]])
        else:
            pictures = drawn[size][torch.randint(PICTURES, (count,), generator=generator)]
        loss, facts = loss_of(vae, pictures, max_noise, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix({k: f"{v:.4f}" for k, v in facts.items()})
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            set_scaling_factor(vae, drawn[min(SIZES)][:128])
            save(vae, out)


def set_scaling_factor(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Store 1 / (standard deviation of the latents) in the config, as `scaling_factor` means in diffusers."""
    import torch

    with torch.no_grad():
        vae.register_to_config(scaling_factor=1.0 / float(vae.encode(pictures).latent_dist.mean.std()))


def save(vae: AutoencoderKL, out: Path) -> None:
    """Write the folder in half precision."""
    import copy

    import torch

    with replacing(out) as folder:
        copy.deepcopy(vae).to(torch.float16).save_pretrained(folder, safe_serialization=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo/vae"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch

    torch.manual_seed(args.seed)
    vae = build_autoencoder()
    fit(vae, args.out, steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"wrote {args.out}: {parameters:,} parameters, scaling factor {vae.config.scaling_factor:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
