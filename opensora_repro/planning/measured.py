"""Utilisation as it was measured: from a run's metrics, or from a benchmark's JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from opensora_repro.config import Config, ConfigError, load_recorded
from opensora_repro.data.buckets import as_one_size, buckets_of
from opensora_repro.files import one_line
from opensora_repro.planning.budget import step_flops
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.gpus import Gpu, gpu_of_device
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.sizes import latent_shape, token_grid
from opensora_repro.run_folder import CONFIG_FILE, METRICS_FILE, STARTS_FILE, STATE_FILE, JsonLines

LARGEST = 1e18  # that a measured number may be
FIRST_STEPS = 2  # left out: they start processes, kernels, caches


def measured_utilisation(path: Path, cfg: Config, gpu: Gpu) -> tuple[float, str]:
    """Model FLOPs over the peak of the GPUs it was measured on, which must be of the kind `gpu`, and where it is from.

    `path`: a run's folder, its metrics.jsonl, or a benchmark's JSON with rows of `tokens_per_second` (on one GPU) and
    `latents`. Raises ConfigError, also where another kind of device is recorded: in a run's checkpoints, in a
    benchmark's "gpu", which is null on a machine without one.
    """
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.is_file():
        raise ConfigError(f"--measured {one_line(path)}: no such run or file")
    devices, reached = _of_run(path, gpu) if path.suffix == ".jsonl" else _of_benchmark(path, cfg, gpu)
    others = sorted(name for name in devices if gpu_of_device(name) != gpu)
    if others:
        raise ConfigError(
            f"--measured {one_line(path)}: measured on {one_line(', '.join(others))}, which tells nothing of a "
            f"{gpu.name}: expected a run on one, or --utilisation"
        )
    if not 0 < reached <= 1:
        raise ConfigError(
            f"--measured {one_line(path)}: {reached:.3g} of the peak of {gpu.name}: "
            "name the GPU that it was measured on with --gpu"
        )
    return reached, one_line(path) if devices else f"on a device that is not recorded: {one_line(path)}"


def _of_run(path: Path, gpu: Gpu) -> tuple[set[str], float]:
    """Kinds of devices, and the median step's FLOPs a second over the peak of its processes' GPUs.

    Encoders work, too, unless cached.
    """
    if not (path.parent / CONFIG_FILE).is_file():
        raise ConfigError(f"--measured {one_line(path)}: the run's {CONFIG_FILE} is not beside it")
    cfg = load_recorded(path.parent / CONFIG_FILE)
    if cfg.data.packing_tokens:
        raise ConfigError(
            f"--measured {one_line(path)}: the run's steps are packed (data.packing_tokens), so they do not tell which "
            "sizes their clips had: expected a run without, or --utilisation"
        )
    sizes = _by_tokens(cfg)
    steps = list(_steps(JsonLines(path).read(), sizes))
    if len(steps) <= FIRST_STEPS:
        raise ConfigError(
            f"--measured {one_line(path)}: {len(steps)} step(s) with samples and seconds, "
            f"expected more than {FIRST_STEPS}"
        )
    steps = steps[FIRST_STEPS:]
    rate = statistics.median(samples * found.flops / seconds for samples, seconds, found in steps)
    data_ranks = max(-(-samples // (found.batch_size * cfg.train.accumulation)) for samples, _, found in steps)
    gpus = data_ranks * cfg.parallel.tp_size * cfg.parallel.sp_size
    return _run_devices(path.parent), rate / (gpus * gpu.peak(cfg.train.dtype))


class _Size(NamedTuple):
    flops: float  # of a sample, the encoders' among them
    batch_size: int


def _by_tokens(cfg: Config) -> dict[int, _Size]:
    """The run's sizes by a sample's tokens: where several have as many, they work as much, but for little."""
    found: dict[int, _Size] = {}
    for bucket in buckets_of(cfg):
        one = as_one_size(cfg, bucket)
        grid = token_grid(cfg.model, latent_shape(one))
        useful, _, encoding = step_flops(one, forward_products(cfg.model, grid), frozen_sizes(one), samples=1)
        most = max(bucket.batch_size, found[grid.tokens].batch_size if grid.tokens in found else 0)
        found[grid.tokens] = _Size(useful + encoding, most)
    return found


def _steps(lines: Sequence[dict[str, Any]], sizes: dict[int, _Size]) -> Iterator[tuple[int, float, _Size]]:
    """Samples, seconds and size of each step that tells them; a run of one size need not tell that."""
    only = next(iter(sizes)) if len(sizes) == 1 else None
    for line in lines:
        samples, seconds, tokens = (line.get(name) for name in ("samples", "seconds", "tokens"))
        if _is_count(samples) and _is_rate(seconds):
            of_sample = only or (tokens // samples if _is_count(tokens) else None)
            if of_sample in sizes:
                yield samples, seconds, sizes[of_sample]


def _is_rate(value: Any) -> TypeGuard[float]:
    """Above 0; of damaged files any value may come, JSON's numbers are of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and _is_rate(value)


def _run_devices(run_dir: Path) -> set[str]:
    """Of its starts and its checkpoints: a run may have been resumed on another machine."""
    states = [_json(path) for path in run_dir.glob(f"checkpoints/step-*/{STATE_FILE}")]
    states += JsonLines(run_dir / STARTS_FILE).read()  # of checkpoints that are kept no more, too
    devices = [state.get("device") for state in states if isinstance(state, dict)]
    return {name for name in devices if isinstance(name, str) and name}


def _json(path: Path) -> Any:
    """None for a file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _of_benchmark(path: Path, cfg: Config, gpu: Gpu) -> tuple[set[str], float]:
    """The device, and the best row whose model is this config's; encoders take no part in it."""
    content = _json(path)
    if content is None:
        raise ConfigError(f"--measured {one_line(path)}: not a JSON file")
    parameters, found = count_parameters(cfg.model), []
    for row in _rows(content):
        if row.get("parameters", parameters) == parameters:
            grid = token_grid(cfg.model, tuple(row["latents"][-4:]))
            flops = forward_products(cfg.model, grid).training_flops / grid.tokens
            found.append(row["tokens_per_second"] * flops / gpu.peak("bf16"))
    if not found:
        raise ConfigError(
            f"--measured {one_line(path)}: no row with tokens_per_second and latents "
            f"of a model of {parameters:,} parameters"
        )
    return _benchmark_devices(content), max(found)


def _benchmark_devices(content: Any) -> set[str]:
    """Benchmarks tell their machine; those for a GPU name it."""
    if not isinstance(content, dict) or not {"gpu", "environment"} & content.keys():
        return set()
    return {str(content.get("gpu") or "cpu")}


def _rows(content: Any) -> Iterator[dict[str, Any]]:
    """Every object, at any depth, that tells tokens a second and the latents [..., C, T, h, w] they are of."""
    if isinstance(content, dict):
        rate, latents = content.get("tokens_per_second"), content.get("latents")
        sizes = latents if isinstance(latents, list) and len(latents) >= 4 else []
        if _is_rate(rate) and sizes and all(map(_is_count, sizes)):
            yield content
        for value in content.values():
            yield from _rows(value)
    elif isinstance(content, list):
        for value in content:
            yield from _rows(value)
