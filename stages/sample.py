"""Sample videos (mp4) or, with one frame, images (png) from a trained run or from published weights.

Weights, autoencoder, text encoder and every default come from the checkpoint, or are the release's; `OUT/0000.mp4` is
the first prompt's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, ConfigError
from opensora_repro.data.files import user_path

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.training.source import Source

USER_MISTAKE = 2
INTERRUPTED = 130
NUM_TRAIN_STEPS = 1000  # IDDPM samplers keep some of these


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.sample", description=__doc__)
    add = parser.add_argument
    source = "folder of a run (its newest checkpoint), a checkpoint, or published weights (file or folder)"
    add("source", metavar="RUN_OR_CHECKPOINT", type=user_path, help=source)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    lines = "one prompt a line (UTF-8); blank lines and lines that start with # are passed over"
    prompts.add_argument("--prompts", type=user_path, metavar="FILE", help=lines)
    labels = "class number, for models conditioned on a class; may be given several times"
    prompts.add_argument("--label", action="append", metavar="N", help=labels)
    add("--out", type=user_path, required=True, metavar="DIR", help="where the files go")
    add("--seed", type=int, default=0, metavar="N", help="sample i's noise depends on (seed, i) alone (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at once; changes no result (%(default)s)")
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--gif", action="store_true", help="also write 0000.gif, ...")
    add("--no-ema", action="store_true", help="use the trained weights, not their moving average")
    add("--num-heads", type=int, metavar="N", help="attention heads, where published weights cannot tell")
    add("--family", choices=("dit", "latte"), help="whose the weights are, where they cannot tell")
    sharing = "processes of torchrun that share a video's frames; groups of them share out the prompts (%(default)s)"
    add("--sp-size", type=int, default=1, metavar="N", help=sharing)
    add("--dry-run", action="store_true", help="print what would be done and stop")
    add = parser.add_argument_group("by default as in the checkpoint's config, or its release's").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps (sample.steps)")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 is none (sample.guidance)")
    add("--sampler", choices=("iddpm", "ddim", "dpm", "euler"), help="(sample.sampler)")
    add("--num-frames", type=int, metavar="N", help="frames; 1 writes a png (data.num_frames)")
    add("--height", type=int, metavar="N", help="pixels (data.height)")
    add("--width", type=int, metavar="N", help="pixels (data.width)")
    add("--fps", type=int, metavar="N", help="frames a second of the written file (sample.fps)")
    add("--vae", type=expanduser, metavar="PATH", help="autoencoder: hub name or local folder (vae.path)")
    add("--text", type=expanduser, metavar="PATH", help="text encoder: hub name or local folder (text.path)")
    add("--dtype", choices=("bf16", "fp32"), help="autocast (train.dtype)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if not args.source.exists():  # seen without importing torch
            raise ConfigError(f"{args.source}: no such run, checkpoint or weights file")
        if args.out.exists() and not args.out.is_dir():
            raise ConfigError(f"--out {args.out}: this is a file, expected a folder")
        prompts = given_prompts(args)
        source = resolve_source(args)
        check_prompts_fit(source, prompts, labels=args.label is not None)
        if args.dry_run:
            return print_plan(args, source, prompts)
        return sample(args, source, prompts)
    except KeyboardInterrupt:
        print(f"interrupted; what is finished is in {args.out}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if not is_user_mistake(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE


def is_user_mistake(error: Exception) -> bool:
    if isinstance(error, ConfigError):
        return True
    from opensora_repro.models.pretrained import ModelNotFound
    from opensora_repro.models.weights import WeightsError
    from opensora_repro.parallel.errors import EngineError

    return isinstance(error, (EngineError, ModelNotFound, WeightsError, OSError))


def given_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts:
        return read_prompts(args.prompts)
    return checked_prompts(args.prompt or args.label, "--prompt" if args.prompt else "--label")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, blank lines and # lines left out. Raises ConfigError if none is left."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path}: not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError(f"--prompts {path}: no prompts in this file; write one a line")
    return checked_prompts(prompts, f"--prompts {path}")


def checked_prompts(prompts: list[str], source: str) -> list[str]:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ConfigError(f"{source}: prompt {number} is empty")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{source}: prompt {number} is not valid Unicode text") from None
    return prompts


def resolve_source(args: argparse.Namespace) -> Source:
    """The weights and their config with the command line's wishes. Raises ConfigError, WeightsError."""
    check_numbers(args)
    from opensora_repro.training.source import find_source

    source = find_source(args.source, ema=not args.no_ema, num_heads=args.num_heads, family=args.family)
    return replace(source, config=with_wishes(source.config, args))


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("steps", "num_frames", "height", "width", "fps", "batch_size", "sp_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ConfigError(f"--guidance {args.guidance}: expected a finite number")


def with_wishes(cfg: Config, args: argparse.Namespace) -> Config:
    flow = cfg.diffusion.objective == "flow"
    if args.sampler is not None and (args.sampler == "euler") != flow:
        fitting = "euler" if flow else "iddpm, ddim or dpm"
        raise ConfigError(f"--sampler {args.sampler}: this {cfg.diffusion.objective} model needs {fitting}")
    cfg = replace(
        cfg,
        data=_with(cfg.data, num_frames=args.num_frames, height=args.height, width=args.width),
        sample=_with(cfg.sample, steps=args.steps, guidance=args.guidance, fps=args.fps,
                     sampler="euler" if flow else args.sampler),
        vae=_with(cfg.vae, path=args.vae),
        text=_with(cfg.text, path=args.text),
        train=_with(cfg.train, dtype=args.dtype),
    )  # fmt: skip
    if cfg.sample.sampler in ("iddpm", "ddim") and cfg.sample.steps > NUM_TRAIN_STEPS:
        raise ConfigError(f"--steps {cfg.sample.steps}: this model was trained with {NUM_TRAIN_STEPS}")
    return cfg


def _with(section: Any, **wishes: Any) -> Any:
    """A config section with the wishes that were uttered."""
    return replace(section, **{key: value for key, value in wishes.items() if value is not None})


def check_prompts_fit(source: Source, prompts: list[str], *, labels: bool) -> None:
    """Raise ConfigError for class numbers where text is wanted, and the other way round."""
    from opensora_repro.models.config import DiTConfig
    from opensora_repro.models.text import ClassLabels

    if conditioned_on_class(source):
        assert isinstance(source.model, DiTConfig)
        try:
            ClassLabels(source.model.num_classes).encode(prompts)
        except ValueError as error:
            raise ConfigError(f"{source.path} is conditioned on a class: {error}") from None
    elif labels:
        raise ConfigError(f"--label: {source.path} is conditioned on text, give --prompt")


def conditioned_on_class(source: Source) -> bool:
    return getattr(source.model, "condition", "text") == "label"


def settings(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What decides the samples besides the prompts."""
    cfg = source.config
    return {
        "checkpoint": str(source.path),
        "weights": "model" if args.no_ema else "ema",
        "seed": args.seed,
        "num_frames": cfg.data.num_frames,
        "height": cfg.data.height,
        "width": cfg.data.width,
        "fps": cfg.sample.fps,
        "sampler": cfg.sample.sampler,
        "steps": cfg.sample.steps,
        "guidance": cfg.sample.guidance,
        "vae": cfg.vae.path,
        "text": "class numbers" if conditioned_on_class(source) else cfg.text.path,
        "dtype": cfg.train.dtype,
    }


def print_plan(args: argparse.Namespace, source: Source, prompts: list[str]) -> int:
    from opensora_repro.training.source import empty_model

    parameters = sum(p.numel() for p in empty_model(source).parameters())
    plan = {**settings(args, source), "parameters": f"{parameters:,}", "prompts": len(prompts)}
    for key, value in {**plan, "batch_size": args.batch_size, "out": args.out}.items():
        print(f"{key:>12}  {value}")
    return 0


def sample(args: argparse.Namespace, source: Source, prompts: list[str]) -> int:
    engine = start_engine(args)
    with closing(engine), engine.watchdog.reporting(args.out / "logs"):
        samples = sample_share(args, source, prompts, engine)
        everyone = [entry for part in engine.peers.gather(samples) for entry in part]
        if engine.is_main:
            write_json(args.out / "samples.json", {**settings(args, source), "samples": sorted_by_file(everyone)})
            print(f"{len(everyone)} written to {args.out} (samples.json has the prompts)")
    return 0


def sample_share(
    args: argparse.Namespace, source: Source, prompts: list[str], engine: TorchEngine
) -> list[dict[str, Any]]:
    """Sample this process's share of the prompts; return what it wrote, which a lone process also keeps up to date."""
    import torch

    from opensora_repro.kernels.choice import choose
    from opensora_repro.training.generate import ProgressBar, generate
    from opensora_repro.training.source import load_models

    cfg, device, mesh = source.config, engine.device, engine.mesh
    # What a run was trained with on a GPU need not run on the device that samples it.
    choose("eager" if cfg.train.kernels == "eager" else "auto", device.type)
    model, vae, conditions, report = load_models(source, device)
    if engine.is_main:
        print(report)
    samples: list[dict[str, Any]] = []
    with (
        closing(ProgressBar("sampling", shown=engine.is_main)) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"),
    ):
        for index, video in generate(
            model,
            vae,
            conditions,
            cfg,
            prompts,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=bar,
            forward=engine.spread(model),
            share=(mesh.data_rank, mesh.data_size),
        ):
            if mesh.member:
                continue  # the group's first process writes
            name = write_files(args.out, index, video, fps=cfg.sample.fps, gif=args.gif)
            samples.append({"file": name, "prompt": prompts[index]})
            if mesh.world_size == 1:
                write_json(args.out / "samples.json", {**settings(args, source), "samples": samples})
    return samples


def sorted_by_file(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda entry: (len(entry["file"]), entry["file"]))


def start_engine(args: argparse.Namespace) -> TorchEngine:
    """This process among those that torchrun started. Raises ConfigError, EngineError."""
    import torch

    from opensora_repro.config import ParallelConfig
    from opensora_repro.parallel.device import default_kind
    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.training.allocator import keep_freed_memory
    from opensora_repro.training.cli import limit_threads

    limit_threads()
    wish = args.device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and wish not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {wish}: several processes take cpu or cuda, each its own GPU")
    try:
        device = torch.device(wish or default_kind())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {wish}: cannot be used ({str(error).splitlines()[0]})") from None
    if device.type == "cpu":
        keep_freed_memory()
    return TorchEngine(ParallelConfig(sp_size=args.sp_size), str(device))


def write_files(out: Path, index: int, video: np.ndarray, *, fps: int, gif: bool) -> str:
    """Write one sample, named by its number alone; return the file's name."""
    from opensora_repro.data.write import write_gif, write_png, write_video

    if len(video) == 1:
        name = f"{index:04d}.png"
        write_png(out / name, video[0])
        return name
    name = f"{index:04d}.mp4"
    write_video(out / name, video, fps)
    if gif:
        write_gif(out / f"{index:04d}.gif", video, fps)
    return name


def write_json(path: Path, content: dict[str, Any]) -> None:
    from opensora_repro.data.write import replacing

    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
