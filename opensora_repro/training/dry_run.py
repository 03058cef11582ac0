"""`--dry-run`: what a run would do and about what it would take, without building anything large."""

from __future__ import annotations

import os
from pathlib import Path

from opensora_repro.config import Config, ParallelConfig, dump_toml
from opensora_repro.data.manifest import read_manifest
from opensora_repro.models.weight_files import open_weights
from opensora_repro.models.weights import check_complete
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.training.checkpoint import list_checkpoints
from opensora_repro.training.ema import horizon_warning
from opensora_repro.training.init import find_start, global_batch_size
from opensora_repro.training.needs import encodes_after_start
from opensora_repro.training.optim import check_processes
from opensora_repro.training.planning.budget import step_flops
from opensora_repro.training.planning.encoders import frozen_sizes
from opensora_repro.training.planning.flops import forward_products
from opensora_repro.training.planning.gpus import Gpu
from opensora_repro.training.planning.memory import step_memory
from opensora_repro.training.planning.parameters import count_parameters
from opensora_repro.training.planning.report import besides, memory_parts, operations, size, verdict
from opensora_repro.training.planning.sizes import latent_shape, token_grid
from opensora_repro.training.stage import Stage


def dry_run(cfg: Config, stage: Stage, gpu: Gpu | None = None) -> list[str]:
    """Lines to print; with `gpu`, also whether the run fits into such a one.

    Raises what the run itself would for a wrong config, manifest or folder.
    """
    mesh = planned_mesh(cfg.parallel)
    check_processes(cfg.optim, mesh.world_size)
    lines = [*dump_toml(cfg).splitlines(), ""]

    def add(name: str, text: str) -> None:
        lines.append(f"# {name + ':':<14}{text}")

    start = find_start(cfg, mesh.data_size, report=lambda line: add("warning", line))
    rows = len(read_manifest(cfg.data.manifest))
    samples = global_batch_size(cfg, mesh.data_size)
    shape = latent_shape(cfg)
    grid = token_grid(cfg.model, shape)

    add("stage", f"{stage.name}, {stage.title}")
    parameters = count_parameters(cfg.model)
    add("model", f"{parameters:,} parameters" + (", temporal attention" if cfg.model.temporal_attention else ""))
    add("latents", "x".join(map(str, shape)) + f" -> {grid.tokens:,} tokens a sample, {grid.tokens * samples:,} a step")
    add("processes", f"{mesh.world_size} = {mesh.data_size} data x {mesh.sp_size} sequence x {mesh.tp_size} tensor")
    batch = f"{cfg.train.batch_size} x {cfg.train.accumulation} micro-batches x {mesh.data_size} data ranks"
    frozen = frozen_sizes(cfg)
    flops, again, encoding = step_flops(cfg, forward_products(cfg.model, grid), frozen, samples)
    add("step", f"{samples} samples ({batch}): {operations(flops)} in the transformer")
    add("besides", besides(encoding, again))
    add("data", f"{rows:,} rows; {cfg.train.steps} steps are {cfg.train.steps * samples / rows:.3g} epochs")
    memory = step_memory(cfg, grid, parameters, frozen, mesh, encodes=encodes_after_start(cfg))
    add("memory", f"about {size(memory.peak)} a process on a GPU: {memory_parts(memory)}")
    if gpu is not None:
        add("card", verdict(memory, gpu))
    add("start", _start(cfg, start.checkpoint))
    found = list_checkpoints(Path(cfg.run.dir))
    add("checkpoints", ", ".join(folder.name for folder in found) or "none yet")
    warning = horizon_warning(cfg.ema.decay, cfg.train.steps)
    if warning:
        add("warning", warning)
    return lines


def planned_mesh(parallel: ParallelConfig) -> Mesh:
    """Of torchrun's processes; without torchrun, of as many as one sample needs. Raises EngineError."""
    tp_size, sp_size = parallel.tp_size, parallel.sp_size
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", tp_size * sp_size))
    return Mesh(rank, world_size, tp_size, sp_size)


def _start(cfg: Config, checkpoint: Path | None) -> str:
    if checkpoint is not None:
        return f"resumes {checkpoint}"
    if cfg.init.weights:
        file = open_weights(cfg.init.weights)
        check_complete(file, cfg.model)
        return f"from the weights {file.path}"
    return "from weights drawn at random"
