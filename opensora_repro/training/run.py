"""From a config to a trained run: check, build, fill the cache, train."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, dump_toml
from opensora_repro.config.sections import encodes_after_start, encodes_always, validates
from opensora_repro.data.cache import CacheRows, LatentCache
from opensora_repro.data.dataset import ClipDataset
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.sampler import BatchSampler, SharedBatches
from opensora_repro.diffusion.objective import build_objective
from opensora_repro.files import sha256_of, write_text
from opensora_repro.frozen.encoder import open_encoder, skipped_models
from opensora_repro.frozen.text import take_null_caption
from opensora_repro.kernels.choice import choose
from opensora_repro.parallel.build import build_engine
from opensora_repro.parallel.engine import Engine
from opensora_repro.parallel.preflight import check_same, config_facts, weights_digest
from opensora_repro.process import StopSignals
from opensora_repro.run_folder import WEIGHTS_FILE, claimed_run_folder, clean_leftovers, list_checkpoints, write_config
from opensora_repro.sampling.generate import check_fit
from opensora_repro.training.batches import BatchBuilder
from opensora_repro.training.checkpoint import load_checkpoint, read_state
from opensora_repro.training.ema import Ema, horizon_warning
from opensora_repro.training.feed import CacheFeed, ClipFeed, Feed, ids_fingerprint
from opensora_repro.training.fill import cache_fingerprint, fill_together
from opensora_repro.training.identity import check_manifest
from opensora_repro.training.loop import Trainer
from opensora_repro.training.metrics import RunLog
from opensora_repro.training.model import apply_compile, build_model, compiles
from opensora_repro.training.optim import build_optimizer, check_processes
from opensora_repro.training.preflight import preflight
from opensora_repro.training.quarantine import Quarantine
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.start import Stage, Start, find_start
from opensora_repro.training.validate import Validator, chosen_samples

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the step reached, whether that is `train.steps`, and the signal that stopped it, if one did."""

    step: int
    finished: bool
    checkpoint: Path | None
    signal: int | None = None


def train(cfg: Config, stage: Stage, say: Say = print) -> Outcome:
    """Start or resume the run in `run.dir`. Raises ValueError of one line for a user's mistake, TrainingError."""
    engine = build_engine(cfg.parallel)
    say = say if engine.is_main else _silent
    try:
        with engine.watchdog.reporting(Path(cfg.run.dir) / "logs"):
            return _train(cfg, stage, engine, say)
    finally:
        engine.close()


def _train(cfg: Config, stage: Stage, engine: Engine, say: Say) -> Outcome:
    check_same(engine.watchdog, "settings", config_facts(cfg))
    check_processes(cfg.optim, engine.mesh.world_size)
    start = engine.peers.on_first(lambda: find_start(cfg, engine.mesh.data_size, say))
    frame = read_manifest(cfg.data.manifest)
    check_same(engine.watchdog, "data", {"data.manifest": ids_fingerprint(frame["id"].tolist())})
    check_manifest(cfg, start, frame, say)
    if start.state.step >= cfg.train.steps:
        return Outcome(start.state.step, True, start.checkpoint)

    def look() -> dict[str, Any]:
        for line in preflight(cfg, stage, engine.mesh, engine.device, frame, start):
            say(line)
        return start.state.identity

    start.state.identity = engine.peers.on_first(look)
    return _Run(cfg, stage, engine, start, frame, say).train()


def _silent(line: str) -> None:
    pass


