"""The training stages' command line: `python -m stages.NAME CONFIG.toml [section.key=value ...] [--dry-run]`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import time
from collections.abc import Sequence
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, ConfigError, load_config
from opensora_repro.config.prompts import check_prompts
from opensora_repro.errors import TRAIN_WITH_LESS, run_command
from opensora_repro.process import limit_threads
from opensora_repro.training.start import Stage

if TYPE_CHECKING:
    from opensora_repro.training.run import Outcome


def run_stage(stage: Stage, description: str | None, argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done or saved after SIGTERM, 130 after Ctrl-C, 2 a user's mistake, 1 a failure.

    143: SIGTERM came before there was a step to save.
    """
    arguments = _parse(stage, description, argv)
    return run_command(lambda: _run(stage, arguments), less_memory=TRAIN_WITH_LESS)


def _run(stage: Stage, arguments: argparse.Namespace) -> int:
    if arguments.gpu is not None and not arguments.dry_run:
        raise ConfigError("--gpu asks what --dry-run estimates: give both, or neither")
    cfg = load_config(arguments.config, arguments.overrides)
    _require(cfg)
    stage.check(cfg)
    _find_evaluations_models(cfg)
    return _dry_run(cfg, stage, arguments.gpu) if arguments.dry_run else _train(cfg, stage)


def _parse(stage: Stage, description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage.name}",
        description=description,
        epilog="The same command again resumes the run in run.dir; init.weights counts at its first start alone.",
    )
    parser.add_argument("config", type=expanduser, metavar="CONFIG.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the estimates, then stop")
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: also whether it fits into such a GPU, as RTX-4090"
    )
    return parser.parse_intermixed_args(argv)


def _require(cfg: Config) -> None:
    if not cfg.run.dir:
        raise ConfigError("run.dir is not set: name the folder for the run, such as run.dir=runs/NAME")
    if not cfg.data.manifest:
        raise ConfigError("data.manifest is not set: name the Parquet or CSV file of the training clips")
    if cfg.validation.every and not cfg.data.val_manifest:
        raise ConfigError("validation.every is set, but data.val_manifest is not: name the held-out clips' manifest")
    if cfg.evaluate.every and not cfg.data.val_manifest:
        raise ConfigError("evaluate.every is set, but data.val_manifest is not: name the held-out clips' manifest")
    if cfg.checkpoint.keep_best in ("psnr", "ssim"):
        raise ConfigError(
            f"checkpoint.keep_best = {cfg.checkpoint.keep_best}: stage 0 measures it, for other stages: loss"
        )
    if cfg.sample.every and not cfg.sample.prompts:
        raise ConfigError("sample.every is set, but sample.prompts is empty: give the captions to sample")
    check_prompts(cfg.sample.prompts, "sample.prompts")


def _find_evaluations_models(cfg: Config) -> None:
    """What a run needs at its first evaluation, and a dry run does not open. Raises ModelNotFound, ConfigError."""
    if not cfg.evaluate.every or not cfg.evaluate.samples:  # what they measure is sampled
        return
    if cfg.evaluate.features not in ("", "own"):
        from opensora_repro.evaluation.features import check_features

        check_features(cfg.evaluate.features, key="evaluate.features")
    if cfg.evaluate.clip:
        from opensora_repro.frozen.clip import find_clip

        find_clip(cfg.evaluate.clip, key="evaluate.clip")


def _dry_run(cfg: Config, stage: Stage, gpu: str | None) -> int:
    from opensora_repro.planning.gpus import find_gpu
    from opensora_repro.training.dry_run import dry_run

    for line in dry_run(cfg, stage, None if gpu is None else find_gpu(gpu)):
        if os.environ.get("RANK", "0") == "0":  # one process of torchrun's tells it, all look
            print(line, flush=True)
    return 0


def _train(cfg: Config, stage: Stage) -> int:
    started = time.monotonic()
    settle_process()
    from opensora_repro.training.run import train

    open_evaluation: Any = None
    if cfg.evaluate.every:
        from opensora_repro.evaluation.in_training import TrainingEvaluation

        open_evaluation = TrainingEvaluation

    outcome = train(cfg, stage, say=lambda line: print(line, flush=True), open_evaluation=open_evaluation)
    if os.environ.get("RANK", "0") == "0":
        _report(cfg, stage, outcome, time.monotonic() - started)
    if outcome.finished or (outcome.signal != signal.SIGINT and outcome.checkpoint is not None):
        return 0
    return 128 + (outcome.signal or signal.SIGTERM)


def settle_process() -> None:
    """Threads and memory as training has them."""
    from opensora_repro.parallel.device import default_kind
    from opensora_repro.process import keep_freed_memory

    limit_threads()
    if default_kind() == "cpu":
        keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn at every fork of a loader process


def _report(cfg: Config, stage: Stage, outcome: Outcome, seconds: float) -> None:
    if not outcome.finished:
        saved = f"saved: {outcome.checkpoint}" if outcome.checkpoint else "no step was trained, so none was saved"
        print(f"{stage.name}: stopped after step {outcome.step} of {cfg.train.steps}; {saved}")
        print("the same command resumes it")
        return
    print(f"{stage.name}: {outcome.step} steps done, {seconds:.0f} s in this call; weights: {outcome.checkpoint}")
    prompt = (cfg.sample.prompts or ("your text",))[0]
    run_dir, out, text = map(shlex.quote, (cfg.run.dir, f"{cfg.run.dir}/out", prompt))
    option = f"--prompt={text}" if prompt.startswith("-") else f"--prompt {text}"
    print(f"sample it: python -m stages.sample {run_dir} {option} --out {out} --seed 0")
