"""What samples faster and not quite the same: guidance in an interval, two caches, and `--fast`, which chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, ConfigError
from opensora_repro.diffusion.samplers import num_calls
from opensora_repro.models.config import ModelConfig
from opensora_repro.planning.memory import FLOAT, HALF
from opensora_repro.planning.sizes import latent_shape, token_grid
from opensora_repro.sampling.caches import Broadcast, Caches, StepCache

if TYPE_CHECKING:
    from opensora_repro.sampling.source import ModelSource

CALIBRATION = "step_cache.json"  # of stages.calibrate, beside the checkpoint
FAST_STEPS = {"euler": 7, "ab2": 7, "dpm": 16}  # by what samples flow models, and IDDPM ones
FAST_INTERVAL = (0.2, 0.95)  # noise levels of guidance


@dataclass(frozen=True)
class Speedups:
    """What a sampling is made faster by, besides its sampler and steps; None: not by that."""

    guidance_interval: tuple[float, float] | None = None
    broadcast: Broadcast | None = None
    step_cache: StepCache | None = None

    def caches(self) -> Caches | None:
        if self.broadcast is None and self.step_cache is None:
            return None
        return Caches(self.broadcast, self.step_cache)

    def settings(self) -> dict[str, Any]:
        """As samples.json has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self, cfg: Config, model: ModelConfig, *, sp_size: int = 1) -> None:
        """Raise ConfigError for what cannot be, or would do nothing."""
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high <= 1:
                raise ConfigError(f"--guidance-interval {low:g} {high:g}: expected noise levels, 0 <= LOW < HIGH <= 1")
            if cfg.sample.guidance == 1:
                raise ConfigError("--guidance-interval: guidance is 1, there is none to limit")
        option = "--broadcast" if self.broadcast is not None else "--step-cache"
        if self.caches() is not None and model.conditioning != "t5":
            raise ConfigError(f"{option}: DiT and Latte have no such cache, STDiT, STDiT2 and STDiT3 have")
        if self.broadcast is not None:
            self._check_broadcast(self.broadcast, cfg)
        if self.step_cache is not None and sp_size > 1:
            raise ConfigError(
                f"--step-cache with --sp-size {sp_size}: each process would judge by its own frames; take --broadcast"
            )

    def _check_broadcast(self, broadcast: Broadcast, cfg: Config) -> None:
        low, high = broadcast.between
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"--broadcast-between {low:g} {high:g}: expected shares of the steps, 0 <= LOW < HIGH <= 1"
            )
        times = (broadcast.spatial, broadcast.temporal, broadcast.cross)
        calls = num_calls(cfg.sample.sampler, cfg.sample.steps)
        room = len(broadcast.within(calls))
        if min(times) < 1:
            raise ConfigError(f"--broadcast {' '.join(map(str, times))}: expected at least 1 each; 1 keeps nothing")
        if max(times) > room + 1:  # the output of the last call before may serve, too
            raise ConfigError(
                f"--broadcast {' '.join(map(str, times))}: an output cannot serve {max(times)} steps, from {low:g} to "
                f"{high:g} of {calls} there are {room}; see --broadcast-between"
            )

    def lines(self, cfg: Config, *, on_gpu: bool) -> Iterator[str]:
        """What is printed."""
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            yield f"guidance {cfg.sample.guidance:g} acts at noise levels {low:g} to {high:g}"
        without = "; without CUDA graphs, whose steps are all alike" if on_gpu else ""
        if self.broadcast is not None:
            found, calls = self.broadcast, num_calls(cfg.sample.sampler, cfg.sample.steps)
            within = found.within(calls)
            yield (
                f"attention's outputs serve {found.spatial} (spatial), {found.temporal} (temporal) and {found.cross} "
                f"(cross) calls of the model, in calls {within.start + 1} to {within.stop} of {calls}{without}"
            )
        if self.step_cache is not None:
            yield f"blocks are skipped while the foretold change stays under {self.step_cache.threshold:g}{without}"

    def memory(self, cfg: Config, model: ModelConfig, *, batch_size: int, sp_size: int = 1) -> float:
        """Bytes that the caches hold at most."""
        grid = token_grid(model, latent_shape(cfg))
        rows = batch_size * (1 if cfg.sample.guidance == 1 else 2)
        values = rows * -(-grid.frames // sp_size) * grid.places * model.hidden_size
        kept = 0.0
        if self.broadcast is not None:
            found, pairs = self.broadcast, getattr(model, "architecture", "") == "stdit3"
            # A block of STDiT3 is over space or time, each with a cross-attention; others' blocks are over both
            times = [found.spatial, found.temporal, *[found.cross] * (2 if pairs else 1)]
            kept += sum(t > 1 for t in times) * model.depth * values * (HALF if cfg.train.dtype == "bf16" else FLOAT)
        return kept + (2 * FLOAT * values if self.step_cache is not None else 0)


def fast_options(source: ModelSource, given: dict[str, Any]) -> dict[str, Any]:
    """What `--fast` chooses of sampler, steps, guidance_interval and broadcast, where `given` says nothing of it.

    Never more steps than the run's own.
    """
    cfg = source.config
    sampler = given["sampler"] or ("euler" if cfg.diffusion.objective == "flow" else "dpm")
    own = cfg.sample.steps
    chosen: dict[str, Any] = {"sampler": sampler, "steps": min(own, FAST_STEPS.get(sampler, own))}
    guidance = cfg.sample.guidance if given["guidance"] is None else given["guidance"]
    if guidance != 1:
        chosen["guidance_interval"] = FAST_INTERVAL
    return {key: value for key, value in chosen.items() if given[key] is None}


def open_step_cache(text: str, source: ModelSource, folder: Path) -> StepCache:
    """Of FILE, FILE:THRESHOLD, THRESHOLD or nothing, the file then in the run's or weights' folder.

    Raises ConfigError.
    """
    from opensora_repro.sampling.source import weights_sha256

    name, _, number = text.rpartition(":")
    threshold = _number(number)
    if threshold is None:  # no threshold, or a colon of the name's own
        name = text
    beside = folder if folder.is_dir() else folder.parent
    places = [Path(name).expanduser()] if name else [beside / CALIBRATION, source.path / CALIBRATION]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"--step-cache: no {places[0]}; python -m stages.calibrate {folder} --prompts FILE writes it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        polynomial, span = _numbers(found["polynomial"]), _numbers(found["span"])
        cache = StepCache(float(found["threshold"]) if threshold is None else threshold, polynomial, (span[0], span[1]))
        sha256 = found["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(f"--step-cache {path}: not a file of stages.calibrate") from None
    if not (math.isfinite(cache.threshold) and cache.threshold >= 0):
        raise ConfigError(f"--step-cache {path}: threshold {cache.threshold:g}, expected a number from 0 on")
    if sha256 != weights_sha256(source):
        raise ConfigError(f"--step-cache {path}: calibrated for other weights; run stages.calibrate for {source.path}")
    return cache


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    found = tuple(map(float, values))
    if not all(map(math.isfinite, found)) or len(found) < 1:
        raise ValueError
    return found
