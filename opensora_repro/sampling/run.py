"""A sampling run: what a process checks before it reads any weights, and its share of the prompts, as files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opensora_repro.config import Config, ConfigError, ParallelConfig
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.write import write_sample
from opensora_repro.diffusion.gaussian import NUM_TRAIN_STEPS
from opensora_repro.diffusion.samplers import FLOW_SAMPLERS
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.pretrained import frozen_dtype
from opensora_repro.frozen.text import ClassLabels, ConditionEncoder, T5Text, open_conditions, take_null_caption
from opensora_repro.frozen.vae import open_vae
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.build import build_shards, check_shards
from opensora_repro.parallel.device import choose_device, default_kind
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.mesh import Mesh, launched_as
from opensora_repro.process import keep_freed_memory, limit_threads
from opensora_repro.sampling.conditions import with_scores
from opensora_repro.sampling.generate import ProgressBar, check_fit, generate
from opensora_repro.sampling.sample_folder import SampleFolder
from opensora_repro.sampling.source import ModelSource, check_memory, weights_sha256
from opensora_repro.weights.adapters import add_adapters, check_adapters
from opensora_repro.weights.families import Network, empty_model
from opensora_repro.weights.load import LoadReport, check_complete, load_model_weights

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.diffusion.samplers import Watch
    from opensora_repro.parallel.shards import Shards
    from opensora_repro.sampling.chain import Chain
    from opensora_repro.sampling.expand import Expander
    from opensora_repro.sampling.generate import Progress
    from opensora_repro.sampling.given import Given
    from opensora_repro.sampling.speedups import Speedups

CUT_SHOWN = 10  # prompts whose unread words are told


def with_options(cfg: Config, **options: Any) -> Config:
    """The config with the options that were given; None: as it is. Raises ConfigError.

    `options`: num_frames, height, width, sampler, steps, guidance, fps, vae, vae_tile, text, shard_text and dtype.
    """
    flow, sampler, shard = cfg.diffusion.objective == "flow", options.get("sampler"), options.get("shard_text")
    if sampler is not None and (sampler in FLOW_SAMPLERS) != flow:
        fitting = "euler, ab2 or heun" if flow else "iddpm, ddim or dpm"
        raise ConfigError(f"--sampler {sampler}: this {cfg.diffusion.objective} model needs {fitting}")

    def given(section: Any, *names: str, **more: Any) -> Any:
        found = {name: options.get(name) for name in names} | more
        return replace(section, **{key: value for key, value in found.items() if value is not None})

    if flow and sampler is None and cfg.sample.sampler not in FLOW_SAMPLERS:
        sampler = "euler"
    cfg = replace(
        cfg,
        data=given(cfg.data, "num_frames", "height", "width"),
        sample=given(cfg.sample, "steps", "guidance", "fps", sampler=sampler),
        vae=given(cfg.vae, path=options.get("vae"), tile_size=options.get("vae_tile")),
        text=given(cfg.text, path=options.get("text"), shard=shard, offload=False if shard else None),
        train=given(cfg.train, "dtype"),
    )
    if cfg.sample.sampler in ("iddpm", "ddim") and cfg.sample.steps > NUM_TRAIN_STEPS:
        raise ConfigError(f"--steps {cfg.sample.steps}: this model was trained with {NUM_TRAIN_STEPS}")
    return cfg


def check_prompts_fit(source: ModelSource, prompts: list[str], *, labels: bool) -> None:
    """Raise ConfigError for class numbers where text is wanted, and the other way round."""
    if source.model.conditioning == "class":
        try:
            ClassLabels(source.model.num_classes).encode(prompts)
        except ValueError as error:
            raise ConfigError(f"{source.path} is conditioned on a class: {error}") from None
    elif labels:
        raise ConfigError(f"--label: {source.path} is conditioned on text, give --prompt")


@dataclass(frozen=True)
class SamplingRun:
    """`prompts` sampled from `source`, whose config has the size and the sampler, into `out`."""

    source: ModelSource
    prompts: Sequence[str]
    out: Path
    seed: int = 0
    batch_size: int = 8
    sp_size: int = 1  # processes that share a sample's frames
    device: str | None = None
    ema: bool = True  # which weights the source has
    gif: bool = False
    overwrite: bool = False
    scores: Mapping[str, Any] = field(default_factory=dict)  # aesthetic, motion, camera: what prompts are told of them
    given: Given | None = None  # frames
    chain: Chain | None = None  # of several clips
    negative: str = ""  # a text that guidance leads away from, in place of the null caption
    expander: Expander | None = None  # rewrites prompts before they are read,
    expanded: Mapping[str, str] | None = None  # but for those that it has rewritten already
    speedups: Speedups | None = None
    # What stands between for one who keeps models, and looks on: in place of `load_models` and of a bar, and beside it
    load: Callable[..., tuple[Network, Autoencoder, ConditionEncoder, LoadReport]] | None = None
    progress: Progress | None = None
    watch: Watch | None = None

    @cached_property
    def texts(self) -> list[str]:
        """What the model reads: the prompts, rewritten, and the words of their scores; of scripts text by text."""

        def read(text: str) -> str:
            return with_scores((self.expanded or {}).get(text, text), **self.scores)

        if self.chain is not None:
            from opensora_repro.sampling.chain import with_texts

            return [with_texts(prompt, read) for prompt in self.prompts]
        return list(map(read, self.prompts)) if self.scores or self.expanded else list(self.prompts)

    @property
    def read(self) -> list[str]:
        """All texts that the model ever reads."""
        return self._each(self.texts)

    def _each(self, prompts: Sequence[str]) -> list[str]:
        if self.chain is None:
            return list(prompts)
        from opensora_repro.sampling.chain import texts_of

        return [text for prompt in prompts for text in texts_of(prompt)]

    @property
    def unexpanded(self) -> list[str]:
        """Texts that are still to be rewritten."""
        known = self.expanded or {}
        return [] if self.expander is None else [text for text in self._each(self.prompts) if text not in known]

    def _folder(self) -> SampleFolder:
        return SampleFolder(self.out, self.settings(), self.texts, gif=self.gif, expanded=self.expanded)

    def settings(self) -> dict[str, Any]:
        """What decides the samples besides the prompts."""
        cfg, model = self.source.config, self.source.model
        return {
            "checkpoint": str(self.source.path),
            "weights": "ema" if self.ema else "model",
            "weights_sha256": weights_sha256(self.source),
            **({"lora": [adapter.digest for adapter in self.source.adapters]} if self.source.adapters else {}),
            "seed": self.seed,
            "num_frames": cfg.data.num_frames,
            "height": cfg.data.height,
            "width": cfg.data.width,
            "fps": sample_fps(cfg),
            "sampler": cfg.sample.sampler,
            "steps": cfg.sample.steps,
            "guidance": cfg.sample.guidance,
            "vae": cfg.vae.path,
            **({"vae_tile": cfg.vae.tile_size} if cfg.vae.tile_size else {}),
            "text": "class numbers" if model.conditioning == "class" else cfg.text.path,
            "dtype": cfg.train.dtype,
            "model": asdict(model),
            "diffusion": asdict(cfg.diffusion),
            **self.scores,
            **({"negative": self.negative} if self.negative else {}),
            **({"given": self.given.settings()} if self.given is not None else {}),
            **({"long": self.chain.settings()} if self.chain is not None else {}),
            **(self.speedups.settings() if self.speedups is not None else {}),
        }

    def check(self, device: torch.device, *, alone: bool) -> Check:
        """Look at all that can be seen without reading weights. Raises what is a user's mistake.

        `alone`: whether this process speaks for all that --sp-size asks for, as in a dry run without torchrun.
        """
        world_size = self.sp_size if alone else launched_as()[1]
        Mesh(launched_as()[0], world_size, sp_size=self.sp_size)
        source = self.source
        self._check_negative()
        check_complete(source.weights, source.model)
        check_adapters(source.adapters, source.model)
        if self.speedups is not None:
            self.speedups.check(source.config, source.model, sp_size=self.sp_size)
        vae, conditions = open_frozen(source, device)
        if source.config.text.shard:
            if not isinstance(conditions, T5Text):
                raise ConfigError(f"--shard-text: {source.path} has no T5 that could be spread")
            check_shards()
        folder = self._folder()
        todo = self.todo(folder)
        memory = ""
        if todo:
            size = min(self.batch_size, len(todo))
            memory = check_memory(
                source, vae, conditions, device, batch_size=size, sp_size=self.sp_size, world_size=world_size,
                kept=self._kept(size),
            )  # fmt: skip
        warnings = [*unread_words(conditions, self.read)]
        warnings += unread_words(conditions, [self.negative], "--negative") if self.negative else []
        if self.given is not None or self.chain is not None:
            if source.model.conditioning != "t5":
                raise ConfigError(f"{source.path}: DiT and Latte take no given frames")
            warnings += [] if source.trained_with_masks else ["this model was not trained with frame masks"]
        return Check(folder, todo, memory, tuple(warnings))

    def _check_negative(self) -> None:
        if self.negative and self.source.model.conditioning == "class":
            raise ConfigError(f"--negative: {self.source.path} is conditioned on a class, it reads no text")
        if self.negative and self.source.config.sample.guidance == 1:
            raise ConfigError("--negative: a guidance of 1 leads away from nothing, give more (--guidance 7)")

    def _kept(self, batch_size: int) -> float:
        """Bytes of caches."""
        if self.speedups is None:
            return 0.0
        source = self.source
        return self.speedups.memory(source.config, source.model, batch_size=batch_size, sp_size=self.sp_size)

    def todo(self, folder: SampleFolder) -> list[int]:
        """Numbers of the prompts to sample. Raises ConfigError where samples of others are in the way."""
        finished = set() if self.overwrite else set(folder.finished())
        return [i for i in range(len(self.prompts)) if i not in finished]

    def plan(self, check: Check) -> dict[str, Any]:
        """What a dry run shows."""
        parameters = sum(p.numel() for p in empty_model(self.source.model).parameters())
        settings = {key: value for key, value in check.folder.settings.items() if not isinstance(value, dict)}
        return settings | {
            "parameters": f"{parameters:,}",
            "prompts": len(self.prompts),
            "to do": len(check.todo),
            "batch_size": self.batch_size,
            "memory": check.memory or "none",
            "out": self.out,
        }

    def sample(self, folder: SampleFolder, device: torch.device) -> str:
        """Sample with all processes what is to do; what the first process has to say of it. Raises NotFinite."""
        limit_threads()
        if device.type == "cpu":
            keep_freed_memory()
        engine = TorchEngine(ParallelConfig(sp_size=self.sp_size), str(device))
        with closing(engine), engine.watchdog.reporting(self.out / "logs"):
            if self.unexpanded:
                run = self._expand(engine)
                return run.sample_with(run._folder(), engine)
            return self.sample_with(folder, engine)

    def sample_with(self, folder: SampleFolder, engine: TorchEngine) -> str:
        """As `sample`, with processes that have come together before."""
        todo = engine.world.on_first(lambda: self._begin(folder))
        written = self._sample_share(folder, todo, engine)
        everyone = [index for part in engine.world.gather(written) for index in part]
        there = len(self.prompts) - len(todo)
        if engine.is_main:
            folder.write(set(range(len(self.prompts))) - set(todo) | set(everyone))
        more = f", {there} were there already" if there else ""
        return f"{len(everyone)} written to {self.out}{more} (samples.json has the prompts)"

    def _expand(self, engine: TorchEngine) -> SamplingRun:
        """The run once the first process has had all prompts rewritten."""
        from opensora_repro.sampling.expand import remember

        assert self.expander is not None
        expander = replace(self.expander, device=str(engine.device))
        work = partial(expander, self.unexpanded, partial(remember, self.out))
        run = replace(self, expanded={**(self.expanded or {}), **engine.world.on_first(work)})
        if engine.is_main:
            for line in unread_words(open_frozen(self.source, engine.device)[1], run.read):
                print(f"warning: {line}", file=sys.stderr)
        return run

    def _begin(self, folder: SampleFolder) -> list[int]:
        """Numbers of the prompts to sample, once the folder says whose samples it is for."""
        todo = self.todo(folder)
        if self.overwrite:
            folder.clear()
        folder.write(set(range(len(self.prompts))) - set(todo))
        return todo

    def _sample_share(self, folder: SampleFolder, todo: list[int], engine: TorchEngine) -> list[int]:
        """Sample this process's share of the prompts; return the numbers of what it wrote.

        A lone process keeps the folder's record up to date meanwhile.
        """
        cfg, device, mesh = self.source.config, engine.device, engine.mesh
        # What a run was trained with on a GPU need not run on the device that samples it.
        choose("eager" if cfg.train.kernels == "eager" else "auto", device.type)
        shards = build_shards(engine) if cfg.text.shard else None
        model, vae, conditions, report = (self.load or load_models)(self.source, device, shards)
        if engine.is_main:
            print(report)
            for adapter in self.source.adapters:
                print(adapter)
        before = set(range(len(self.prompts))) - set(todo)
        written: list[int] = []
        with (
            closing(ProgressBar("sampling", shown=engine.is_main and self.progress is None)) as bar,
            torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"),
        ):
            for index, video in self._videos(model, vae, conditions, self.progress or bar, todo, engine):
                if mesh.member:
                    continue  # the group's first process writes
                if video is not None:  # a long one is written as it goes
                    for name in reversed(folder.files(index)):  # its own file last: once that is there, all are
                        write_sample(self.out / name, video, folder.settings["fps"])
                written.append(index)
                if mesh.world_size == 1:
                    folder.write(before | set(written))
        if isinstance(conditions, T5Text):
            conditions.join()
        return written

    def _videos(
        self, model: Network, vae: Autoencoder, conditions: ConditionEncoder, progress: Progress, todo: Sequence[int],
        engine: TorchEngine,
    ) -> Iterator[tuple[int, np.ndarray | None]]:  # fmt: skip
        """This process's share of the samples: number and frames, or None for what is written already."""
        cfg, mesh = self.source.config, engine.mesh
        share = (mesh.data_rank, mesh.data_size)
        calls = partial(
            generate, model, vae, conditions, cfg, seed=self.seed, forward=engine.spread(model),
            negative=self.negative, speedups=self.speedups, watch=self.watch,
        )  # fmt: skip
        if self.given is not None or self.chain is not None:
            from opensora_repro.sampling.chain import given_videos

            yield from given_videos(
                calls, vae, cfg, self.texts, given=self.given, chain=self.chain, out=self.out, progress=progress,
                batch_size=self.batch_size, todo=todo, share=share, writes=not mesh.member,
            )  # fmt: skip
            return
        yield from calls(self.texts, batch_size=self.batch_size, progress=progress, share=share, only=todo)


