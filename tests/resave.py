"""Resume a run and write its checkpoint again at once: CONFIG.toml [section.key=value ...] FOLDER."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_repro.config import dump_toml, load_config
from opensora_repro.parallel.build import build_engine
from opensora_repro.training.checkpoint import load_checkpoint, newest_checkpoint
from opensora_repro.training.ema import Ema
from opensora_repro.training.model import build_model
from opensora_repro.training.optim import build_optimizer
from opensora_repro.training.save import CheckpointWriter


def main(argv: Sequence[str]) -> int:
    config, *overrides, folder = argv
    cfg = load_config(config, overrides)
    found = newest_checkpoint(Path(cfg.run.dir))
    assert found is not None
    checkpoint, state = found
    engine = build_engine(cfg.parallel)
    model, _ = build_model(cfg, engine.device, load_init=False)
    engine.prepare(model, build_optimizer(model, cfg.optim))
    ema = Ema(engine, cfg.ema.decay)
    load_checkpoint(checkpoint, state, engine, ema)
    CheckpointWriter(Path(folder), engine, dump_toml(cfg), keep=0, background=False).save(state, ema)
    engine.close()
    return 0
