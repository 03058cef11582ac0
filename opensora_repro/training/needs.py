"""When a run needs its frozen models, as its config tells."""

from __future__ import annotations

from opensora_repro.config import Config


def validates(cfg: Config) -> bool:
    """Whether a run measures the loss of held-out samples."""
    return cfg.validation.every > 0 and bool(cfg.data.val_manifest)


def encodes_always(cfg: Config) -> bool:
    """Whether a run needs the frozen models even when the cache holds every sample."""
    return not cfg.data.cache or cfg.sample.every > 0 or validates(cfg)


def encodes_after_start(cfg: Config) -> bool:
    """Whether a run needs the frozen models still once it trains."""
    return not cfg.data.cache or cfg.sample.every > 0
