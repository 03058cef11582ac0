"""`stages.evaluate`: checkpoints one after another, in steps that are done once, by all processes together.

OUT/NAME/results.json    each step's metrics, and a digest of all that decides them: the same command goes on
OUT/NAME/samples-*/      as stages.sample writes them; OUT/NAME/nearest.png, nearest.json: samples beside training clips
OUT/NAME/vbench/         under the names that VBench looks for
OUT/features/            the feature model that is trained on the spot
OUT/evaluation.json, evaluation.md
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_repro.config import Config, ConfigError, ParallelConfig
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.video import probe, read_frames
from opensora_repro.data.write import write_png
from opensora_repro.diffusion.gaussian import build_objective
from opensora_repro.errors import DataError
from opensora_repro.evaluation import memorised, vbench
from opensora_repro.evaluation.clips import Clips, as_video, once_each
from opensora_repro.evaluation.distances import share_of
from opensora_repro.evaluation.features import OWN, ClipFeatures, FeatureModel, all_features, open_features
from opensora_repro.evaluation.losses import HeldOutLosses
from opensora_repro.evaluation.own_features import OwnFeatures, make_own
from opensora_repro.evaluation.pixels import look_at
from opensora_repro.evaluation.quality import as_json, clip_vectors, of_clip, of_features, of_looks
from opensora_repro.evaluation.reconstruction import given_back, reconstruction
from opensora_repro.evaluation.share import shared
from opensora_repro.evaluation.table import write_evaluation
from opensora_repro.files import Sha256Memo, digest, is_file, read_json, safe_name, write_text
from opensora_repro.frozen.encoder import open_encoder
from opensora_repro.frozen.perceptual import load_lpips
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.run_folder import STATE_FILE
from opensora_repro.sampling.run import SamplingRun
from opensora_repro.sampling.source import ModelSource
from opensora_repro.storage.addresses import place, shown
from opensora_repro.training.step import ModelRunner
from opensora_repro.weights.adapters import add_adapters
from opensora_repro.weights.families import empty_model
from opensora_repro.weights.load import load_model_weights

RESULTS = "results.json"
SHOWN = 16  # samples beside their nearest training clips
OWN_CLIPS = 512  # that the model which is trained on the spot sees
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    manifest: Path
    out: Path
    clips: int
    samples: int
    levels: tuple[float, ...]
    features: str
    clip: str | None
    lpips: str | None
    training: Path | None  # manifest; None: the run's, where it is still there
    training_clips: int
    vbench: Path | None
    seed: int
    batch_size: int
    device: torch.device
    ema: bool


def evaluate(sources: Sequence[ModelSource], options: Options, say: Say) -> str:
    """Evaluate every source; return the table. Raises UserError, NotFinite."""
    engine = TorchEngine(ParallelConfig(), str(options.device))
    say = say if engine.is_main else lambda line: None
    with closing(engine), engine.watchdog.reporting(options.out / "logs"), engine.watchdog.paused():
        common = Common(options, engine, sources[0].config, say)
        entries: list[dict[str, Any]] = []
        for source, name in zip(sources, names_of([source.path for source in sources]), strict=True):
            entries.append(OfCheckpoint(source, name, common).entry())
            table: str = engine.world.on_first(lambda: write_evaluation(options.out, str(options.manifest), entries))
        return table


def names_of(paths: Sequence[Path]) -> list[str]:
    """A folder's name for each: the run's and the checkpoint's, and a number where two are alike."""
    found: list[str] = []
    for path in paths:
        parts = [path.parent.parent.name, path.name] if path.parent.name == "checkpoints" else [path.stem]
        name = safe_name("-".join(filter(None, parts)))
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        found.append(name if name not in found else next(other for other in numbered if other not in found))
    return found


