"""Stage 0: train the autoencoder whose latents the later stages generate, and a text encoder of one's own captions."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from os.path import expanduser
from typing import TYPE_CHECKING

from opensora_repro.config import AutoencoderConfig, ConfigError, load_autoencoder_config
from opensora_repro.errors import run_command
from stages._training import settle_process

if TYPE_CHECKING:
    from opensora_repro.training.run import Outcome

LESS_MEMORY = 'Lower train.batch_size, or set train.activation_checkpointing = "full"'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.stage0_autoencoder",
        description=__doc__,
        epilog="The same command again resumes the run in run.dir. Its folders vae/ and text/ are what vae.path and "
        "text.path of the later stages take.",
    )
    parser.add_argument("config", type=expanduser, metavar="CONFIG.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, then stop")
    arguments = parser.parse_intermixed_args(argv)
    return run_command(lambda: _run(arguments), less_memory=LESS_MEMORY)


def _run(arguments: argparse.Namespace) -> int:
    cfg = load_autoencoder_config(arguments.config, arguments.overrides)
    if not cfg.run.dir:
        raise ConfigError("run.dir is not set: name the folder for the run, such as run.dir=runs/stage0")
    if not cfg.data.manifest:
        raise ConfigError("data.manifest is not set: name the Parquet or CSV file of the training clips")
    return _dry_run(cfg) if arguments.dry_run else _train(cfg)


def _dry_run(cfg: AutoencoderConfig) -> int:
    from opensora_repro.training.autoencoder.preflight import dry_run

    for line in dry_run(cfg):
        if os.environ.get("RANK", "0") == "0":
            print(line, flush=True)
    return 0


def _train(cfg: AutoencoderConfig) -> int:
    started = time.monotonic()
    settle_process()
    from opensora_repro.training.autoencoder.run import train

    outcome = train(cfg, say=lambda line: print(line, flush=True))
    if os.environ.get("RANK", "0") == "0":
        _report(cfg, outcome, time.monotonic() - started)
    if outcome.finished or (outcome.signal != signal.SIGINT and outcome.checkpoint is not None):
        return 0
    return 128 + (outcome.signal or signal.SIGTERM)


def _report(cfg: AutoencoderConfig, outcome: Outcome, seconds: float) -> None:
    if not outcome.finished:
        saved = f"saved: {outcome.checkpoint}" if outcome.checkpoint else "no step was trained, so none was saved"
        print(f"stage0_autoencoder: stopped after step {outcome.step} of {cfg.train.steps}; {saved}")
        print("the same command resumes it")
        return
    run_dir = shlex.quote(cfg.run.dir)
    print(f"stage0_autoencoder: {outcome.step} steps done, {seconds:.0f} s in this call; look at {run_dir}/report.html")
    text = f" text.path={run_dir}/text model.caption_channels={cfg.text.hidden_size}" if cfg.text.vocab_size else ""
    print(f"the later stages take it: vae.path={run_dir}/vae model.in_channels={cfg.model.latent_channels}{text}")


if __name__ == "__main__":
    sys.exit(main())
