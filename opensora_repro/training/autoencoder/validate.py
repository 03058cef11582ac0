"""What the autoencoder makes of clips that it does not learn from: PSNR, SSIM, and pictures of both side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, to_tensor
from opensora_repro.data.write import write_png, write_video
from opensora_repro.errors import DataError
from opensora_repro.files import replacing
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.run_folder import samples_folder
from opensora_repro.training.autoencoder.model import Trained
from opensora_repro.training.autoencoder.quality import psnr, ssim
from opensora_repro.training.fill import load_listed
from opensora_repro.training.metrics import Quarantine
from opensora_repro.training.validate import Chosen

SHOWN = 12  # clips in a grid, two columns of pairs


@dataclass(frozen=True)
class Quality:
    """Means over frames, then clips."""

    psnr: float  # decibels
    ssim: float
    l1: float  # of values from -1 to 1
    samples: int


class HeldOut:
    """Clips of this data rank's share, in host memory as bytes."""

    def __init__(
        self, dataset: ClipDataset, chosen: Sequence[Chosen], engine: TorchEngine, quarantine: Quarantine, workers: int
    ) -> None:
        """`chosen`: rows of `dataset` and their buckets. Collective. Raises DataError where none can be read."""
        own = chosen[engine.mesh.data_rank :: engine.mesh.data_size]
        rows, shapes = [row for row, _ in own], [bucket.shape for _, bucket in own]
        found = list(load_listed(dataset, rows, shapes, workers))
        self.clips = [sample for sample in found if isinstance(sample, Clip)]
        self.engine, self.rate = engine, max((clip.fps for clip in self.clips), default=0.0)
        for bad in engine.world.gather([sample for sample in found if isinstance(sample, BadSample)]):
            for sample in bad:
                quarantine.add(sample)
        quarantine.saw(range(len(chosen)))
        quarantine.check()
        if not sum(engine.world.gather(len(self.clips))):
            raise DataError(f"no clip to validate with can be read; {quarantine.latest()}")

    @torch.no_grad()
    def measure(self, autoencoder: Trained) -> Quality:
        """With the weights that the autoencoder has now. Collective."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        for source, found in self.reconstructed(autoencoder, self.clips):
            error = (found - source).abs().mean()
            values = [psnr(found, source).mean(), ssim(found, source).mean(), error, torch.ones(())]
            sums += torch.stack([value.to(sums) for value in values])
        decibels, similarity, error, count = self.engine.sum(sums).tolist()
        return Quality(decibels / count, similarity / count, error / count, round(count))

    @torch.no_grad()
    def latent_statistics(self, autoencoder: Trained) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the latents' means over this process's clips, [Cz] each."""
        means = [autoencoder.moments(self._video(clip)).chunk(2, dim=1)[0] for clip in self.clips]
        values = torch.cat([rearrange(mean.float(), "1 c t h w -> c (t h w)") for mean in means], dim=1)
        return values.mean(dim=1), values.std(dim=1)

    def reconstructed(self, autoencoder: Trained, clips: Sequence[Clip]) -> Iterator[tuple[Tensor, Tensor]]:
        """Source and reconstruction of each clip, frames [T, 3, H, W] in [-1, 1]."""
        for clip in clips:
            video = self._video(clip)
            means = autoencoder.moments(video).chunk(2, dim=1)[0]
            found = autoencoder.decode(means, num_frames=video.shape[2]).float().clamp(-1, 1)
            yield tuple(rearrange(x, "1 c t h w -> t c h w") for x in (video, found))  # type: ignore[misc]

    @torch.no_grad()
    def write_grid(self, autoencoder: Trained, run_dir: Path, step: int) -> tuple[Path, np.ndarray]:
        """RUN/samples/step-…/: grid.png of a frame of each clip, source beside reconstruction; of videos mp4s of both.

        Returns the folder and the grid. Raises OSError.
        """
        folder = samples_folder(run_dir) / f"step-{step:08d}"
        pairs = []
        with replacing(folder) as unfinished:
            unfinished.mkdir(parents=True)
            for number, both in enumerate(self.reconstructed(autoencoder, self.clips[:SHOWN])):
                beside = np.concatenate([_as_bytes(frames) for frames in both], axis=2)  # [T, H, 2 W, 3]
                pairs.append(beside[len(beside) // 2])
                if len(beside) > 1:
                    write_video(unfinished / f"{number:04d}.mp4", beside, self.rate or 8)
            grid = _in_two_columns(pairs)
            write_png(unfinished / "grid.png", grid)
        return folder, grid

    def _video(self, clip: Clip) -> Tensor:
        return to_tensor(clip.pixels).to(self.engine.device)[None]


def _as_bytes(frames: Tensor) -> np.ndarray:
    """[T, 3, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    found = rearrange(((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), "t c h w -> t h w c")
    return found.cpu().numpy()


def _in_two_columns(pairs: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [H, W, 3] of any sizes as one, black where there is none."""
    height, width = (max(pair.shape[axis] for pair in pairs) for axis in (0, 1))
    rows = -(-len(pairs) // 2)
    grid = np.zeros((rows * height, min(2, len(pairs)) * width, 3), dtype=np.uint8)
    for number, pair in enumerate(pairs):
        top, left = number // 2 * height, number % 2 * width
        grid[top : top + pair.shape[0], left : left + pair.shape[1]] = pair
    return grid
