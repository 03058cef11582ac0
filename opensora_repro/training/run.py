"""From a config to a trained run: check, build, fill the cache, train."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora_repro.config import Config, dump_toml
from opensora_repro.config.sections import encodes_after_start, encodes_always, validates
from opensora_repro.data.buckets import as_sampled, assigned
from opensora_repro.data.cache import CacheRows, LatentCache
from opensora_repro.data.dataset import Clip, ClipDataset
from opensora_repro.data.ids import ids_fingerprint
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.packing import build_sampler, build_schedule
from opensora_repro.data.sampler import SharedBatches, keyed_generator
from opensora_repro.diffusion.gaussian import Objective, build_objective
from opensora_repro.files import sha256_of, write_text
from opensora_repro.frozen.encoder import Encoder, open_encoder, skipped_models
from opensora_repro.frozen.text import take_null_caption
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.build import build_engine, build_shards
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.preflight import check_same, config_facts, weights_digest
from opensora_repro.process import StopSignals
from opensora_repro.run_folder import (
    WEIGHTS_FILE,
    claimed_run_folder,
    clean_leftovers,
    list_checkpoints,
    read_state,
    write_config,
)
from opensora_repro.sampling.generate import check_fit, decode
from opensora_repro.training.alarms import Alarms
from opensora_repro.training.batches import CacheFeed, ClipFeed, Feed
from opensora_repro.training.checkpoint import load_checkpoint
from opensora_repro.training.fill import CacheFill, cache_fingerprint, fill_cache
from opensora_repro.training.identity import check_manifest
from opensora_repro.training.loop import Evaluates, Trainer
from opensora_repro.training.metrics import Quarantine, RunLog
from opensora_repro.training.model import apply_compile, build_model, compiles
from opensora_repro.training.optim import check_processes, prepare_engine
from opensora_repro.training.preflight import preflight
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.start import Stage, Start, find_start, start_line
from opensora_repro.training.step import horizon_warning
from opensora_repro.training.validate import Validator, chosen_samples
from opensora_repro.weights.adapters import adapter_config

COMPARED_CLIPS, COMPARED_NOISE = 12, 4  # that samples are compared with
Say = Callable[[str], None]
OpenEvaluation = Callable[[Config, Encoder, Objective, TorchEngine, Say], Evaluates]


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the step reached, whether that is `train.steps`, and the signal that stopped it, if one did."""

    step: int
    finished: bool
    checkpoint: Path | None
    signal: int | None = None


def train(cfg: Config, stage: Stage, say: Say = print, open_evaluation: OpenEvaluation | None = None) -> Outcome:
    """Start or resume the run in `run.dir`. Raises ValueError of one line for a user's mistake, TrainingError.

    `open_evaluation` makes what `[evaluate]` measures with.
    """
    engine = build_engine(cfg.parallel)
    say = say if engine.is_main else lambda line: None
    try:
        with engine.watchdog.reporting(Path(cfg.run.dir) / "logs"):
            return _train(cfg, stage, engine, say, open_evaluation)
    finally:
        engine.close()


def _train(cfg: Config, stage: Stage, engine: TorchEngine, say: Say, open_evaluation: OpenEvaluation | None) -> Outcome:
    check_same(engine.watchdog, "settings", config_facts(cfg))
    check_processes(cfg.optim, engine.mesh.world_size)
    start = engine.world.on_first(lambda: find_start(cfg, engine.mesh.data_size, say))
    table = read_manifest(cfg.data.manifest)
    check_same(engine.watchdog, "data", {"data.manifest": ids_fingerprint(table["id"])})
    check_manifest(cfg, start, table, say)
    if start.state.step >= cfg.train.steps:
        return Outcome(start.state.step, True, start.checkpoint)

    clips: list[dict[str, Any]] = []

    def look() -> dict[str, Any]:
        for line in preflight(cfg, stage, engine.mesh, engine.device, table, start, told=clips):
            say(line)
        return start.state.identity

    start.state.identity = engine.world.on_first(look)
    return _Run(cfg, stage, engine, start, table, say, open_evaluation, clips).train()