@dataclass(frozen=True)
class Check:
    """What a run found before it read any weights."""

    folder: SampleFolder
    todo: list[int]  # numbers of the prompts to sample
    memory: str  # what a process needs, in words; empty where nothing is to do
    warnings: tuple[str, ...]


def unread_words(conditions: ConditionEncoder, prompts: Sequence[str], name: str = "") -> Iterator[str]:
    """What of the prompts the model does not read."""
    if isinstance(conditions, ClassLabels):
        return
    readings = conditions.read(prompts)
    cut = [(number, reading.dropped) for number, reading in enumerate(readings) if reading.dropped]
    for number, dropped in cut[:CUT_SHOWN]:
        shown = dropped if len(dropped) <= 200 else f"{dropped[:200]}..."
        where = name or f"prompt {number}"
        yield f"{where} is longer than the model's {conditions.max_length} tokens, it does not read {shown!r}"
    if len(cut) > CUT_SHOWN:
        yield f"{len(cut) - CUT_SHOWN} more prompts are cut like this"
    unknown = sum(reading.unknown for reading in readings)
    if unknown:
        share = unknown / sum(reading.words for reading in readings)
        whose = f"{name}'s" if name else "the prompts'"
        yield f"{share:.0%} of {whose} words are unknown to this tokenizer"