class _Run:
    """One process's part of a run, in the order in which mistakes are cheapest to find."""

    def __init__(self, cfg: Config, stage: Stage, engine: Engine, start: Start, frame: pd.DataFrame, say: Say) -> None:
        self.cfg, self.stage, self.engine, self.start, self.say = cfg, stage, engine, start, say
        self.run_dir = Path(cfg.run.dir)
        self.kernels = choose(cfg.train.kernels, engine.device.type)
        self.dataset = ClipDataset(frame, cfg.data, cfg.run.seed)
        self.rows = CacheRows(frame) if cfg.data.cache else None
        val_manifest = cfg.data.val_manifest if validates(cfg) else None
        self.held_out = ClipDataset(val_manifest, cfg.data, cfg.run.seed, augment=False) if val_manifest else None
        self.encoder = open_encoder(cfg, engine.device)
        check_fit(cfg, self.encoder.vae, self.encoder.text)
        self.model, self.report = build_model(cfg, engine.device, load_init=not start.resumes)
        self.compiles = compiles(cfg, engine.device.type)
        if self.compiles:
            apply_compile(self.model, cfg)
        if encodes_always(cfg):
            self.encoder.load()
        if self.report is not None and self.report.lacks_null_caption:
            take_null_caption(self.model, self.encoder.text)
        self.objective = build_objective(cfg.diffusion)

    def train(self) -> Outcome:
        self._announce()
        with StopSignals() as stop, contextlib.ExitStack() as held:
            self.engine.peers.on_first(lambda: held.enter_context(claimed_run_folder(self.run_dir)))
            trainer = self._build_trainer(stop)
            held.callback(trainer.close)
            if not self._agree(stop.requested()):
                self.engine.peers.on_first(self._write_config)
                trainer.run(self.stage.name)
            return self._outcome(trainer.state.step, stop)

    def _announce(self) -> None:
        cfg, start = self.cfg, self.start
        if start.resumes:
            self.say(f"{self.stage.name}: resuming {cfg.run.dir} after step {start.state.step} of {cfg.train.steps}")
        else:
            weights = str(self.report) if self.report else "weights drawn at random"
            self.say(f"{self.stage.name}: starting {cfg.run.dir}; {weights}")
            stride = self.encoder.vae.spatial_stride
            for line in self.stage.check_start(self.model, cfg, self.report, stride):
                self.say(line)
        if self.compiles:
            self.say(
                f"{self.stage.name}: compiled blocks (train.compile = {cfg.train.compile}); the first steps wait for it"
            )
        if self.kernels == "triton":
            self.say(f"{self.stage.name}: fused kernels (train.kernels = {cfg.train.kernels})")
        warning = horizon_warning(cfg.ema.decay, cfg.train.steps)
        if warning:
            self.say(f"warning: {warning}")

    def _write_config(self) -> None:
        clean_leftovers(self.run_dir)
        write_config(self.run_dir, dump_toml(self.cfg))
        if self.report is not None:
            content = self.report.to_dict()  # with the sha256 of every file that was read
            content["files"] = {name: sha256_of(Path(name)) for name in self.report.files}
            write_text(self.run_dir / WEIGHTS_FILE, json.dumps(content, indent=1) + "\n")

    def _build_trainer(self, stop: StopSignals) -> Trainer:
        cfg, engine, state = self.cfg, self.engine, self.start.state
        quarantine = Quarantine(
            self.run_dir,
            num_samples=len(self.dataset),
            max_fraction=cfg.data.max_bad_fraction,
            writes=engine.is_main,
        )
        self._check_weights()
        # ColossalAI's plugins and Gemini hand the optimizer weights of their own.
        fused = self.kernels == "triton" and cfg.parallel.engine == "torch"
        engine.prepare(self.model, build_optimizer(self.model, cfg.optim, fused=fused))
        ema = Ema(engine, cfg.ema.decay, offload=cfg.optim.offload)
        if self.start.checkpoint is not None:
            load_checkpoint(self.start.checkpoint, state, engine, ema)
        # Held-out samples first: what is wrong with them is not found after all others have been encoded.
        validator = self._build_validator(stop) if self.held_out else None
        feed = self._build_feed(quarantine, stop)
        self._leave_encoder()
        return Trainer(
            cfg=cfg,
            engine=engine,
            model=self.model,
            objective=self.objective,
            encoder=self.encoder,
            builder=self._build_batch_builder(),
            ema=ema,
            feed=feed,
            state=state,
            writer=self._build_writer(),
            log=RunLog(self.run_dir, resumed_step=state.step, enabled=engine.is_main),
            quarantine=quarantine,
            validator=validator,
            stop=stop,
        )

    def _check_weights(self) -> None:
        """All processes must begin with the same weights. Raises EngineError."""
        if self.engine.mesh.world_size == 1:
            return
        if self.start.checkpoint is not None:
            facts = read_state(self.start.checkpoint)[1]
        else:
            facts = {"the model's weights": weights_digest(self.model.state_dict())}
        check_same(self.engine.watchdog, "weights", facts)

    def _build_writer(self) -> CheckpointWriter:
        cfg = self.cfg
        keep, background = cfg.checkpoint.keep, cfg.checkpoint.background
        return CheckpointWriter(self.run_dir, self.engine, dump_toml(cfg), keep=keep, background=background)

    def _build_batch_builder(self) -> BatchBuilder:
        cfg, vae = self.cfg, self.encoder.vae
        height, width = cfg.data.height // vae.spatial_stride, cfg.data.width // vae.spatial_stride
        return BatchBuilder(
            vae,
            self.objective,
            seed=cfg.run.seed,
            batch_size=cfg.train.batch_size,
            patch_size=cfg.model.patch_size,
            drop_probability=cfg.model.class_dropout_prob,
            latent_shape=(vae.latent_channels, cfg.data.num_frames, height, width),
            text_shape=(cfg.model.model_max_length, cfg.model.caption_channels),
            device=self.engine.device,
        )

    def _build_validator(self, stop: StopSignals) -> Validator:
        assert self.held_out is not None
        cfg, engine = self.cfg, self.engine
        chosen = chosen_samples(self.held_out.ids, cfg.validation.max_samples)
        with contextlib.closing(
            Quarantine(
                self.run_dir,
                num_samples=len(chosen),
                max_fraction=cfg.data.max_bad_fraction,
                writes=engine.is_main,
                kind="held-out samples",
            )
        ) as quarantine:
            validator = Validator(
                cfg, self.held_out, chosen, self.encoder, self.objective, engine, quarantine, stopped=stop.requested
            )
            self._tell_bad(quarantine)
            return validator

    def _tell_bad(self, quarantine: Quarantine) -> None:
        if len(quarantine):
            self.say(f"{self.stage.name}: {quarantine.summary()}")

    def _build_feed(self, quarantine: Quarantine, stop: StopSignals) -> Feed:
        cfg, engine, mesh = self.cfg, self.engine, self.engine.mesh
        whole = BatchSampler(
            len(self.dataset), cfg.train.batch_size, cfg.run.seed, rank=mesh.data_rank, world_size=mesh.data_size
        )
        sampler = SharedBatches(whole, mesh.member, mesh.model_size)
        if self.rows is None:
            pinned = engine.device.type == "cuda"
            return ClipFeed(self.dataset, sampler, cfg.data.num_workers, pinned=pinned)
        cache = LatentCache(cfg.data.cache, engine.peers.on_first(lambda: cache_fingerprint(cfg, self.encoder)))
        fill_together(
            self.dataset,
            self.rows,
            self.encoder,
            cache,
            engine,
            quarantine,
            num_workers=cfg.data.num_workers,
            stopped=stop.requested,
        )
        self._tell_bad(quarantine)
        return CacheFeed(cache, sampler, self.rows, cfg.data.draws)

    def _leave_encoder(self) -> None:
        """All that is encoded before training has been."""
        skipped = skipped_models(self.engine.peers.gather(self.encoder.not_loaded()))
        if skipped:
            self.say(skipped)
        if not encodes_after_start(self.cfg):
            self.encoder.release()

    def _agree(self, wish: bool) -> bool:
        return any(self.engine.peers.gather(wish))

    def _outcome(self, step: int, stop: StopSignals) -> Outcome:
        newest = self.engine.peers.on_first(lambda: list_checkpoints(self.run_dir)[-1:])
        return Outcome(step, step >= self.cfg.train.steps, newest[0] if newest else None, stop.received)
