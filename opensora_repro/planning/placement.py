"""Which parallel layouts hold a config on given GPUs, from the simplest one on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from opensora_repro.config import Config, ConfigError, ParallelConfig, check_config
from opensora_repro.errors import EngineError
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.gpus import GIB, Gpu
from opensora_repro.planning.memory import Memory, Size, needed_memory

SIZES = (1, 2, 4, 8)  # of tensor and sequence parallelism; more than a machine's GPUs would wait for the network


@dataclass(frozen=True)
class Fit:
    """A layout, what one process needs with each kind of activation checkpointing, and why it does not fit, if so.

    `memory` holds for the config's own train.activation_checkpointing; it and the peaks (bytes) are missing where the
    layout is impossible.
    """

    overrides: str
    parallel: ParallelConfig
    memory: Memory | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    @property
    def fits(self) -> bool:
        return not self.refused


@dataclass(frozen=True)
class Fitter:
    """What the layouts of one config have in common."""

    cfg: Config
    gpu: Gpu
    gpus: int
    least_frames: int  # of latents, in patches, of the run's shortest clips
    sizes: list[Size]  # whose steps may need the most memory

    def try_layout(self, parallel: ParallelConfig) -> Fit:
        cfg = dataclasses.replace(self.cfg, parallel=parallel)
        overrides = describe(parallel)
        try:
            check_config(cfg)
            mesh = Mesh(0, self.gpus, parallel.tp_size, parallel.sp_size)
            if self.least_frames < parallel.sp_size:
                shortest = f"the shortest clips have only {self.least_frames} latent frames"
                raise ConfigError(f"parallel.sp_size = {parallel.sp_size}: {shortest}")
        except (ConfigError, EngineError) as error:
            return Fit(overrides, parallel, refused=str(error))
        memory = {kind: self._memory(cfg, mesh, kind) for kind in ACTIVATION_CHECKPOINTING}
        peaks = {kind: found.peak for kind, found in memory.items()}
        own = memory[cfg.train.activation_checkpointing]
        return Fit(overrides, parallel, own, peaks, too_much(own, self.gpu))

    def _memory(self, cfg: Config, mesh: Mesh, checkpointing: str) -> Memory:
        train = dataclasses.replace(cfg.train, activation_checkpointing=checkpointing)
        cfg = dataclasses.replace(cfg, train=train)
        return needed_memory(cfg, mesh, "cuda", self.sizes)


def too_much(memory: Memory, gpu: Gpu) -> str:
    """Why it does not fit into the GPU; empty where it does."""
    usable = gpu.usable_bytes
    if memory.peak <= usable:
        return ""
    return f"needs {memory.peak / GIB:.1f} GiB of the {usable / GIB:.1f} GiB usable on a {gpu.name}"


def candidates(cfg: Config, gpus: int) -> Iterator[ParallelConfig]:
    """Layouts in the order of preference: few processes a sample, then little machinery.

    Data parallelism first, spread more and more; then a sample's frames over several processes, then matrices too.
    """
    timeout = cfg.parallel.timeout
    yield ParallelConfig(timeout=timeout)
    if gpus == 1:
        return
    for engine, plugin in (("colossalai", "zero1"), ("colossalai", "zero2"), ("torch", "fsdp")):
        yield ParallelConfig(engine, plugin, timeout=timeout)
    shares = [(tp, sp) for tp in SIZES for sp in SIZES if 1 < tp * sp <= min(gpus, SIZES[-1])]
    for tp, sp in sorted(shares, key=lambda share: (share[0] * share[1], share[0])):
        if sp == 1 or cfg.model.temporal_attention:
            yield ParallelConfig("colossalai", "hybrid" if tp > 1 else "zero2", tp, sp, timeout)


def describe(parallel: ParallelConfig) -> str:
    """The layout as overrides of a config, sizes of 1 left out."""
    words = [f"parallel.engine={parallel.engine}", f"parallel.plugin={parallel.plugin}"]
    for name in ("tp_size", "sp_size"):
        if getattr(parallel, name) > 1:
            words.append(f"parallel.{name}={getattr(parallel, name)}")
    return " ".join(words)
