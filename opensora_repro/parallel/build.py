"""The engine that a config names, without importing those that it does not."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import TYPE_CHECKING

import torch

from opensora_repro.config import ParallelConfig
from opensora_repro.errors import EngineError
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.mesh import launched_as

if TYPE_CHECKING:
    from opensora_repro.parallel.shards import Shards

OLDEST_FSDP = "2.6"  # torch


def build_engine(cfg: ParallelConfig, device: str | None = None) -> TorchEngine:
    """The engine that `parallel.engine` names. Raises EngineError where it cannot run here."""
    check_installed(cfg)
    if cfg.plugin == "fsdp" and launched_as()[1] > 1:
        from opensora_repro.parallel.fsdp import FsdpEngine

        return FsdpEngine(cfg, device)
    if cfg.engine == "torch":
        return TorchEngine(cfg, device)
    try:
        return _colossal_engine()(cfg, device)
    except ModuleNotFoundError as error:
        raise _not_installed(str(error.name).split(".")[0]) from None


def build_shards(engine: TorchEngine) -> Shards | None:
    """The processes over which `text.shard` spreads T5; None for a single one. Collective. Raises EngineError."""
    if engine.mesh.world_size == 1:
        return None
    check_shards()
    from opensora_repro.parallel.shards import Shards

    return Shards(engine.device)


def check_shards() -> None:
    """Raise EngineError where torch is too old for `text.shard`."""
    _check_fsdp("text.shard = true", "set text.shard=false")


def _check_fsdp(key: str, otherwise: str) -> None:
    if torch.__version__ < OLDEST_FSDP:  # which torch compares as versions
        raise EngineError(
            f"{key}: expected torch {OLDEST_FSDP} or newer, found {torch.__version__}: update it, or {otherwise}"
        )


def check_installed(cfg: ParallelConfig) -> None:
    """Raise EngineError where the package of `parallel.engine` is absent or too old; nothing is imported."""
    if cfg.plugin == "fsdp":
        _check_fsdp('parallel.plugin = "fsdp"', "set parallel.engine=colossalai parallel.plugin=zero2")
    if cfg.engine != "torch" and importlib.util.find_spec("colossalai") is None:
        raise _not_installed("colossalai")


def _not_installed(package: str) -> EngineError:
    return EngineError(
        f'parallel.engine = "colossalai": the package {package} is not installed: '
        'pip install colossalai, or set parallel.engine=torch (plugin "ddp")'
    )


def _colossal_engine() -> type[TorchEngine]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which ColossalAI imports, and nobody here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ColossalAI's, about packages that would serve others
        from opensora_repro.parallel.colossal import ColossalEngine

        return ColossalEngine