class _Run:
    """One process's part of a run."""

    def __init__(
        self, cfg: Config, stage: Stage, engine: TorchEngine, start: Start, table: Any, say: Say,
        open_evaluation: OpenEvaluation | None, clips: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        """`clips`: what was found of the manifests, in the first process."""
        self.open_evaluation, self.clips = open_evaluation, clips
        self.cfg, self.stage, self.engine, self.start, self.table, self.say = cfg, stage, engine, start, table, say
        self.run_dir = Path(cfg.run.dir)

    def train(self) -> Outcome:
        """The steps in the order in which mistakes are cheapest to find."""
        self._open_data()
        self._build_model()
        self._announce()
        with StopSignals() as self.stop, contextlib.ExitStack() as held:
            self.engine.world.on_first(lambda: held.enter_context(claimed_run_folder(self.run_dir)))
            self._check_weights()
            self._prepare_engine()
            # Held-out samples first: what is wrong with them is not found after all others have been encoded.
            validator = self._build_validator() if self.held_out else None
            evaluation = self._build_evaluation()
            quarantine = held.enter_context(contextlib.closing(self._quarantine(len(self.dataset))))
            feed = self._build_feed(quarantine)
            self._release_encoder()  # all that is encoded before training has been
            trainer = self._build_trainer(feed, quarantine, validator, evaluation)
            held.callback(trainer.close)
            if not any(self.engine.world.gather(self.stop.requested())):
                self.engine.world.on_first(self._write_config)  # from here on the folder is a run
                trainer.log.start(start_line(self.stage.name, self.engine, self.start.state.step, self.clips))
                self.engine.world.on_first(lambda: trainer.log.open_track(self.cfg, self.say))
                trainer.run(self.stage.name)
            newest = self.engine.world.on_first(lambda: list_checkpoints(self.run_dir)[-1:])
            step = trainer.state.step
            return Outcome(step, step >= self.cfg.train.steps, newest[0] if newest else None, self.stop.received)

    def _open_data(self) -> None:
        cfg = self.cfg
        self.dataset = ClipDataset(self.table, cfg.data, cfg.run.seed)
        assignment = assigned(self.table, cfg)
        self.schedule = build_schedule(cfg, assignment, self.start.state.global_batch_sizes)
        self.rows = CacheRows(self.table, cfg, assignment) if cfg.data.cache else None
        held_out = read_manifest(cfg.data.val_manifest) if validates(cfg) else None
        self.held_out = None if held_out is None else ClipDataset(held_out, cfg.data, cfg.run.seed, augment=False)
        self.chosen = [] if held_out is None else chosen_samples(held_out, cfg)

    def _build_model(self) -> None:
        cfg, device = self.cfg, self.engine.device
        self.kernels = choose(cfg.train.kernels, device.type)  # before the blocks are built and compiled with them
        self.encoder = open_encoder(cfg, device, build_shards(self.engine) if cfg.text.shard else None)
        check_fit(as_sampled(cfg), self.encoder.vae, self.encoder.text)
        self.model, self.report = build_model(cfg, device, load_init=not self.start.resumes)
        self.compiles = compiles(cfg, device.type)
        if self.compiles:
            apply_compile(self.model, cfg)
        if encodes_always(cfg):
            self.encoder.load()
        if self.report is not None and self.report.lacks_null_caption:
            take_null_caption(self.model, self.encoder.text)
        self.objective = build_objective(cfg.diffusion)

    def _announce(self) -> None:
        cfg, start, name = self.cfg, self.start, self.stage.name
        if start.resumes:
            self.say(f"{name}: resuming {cfg.run.dir} after step {start.state.step} of {cfg.train.steps}")
        else:
            self.say(f"{name}: starting {cfg.run.dir}; {self.report or 'weights drawn at random'}")
            stride = self.encoder.vae.spatial_stride
            for line in self.stage.check_start(self.model, cfg, self.report, stride):
                self.say(line)
        if cfg.lora.rank:
            count = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
            self.say(f"{name}: the weights are frozen, adapters of rank {cfg.lora.rank} trained: {count:,} parameters")
        if self.compiles:
            self.say(f"{name}: compiled blocks (train.compile = {cfg.train.compile}); the first steps wait for it")
        if self.kernels == "triton":
            self.say(f"{name}: fused kernels (train.kernels = {cfg.train.kernels})")
        warning = horizon_warning(cfg.ema.decay, cfg.train.steps)
        if warning:
            self.say(f"warning: {warning}")

    def _check_weights(self) -> None:
        """All processes must begin with the same weights. Raises EngineError."""
        if self.engine.mesh.world_size == 1:
            return
        if self.start.checkpoint is not None:
            facts = read_state(self.start.checkpoint)[1]
            if self.cfg.lora.rank:
                facts["init.weights"] = weights_digest(self.model.state_dict())
        else:
            facts = {"the model's weights": weights_digest(self.model.state_dict())}
        check_same(self.engine.watchdog, "weights", facts)

    def _prepare_engine(self) -> None:
        """Optimizer and average; where the run resumes, the checkpoint's, which needs the engine's pieces of all."""
        self.ema = prepare_engine(self.engine, self.model, self.cfg, self.kernels)
        if self.start.checkpoint is not None:
            load_checkpoint(self.start.checkpoint, self.start.state, self.engine, self.ema)

    def _quarantine(self, num_samples: int, kind: str = "samples") -> Quarantine:
        fraction, writes = self.cfg.data.max_bad_fraction, self.engine.is_main
        return Quarantine(self.run_dir, num_samples=num_samples, max_fraction=fraction, writes=writes, kind=kind)

    def _tell_bad(self, quarantine: Quarantine) -> None:
        if len(quarantine):
            self.say(f"{self.stage.name}: {quarantine.summary()}")

    def _build_validator(self) -> Validator:
        assert self.held_out is not None
        with contextlib.closing(self._quarantine(len(self.chosen), "held-out samples")) as quarantine:
            validator = Validator(
                self.cfg, self.held_out, self.chosen, self.encoder, self.objective, self.engine, quarantine,
                stopped=self.stop.requested,
            )  # fmt: skip
            self._tell_bad(quarantine)
            return validator

    def _build_evaluation(self) -> Evaluates | None:
        if self.open_evaluation is None or any(self.engine.world.gather(self.stop.requested())):
            return None
        return self.open_evaluation(self.cfg, self.encoder, self.objective, self.engine, self.say)

    def _build_feed(self, quarantine: Quarantine) -> Feed:
        cfg, engine, mesh = self.cfg, self.engine, self.engine.mesh
        share = {"rank": mesh.data_rank, "world_size": mesh.data_size, "accumulation": cfg.train.accumulation}
        whole = build_sampler(cfg, self.schedule, **share)
        sampler = SharedBatches(whole, mesh.member, mesh.model_size)
        if self.rows is None:
            pinned = engine.device.type == "cuda"
            return ClipFeed(self.dataset, sampler, cfg.data.num_workers, pinned=pinned)
        cache = LatentCache(cfg.data.cache, engine.world.on_first(lambda: cache_fingerprint(cfg, self.encoder)))
        fill = CacheFill(self.dataset, self.rows, self.encoder, cache, cfg.data.num_workers, mesh.rank, mesh.world_size)
        fill_cache(fill, engine, quarantine, self.stop.requested)
        self._tell_bad(quarantine)
        return CacheFeed(cache, sampler, self.rows)

    def _release_encoder(self) -> None:
        skipped = skipped_models(self.engine.world.gather(self.encoder.not_loaded()))
        if skipped:
            self.say(skipped)
        if not encodes_after_start(self.cfg):
            self.encoder.release()

    def _build_trainer(
        self, feed: Feed, quarantine: Quarantine, validator: Validator | None, evaluation: Evaluates | None
    ) -> Trainer:
        cfg, engine, state = self.cfg, self.engine, self.start.state
        log = RunLog(self.run_dir, resumed_step=state.step, enabled=engine.is_main)
        return Trainer(
            cfg=cfg,
            engine=engine,
            model=self.model,
            objective=self.objective,
            encoder=self.encoder,
            ema=self.ema,
            schedule=self.schedule,
            feed=feed,
            state=state,
            writer=self._build_writer(),
            log=log,
            quarantine=quarantine,
            validator=validator,
            evaluation=evaluation,
            alarms=Alarms(cfg, log, self._some_clips, self._decoded_noise, settled=(cfg.optim.warmup_steps,)),
            stop=self.stop,
        )

    def _some_clips(self) -> list[np.ndarray]:
        """A few training clips as the model is to sample them, to compare samples with; none where none can be read."""
        data, count = as_sampled(self.cfg).data, len(self.dataset)
        rows = range(0, count, -(-count // COMPARED_CLIPS))
        found = [self.dataset.load(0, row, (data.num_frames, data.height, data.width)) for row in rows]
        return [clip.pixels.numpy() for clip in found if isinstance(clip, Clip)]

    @torch.no_grad()
    def _decoded_noise(self) -> list[np.ndarray]:
        vae, data = self.encoder.vae, as_sampled(self.cfg).data
        frames = min(data.num_frames, 4) if vae.temporal_stride == 1 else data.num_frames
        shape = (COMPARED_NOISE, *vae.latent_shape(frames, data.height, data.width))
        latents = torch.randn(shape, generator=keyed_generator(0, 0, "", "alarm noise")).to(self.engine.device)
        return [decode(vae, latent, num_frames=frames) for latent in latents]

    def _build_writer(self) -> CheckpointWriter:
        cfg = self.cfg
        return CheckpointWriter(
            self.run_dir,
            self.engine,
            dump_toml(cfg),
            keep=cfg.checkpoint.keep,
            background=cfg.checkpoint.background,
            keep_best=cfg.checkpoint.keep_best,
            adapter_config=adapter_config(cfg) if cfg.lora.rank else "",
        )

    def _write_config(self) -> None:
        clean_leftovers(self.run_dir)
        write_config(self.run_dir, dump_toml(self.cfg))
        if self.report is not None:
            content = asdict(self.report)  # with the sha256 of every file that was read
            content["files"] = {name: sha256_of(Path(name)) for name in self.report.files}
            write_text(self.run_dir / WEIGHTS_FILE, json.dumps(content, indent=1) + "\n")
