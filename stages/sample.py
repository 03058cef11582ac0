"""Sample videos (mp4) or, with one frame, images (png) from a trained run or from published weights.

Weights, autoencoder, text encoder and every default come from the checkpoint, or are the release's; `OUT/0000.mp4` is
the first prompt's.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.prompts import check_prompts
from opensora_repro.errors import GOES_ON, run_command
from opensora_repro.files import user_path

if TYPE_CHECKING:
    import numpy as np
    import torch

    from opensora_repro.frozen.text import ConditionEncoder
    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.sampling.sample_folder import SampleFolder
    from opensora_repro.sampling.source import Source

NUM_TRAIN_STEPS = 1000  # IDDPM samplers keep some of these
CUT_SHOWN = 10  # prompts whose unread words are told


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.sample", description=__doc__)
    add = parser.add_argument
    source = "folder of a run (its newest checkpoint), a checkpoint, or published weights (file, folder, fetched NAME)"
    add("source", metavar="RUN_OR_CHECKPOINT", type=user_path, help=source)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    lines = "one prompt a line (UTF-8); blank lines and lines that start with # are passed over"
    prompts.add_argument("--prompts", type=user_path, metavar="FILE", help=lines)
    labels = "class number, for models conditioned on a class; may be given several times"
    prompts.add_argument("--label", action="append", metavar="N", help=labels)
    add(
        "--out", type=user_path, required=True, metavar="DIR", help="where the files go; samples of these settings stay"
    )
    add("--overwrite", action="store_true", help="replace the samples that are in DIR, whatever their settings")
    add("--seed", type=int, default=0, metavar="N", help="sample i's noise depends on (seed, i) alone (%(default)s)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="prompts at once; changes results by rounding alone (%(default)s)",
    )
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--gif", action="store_true", help="also write 0000.gif, ...")
    add("--no-ema", action="store_true", help="use the trained weights, not their moving average")
    add("--num-heads", type=int, metavar="N", help="attention heads, where published weights cannot tell")
    add("--family", choices=("dit", "latte"), help="whose the weights are, where they cannot tell")
    sharing = "processes of torchrun that share a video's frames; groups of them share out the prompts (%(default)s)"
    add("--sp-size", type=int, default=1, metavar="N", help=sharing)
    add("--dry-run", action="store_true", help="check everything but the weights' values, print the plan and stop")
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
    return run_command(
        lambda: run(args),
        kept=f"what is finished is in {args.out}; {GOES_ON}",
        less_memory="Lower --batch-size, --num-frames, --height or --width",
    )


def run(args: argparse.Namespace) -> int:
    if not args.source.exists():  # seen without importing torch
        args.source = published(args.source)
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out}: this is a file, expected a folder")
    prompts = given_prompts(args)
    source = resolve_source(args)
    check_prompts_fit(source, prompts, labels=args.label is not None)
    return sample(args, source, prompts)


def published(name: Path) -> Path:
    """What the hub's cache holds of the catalog's weights of that name. Raises ConfigError, CatalogError."""
    from opensora_repro.weights.catalog import find_cached, similar_name

    found = find_cached(str(name))
    if found is None:
        raise ConfigError(f"{name}: no such run, checkpoint or weights file{similar_name(str(name))}")
    return found


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
    check_prompts(prompts, source)
    return prompts


def resolve_source(args: argparse.Namespace) -> Source:
    """The weights and their config with the command line's wishes. Raises ConfigError, WeightsError."""
    check_numbers(args)
    from opensora_repro.sampling.source import find_source

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
    from opensora_repro.frozen.text import ClassLabels

    if conditioned_on_class(source):
        try:
            ClassLabels(source.model.num_classes).encode(prompts)
        except ValueError as error:
            raise ConfigError(f"{source.path} is conditioned on a class: {error}") from None
    elif labels:
        raise ConfigError(f"--label: {source.path} is conditioned on text, give --prompt")


def conditioned_on_class(source: Source) -> bool:
    return source.model.conditioning == "class"


