"""What a start looks at before anything is built, and `--dry-run` alike: in one function, so that both say the same."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import encodes_after_start, validates
from opensora_repro.data.manifest import kind_by_name, read_manifest
from opensora_repro.data.preflight import SAMPLED_ROWS, keyed_sample, require_usable, survey, table, warnings
from opensora_repro.frozen.encoder import open_encoder
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.text import T5Text, read_cleaned
from opensora_repro.kernels.choice import choose
from opensora_repro.parallel.build import check_installed
from opensora_repro.parallel.device import total_memory
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.gpus import usable_bytes
from opensora_repro.planning.memory import Memory, step_memory
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.report import memory_parts, size
from opensora_repro.planning.sizes import latent_shape, token_grid
from opensora_repro.process import host_memory
from opensora_repro.run_folder import CONFIG_FILE, check_folder
from opensora_repro.sampling.generate import check_fit
from opensora_repro.training.identity import frozen_identity
from opensora_repro.training.start import Stage, Start
from opensora_repro.training.validate import chosen_samples
from opensora_repro.weights.catalog import CatalogError, load_catalog
from opensora_repro.weights.files import open_weights
from opensora_repro.weights.load import check_complete, inserts_temporal_attention

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # files that no stage makes, but in checkpoints
UNKNOWN_WORDS = 0.01  # share from which on a warning is due
CUT_CAPTIONS = 0.1


def preflight(
    cfg: Config,
    stage: Stage,
    mesh: Mesh,
    device: torch.device | None,
    frame: pd.DataFrame | None,
    start: Start,
    *,
    dry: bool = False,
) -> Iterator[str]:
    """Lines for people, as they are found out. Raises, in one line, whatever would stop the run before its first step.

    `frame` is the training manifest, None where it is still to come. With `dry`, the manifests and `init.weights` may
    be absent: an earlier stage may have to make them yet. The start's state takes up what the frozen models hold.
    `device` None: the run is planned for another machine, of
    which no device, memory or frozen models are here to be looked at.
    """
    check_folder("run.dir", cfg.run.dir)
    if cfg.data.cache:
        check_folder("data.cache", cfg.data.cache)
    if device is not None:
        check_installed(cfg.parallel)
        choose(cfg.train.kernels, device.type)
    if cfg.init.weights and not start.resumes:
        if dry and weights_to_come(cfg.init.weights):
            yield to_come("init.weights", cfg.init.weights)
        else:
            check_weights(cfg, stage)
    encoder = None
    try:
        encoder = open_encoder(cfg, device or torch.device("cpu"))
        check_fit(cfg, encoder.vae, encoder.text)
        if start.resumes or not dry:
            start.state.identity |= frozen_identity(cfg, start, encoder)
    except ModelNotFound as error:
        if device is not None:
            raise
        yield f"not on this machine: {error}"
    if device is not None:
        yield from memory(cfg, mesh, device)
    if frame is None:
        yield to_come("data.manifest", cfg.data.manifest)
    else:
        yield from clips(cfg, frame, "clips of", cfg.data.manifest, here=device is not None)
    if validates(cfg):
        held_out = find_manifest(cfg.data.val_manifest) if dry else read_manifest(cfg.data.val_manifest)
        if held_out is None:
            yield to_come("data.val_manifest", cfg.data.val_manifest)
        else:
            held_out = held_out.iloc[chosen_samples(held_out["id"].tolist(), cfg.validation.max_samples)]
            yield from clips(cfg, held_out, "held-out clips of", cfg.data.val_manifest, here=device is not None)
    if frame is not None and encoder is not None:
        yield from captions(cfg, frame, encoder.text)


def is_to_come(path: str) -> bool:
    """Whether nothing has the name: an earlier stage may make it. What is there, but wrong, is a mistake."""
    return not os.path.lexists(path)


def weights_to_come(path: str) -> bool:
    """Whether this may be a run that an earlier stage has to make, or has begun, without a checkpoint so far."""
    run = Path(path)
    if not is_to_come(path):
        begun = (run / CONFIG_FILE).is_file() and not (run / "checkpoints").exists()
        return begun and not any(file.suffix in WEIGHTS_SUFFIXES for file in run.iterdir())
    return not (is_published(path) or (run.suffix in WEIGHTS_SUFFIXES and "checkpoints" not in run.parts))


def is_published(name: str) -> bool:
    """Whether this is fetched by its name, not made."""
    with contextlib.suppress(CatalogError):  # an installation without the catalog
        return any(entry.name == name for entry in load_catalog())
    return False


def find_manifest(path: str) -> pd.DataFrame | None:
    """The manifest's rows, None where it is to come. Raises DataError."""
    if not is_to_come(path):
        return read_manifest(path)
    kind_by_name(Path(path))  # what comes under another name will not be one
    return None


