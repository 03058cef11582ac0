"""Make an autoencoder for the demo: `python -m opensora_repro.demo.autoencoder --out FOLDER [section.key=value ...]`.

Pictures of the shape world are drawn for configs/demo/stage0.toml, a run of stage 0, whose result is written in half
precision. Run again, it goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from opensora_repro.config import load_autoencoder_config
from opensora_repro.errors import run_command
from opensora_repro.files import replacing

CONFIG = "configs/demo/stage0.toml"
SIZE = 96  # pixels of a picture's side


def draw_pictures(manifest: Path, count: int, seed: int) -> None:
    """Write random frames of the shape world as png files beside the manifest, which comes last."""
    import numpy as np
    import pyarrow as pa

    from opensora_repro.data.manifest import write_manifest
    from opensora_repro.data.write import write_png
    from opensora_repro.demo.shapes import motions, render

    rng, everything, rows = np.random.default_rng(seed), motions(), []
    for number in range(count):
        radius = rng.uniform(0.13, 0.23)
        margin = radius * 0.9
        centre = (rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin))
        background: Any = tuple(int(v) for v in np.clip(rng.integers(4, 44) + rng.integers(-6, 7, size=3), 0, 48))
        motion = everything[rng.integers(len(everything))]
        path = manifest.parent / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, render(motion, centre, radius, background, width=SIZE, height=SIZE))
        rows.append({"id": path.stem, "path": str(path.resolve()), "caption": motion.caption, "num_frames": 1,
                     "fps": 0.0, "height": SIZE, "width": SIZE})  # fmt: skip
    write_manifest(pa.Table.from_pylist(rows), manifest)


def make(out: Path, count: int, overrides: list[str]) -> int:
    from diffusers import AutoencoderKL

    from opensora_repro.training.autoencoder.run import train

    cfg = load_autoencoder_config(CONFIG, overrides)
    if not Path(cfg.data.manifest).exists():
        draw_pictures(Path(cfg.data.manifest), count, cfg.run.seed)
    if train(cfg).finished:
        import torch

        vae = AutoencoderKL.from_pretrained(Path(cfg.run.dir) / "vae").to(torch.float16)
        with replacing(out) as folder:
            vae.save_pretrained(folder, safe_serialization=True)
        print(f"wrote {out}: {sum(p.numel() for p in vae.parameters()):,} parameters")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=4096, help="to draw (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"changes to {CONFIG}")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: make(args.out, args.pictures, args.overrides))


if __name__ == "__main__":
    sys.exit(main())