def settings(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What decides the samples besides the prompts."""
    from opensora_repro.sampling.source import weights_sha256

    cfg = source.config
    return {
        "checkpoint": str(source.path),
        "weights": "model" if args.no_ema else "ema",
        "weights_sha256": weights_sha256(source),
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
        "model": asdict(source.model),
        "diffusion": asdict(cfg.diffusion),
    }


def sample(args: argparse.Namespace, source: Source, prompts: list[str]) -> int:
    """Look at all that can be seen without reading weights; then sample what is not there yet."""
    from opensora_repro.parallel.mesh import Mesh, launched_as
    from opensora_repro.sampling.sample_folder import SampleFolder
    from opensora_repro.sampling.source import check_memory, open_frozen
    from opensora_repro.weights.load import check_complete

    rank, world_size, local_rank = launched_as()
    # The run checks this, too; a dry run may be asked without torchrun what its processes would do.
    Mesh(rank, args.sp_size if args.dry_run and world_size == 1 else world_size, sp_size=args.sp_size)
    device = pick_device(args, world_size, local_rank)
    check_complete(source.weights, source.model)
    vae, conditions = open_frozen(source, device)
    folder = SampleFolder(args.out, settings(args, source), prompts, gif=args.gif)
    todo = open_prompts(args, folder)
    memory = ""
    if todo:
        batch_size = min(args.batch_size, len(todo))
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory = check_memory(
            source, vae, conditions, device, batch_size=batch_size, sp_size=args.sp_size, processes=neighbours
        )
    if args.dry_run:
        print_plan(args, source, folder, len(todo), memory)
    if rank == 0:
        for line in unread_words(conditions, prompts):
            print(f"warning: {line}", file=sys.stderr)
    if args.dry_run:
        return 0
    if not todo:
        if rank == 0:
            print(f"all {len(prompts)} were in {args.out} already")
        return 0
    return sample_all(args, source, folder, device)


def open_prompts(args: argparse.Namespace, folder: SampleFolder) -> list[int]:
    """Numbers of the prompts to sample. Raises ConfigError where samples of others are in the way."""
    finished = set() if args.overwrite else set(folder.finished())
    return [i for i in range(len(folder.prompts)) if i not in finished]


def print_plan(args: argparse.Namespace, source: Source, folder: SampleFolder, num_todo: int, memory: str) -> None:
    from opensora_repro.weights.families import empty_model

    parameters = sum(p.numel() for p in empty_model(source.model).parameters())
    plan = {key: value for key, value in folder.settings.items() if not isinstance(value, dict)}
    plan |= {"parameters": f"{parameters:,}", "prompts": len(folder.prompts), "to do": num_todo}
    for key, value in {**plan, "batch_size": args.batch_size, "memory": memory or "none", "out": args.out}.items():
        print(f"{key:>14}  {value}")


def unread_words(conditions: ConditionEncoder, prompts: list[str]) -> Iterator[str]:
    """What of the prompts the model does not read."""
    from opensora_repro.frozen.text import ClassLabels

    if isinstance(conditions, ClassLabels):
        return
    readings = conditions.read(prompts)
    cut = [(number, reading.dropped) for number, reading in enumerate(readings) if reading.dropped]
    for number, dropped in cut[:CUT_SHOWN]:
        shown = dropped if len(dropped) <= 200 else f"{dropped[:200]}..."
        yield f"prompt {number} is longer than the model's {conditions.max_length} tokens, it does not read {shown!r}"
    if len(cut) > CUT_SHOWN:
        yield f"{len(cut) - CUT_SHOWN} more prompts are cut like this"
    unknown = sum(reading.unknown for reading in readings)
    if unknown:
        share = unknown / sum(reading.words for reading in readings)
        yield f"{share:.0%} of the prompts' words are unknown to this tokenizer"


def sample_all(args: argparse.Namespace, source: Source, folder: SampleFolder, device: torch.device) -> int:
    engine = start_engine(args, device)
    with closing(engine), engine.watchdog.reporting(args.out / "logs"):
        todo = engine.world.on_first(lambda: begin(args, folder))
        written = sample_share(args, source, folder, todo, engine)
        everyone = [index for part in engine.world.gather(written) for index in part]
        if engine.is_main:
            folder.write(set(range(len(folder.prompts))) - set(todo) | set(everyone))
            there = len(folder.prompts) - len(todo)
            more = f", {there} were there already" if there else ""
            print(f"{len(everyone)} written to {args.out}{more} (samples.json has the prompts)")
    return 0


def begin(args: argparse.Namespace, folder: SampleFolder) -> list[int]:
    """Numbers of the prompts to sample, once the folder says whose samples it is for."""
    todo = open_prompts(args, folder)
    if args.overwrite:
        folder.clear()
    folder.write(set(range(len(folder.prompts))) - set(todo))
    return todo


def sample_share(
    args: argparse.Namespace, source: Source, folder: SampleFolder, todo: list[int], engine: TorchEngine
) -> list[int]:
    """Sample this process's share of the prompts; return the numbers of what it wrote.

    A lone process keeps the folder's record up to date meanwhile.
    """
    import torch

    from opensora_repro.kernels.choice import choose
    from opensora_repro.sampling.generate import ProgressBar, generate
    from opensora_repro.sampling.source import load_models

    cfg, device, mesh = source.config, engine.device, engine.mesh
    # What a run was trained with on a GPU need not run on the device that samples it.
    choose("eager" if cfg.train.kernels == "eager" else "auto", device.type)
    model, vae, conditions, report = load_models(source, device)
    if engine.is_main:
        print(report)
    before = set(range(len(folder.prompts))) - set(todo)
    written: list[int] = []
    with (
        closing(ProgressBar("sampling", shown=engine.is_main)) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"),
    ):
        for index, video in generate(
            model,
            vae,
            conditions,
            cfg,
            folder.prompts,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=bar,
            forward=engine.spread(model),
            share=(mesh.data_rank, mesh.data_size),
            only=todo,
        ):
            if mesh.member:
                continue  # the group's first process writes
            write_files(args.out, folder.files(index), video, fps=cfg.sample.fps)
            written.append(index)
            if mesh.world_size == 1:
                folder.write(before | set(written))
    return written


def pick_device(args: argparse.Namespace, world_size: int, local_rank: int) -> torch.device:
    """The device that this process samples on, and that it is CUDA's from here on. Raises ConfigError, EngineError."""
    import torch

    from opensora_repro.parallel.device import choose_device, default_kind

    wish = args.device
    if world_size > 1 and wish not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {wish}: several processes take cpu or cuda, each its own GPU")
    try:
        kind = torch.device(wish or default_kind())
        if kind.type == "cuda" and default_kind() != "cuda":
            raise RuntimeError("no usable GPU was found")
        device = choose_device(str(kind), local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {wish}: cannot be used ({str(error).splitlines()[0]})") from None
    return device


def start_engine(args: argparse.Namespace, device: torch.device) -> TorchEngine:
    """This process among those that torchrun started. Raises EngineError."""
    from opensora_repro.config import ParallelConfig
    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.process import keep_freed_memory, limit_threads

    limit_threads()
    if device.type == "cpu":
        keep_freed_memory()
    return TorchEngine(ParallelConfig(sp_size=args.sp_size), str(device))


def write_files(out: Path, names: list[str], video: np.ndarray, *, fps: int) -> None:
    """Write one sample's frames [T, H, W, 3] under each of its names."""
    from opensora_repro.data.write import write_gif, write_png, write_video

    for name in reversed(names):  # its own file last: once that is there, all are
        if name.endswith(".png"):
            write_png(out / name, video[0])
        elif name.endswith(".gif"):
            write_gif(out / name, video, fps)
        else:
            write_video(out / name, video, fps)


if __name__ == "__main__":
    sys.exit(main())
