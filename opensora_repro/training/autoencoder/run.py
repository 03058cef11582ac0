"""From stage 0's config to a trained autoencoder, and to a text encoder if one is asked for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from opensora_repro.config import AutoencoderConfig, dump_toml
from opensora_repro.data.buckets import assigned, buckets_of, global_batch_sizes
from opensora_repro.data.dataset import ClipDataset
from opensora_repro.data.ids import ids_fingerprint
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.packing import build_schedule
from opensora_repro.data.sampler import BatchSampler, Schedule, SharedBatches
from opensora_repro.files import write_text
from opensora_repro.frozen.own_words import build_encoder, build_tokenizer, count_words, save_text_encoder, vocabulary
from opensora_repro.frozen.perceptual import load_lpips
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.build import build_engine
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.preflight import check_same, config_facts, weights_digest
from opensora_repro.process import StopSignals
from opensora_repro.run_folder import claimed_run_folder, clean_leftovers, list_checkpoints, write_config
from opensora_repro.training.alarms import Alarms
from opensora_repro.training.autoencoder.batches import HeldFeed
from opensora_repro.training.autoencoder.loop import AutoencoderTrainer
from opensora_repro.training.autoencoder.losses import AutoencoderLosses
from opensora_repro.training.autoencoder.model import build_autoencoder
from opensora_repro.training.autoencoder.preflight import find_start, preflight
from opensora_repro.training.autoencoder.report import TEXT_FACTS
from opensora_repro.training.autoencoder.validate import HeldOut
from opensora_repro.training.batches import ClipFeed, Feed
from opensora_repro.training.checkpoint import load_checkpoint
from opensora_repro.training.identity import check_manifest
from opensora_repro.training.metrics import Quarantine, RunLog
from opensora_repro.training.optim import prepare_engine
from opensora_repro.training.run import Outcome, Say
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.start import Start, start_line
from opensora_repro.training.validate import chosen_samples

NAME = "stage0_autoencoder"
TEXT = "text"  # folder in the run's, for `text.path`
MAX_LENGTH = 120  # tokens, as the tokenizer says it; model.model_max_length of the later stages decides
SHOWN_WITHOUT_VALIDATION = 16  # clips from which the latents' scale is measured


def train(cfg: AutoencoderConfig, say: Say = print) -> Outcome:
    """Start or resume the run in `run.dir`. Raises ValueError of one line for a user's mistake, TrainingError."""
    engine = build_engine(cfg.parallel)
    say = say if engine.is_main else lambda line: None
    try:
        with engine.watchdog.reporting(Path(cfg.run.dir) / "logs"):
            return _train(cfg, engine, say)
    finally:
        engine.close()


def _train(cfg: AutoencoderConfig, engine: TorchEngine, say: Say) -> Outcome:
    check_same(engine.watchdog, "settings", config_facts(cfg))  # type: ignore[arg-type]
    start = engine.world.on_first(lambda: find_start(cfg, engine.mesh.data_size, say))
    manifest = read_manifest(cfg.data.manifest, need_captions=bool(cfg.text.vocab_size))
    check_same(engine.watchdog, "data", {"data.manifest": ids_fingerprint(manifest["id"])})
    check_manifest(cfg.shared, start, manifest, say)
    if start.state.step >= cfg.train.steps:
        return Outcome(start.state.step, True, start.checkpoint)

    clips: list[dict[str, Any]] = []

    def look() -> None:
        for line in preflight(cfg, manifest, start, engine.device, told=clips):
            say(line)

    engine.world.on_first(look)
    return _Run(cfg, engine, start, manifest, say, clips).train()


