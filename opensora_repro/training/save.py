"""Saving a checkpoint by all ranks together, in the foreground or behind the training.

Tensors become whole one at a time and each is kept, in host memory, by the one rank that will write it; so no device
and no process ever holds a second model. The snapshot is all that training waits for: writing, hashing and renaming
may go on in a thread, which talks to the other ranks' threads through a process group of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_repro.files import beside, remove_folder, sha256_of, sync_folder, write_text
from opensora_repro.parallel.device import device_kind
from opensora_repro.parallel.engine import Collectives, TorchEngine
from opensora_repro.parallel.tensor_file import TensorFile
from opensora_repro.run_folder import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    EMA_FILE,
    OPTIMIZER_FILE,
    SCHEMA_VERSION,
    STATE_FILE,
    TrainState,
    checkpoints_folder,
    mark_best,
    prune,
)
from opensora_repro.training.checkpoint import (
    UnwritableCheckpoint,
    optimizer_pieces,
    saved_as,
    saved_beside,
    weights_file,
)
from opensora_repro.training.step import Ema


@dataclass
class Snapshot:
    """A checkpoint's content: every file's layout, and the tensors that this rank writes."""

    state: TrainState
    layouts: dict[str, dict[str, tuple[torch.dtype, torch.Size]]]
    own: dict[str, dict[str, Tensor]]


class CheckpointWriter:
    """Writes a run's checkpoints and keeps the newest `keep` of them (0: all). All methods are collective.

    `keep_best`: a metric, whose best checkpoint is kept as well; "": none is.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: TorchEngine,
        config_toml: str,
        *,
        keep: int,
        background: bool,
        keep_best: str = "",
        adapter_config: str = "",
    ) -> None:
        self.run_dir, self.engine, self.keep, self.keep_best = run_dir, engine, keep, keep_best
        self.texts = {CONFIG_FILE: config_toml, **({ADAPTER_CONFIG_FILE: adapter_config} if adapter_config else {})}
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainState, ema: Ema) -> None:
        """Write the checkpoint of `state.step`, or begin to; raises UnwritableCheckpoint, also the one before's."""
        self.wait()
        snapshot = take_snapshot(self.engine, ema, state, copy=self.background)
        if not self.background:
            self._write(snapshot, self.engine.world)
            return
        self._thread = threading.Thread(target=self._write_behind, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is written. Raises UnwritableCheckpoint where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _about(self, state: TrainState) -> dict[str, Any]:
        """The state, and the kind of device that this process computes on."""
        return {**dataclasses.asdict(state), "device": device_kind(self.engine.device)}

    def _write_behind(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot, self.engine.savers)
        except Exception as error:  # raised where the run waits for this thread
            self._error = error

    def _write(self, snapshot: Snapshot, group: Collectives) -> None:
        final = checkpoints_folder(self.run_dir) / f"step-{snapshot.state.step:08d}"
        unfinished = final.with_name(group.gather(beside(final).name)[0])  # one folder for all processes
        files = {name: TensorFile(unfinished / name, layout) for name, layout in snapshot.layouts.items()}
        try:
            with _together(group, final):
                if group.rank == 0:
                    _create(unfinished, files)
            with _together(group, final):
                for name, file in files.items():
                    file.write(snapshot.own[name])
            hashes: dict[str, str] = {}
            with _together(group, final):
                hashes = {name: sha256_of(unfinished / name) for name in sorted(files)[group.rank :: group.size]}
            every = {name: value for part in group.gather(hashes) for name, value in part.items()}
            with _together(group, final):
                if group.rank == 0:
                    _finish(unfinished, final, self._about(snapshot.state), self.texts, every)
                    if self.keep_best:
                        mark_best(self.run_dir, self.keep_best)
                    prune(self.run_dir, snapshot.state.step, self.keep)
        except UnwritableCheckpoint:
            if group.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextlib.contextmanager
def _together(group: Collectives, final: Path) -> Iterator[None]:
    """Every rank does its part of the block and waits for the others; all raise where one could not."""
    error = None
    try:
        yield
    except OSError as found:
        where = f" (process {group.rank} on {socket.gethostname()}: all need one file system)" if group.rank else ""
        error = UnwritableCheckpoint(f"cannot write checkpoint {final}: {' '.join(str(found).split())}{where}")
    group.agree(error)


def take_snapshot(engine: TorchEngine, ema: Ema, state: TrainState, *, copy: bool) -> Snapshot:
    """Collective. `copy`: the tensors will still be read after training has gone on."""
    entries = list(_entries(engine, ema))
    sizes = [math.prod(shape) * dtype.itemsize for _, _, dtype, shape, _, _ in entries]
    owners = share_out(sizes, engine.mesh.world_size)
    files = (weights_file(engine), EMA_FILE, OPTIMIZER_FILE)
    snapshot = Snapshot(dataclasses.replace(state), {file: {} for file in files}, {file: {} for file in files})
    for (file, key, dtype, shape, name, piece), owner in zip(entries, owners, strict=True):
        snapshot.layouts[file][key] = (dtype, shape)
        whole = engine.whole(name, piece) if name else piece
        if owner == engine.mesh.rank:
            snapshot.own[file][key] = whole.detach().to("cpu", copy=copy)
    return snapshot


def _entries(engine: TorchEngine, ema: Ema) -> Iterator[tuple[str, str, torch.dtype, torch.Size, str, Tensor]]:
    """(file, key, dtype, shape, parameter that it is spread as, this rank's piece); no parameter: whole everywhere."""
    for file, weights in ((weights_file(engine), engine.masters), (EMA_FILE, ema.shadow)):
        for name, piece in weights.items():
            yield file, saved_as(name), piece.dtype, engine.whole_shape(name), name, piece
        for name, value in saved_beside(engine).items():
            yield file, name, value.dtype, value.shape, "", value
    for kind, name, piece in optimizer_pieces(engine):
        shape = engine.whole_shape(name) if piece.ndim else piece.shape
        yield OPTIMIZER_FILE, f"{kind}.{name}", piece.dtype, shape, name if piece.ndim else "", piece


def share_out(sizes: Sequence[int], count: int) -> list[int]:
    """Whose each item is, so that all `count` get about as much: always the least laden one's."""
    load = [0] * count
    owners = []
    for size in sizes:
        owner = load.index(min(load))
        load[owner] += size
        owners.append(owner)
    return owners


def _create(unfinished: Path, files: dict[str, TensorFile]) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that failed, where it could not be deleted then
    unfinished.mkdir(parents=True)
    for file in files.values():
        file.create()


def _finish(
    unfinished: Path, final: Path, about: dict[str, Any], texts: dict[str, str], hashes: dict[str, str]
) -> None:
    """What is not a tensor; then the name under which the checkpoint is seen."""
    for name, text in texts.items():
        write_text(unfinished / name, text)
        hashes = {**hashes, name: sha256_of(unfinished / name)}
    content = {"schema_version": SCHEMA_VERSION, **about, "sha256": dict(sorted(hashes.items()))}
    write_text(unfinished / STATE_FILE, json.dumps(content, indent=2) + "\n")
    sync_folder(unfinished)
    remove_folder(final)  # a damaged one of this step, which resuming passed over
    os.rename(unfinished, final)
    sync_folder(final.parent)
