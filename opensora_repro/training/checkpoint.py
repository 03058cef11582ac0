"""Checkpoints: whole tensors under published names, written beside and renamed last, verified before use.

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
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora_repro.errors import TrainingError, UserError
from opensora_repro.files import sha256_of
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.run_folder import ADAPTER_FILE, EMA_FILE, MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, list_checkpoints
from opensora_repro.training.step import Ema
from opensora_repro.weights.adapters import saved_name
from opensora_repro.weights.files import LORA

SCHEMA_VERSION = 1


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or trusted; the message is one line meant for the user."""


class UnwritableCheckpoint(CheckpointError, TrainingError):
    """The machine's fault, not the user's."""


class SchemaError(CheckpointError):
    """The checkpoint is whole, but of another release's layout."""


@dataclass
class TrainState:
    """Where a run stands, besides its tensors."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples_seen: int = 0  # good samples that reached the model
    bad_steps: int = 0  # non-finite steps in a row up to now
    ema_updates: int = 0
    global_batch_sizes: list[int] = field(default_factory=list)  # samples a step of each bucket, over all ranks
    data_fingerprint: str = ""  # of the samples' ids, which the sampler's order depends on
    identity: dict[str, Any] = field(default_factory=dict)  # of manifest and frozen models, see identity.py


def verify_checkpoint(folder: Path) -> TrainState:
    """Read `state.json` and compare every file's sha256. Raises CheckpointError that says what is wrong."""
    state, hashes = read_state(folder)
    for name, expected in hashes.items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name}: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written (sha256 differs)")
    return state


def read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    """The state and each file's recorded sha256. Raises CheckpointError."""
    path = folder / STATE_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
            raise ValueError("it is no object with sha256 in it")
        version, hashes = content.pop("schema_version"), content.pop("sha256")
        content.pop("device", None)  # for people, and for plans, see planning/measured.py
        content.pop("position", None)  # of earlier releases, which had one size
        if "global_batch_size" in content:
            content["global_batch_sizes"] = [content.pop("global_batch_size")]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE} cannot be read ({error})") from None
    if version != SCHEMA_VERSION:
        raise SchemaError(f"checkpoint {folder} has schema version {version}; this release reads {SCHEMA_VERSION}")
    try:
        return TrainState(**content), hashes
    except TypeError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE}: {error}") from None


def newest_checkpoint(run_dir: Path, report: Callable[[str], None] = print) -> tuple[Path, TrainState] | None:
    """The newest checkpoint whose files are whole; None where there is none at all.

    A damaged one is reported and the one before it taken. Raises CheckpointError where all are damaged.
    """
    reasons: list[str] = []
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            state = verify_checkpoint(folder)
        except SchemaError:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            report(f"{error}; looking for the one before it")
            continue
        return folder, state
    if reasons:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole ({reasons[0]}): restore one, or move the folder away to start again"
        )
    return None


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
