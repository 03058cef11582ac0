"""What memory this machine has, and whether a training run fits into it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from opensora_repro.config import Config, ConfigError
from opensora_repro.parallel.device import total_memory
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.gpus import usable_bytes
from opensora_repro.planning.memory import needed_memory
from opensora_repro.planning.report import memory_parts, size
from opensora_repro.process import host_memory


@dataclass(frozen=True)
class Room:
    """Memory, in bytes, of a process's GPU, or of the machine that processes on CPUs share."""

    place: str
    total: float
    free: float
    state: str  # of what is free, in a word
    swap: float = 0
    processes: int = 1  # which share it

    @property
    def limit(self) -> float:
        return self.total + self.swap


def room_on(device: torch.device) -> Room:
    """What there is for processes like this one."""
    if device.type == "cuda":
        total = total_memory(device)
        return Room("this GPU", total, usable_bytes(total), "usable")
    host = host_memory()
    told = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
    return Room("this machine", host.total, host.free, "free", host.swap, int(told) if told.isdecimal() else 1)


def check_memory(cfg: Config, mesh: Mesh, device: torch.device) -> str:
    """A line on what a process needs and this machine has. Raises ConfigError where not even the weights find room."""
    need, room = needed_memory(cfg, mesh, device.type), room_on(device)
    always = need.states.weights + need.states.optimizer + need.states.average
    if device.type == "cuda":  # host memory need not hold what is mapped from files
        always += need.encoders
    processes = room.processes
    if processes * always > room.limit:
        raise ConfigError(
            f"weights, optimizer and average take {size(processes * always)}, {room.place} has {size(room.limit)}: "
            "take a smaller model or a larger machine, or spread them over GPUs (parallel.plugin=zero2)"
        )
    peak = processes * need.peak
    together = f", {size(peak)} for {processes} processes" if processes > 1 else ""
    warning = "" if peak <= room.free else "warning: probably too much "
    has = f"{room.place} has {size(room.free)} of its {size(room.total)} {room.state}"
    return f"{warning}memory: about {size(need.peak)} a process{together}, {has}: {memory_parts(need)}"
