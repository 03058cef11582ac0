"""`--dry-run`: what a run would do and about what it would take, without building anything large."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opensora_repro.config import Config, dump_toml
from opensora_repro.data.buckets import as_heaviest, buckets_of, global_batch_sizes
from opensora_repro.parallel.device import choose_device
from opensora_repro.parallel.mesh import Mesh, launched_as, meeting_place
from opensora_repro.planning.budget import step_flops
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.gpus import Gpu
from opensora_repro.planning.memory import needed_memory
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.report import encoding_and_recomputation, fits_into, memory_parts, operations, size
from opensora_repro.planning.sizes import latent_shape, token_grid
from opensora_repro.run_folder import list_checkpoints
from opensora_repro.training.identity import check_manifest
from opensora_repro.training.optim import check_processes
from opensora_repro.training.preflight import find_manifest, preflight
from opensora_repro.training.start import Stage, Start, find_start
from opensora_repro.training.step import horizon_warning
from opensora_repro.weights.files import find_weights, weights_to_come


def dry_run(cfg: Config, stage: Stage, gpu: Gpu | None = None) -> Iterator[str]:
    """Lines to print, as they are found out. Raises what the run itself would, at the latest when all else is told.

    With `gpu`, the plan is for a machine with such GPUs, and as many of them as one sample needs unless torchrun says
    more; what this machine is and lacks does not matter then.
    """
    tp_size, sp_size = cfg.parallel.tp_size, cfg.parallel.sp_size
    rank, world_size, _ = launched_as(tp_size * sp_size if gpu is not None else 1)
    if gpu is None and world_size > 1:
        meeting_place()
    mesh = Mesh(rank, world_size, tp_size, sp_size)
    check_processes(cfg.optim, mesh.world_size)
    yield from dump_toml(cfg).splitlines()
    yield ""
    told: list[str] = []
    start = find_start(cfg, mesh.data_size, report=told.append)
    frame = find_manifest(cfg.data.manifest, may_come=not start.resumes)
    if frame is not None:
        check_manifest(cfg, start, frame, say=lambda line: told.append(line.removeprefix("warning: ")))
    yield from (f"# warning: {line}" for line in told)
    for name, text in _plan(cfg, stage, mesh, gpu, start, None if frame is None else len(frame)):
        yield f"# {name + ':':<14}{text}"
    device = None if gpu is not None else choose_device(None, launched_as()[2])
    for line in preflight(cfg, stage, mesh, device, frame, start, dry=True):
        yield f"# {line}"


def _plan(
    cfg: Config, stage: Stage, mesh: Mesh, gpu: Gpu | None, start: Start, rows: int | None
) -> Iterator[tuple[str, str]]:
    """What follows from the config alone, by name."""
    several, whole, cfg = len(buckets_of(cfg)), cfg, as_heaviest(cfg)
    (samples,) = global_batch_sizes(cfg, mesh.data_size)
    shape = latent_shape(cfg)
    grid = token_grid(cfg.model, shape)
    yield "stage", f"{stage.name}, {stage.title}"
    parameters = count_parameters(cfg.model)
    yield "model", f"{parameters:,} parameters" + (", temporal attention" if cfg.model.temporal_attention else "")
    if several > 1:
        follows = "if all of a step's clips were of the heaviest" if cfg.data.packing_tokens else "of the heaviest"
        yield (
            "buckets",
            f"{several}, told apart below; what follows is {follows}, memory of the one that needs the most",
        )
    sizes = "x".join(map(str, shape))
    yield "latents", f"{sizes} -> {grid.tokens:,} tokens a sample, {grid.tokens * samples:,} a step"
    yield "processes", f"{mesh.world_size} = {mesh.data_size} data x {mesh.sp_size} sequence x {mesh.tp_size} tensor"
    batch = f"{cfg.train.batch_size} x {cfg.train.accumulation} micro-batches x {mesh.data_size} data ranks"
    flops, again, encoding = step_flops(cfg, forward_products(cfg.model, grid), frozen_sizes(cfg), samples)
    yield "step", f"{samples} samples ({batch}): {operations(flops)} in the transformer"
    yield "overhead", encoding_and_recomputation(encoding, again)
    if rows is not None and several == 1:
        yield "data", f"{rows:,} rows; {cfg.train.steps} steps are {cfg.train.steps * samples / rows:.3g} epochs"
    if gpu is not None:
        memory = needed_memory(whole, mesh, "cuda")
        yield "memory", f"about {size(memory.peak)} a process on a GPU: {memory_parts(memory)}"
        yield "card", fits_into(memory, gpu)
    yield "start", _start(cfg, start.checkpoint)
    found = list_checkpoints(Path(cfg.run.dir))
    yield "checkpoints", ", ".join(folder.name for folder in found) or "none yet"
    warning = horizon_warning(cfg.ema.decay, cfg.train.steps)
    if warning:
        yield "warning", warning


def _start(cfg: Config, checkpoint: Path | None) -> str:
    if checkpoint is not None:
        return f"resumes {checkpoint}"
    if not cfg.init.weights:
        return "from weights drawn at random"
    return (
        f"from the weights {cfg.init.weights if weights_to_come(cfg.init.weights) else find_weights(cfg.init.weights)}"
    )
