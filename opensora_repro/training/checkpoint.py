"""Checkpoints: whole tensors under published names, written beside and renamed last, verified before use.

RUN/checkpoints/step-00000100/
    model.safetensors      the trained weights
    ema.safetensors        the averaged weights, the same keys
    optimizer.safetensors  `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` for each parameter's NAME
    state.json             TrainState, schema version, and every file's sha256
    config.toml            the run's resolved config

No generator state: all randomness is keyed by seed, epoch and sample id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora_repro.training.ema import Ema

SCHEMA_VERSION = 1
STATE_FILE, CONFIG_FILE = "state.json", "config.toml"
_STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or trusted; the message is one line meant for the user."""


class SchemaError(CheckpointError):
    """The checkpoint is whole, but of another release's layout."""


@dataclass
class TrainState:
    """Where a run stands, besides its tensors."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples_seen: int = 0  # good samples that reached the model
    position: int = 0  # samples drawn from the sampler over all ranks: where its epochs, laid end to end, go on
    bad_steps: int = 0  # non-finite steps in a row up to now
    ema_updates: int = 0
    global_batch_size: int = 0  # samples a step over all ranks and micro-batches
    data_fingerprint: str = ""  # of the samples' ids, which the sampler's order depends on


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders (not verified), oldest first."""
    folder = checkpoints_folder(run_dir)
    found = [path for path in folder.glob("step-*") if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    model: nn.Module,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    config_toml: str,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step`, then delete all but the newest `keep` (0: none). Raises CheckpointError."""
    folder = checkpoints_folder(run_dir)
    final = folder / f"step-{state.step:08d}"
    beside = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(beside)
        beside.mkdir()
        _write_tensors(beside / "model.safetensors", model.state_dict())
        _write_tensors(beside / "ema.safetensors", ema.state_dict(model))
        _write_tensors(beside / "optimizer.safetensors", optimizer_tensors(model, optimizer))
        _write_text(beside / CONFIG_FILE, config_toml)
        files = {path.name: _sha256(path) for path in sorted(beside.iterdir())}
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(state), "sha256": files}
        _write_text(beside / STATE_FILE, json.dumps(content, indent=2) + "\n")
        _sync_folder(beside)
        _remove(final)  # a damaged one of this step, which resuming passed over
        os.rename(beside, final)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {final}: {' '.join(str(error).split())}") from error
    _prune(run_dir, state.step, keep)
    return final


def clean_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    for path in checkpoints_folder(run_dir).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(folder: Path) -> TrainState:
    """Read `state.json` and compare every file's sha256. Raises CheckpointError that says what is wrong."""
    state, hashes = read_state(folder)
    for name, expected in hashes.items():
        try:
            found = _sha256(folder / name)
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
        version, hashes = content.pop("schema_version"), content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
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


def load_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer
) -> None:
    """Put a verified checkpoint's tensors in place. Raises CheckpointError where names or shapes differ."""
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        ema.load(load_file(folder / "ema.safetensors"), state.ema_updates)
        load_optimizer_tensors(model, optimizer, load_file(folder / "optimizer.safetensors"))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {folder} does not fit this model: {reason[:400]}") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `KIND.PARAMETER`; empty before the first step."""
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Raises KeyError for a parameter that the model does not have."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: i for i, name in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        state.setdefault(index[name], {})[kind] = value
    # torch's own loading puts each tensor on the device and in the dtype that its implementation of the step wants.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _prune(run_dir: Path, newest_step: int, keep: int) -> None:
    older = [path for path in list_checkpoints(run_dir) if _step_of(path) <= newest_step]
    for path in older[:-keep] if keep else []:
        _remove(path)


def _remove(folder: Path) -> None:
    """Delete a folder; its name goes first, so that a half-deleted checkpoint is never seen."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _step_of(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