def to_come(key: str, path: str) -> str:
    return f"not yet there: {key} = {path}, which an earlier stage has to make; it is looked at when the run starts"


def check_weights(cfg: Config, stage: Stage) -> Path:
    """The file that `init.weights` means. Raises WeightsError, ConfigError where the model or the stage is another."""
    file = open_weights(cfg.init.weights)
    if inserts_temporal_attention(check_complete(file, cfg.model)) and not stage.takes_image_models:
        raise ConfigError(f"init.weights = {cfg.init.weights} is an image model: {stage.name} goes on from a video run")
    return file.path


def clips(cfg: Config, frame: pd.DataFrame, title: str, manifest: str, *, here: bool) -> Iterator[str]:
    """The table of a manifest's clips, and what to do about it. Raises DataError where none can be used `here`."""
    found = survey(frame, cfg.data, manifest)
    if here:
        require_usable(found)
    yield from table(found, title)
    for line in warnings(found):
        yield f"warning: {line}"


def captions(cfg: Config, frame: pd.DataFrame, text: T5Text) -> Iterator[str]:
    """How many captions the model reads to their end, and knows the words of. This is where training counts them."""
    tokenizer, limit = text.load_tokenizer(), text.max_length
    looked = keyed_sample(frame, SAMPLED_ROWS)
    readings = read_cleaned(tokenizer, looked["caption"].tolist(), limit)
    cut = sum(bool(reading.dropped) for reading in readings) / len(readings)
    length = statistics.median(reading.tokens for reading in readings)
    sampled = f" ({len(looked):,} of {len(frame):,} looked at)" if len(looked) < len(frame) else ""
    told = "none is longer than" if not cut else f"{share(cut)} are cut, longer than"
    warning = "warning: " if cut > CUT_CAPTIONS else ""
    yield f"{warning}captions{sampled}: median length {length:g} tokens; {told} the {limit} that the model reads"
    unknown = sum(reading.unknown for reading in readings) / max(1, sum(reading.words for reading in readings))
    if unknown:
        warning = "warning: " if unknown > UNKNOWN_WORDS else ""
        yield f"{warning}captions{sampled}: {share(unknown)} of the words are unknown to this tokenizer"
    for prompt, reading in zip(cfg.sample.prompts, read_cleaned(tokenizer, cfg.sample.prompts, limit), strict=True):
        if reading.dropped:
            yield f"warning: of the sample prompt {prompt[:40]!r}... the model does not read {reading.dropped[:200]!r}"


def share(value: float) -> str:
    """Of a part above 0, which is not told to be none."""
    return f"{100 * value:.0f} %" if value > 0.01 else f"{100 * value:.2g} %"


def memory(cfg: Config, mesh: Mesh, device: torch.device) -> Iterator[str]:
    """What a process needs, and what this machine has. Raises ConfigError where not even the weights find room."""
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
    yield f"{warning}memory: about {size(need.peak)} a process{together}, {place} {room}: {memory_parts(need)}"


def needed_memory(cfg: Config, mesh: Mesh, device_type: str) -> Memory:
    """Of one process, by the formulas."""
    if device_type == "cpu":  # where what is offloaded lies in the same memory
        cfg = replace(cfg, optim=replace(cfg.optim, offload=False), text=replace(cfg.text, offload=False))
    grid = token_grid(cfg.model, latent_shape(cfg))
    parameters, frozen = count_parameters(cfg.model), frozen_sizes(cfg)
    encodes = encodes_after_start(cfg)
    return step_memory(cfg, grid, parameters, frozen, mesh, encodes=encodes, device=device_type)