def pick_device(name: str | None, world_size: int, local_rank: int) -> torch.device:
    """The device that this process samples on, and that it is CUDA's from here on. Raises ConfigError, EngineError."""
    if world_size > 1 and name not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {name}: several processes take cpu or cuda, each its own GPU")
    try:
        kind = torch.device(name or default_kind())
        if kind.type == "cuda" and default_kind() != "cuda":
            raise RuntimeError("no usable GPU was found")
        device = choose_device(str(kind), local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from None
    return device


def open_frozen(
    source: ModelSource, device: torch.device, shards: Shards | None = None
) -> tuple[Autoencoder, ConditionEncoder]:
    """The autoencoder, and what makes a condition of prompts: T5, CLIP, or class numbers; their weights are not read.

    Raises ModelNotFound, and ConfigError where they or the samples' size do not fit the model.
    """
    cfg = source.config
    dtype = frozen_dtype(cfg, device)
    vae = open_vae(cfg.vae, device, dtype)
    conditions = open_conditions(cfg.text, source.model, device, dtype, shards)
    check_fit(cfg, vae, conditions, source.model)
    return vae, conditions


def load_models(
    source: ModelSource, device: torch.device, shards: Shards | None = None
) -> tuple[Network, Autoencoder, ConditionEncoder, LoadReport]:
    """The model in float32, and what `open_frozen` gives, all weights read.

    `shards`: the processes over which T5 is spread; collective then. Raises WeightsError, ModelNotFound, ConfigError.
    """
    vae, conditions = open_frozen(source, device, shards)
    model = empty_model(source.model)
    report = load_model_weights(model, source.weights)
    if source.adapters:
        add_adapters(model, source.adapters)
    model = model.eval().to(device)
    vae.frozen.load()
    if not isinstance(conditions, ClassLabels):
        conditions.frozen.load()
    if isinstance(conditions, T5Text) and report.lacks_null_caption:
        take_null_caption(model, conditions)
    return model, vae, conditions, report
