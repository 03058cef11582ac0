"""How a run begins: what its stage asks for, and whether it resumes its own newest checkpoint or starts anew.

The two cannot be confused: a run folder with checkpoints is always resumed, and only with the settings it began with;
`init.weights` counts at the very first step alone. Every stage's `--help` comes by here: torch is imported late.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, ConfigError, config_dict, load_recorded
from opensora_repro.run_folder import CONFIG_FILE, TrainState, newest_checkpoint

if TYPE_CHECKING:
    from opensora_repro.models.captioned import CaptionedModel
    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.weights.load import LoadReport


@dataclass(frozen=True)
class Stage:
    name: str  # the runner's module, "stage1_image"
    title: str  # a few words for people
    check: Callable[[Config], None]  # raises ConfigError
    # After the initial weights are loaded, at a run's first start alone; returns lines to print, raises on a fault.
    # Takes the model, the config, what was loaded (None: nothing) and the autoencoder's stride in pixels.
    check_start: Callable[[CaptionedModel, Config, LoadReport | None, int], Sequence[str]] = lambda *_: ()
    takes_image_models: bool = True  # whether `init.weights` may be an image model's


# What may change between a run's start and its continuation, because it changes no step already made and no later one
# by more than rounding. Samples a step are compared as a whole, so that they can be shared out anew.
FREE_SECTIONS = ("checkpoint", "validation", "evaluate", "sample", "alarms", "track", "parallel")
FREE_KEYS = (
    "run.dir",
    "data.manifest",  # these three are compared by what they hold, see identity.py
    "vae.path",
    "text.path",
    "data.val_manifest",
    "data.num_workers",
    "data.decode_timeout",
    "data.cache",
    "data.max_bad_fraction",
    "vae.micro_batch_size",
    "text.micro_batch_size",
    "text.offload",
    "text.shard",
    "optim.in_backward",
    "optim.offload",
    "train.steps",
    "train.batch_size",
    "train.accumulation",
    "train.kernels",
    "train.compile",
    "train.activation_checkpointing",
    "train.offload_activations",
    "train.overlap",
    "train.max_bad_steps",
)


@dataclass(frozen=True)
class Start:
    """The newest whole checkpoint of the run's folder and its state; None and a fresh state at a run's first start."""

    checkpoint: Path | None
    state: TrainState

    @property
    def resumes(self) -> bool:
        return self.checkpoint is not None


def find_start(cfg: Config, data_size: int, report: Callable[[str], None] = print) -> Start:
    """Look into `run.dir`. Raises ConfigError when it holds a run with other settings, CheckpointError when damaged."""
    from opensora_repro.data.buckets import global_batch_sizes

    run_dir = Path(cfg.run.dir)
    samples = global_batch_sizes(cfg, data_size)
    found = newest_checkpoint(run_dir, report)
    if found is None:
        return Start(None, TrainState(global_batch_sizes=samples))
    checkpoint, state = found
    changes = changed_settings(load_recorded(checkpoint / CONFIG_FILE), cfg)
    parts = cfg.train.accumulation * data_size
    for there, here in zip(state.global_batch_sizes, samples, strict=False):
        if there != here:
            changes.append(
                f"samples a step (train.batch_size x train.accumulation x data ranks) = {there} there, {here} here "
                f"({here // parts} x {cfg.train.accumulation} x {data_size} data ranks)"
            )
    if changes:
        shown = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {shown}. Restore them to resume it, or set another run.dir "
            f"for a new run (with init.weights={run_dir} it starts from this run's weights)"
        )
    _check_steps(cfg, load_recorded(checkpoint / CONFIG_FILE).train.steps, state.step)
    return Start(checkpoint, state)


def _check_steps(cfg: Config, recorded: int, done: int) -> None:
    """`train.steps` may change, but not undo what has been done. Raises ConfigError."""
    steps, decay, run_dir = cfg.train.steps, cfg.optim.decay_steps, cfg.run.dir
    if steps < done:
        raise ConfigError(
            f"train.steps = {steps}: {run_dir} has made {done} steps already; set train.steps={done} or more, "
            "or sample what is there"
        )
    first_decayed = max(1, recorded - decay + 1)
    if steps > recorded and decay and done >= first_decayed:
        raise ConfigError(
            f"train.steps = {steps}: the learning rate of {run_dir} has been falling since step {first_decayed}, "
            f"to end at train.steps={recorded} (optim.decay_steps = {decay}), and would jump up again; resume with "
            f"train.steps={recorded}, or set another run.dir with init.weights={run_dir} to train on from its weights"
        )


def changed_settings(recorded: Config, current: Config) -> list[str]:
    """`section.key = OLD there, NEW here` for every setting that changes the run."""
    old, new = (config_dict(cfg) for cfg in (recorded, current))
    for buckets in (old["data"]["buckets"], new["data"]["buckets"]):
        for bucket in buckets:
            del bucket["batch_size"]  # samples a step are compared as a whole
    if old["data"]["packing_tokens"] and new["data"]["packing_tokens"]:  # how long rows are changes no step
        old["data"]["packing_tokens"] = new["data"]["packing_tokens"]
    return [
        f"{section}.{key} = {_shown(old[section][key])} there, {_shown(new[section][key])} here"
        for section in new
        if section not in FREE_SECTIONS
        for key in new[section]
        if key in old[section]  # of another architecture, [model] has other keys
        and f"{section}.{key}" not in FREE_KEYS
        and old[section][key] != new[section][key]
    ]


def start_line(stage: str, engine: TorchEngine, step: int, clips: list[dict[str, Any]]) -> dict[str, Any]:
    """What RUN/starts.jsonl tells of one start: when and where, by how many processes, with which clips."""
    import torch

    from opensora_repro.parallel.device import device_kind

    return {
        "step": step,
        "time": round(time.time(), 3),
        "stage": stage,
        "device": device_kind(engine.device),
        "processes": engine.mesh.world_size,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "clips": clips,
    }


def _shown(value: Any) -> str:
    return repr(value) if value != "" else "none"
