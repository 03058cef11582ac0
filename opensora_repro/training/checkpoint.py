"""Checkpoints: whole tensors under published names, written beside and renamed last, verified before use (run_folder).

RUN/checkpoints/step-00000100/
    model.safetensors      the trained weights
    ema.safetensors        the averaged weights, the same keys
    optimizer.safetensors  `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` for each parameter's NAME
    state.json             TrainState, schema version, and every file's sha256
    config.toml            the run's resolved config

With [lora] adapter_model.safetensors stands in model.safetensors' place, with ema.safetensors under peft's names, and
adapter_config.json beside them; the weights that are adapted stay where `init.weights` says.

No generator state: all randomness is keyed by seed, epoch and sample id. Nothing of how the run was spread over
processes: every rank takes its pieces from the whole tensors, so any other topology or engine can go on with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora_repro.errors import TrainingError
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.run_folder import ADAPTER_FILE, EMA_FILE, MODEL_FILE, OPTIMIZER_FILE, CheckpointError, TrainState
from opensora_repro.training.step import Ema
from opensora_repro.weights.adapters import saved_name
from opensora_repro.weights.files import LORA


class UnwritableCheckpoint(CheckpointError, TrainingError):
    """The machine's fault, not the user's."""


def load_checkpoint(folder: Path, state: TrainState, engine: TorchEngine, ema: Ema) -> None:
    """Put a verified checkpoint's tensors in place, each rank its own pieces, tensor by tensor.

    Raises CheckpointError where names or shapes differ.
    """
    try:
        with _opened(folder / weights_file(engine), engine) as file:
            for name in engine.masters:
                engine.load(name, file.get_tensor(saved_as(name)))
            for name, value in saved_beside(engine).items():
                value.copy_(file.get_tensor(name))
        with _opened(folder / EMA_FILE, engine) as file:
            for name, value in ema.shadow.items():
                value.copy_(engine.take(name, file.get_tensor(saved_as(name))))
        ema.updates = state.ema_updates
        with safe_open(folder / OPTIMIZER_FILE, framework="pt") as file:
            _load_optimizer(engine, file)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {folder} does not fit this model: {reason[:400]}") from error


@contextlib.contextmanager
def _opened(path: Path, engine: TorchEngine) -> Iterator[Any]:
    """A file of the model's weights. Raises RuntimeError unless it has the model's names and shapes."""
    expected = {saved_as(name): engine.whole_shape(name) for name in engine.masters}
    expected |= {name: value.shape for name, value in saved_beside(engine).items()}
    with safe_open(path, framework="pt") as file:
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                there, here = (list(shapes[name]) if name in shapes else "absent" for shapes in (found, expected))
                raise RuntimeError(f"{name} is {there} in {path.name}, {here} in the model")
        yield file


def weights_file(engine: TorchEngine) -> str:
    """What a checkpoint's trained weights are in."""
    return ADAPTER_FILE if _adapts(engine) else MODEL_FILE


def saved_beside(engine: TorchEngine) -> dict[str, Tensor]:
    """What is saved with the trained weights: the rest of the model, unless adapters are what is trained."""
    return {} if _adapts(engine) else engine.fixed


def saved_as(parameter: str) -> str:
    """Its name in a checkpoint's weights."""
    return saved_name(parameter) if LORA.search(parameter) else parameter


def _adapts(engine: TorchEngine) -> bool:
    return any(map(LORA.search, engine.masters))


def optimizer_pieces(engine: TorchEngine) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, parameter, this rank's piece) of the optimizer's whole state; nothing before the first step."""
    for name, master in engine.masters.items():
        for kind, value in engine.optimizer.state.get(master, {}).items():
            yield kind, name, value


def _load_optimizer(engine: TorchEngine, file: Any) -> None:
    """Raises KeyError for a parameter that the model does not have."""
    names = {id(master): name for name, master in engine.masters.items()}
    optimizer = engine.optimizer
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: i for i, name in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}
    for key in file.keys():  # noqa: SIM118
        kind, _, name = key.partition(".")
        value = file.get_tensor(key)
        state.setdefault(index[name], {})[kind] = engine.take(name, value) if value.ndim else value
    # torch's own loading puts each tensor on the device and in the dtype that its implementation of the step wants.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