class Common:
    """What all checkpoints are measured with."""

    def __init__(self, options: Options, engine: TorchEngine, first: Config, say: Say) -> None:
        """`first`: the config of the first checkpoint, which the model trained on the spot looks at clips with."""
        self.options, self.engine, self.first, self.say = options, engine, first, say
        self.hash_file = Sha256Memo()
        self.table = read_manifest(options.manifest)
        self.manifest_sha256 = self.hash_file(options.manifest)
        self.notes: list[str] = []
        self._kept: dict[str, Any] = {}
        self.features = self._open_features()

    def once(self, key: Sequence[Any], work: Callable[[], Any]) -> Any:
        """What `work` gave for the key before."""
        name = digest(list(key))
        if name not in self._kept:
            self._kept[name] = work()
        return self._kept[name]

    def held_out(self, cfg: Config) -> Clips:
        def find() -> Clips:
            clips = Clips(self.table, cfg, self.options.clips, what=f"--manifest {self.options.manifest}")
            self.notes += clips.drop_bad(self.engine, cfg.data.max_bad_fraction)
            return clips

        found: Clips = self.once(["held out", *data_key(cfg)], find)
        return found

    def training(self, cfg: Config) -> Clips | None:
        """Clips that the run was trained on; None where their manifest is unknown or gone."""
        path = self.options.training or place(cfg.data.manifest)
        if not is_file(path):
            if self.options.training is not None:
                raise ConfigError(f"--train {path}: no such manifest")
            return None
        what = f"training clips of {shown(str(path))}"
        find = lambda: Clips(once_each(read_manifest(path)), cfg, self.options.training_clips, what=what)  # noqa: E731
        found: Clips = self.once(["training", str(path), *data_key(cfg)], find)
        return found

    def _open_features(self) -> FeatureModel:
        options = self.options
        if options.features != OWN:
            return open_features(options.features, options.device)
        file = options.out / "features" / "own.safetensors"
        self.engine.world.on_first(lambda: self._make_own(file))
        return OwnFeatures(file, options.device)

    def _make_own(self, file: Path) -> None:
        """Trained once for a folder: all that is measured in it compares."""
        if file.exists():
            return
        clips = self.training(self.first)
        if clips is None:
            clips = self.held_out(self.first)
            self.say("no training clips were found (--train MANIFEST): held-out ones are taken, which seem nearer then")
        self.say(f"training a feature model on {min(OWN_CLIPS, len(clips))} clips: {file}")
        make_own(file, clips, OWN_CLIPS, seed=self.options.seed)

    @cached_property
    def clip(self) -> ClipFeatures:
        assert self.options.clip is not None
        return ClipFeatures(self.options.clip, self.options.device, key="--clip")

    @cached_property
    def lpips(self) -> Any:
        path = self.options.lpips
        return None if path is None else load_lpips(path).to(self.options.device)

    def features_of(self, videos: list[np.ndarray]) -> list[Tensor]:
        return list(all_features(self.features, videos, self.options.batch_size))

    def of_clips(self, clips: Clips) -> tuple[list[int], Tensor]:
        """Numbers of the clips that can be read, and their features [N, F, D]."""
        good, features, _ = self._seen(clips)
        return good, features

    def thumbnails(self, clips: Clips) -> Tensor:
        """[N, D] of the same clips."""
        return self._seen(clips)[2]

    def _seen(self, clips: Clips) -> tuple[list[int], Tensor, Tensor]:
        def look(videos: list[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
            return list(zip(self.features_of(videos), map(memorised.thumbnail, videos), strict=True))

        def find() -> tuple[list[int], Tensor, Tensor]:
            found = shared(self.engine, range(len(clips)), lambda part: clips.map_videos(part, look))
            good = [number for number, of in enumerate(found) if of is not None]
            if not good:
                raise DataError(f"{clips.what}: none of {len(found)} clips can be read")
            features, thumbnails = zip(*(of for of in found if of is not None), strict=True)
            return good, torch.stack(features), torch.stack(thumbnails)

        result: tuple[list[int], Tensor, Tensor] = self.once(["seen", clips.what, clips.ids, self._size(clips)], find)
        return result

    def _size(self, clips: Clips) -> list[Any]:
        return [clips.data.num_frames, clips.data.height, clips.data.width]


def data_key(cfg: Config) -> list[Any]:
    data = cfg.data
    size = [data.num_frames, data.height, data.width]
    return [*size, data.frame_interval, data.fps, data.frame_sampling]


@dataclass(frozen=True)
class Known:
    """Training clips that samples are compared with; `features` [M, F, D], `thumbnails` [M, D]: of the `good` ones."""

    clips: Clips
    good: list[int]
    features: Tensor
    thumbnails: Tensor


class OfCheckpoint:
    """One checkpoint's steps."""

    def __init__(self, source: ModelSource, name: str, common: Common) -> None:
        if source.model.conditioning != "t5":
            raise ConfigError(f"{source.path}: it is conditioned on a class, and held-out clips have captions")
        self.source, self.name, self.common = source, name, common
        self.options, self.engine, self.folder = common.options, common.engine, common.options.out / name
        self.cfg = replace(source.config, model=source.model)  # type: ignore[arg-type]
        self.held = common.held_out(self.cfg)
        captions = self.held.captions
        prompts = [captions[i % len(captions)] for i in range(self.options.samples)]
        self.sampling = self._sampling(prompts, "samples", common.manifest_sha256)
        self.notes: list[str] = []

    def entry(self) -> dict[str, Any]:
        """The checkpoint's part of evaluation.json."""
        steps: dict[str, Callable[[], dict[str, Any]]] = {"losses": self.losses, "autoencoder": self.autoencoder}
        if self.options.samples:
            steps |= {"pixels": self.pixels, "distances": self.distances}
            steps |= {"clip": self.clip} if self.options.clip else {}
            steps |= {"copies": self.copies}
        steps |= {"vbench": self.vbench_videos} if self.options.vbench else {}
        metrics: dict[str, Any] = {}
        if self.options.samples:
            self._sample(self.sampling)
        for step, work in steps.items():
            metrics |= self._done(step, work)
        found = self.engine.world.on_first(lambda: vbench.read_results(self.folder / vbench.FOLDER))
        notes = [*self.common.notes, *self.notes]
        return {
            "path": str(self.source.path),
            "name": self.name,
            "step": step_of(self.source.path),
            "metrics": metrics | found,
            "clips": len(self.held),
            "samples": self.options.samples,
            "notes": notes,
        }

    def _done(self, step: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The step's metrics, as recorded where nothing that decides them has changed. Collective."""
        of = digest([step, self._decides()])
        file = self.folder / RESULTS
        recorded = self.engine.world.on_first(lambda: read_json(file))
        if recorded.get(step, {}).get("of") == of:
            self.notes += recorded[step]["notes"]
            found: dict[str, Any] = recorded[step]["metrics"]
            return found
        self.common.say(f"{self.name}: {step}")
        before = len(self.notes)
        found = work()
        recorded[step] = {"of": of, "metrics": found, "notes": self.notes[before:]}
        self.engine.world.on_first(lambda: write_text(file, json.dumps(recorded, indent=1) + "\n"))
        return found

    def _decides(self) -> list[Any]:
        options = self.options
        training = options.training or place(self.cfg.data.manifest)
        told = [options.clips, options.samples, list(options.levels), options.lpips, options.training_clips]
        told += [self.common.features.fingerprint, self.common.clip.fingerprint if options.clip else ""]
        told += [self.common.hash_file(file) for file in (training, options.vbench) if file and is_file(file)]
        settings = {key: value for key, value in self.sampling.settings().items() if key != "checkpoint"}
        return [settings, self.common.manifest_sha256, *told, *data_key(self.cfg)]

    # Losses

    def losses(self) -> dict[str, Any]:
        device, engine, cfg = self.engine.device, self.engine, self.cfg
        choose("eager" if cfg.train.kernels == "eager" else "auto", device.type)
        model = empty_model(self.source.model)
        load_model_weights(model, self.source.weights)
        add_adapters(model, self.source.adapters)
        model = model.eval().to(device)
        encoder = open_encoder(replace(cfg, text=replace(cfg.text, shard=False)), device)
        own = range(len(self.held))[engine.mesh.data_rank :: engine.mesh.data_size]
        cfg = replace(cfg, train=replace(cfg.train, batch_size=self.options.batch_size))
        clips = self.held.good(own)
        measured = HeldOutLosses(cfg, encoder, build_objective(cfg.diffusion), engine, clips, self.options.levels)
        found = measured.measure(ModelRunner(model, cfg.train.dtype, device))
        if "caption_gap" not in found:
            self.notes.append("caption_gap: all held-out clips have the same caption")
        return as_json({**found})

    # Samples

    def _sampling(self, prompts: list[str], kind: str, of: Any, *, other_noise: bool = False) -> SamplingRun:
        """Samples of other settings, or of another file of prompts, lie in another folder."""
        options = self.options
        run = SamplingRun(
            self.source, prompts, self.folder, seed=options.seed + other_noise, batch_size=options.batch_size,
            ema=options.ema,
        )  # fmt: skip
        settings = {key: value for key, value in run.settings().items() if key != "checkpoint"}
        return replace(run, out=self.folder / f"{kind}-{digest([settings, of], size=4)}")

    def _sample(self, run: SamplingRun) -> None:
        check = run.check(self.engine.device, alone=False)
        self.notes += check.warnings
        if any(self.engine.world.gather(bool(check.todo))):  # all have looked before the first one writes
            self.common.say(f"{self.name}: {len(check.todo)} samples to {run.out}")
            run.sample_with(check.folder, self.engine)

    def videos(self, numbers: Sequence[int], run: SamplingRun | None = None) -> list[np.ndarray]:
        """Samples (of `run`, by default the ones that all is measured on) as they were written, uint8 [T, H, W, 3]."""
        out = (run or self.sampling).out
        ending = "png" if self.cfg.data.num_frames == 1 else "mp4"
        found = []
        for number in numbers:
            file = out / f"{number:04d}.{ending}"
            found.append(np.asarray(read_frames(file, start=0, count=probe(file).num_frames)))
        return found

    @cached_property
    def sample_features(self) -> Tensor:
        numbers = range(self.options.samples)
        return torch.stack(shared(self.engine, numbers, lambda part: self.common.features_of(self.videos(part))))

    def pixels(self) -> dict[str, Any]:
        samples = shared(self.engine, range(self.options.samples), lambda part: [look_at(v) for v in self.videos(part)])
        look = lambda part: [look_at(as_video(clip)) for clip in self.held.good(part)]  # noqa: E731
        real = self.common.once(
            ["looks", self.held.ids, *data_key(self.cfg)], lambda: shared(self.engine, range(len(self.held)), look)
        )
        return as_json(of_looks(samples, real))

    def distances(self) -> dict[str, Any]:
        _, real = self.common.of_clips(self.held)
        found = of_features(self.sample_features, real)
        samples, clips, channels = len(self.sample_features), len(real), real.shape[-1]
        self.notes.append(
            f"frechet and kernel: {samples} samples against {clips} held-out clips, {channels} features of "
            f"{self.common.features.name}; frechet is biased upwards by few samples, so compare equal numbers alone; "
            "kernel is not biased"
        )
        training = self.common.training(self.cfg)
        if training is not None:
            _, known = self.common.of_clips(training)
            floor = of_features(known[:samples], real)
            found |= {f"{name}_floor": value for name, value in floor.items()}
            self.notes.append(
                f"frechet_floor, kernel_floor: of {min(samples, len(known))} training clips in place of the samples: "
                "what a perfect model would have"
            )
        return as_json(found)

    def clip(self) -> dict[str, Any]:
        model, prompts = self.common.clip, list(self.sampling.prompts)
        frames = shared(self.engine, range(len(prompts)), lambda part: list(model.features(self.videos(part))))
        found = of_clip(torch.stack(frames), clip_vectors(model, prompts), prompts)
        self.notes.append(f"text_match: among {len(set(prompts))} captions, {1 / len(set(prompts)):.2g} by chance")
        return as_json(found)

    def copies(self) -> dict[str, Any]:
        training = self.common.training(self.cfg)
        if training is None:
            self.notes.append("memorised: no training clips to compare with (give --train MANIFEST)")
            return {}
        good, known = self.common.of_clips(training)
        nearest = partial(self._nearest, known=Known(training, good, known, self.common.thumbnails(training)))
        look = lambda part: self.common.features_of(self._again(self.held, part))  # noqa: E731
        real = torch.stack(shared(self.engine, range(len(self.held)), look))
        held = nearest(real, lambda part: self._again(self.held, part))
        of_samples = nearest(self.sample_features, self.videos)
        clips = [number % len(self.held) for number in range(self.options.samples)]
        flags = memorised.are_near(of_samples, held, clips)
        again = self._near_again(memorised.suspects(of_samples, flags, clips), held, nearest)
        flags = [flag and again.get(clip) == memorised.AGAIN for flag, clip in zip(flags, clips, strict=True)]
        lines = memorised.as_lines(of_samples, clips, again, flags, self.sampling.prompts, training.ids)
        self.engine.world.on_first(lambda: self._write_nearest(lines, training))
        self._note_copies(held, len(good), again)
        return as_json({"memorised": share_of(flags)})

    def _near_again(
        self, clips: Sequence[int], held: memorised.Nearest, nearest: Callable[..., memorised.Nearest]
    ) -> dict[int, int]:
        """Of held-out clips' captions: how many more samples are near a training clip, with other noise."""
        if not clips:
            return {}
        of = [clip for clip in clips for _ in range(memorised.AGAIN)]
        run = self._sampling([self.held.captions[clip] for clip in of], "again", clips, other_noise=True)
        self._sample(run)
        load = partial(self.videos, run=run)
        features = torch.stack(shared(self.engine, range(len(of)), lambda part: self.common.features_of(load(part))))
        flags = memorised.are_near(nearest(features, load), held, of)
        return {clip: sum(flag for flag, other in zip(flags, of, strict=True) if other == clip) for clip in clips}

    def _note_copies(self, held: memorised.Nearest, known: int, again: dict[int, int]) -> None:
        self.notes.append(
            f"memorised: share of samples near one of {known} training clips, at {memorised.AGAIN} other noises, too: "
            "nearer, as the autoencoder gives clips back, than nine of ten held-out clips and the caption's own, and "
            "than two thirds of the distance to the next clip; "
            f"{len(again)} captions were sampled again; nearest.png shows the nearest"
        )
        trained = [name for name, pixels in zip(self.held.ids, held.pixels, strict=True) if not pixels]
        if trained:
            self.notes.append(
                f"memorised: {len(trained)} of {len(self.held)} held-out clips are training clips, such as "
                f"{trained[0]!r}: of their captions no copies can be told"
            )

    def _again(self, clips: Clips, numbers: Sequence[int]) -> list[np.ndarray]:
        """Clips as the run's autoencoder gives them back."""
        vae = open_encoder(self.cfg, self.engine.device).vae
        return [given_back(vae, clip, self.engine.device) for clip in clips.good(numbers)]

    def _nearest(
        self, features: Tensor, load: Callable[[Sequence[int]], list[np.ndarray]], *, known: Known
    ) -> memorised.Nearest:
        """`features` [N, F, D] of what `load` loads: the nearest by features or by thumbnails, as pixels have it."""
        by_features = memorised.nearest(features.mean(dim=1), known.features.mean(dim=1))
        scale = memorised.scale_of(known.features.mean(dim=1))
        again = lru_cache(maxsize=64)(lambda other: self._again(known.clips, [known.good[other]])[0])

        def apart(part: Sequence[int]) -> Iterator[tuple[int, float, float, float]]:
            for number, video in zip(part, load(part), strict=True):
                looks = memorised.thumbnail(video)
                others = {by_features[number], int((known.thumbnails - looks).square().mean(dim=1).argmin())}
                pixels, first = min((memorised.rms(video, again(other)), other) for other in others)
                second = memorised.one_apart(looks, known.thumbnails, first)
                length = ((features[number] - self.common.features_of([again(first)])[0]).mean(dim=0) / scale).norm()
                next_one = math.inf if second is None else memorised.rms(video, again(second))
                yield known.good[first], float(length), pixels, next_one

        found = zip(*shared(self.engine, range(len(features)), apart), strict=True)
        return memorised.Nearest(*map(list, found))

    def _write_nearest(self, lines: list[dict[str, Any]], training: Clips) -> None:
        shown = lines[:SHOWN]
        clips = training.good([training.ids.index(line["training_clip"]) for line in shown])
        pairs = list(zip(self.videos([line["sample"] for line in shown]), map(as_video, clips), strict=True))
        write_png(self.folder / "nearest.png", memorised.side_by_side(pairs))
        write_text(self.folder / "nearest.json", json.dumps(lines, indent=1, ensure_ascii=False) + "\n")

    # What else

    def autoencoder(self) -> dict[str, Any]:
        vae = open_encoder(self.cfg, self.engine.device).vae
        key = ["autoencoder", vae.fingerprint(self.common.hash_file), self.held.ids, *data_key(self.cfg)]
        found: dict[str, Any] = self.common.once(key, lambda: as_json(reconstruction(vae, self.held, self.common)))
        return found

    def vbench_videos(self) -> dict[str, Any]:
        assert self.options.vbench is not None
        if self.cfg.data.num_frames == 1:
            raise ConfigError(f"--vbench: {self.source.path} makes pictures, VBench looks at videos")
        prompts = vbench.read_prompts(self.options.vbench)
        run = self._sampling(vbench.repeated(prompts), "vbench", self.common.hash_file(self.options.vbench))
        self._sample(run)
        self.engine.world.on_first(lambda: vbench.lay_out(run.out, self.folder / vbench.FOLDER, prompts))
        return {}


def step_of(path: Path) -> int | None:
    """The step of one of our checkpoints."""
    step: int | None = read_json(path / STATE_FILE).get("step")
    return step
