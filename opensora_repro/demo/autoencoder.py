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
SIZE = 96  # pixels of the longer side of the demo's pictures


def draw_pictures(manifest: Path, count: int, seed: int) -> None:
    """Write random pictures of the shape world as png files beside the manifest, which comes last.

    As many small squares as of the demo's three formats together, for they cost least. Half of the colours are those of
    the world, a quarter its others, and the rest any with a bright channel.
    """
    import numpy as np
    import pyarrow as pa

    from opensora_repro.data.manifest import write_manifest
    from opensora_repro.data.write import write_png
    from opensora_repro.demo.shapes import FORMATS, OTHER_COLOURS, motions, pixels, render

    rng, everything, rows = np.random.default_rng(seed), motions(), []
    pictures = [*FORMATS.values(), *[(2 / 3, 2 / 3)] * 3]
    for number in range(count):
        picture = pictures[rng.integers(len(pictures))]
        radius = rng.uniform(*((0.152, 0.168) if rng.random() < 0.6 else (0.13, 0.23)))  # the demo's, or any
        centre: Any = tuple(rng.uniform(0.9 * radius, side - 0.9 * radius) for side in picture)
        background: Any = tuple(int(v) for v in np.clip(rng.integers(4, 44) + rng.integers(-6, 7, size=3), 0, 48))
        motion = everything[rng.integers(len(everything))]
        colour = rng.integers(20, 236, size=3)
        colour[rng.integers(3)] = 235
        width, height = pixels(picture, SIZE)
        path = manifest.parent / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = rng.random()
        rgb: Any = None if kind < 0.5 else colour if kind < 0.75 else rng.choice(list(OTHER_COLOURS.values()))
        drawn = render(motion, centre, radius, background, width=width, height=height, colour=rgb, size=SIZE)
        write_png(path, drawn)
        rows.append({"id": path.stem, "path": str(path.resolve()), "caption": motion.shape, "num_frames": 1,
                     "fps": 0.0, "height": height, "width": width})  # fmt: skip
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
            config = folder / "config.json"  # without the place of this run
            lines = config.read_text(encoding="utf-8").splitlines(keepends=True)
            config.write_text("".join(line for line in lines if "_name_or_path" not in line), encoding="utf-8")
        print(f"wrote {out}: {sum(p.numel() for p in vae.parameters()):,} parameters")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=6144, help="to draw (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"changes to {CONFIG}")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: make(args.out, args.pictures, args.overrides))


if __name__ == "__main__":
    sys.exit(main())
