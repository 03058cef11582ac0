"""Memory of decoding: `python -m tests.decoding_memory FOLDER FRAMES HEIGHT WIDTH TILE [TILES]` prints JSON.

The autoencoder in FOLDER decodes random latents as `stages.sample` does on a CPU. Told are bytes of resident memory
beyond what there was before: after each tile, and at most; and the planner's figure. TILES bounds the time: further
tiles are grey instead of decoded, and are joined and converted as any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_repro.config import Config, DataConfig, VaeConfig
from opensora_repro.frozen.vae import open_vae
from opensora_repro.models.config import STDiTConfig
from opensora_repro.planning.sampling import sampling_memory
from opensora_repro.process import forget_peak, keep_freed_memory, limit_threads, peak_memory
from opensora_repro.sampling.generate import decode


def measure(folder: Path, frames: int, height: int, width: int, tile: int, tiles: int) -> dict[str, Any]:
    limit_threads()
    keep_freed_memory()
    data, cfg = DataConfig(num_frames=frames, height=height, width=width), VaeConfig(str(folder), tile_size=tile)
    vae: Any = open_vae(cfg, "cpu", torch.float32)
    shape, network = vae.latent_shape(frames, height, width), vae._pixels
    model = STDiTConfig(in_channels=shape[0])
    after: list[int] = []

    def pixels(z: Tensor, num_frames: int) -> Tensor:
        if len(after) >= tiles:
            height, width = (side * vae.spatial_stride for side in z.shape[-2:])
            return torch.full((1, 3, num_frames, height, width), 0.5)
        found: Tensor = network(z, num_frames)
        after.append(peak_memory() - before)
        return found

    decode(vae, torch.zeros(vae.latent_shape(1, 64, 64)), num_frames=1)  # reads weights and what else comes once
    latent = torch.randn(shape)
    vae._pixels = pixels
    forget_peak()
    before = peak_memory()
    video = decode(vae, latent, num_frames=frames)
    peak = peak_memory() - before
    assert video.shape == (frames, height, width, 3)
    told = sampling_memory(
        Config(data=data, vae=cfg), model, 0, batch_size=1, device_type="cpu", reads_t5=False
    ).decoding
    return {"after": after, "peak": peak, "planned": told}


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[2:]]
    print(json.dumps(measure(Path(sys.argv[1]), *sizes[:4], *(sizes[4:] or [10_000]))))
