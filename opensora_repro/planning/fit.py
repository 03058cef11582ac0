"""Whether a training run fits into this machine's memory."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import encodes_after_start
from opensora_repro.parallel.device import total_memory
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.gpus import usable_bytes
from opensora_repro.planning.memory import Memory, step_memory
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.report import memory_parts, size
from opensora_repro.planning.sizes import latent_shape, token_grid
from opensora_repro.process import host_memory


def check_memory(cfg: Config, mesh: Mesh, device: torch.device) -> str:
    """A line on what a process needs and this machine has. Raises ConfigError where not even the weights find room."""
    need = needed_memory(cfg, mesh, device.type)
    always = need.states.weights + need.states.optimizer + need.states.average
    if device.type == "cuda":
        processes, total, place = 1, total_memory(device), "this GPU has"
        always += need.encoders  # host memory need not hold what is mapped from files
        usable = usable_bytes(total)
        room = f"{size(usable)} of its {size(total)} usable"
    else:
        host = host_memory()
        told = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
        processes = int(told) if told.isdecimal() else 1
        total, usable, place = host.total + host.swap, host.free, "this machine has"
        room = f"{size(host.free)} of its {size(host.total)} free"
    if processes * always > total:
        raise ConfigError(
            f"weights, optimizer and average take {size(processes * always)}, {place} {size(total)}: take a smaller "
            "model or a larger machine, or spread them over GPUs (parallel.plugin=zero2)"
        )
    peak = processes * need.peak
    together = f", {size(peak)} for {processes} processes" if processes > 1 else ""
    warning = "" if peak <= usable else "warning: probably too much "
    return f"{warning}memory: about {size(need.peak)} a process{together}, {place} {room}: {memory_parts(need)}"


def needed_memory(cfg: Config, mesh: Mesh, device_type: str) -> Memory:
    """Of one process, by the formulas."""
    if device_type == "cpu":  # where what is offloaded lies in the same memory
        cfg = replace(cfg, optim=replace(cfg.optim, offload=False), text=replace(cfg.text, offload=False))
    grid = token_grid(cfg.model, latent_shape(cfg))
    parameters, frozen = count_parameters(cfg.model), frozen_sizes(cfg)
    encodes = encodes_after_start(cfg)
    return step_memory(cfg, grid, parameters, frozen, mesh, encodes=encodes, device=device_type)
