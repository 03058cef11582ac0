"""Teach the trained demo a seventh colour by an adapter: 60 clips, [lora], samples, and the judge's count.

    python examples/seventh_colour.py [--demo runs/demo] [--out runs/seventh_colour] [section.key=value ...]

`make demo` comes first. Its text encoder knows six words for colours; any other is its one unknown word, a vector like
the others' that no clip has used so far: one new colour can be told apart, a second one could not. Lime is a colour
that the demo's autoencoder, trained on six, gives back as it is; white and orange it does not. The adapter stands
beside the layers that read captions and nothing else, so that what the other words do stays as it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from opensora_repro.data.manifest import write_manifest
from opensora_repro.data.write import write_video
from opensora_repro.demo import shapes
from opensora_repro.demo.adherence import measure_file, shares
from opensora_repro.demo.footage import FPS, FRAMES_A_SCENE, SIZE

COLOUR, RGB = "lime", (90, 235, 20)
CLIPS_A_MOTION = 5  # of 3 shapes that move in 4 directions: 60 clips
LORA = {"lora.rank": 8, "lora.alpha": 8, "lora.targets": ["cross_attn.kv_linear"]}
TRAIN = {"train.steps": 300, "optim.lr": 4e-3, "optim.warmup_steps": 10, "optim.decay_steps": 150, "ema.decay": 0.95}
PROMPTS_OF_OLD = 4  # of each of the six colours; of the new one all 12 motions are sampled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/seventh_colour"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    old = list(shapes.COLOURS)
    shapes.COLOURS[COLOUR] = RGB  # for the film and for the judge
    manifest = film(args.out)
    begin = time.monotonic()
    train(args.demo, args.out, manifest, args.overrides)
    seconds = time.monotonic() - begin
    found = {}
    for name, lora in (("without", []), ("with", ["--lora", str(args.out / "run")])):
        found[name] = judge(args.demo, args.out / name, [*old, COLOUR], lora)
        kept = {key: sum(found[name][colour][key] for colour in old) / len(old) for key in found[name][COLOUR]}
        print(f"{name:>8} the adapter: {COLOUR} {found[name][COLOUR]}, the six others {kept}")
    print(f"trained in {seconds:.0f} s")
    (args.out / "seventh_colour.json").write_text(json.dumps(found | {"seconds": seconds}, indent=1) + "\n")
    return 0


def film(out: Path) -> Path:
    """Clips of the new colour as stage 3 takes them, and their manifest."""
    rng, rows = np.random.default_rng(0), []
    for motion in [shapes.Motion(COLOUR, s, d) for s in shapes.SHAPES for d in shapes.DIRECTIONS]:
        for number in range(CLIPS_A_MOTION):
            path = out / "clips" / f"{motion.shape}-{motion.direction}-{number}.mp4"
            scene = shapes.draw_scene(motion, rng)
            if not path.exists():
                write_video(path, scene.frames(count=FRAMES_A_SCENE, size=SIZE), FPS)
            facts = {"num_frames": FRAMES_A_SCENE, "fps": float(FPS), "height": SIZE, "width": SIZE}
            rows.append({"id": path.stem, "path": str(path.resolve()), "caption": motion.caption, **facts})
    write_manifest(pa.Table.from_pylist(rows), out / "manifest.parquet")
    return out / "manifest.parquet"


def train(demo: Path, out: Path, manifest: Path, overrides: list[str]) -> None:
    steps = TRAIN["train.steps"]
    settings = {
        "run.dir": str(out / "run"), "init.weights": str(demo / "stage3"), "data.manifest": str(manifest),
        "data.val_manifest": "", "validation.every": 0, "data.cache": str(out / "cache"), "data.buckets": [],
        "sample.every": 0, "checkpoint.every": steps, **LORA, **TRAIN,
    }  # fmt: skip
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    run("stages.stage3_hq", str(demo / "stage3" / "config.toml"), *changes, *overrides)


def judge(demo: Path, out: Path, colours: list[str], lora: list[str]) -> dict[str, dict[str, float]]:
    """Of each colour the shares of samples with the right colour, shape and direction."""
    every = [shapes.Motion(c, s, d) for c in colours for s in shapes.SHAPES for d in shapes.DIRECTIONS]
    order = np.random.default_rng(0).permutation(len(every))
    of = {c: [every[i] for i in order if every[i].colour == c] for c in colours}
    prompts = [m for c in colours for m in (of[c] if c == COLOUR else of[c][:PROMPTS_OF_OLD])]
    out.mkdir(parents=True, exist_ok=True)
    (out / "prompts.txt").write_text("".join(f"{motion.caption}\n" for motion in prompts))
    texts = ["--prompts", str(out / "prompts.txt")]
    run("stages.sample", str(demo / "stage3"), *texts, "--out", str(out), "--overwrite", *lora)
    agrees = [measure_file(out / f"{index:04d}.mp4").agrees(motion) for index, motion in enumerate(prompts)]
    own = {c: [{"agrees": a} for m, a in zip(prompts, agrees, strict=True) if m.colour == c] for c in colours}
    return {colour: {key: round(value, 2) for key, value in shares(records).items()} for colour, records in own.items()}


def run(*command: str) -> None:
    print("$ python -m " + " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    sys.exit(main())
