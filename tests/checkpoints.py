"""A model's checkpoint as a run of one process leaves it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.run_folder import TrainState
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.step import Ema


def prepared(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> TorchEngine:
    engine = TorchEngine(device="cpu")
    engine.prepare(model, optimizer or torch.optim.AdamW(model.parameters()))
    return engine


def write_checkpoint(
    run_dir: Path, model: nn.Module, config_toml: str, state: TrainState, *, shrink_average: float = 1.0
) -> None:
    engine = prepared(model)
    ema = Ema(engine, 0.9)
    for shadow in ema.shadow.values():
        shadow.mul_(shrink_average)
    CheckpointWriter(run_dir, engine, config_toml, keep=0, background=False).save(state, ema)