class _Run:
    """One process's part of a run."""

    def __init__(
        self, cfg: AutoencoderConfig, engine: TorchEngine, start: Start, manifest: Any, say: Say,
        clips: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        self.clips = clips
        self.cfg, self.shared, self.engine, self.start = cfg, cfg.shared, engine, start
        self.manifest, self.say, self.run_dir = manifest, say, Path(cfg.run.dir)

    def train(self) -> Outcome:
        """The steps in the order in which mistakes are cheapest to find."""
        self._build_model()
        with StopSignals() as stop, contextlib.ExitStack() as held:
            self.engine.world.on_first(lambda: held.enter_context(claimed_run_folder(self.run_dir)))
            self._prepare_engine()
            self.engine.world.on_first(self._make_text)
            held_out = self._open_held_out()
            dataset = ClipDataset(self.manifest, self.cfg.data, self.cfg.run.seed)
            quarantine = held.enter_context(contextlib.closing(self._quarantine(len(dataset))))
            trainer = self._build_trainer(dataset, held_out, quarantine, stop)
            held.callback(trainer.close)
            if not any(self.engine.world.gather(stop.requested())):
                self.engine.world.on_first(self._write_config)
                trainer.log.start(start_line(NAME, self.engine, self.start.state.step, self.clips))
                self.engine.world.on_first(lambda: trainer.log.open_track(self.cfg, self.say))
                trainer.run(NAME)
            newest = self.engine.world.on_first(lambda: list_checkpoints(self.run_dir)[-1:])
            step = trainer.state.step
            return Outcome(step, step >= self.cfg.train.steps, newest[0] if newest else None, stop.received)

    def _build_model(self) -> None:
        cfg, device = self.cfg, self.engine.device
        self.kernels = choose(cfg.train.kernels, device.type)
        self.autoencoder = build_autoencoder(cfg).to(device)
        lpips = load_lpips(cfg.loss.lpips_path).to(device) if cfg.loss.lpips_path else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed)
            self.model = AutoencoderLosses(self.autoencoder, cfg.loss, lpips).to(device)
        trained = sum(value.numel() for value in self.autoencoder.module.parameters() if value.requires_grad)
        state = f"resuming {cfg.run.dir} after step {self.start.state.step} of {cfg.train.steps}"
        self.say(f"{NAME}: {state if self.start.resumes else f'starting {cfg.run.dir}'}; {trained:,} parameters")

    def _prepare_engine(self) -> None:
        """Optimizer and average; where the run resumes, the checkpoint's."""
        if self.engine.mesh.world_size > 1 and self.start.checkpoint is None:
            check_same(self.engine.watchdog, "weights", {"the weights": weights_digest(self.model.state_dict())})
        self.ema = prepare_engine(self.engine, self.model, self.shared, self.kernels)
        if self.start.checkpoint is not None:
            load_checkpoint(self.start.checkpoint, self.start.state, self.engine, self.ema)

    def _make_text(self) -> None:
        """RUN/text, where it is asked for and not yet there: the same captions give the same files."""
        text = self.cfg.text
        if not text.vocab_size or (self.run_dir / TEXT).exists():
            return
        captions = self.manifest["caption"].to_pylist()
        words = count_words(captions, text.vocab_size)
        tokens = len(vocabulary(words.known))
        encoder = build_encoder(
            tokens, seed=self.cfg.run.seed, hidden_size=text.hidden_size, depth=text.depth, num_heads=text.num_heads
        )
        save_text_encoder(encoder, build_tokenizer(words.known, MAX_LENGTH), self.run_dir / TEXT)
        facts = {
            "words": len(words.known),
            "captions": len(captions),
            "left_out": words.num_left_out,
            "share_left_out": words.share_left_out,
            "longest": words.longest,
        }
        write_text(self.run_dir / TEXT_FACTS, json.dumps(facts, indent=1) + "\n")
        self.say(f"{NAME}: a text encoder of {len(words.known):,} words of the captions: {self.run_dir / TEXT}")

    def _quarantine(self, num_samples: int, kind: str = "samples") -> Quarantine:
        fraction, writes = self.cfg.data.max_bad_fraction, self.engine.is_main
        return Quarantine(self.run_dir, num_samples=num_samples, max_fraction=fraction, writes=writes, kind=kind)

    def _open_held_out(self) -> HeldOut:
        """Held-out clips; without any, training clips, from which at least the latents' scale is measured."""
        cfg, shared = self.cfg, self.shared
        apart = bool(cfg.validation.every and cfg.data.val_manifest)
        table = read_manifest(cfg.data.val_manifest, need_captions=False) if apart else self.manifest
        chosen = chosen_samples(table, shared)
        chosen = chosen if apart else chosen[:SHOWN_WITHOUT_VALIDATION]
        dataset = ClipDataset(table, cfg.data, cfg.run.seed, augment=False)
        with contextlib.closing(self._quarantine(len(chosen), "held-out samples")) as quarantine:
            held_out = HeldOut(dataset, chosen, self.engine, quarantine, cfg.data.num_workers)
            if len(quarantine):
                self.say(f"{NAME}: {quarantine.summary()}")
            return held_out

    def _build_feed(self, dataset: ClipDataset, schedule: Schedule) -> Feed:
        cfg, mesh = self.cfg, self.engine.mesh
        shapes = [bucket.shape for bucket in buckets_of(self.shared)]
        share = {"rank": mesh.data_rank, "world_size": mesh.data_size, "accumulation": cfg.train.accumulation}
        sampler = SharedBatches(BatchSampler(schedule, shapes, **share), 0, 1)
        kind = HeldFeed if HeldFeed.fits(dataset, shapes) else ClipFeed
        return kind(dataset, sampler, cfg.data.num_workers, pinned=self.engine.device.type == "cuda")

    def _build_trainer(
        self, dataset: ClipDataset, held_out: HeldOut, quarantine: Quarantine, stop: StopSignals
    ) -> AutoencoderTrainer:
        cfg, engine, state = self.cfg, self.engine, self.start.state
        samples = global_batch_sizes(self.shared, engine.mesh.data_size)
        schedule = build_schedule(self.shared, assigned(self.manifest, self.shared), samples)
        keep, background, best = cfg.checkpoint.keep, cfg.checkpoint.background, cfg.checkpoint.keep_best
        log = RunLog(self.run_dir, resumed_step=state.step, enabled=engine.is_main)
        settled = (cfg.optim.warmup_steps, cfg.loss.discriminator_start)
        absent: Any = None
        model: Any = self.model
        return AutoencoderTrainer(
            cfg=self.shared,
            engine=engine,
            model=model,
            objective=absent,
            encoder=absent,
            ema=self.ema,
            schedule=schedule,
            feed=self._build_feed(dataset, schedule),
            state=state,
            writer=CheckpointWriter(
                self.run_dir, engine, dump_toml(cfg), keep=keep, background=background, keep_best=best
            ),
            log=log,
            quarantine=quarantine,
            validator=absent,
            evaluation=None,
            alarms=Alarms(self.shared, log, settled=settled),
            stop=stop,
            stage0=cfg,
            autoencoder=self.autoencoder,
            held_out=held_out,
        )

    def _write_config(self) -> None:
        clean_leftovers(self.run_dir)
        write_config(self.run_dir, dump_toml(self.cfg))
