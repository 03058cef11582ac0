"""Pictures and videos of fixed prompts during training: RUN/samples/step-00000100/."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.write import write_png, write_sample
from opensora_repro.files import replacing
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.text import EncodedPrompts
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.run_folder import samples_folder
from opensora_repro.sampling.generate import generate

STRIP_FRAMES = 8  # frames of a video shown side by side in the grid
GAP = 2  # pixels between pictures
MOVING_WIDTH = 768  # pixels of all videos side by side, about


def write_samples(cfg: Config, videos: Sequence[np.ndarray], step: int) -> tuple[Path, np.ndarray]:
    """Write the videos of `sample.prompts`; return the folder and the grid, uint8 [H, W, 3].

    Files: 0000.mp4 (0000.png for one frame), ... in the prompts' order, and grid.png. The folder appears whole.
    Raises OSError.
    """
    final = samples_folder(Path(cfg.run.dir)) / f"step-{step:08d}"
    grid = tile(videos)
    with replacing(final) as folder:
        for index, video in enumerate(videos):
            name = f"{index:04d}.png" if len(video) == 1 else f"{index:04d}.mp4"
            write_sample(folder / name, video, sample_fps(cfg))
        write_png(folder / "grid.png", grid)
    return final, grid


def sample_prompts(
    cfg: Config, model: CaptionedModel, forward: Callable[..., Tensor], vae: Autoencoder, encoded: EncodedPrompts
) -> list[np.ndarray]:
    """Sample `sample.prompts` with the model as it is, called through `forward`; videos uint8 [T, H, W, 3]."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"):
        found = generate(
            model,
            vae,
            encoded,
            cfg,
            cfg.sample.prompts,
            seed=cfg.run.seed,
            batch_size=cfg.train.batch_size,
            forward=forward,
        )
        return [video for _, video in found]


def tile(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos uint8 [T, H, W, 3] of one size -> one picture: a row a video, or near-square rows of single frames."""
    frames = len(videos[0])
    if frames > 1:
        shown = np.linspace(0, frames - 1, min(frames, STRIP_FRAMES)).round().astype(int)
        cells = np.stack([video[shown] for video in videos])  # [rows, columns, H, W, 3]
    else:
        columns = math.ceil(math.sqrt(len(videos)))
        blank = np.zeros_like(videos[0])
        padded = [*videos, *[blank] * (-len(videos) % columns)]
        cells = rearrange(np.concatenate(padded), "(r c) h w k -> r c h w k", c=columns)
    return _joined(cells)


def moving_grid(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos uint8 [T, H, W, 3] of one size -> one video in near-square rows, of fewer pixels where it is large."""
    columns = math.ceil(math.sqrt(len(videos)))
    step = math.ceil(columns * videos[0].shape[2] / MOVING_WIDTH)
    small = [video[:, ::step, ::step] for video in videos]
    padded = np.stack([*small, *[np.zeros_like(small[0])] * (-len(small) % columns)], axis=1)  # [T, n, H, W, 3]
    return np.stack([_joined(rearrange(cells, "(r c) h w k -> r c h w k", c=columns)) for cells in padded])


def _joined(cells: np.ndarray) -> np.ndarray:
    """[rows, columns, H, W, 3] -> one picture."""
    cells = np.pad(cells, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)))
    picture: np.ndarray = rearrange(cells, "r c h w k -> (r h) (c w) k")
    return picture
