"""A fast subset of the metrics while a run trains, on the weights that its model has at the moment: `[evaluate]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.buckets import as_sampled
from opensora_repro.data.manifest import read_manifest
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.evaluation.clips import Clips, as_video
from opensora_repro.evaluation.distances import Estimate
from opensora_repro.evaluation.features import OWN, ClipFeatures, FeatureModel, all_features, open_features
from opensora_repro.evaluation.losses import HeldOutLosses
from opensora_repro.evaluation.own_features import OwnFeatures, make_own
from opensora_repro.evaluation.pixels import Looks, look_at
from opensora_repro.evaluation.quality import clip_vectors, of_clip, of_features, of_looks
from opensora_repro.evaluation.share import shared
from opensora_repro.frozen.encoder import Encoder
from opensora_repro.frozen.text import EncodedPrompts
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.run_folder import evaluation_folder
from opensora_repro.sampling.generate import NotFinite, generate
from opensora_repro.training.step import ModelRunner

OWN_CLIPS = 256  # that the model which is trained on the spot sees


class TrainingEvaluation:
    """What a run is evaluated with: held-out clips, encoded once, and what their pixels and features are."""

    def __init__(
        self, cfg: Config, encoder: Encoder, objective: Objective, engine: TorchEngine, say: Callable[[str], None]
    ) -> None:
        """Collective. Raises DataError, ConfigError, ModelNotFound."""
        self.cfg, self.encoder, self.engine, self.say = as_sampled(cfg), encoder, engine, say
        self.options = cfg.evaluate
        self.held = Clips(read_manifest(cfg.data.val_manifest), self.cfg, self.options.clips, what="data.val_manifest")
        for line in self.held.drop_bad(engine, cfg.data.max_bad_fraction):
            say(line)
        own = range(len(self.held))[engine.mesh.data_rank :: engine.mesh.data_size]
        levels = cfg.validation.timesteps
        self.losses = HeldOutLosses(self.cfg, encoder, objective, engine, self.held.good(own), levels)
        captions = self.held.captions
        self.prompts = [captions[i % len(captions)] for i in range(self.options.samples)]
        if self.prompts:
            self._look_at_data(cfg)

    def _look_at_data(self, cfg: Config) -> None:
        """What samples will be compared with, from all held-out clips."""
        path, device = self.options.features, self.engine.device
        self.features: FeatureModel | None = None
        if path == OWN:
            file = evaluation_folder(Path(cfg.run.dir)) / "own.safetensors"
            self.engine.world.on_first(lambda: self._make_own(file))
            self.features = OwnFeatures(file, device)
        elif path:
            self.features = open_features(path, device, key="evaluate.features")
        self.clip = ClipFeatures(self.options.clip, device, key="evaluate.clip") if self.options.clip else None
        numbers = range(len(self.held))
        found = shared(self.engine, numbers, lambda part: [self._seen(as_video(c)) for c in self.held.good(part)])
        self.looks, features = [look for look, _, _ in found], [of for _, of, _ in found]
        self.real = torch.stack([of for of in features if of is not None]) if self.features else None

    def _make_own(self, file: Path) -> None:
        if file.exists():  # a resumed run measures with the same
            return
        clips = Clips(read_manifest(self.cfg.data.manifest), self.cfg, OWN_CLIPS, what="data.manifest")
        self.say(f"evaluation: training a feature model on {len(clips)} clips: {file}")
        make_own(file, clips, OWN_CLIPS, seed=self.cfg.run.seed)

    def _seen(self, video: np.ndarray) -> tuple[Looks, Tensor | None, Tensor | None]:
        """What is kept of a video: its looks, its features [F, D], and CLIP's of its frames [F, D]."""
        features = None if self.features is None else all_features(self.features, [video], 1)[0]
        return look_at(video), features, None if self.clip is None else self.clip.features([video])[0]

    def measure(self, runner: ModelRunner, model: CaptionedModel) -> dict[str, float]:
        """Metrics by name. Collective."""
        found: dict[str, Estimate | float] = {**self.losses.measure(runner)}
        if self.prompts:
            found |= self._of_samples(runner, model)
        return {name: of.value if isinstance(of, Estimate) else of for name, of in found.items()}

    def _of_samples(self, runner: ModelRunner, model: CaptionedModel) -> dict[str, Estimate | float]:
        encoded = EncodedPrompts(self.encoder.text, self.prompts)  # by all, who may each hold a share
        error, own = None, {}
        try:
            own = {index: self._seen(video) for index, video in self._sampled(runner, model, encoded)}
        except NotFinite as found:
            error = str(found)
        parts = self.engine.world.gather((own, error))
        errors = [error for _, error in parts if error is not None]
        if errors:
            self.say(f"warning: no samples to evaluate: {errors[0]}")
            return {}
        everyone = {index: seen for part, _ in parts for index, seen in part.items()}
        looks, features, frames = zip(*(everyone[index] for index in range(len(self.prompts))), strict=True)
        metrics = of_looks(looks, self.looks)
        if self.real is not None:
            metrics |= of_features(torch.stack(features), self.real)
        if self.clip is not None:
            metrics |= of_clip(torch.stack(frames), clip_vectors(self.clip, self.prompts), self.prompts)
        return metrics

    def _sampled(
        self, runner: ModelRunner, model: CaptionedModel, encoded: EncodedPrompts
    ) -> list[tuple[int, np.ndarray]]:
        """This process's share of the samples: the same noise at every evaluation."""
        cfg, mesh = self.cfg, self.engine.mesh
        if self.options.steps:
            cfg = replace(cfg, sample=replace(cfg.sample, steps=self.options.steps))
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"):
            found = generate(
                model, self.encoder.vae, encoded, cfg, self.prompts, seed=cfg.run.seed,
                batch_size=cfg.train.batch_size, forward=runner.forward, share=(mesh.data_rank, mesh.data_size),
            )  # fmt: skip
            return list(found)
