"""What a run tells elsewhere, where `[track]` names a place; wandb is loaded by nothing else."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_repro.config import AutoencoderConfig, Config, ConfigError, config_dict
from opensora_repro.files import one_line

LONGEST_NAME, NOT_IN_NAMES = 128, "/\\#?%:"  # of projects, as wandb has it
OTHERWISE = "WANDB_MODE=offline keeps it in run.dir, an empty track.wandb leaves it out"


def check_track(cfg: Config | AutoencoderConfig) -> None:
    """Raise ConfigError where what `[track]` asks for is not installed, may not send, or has a name of no project."""
    if len(cfg.track.wandb) > LONGEST_NAME or set(cfg.track.wandb) & set(NOT_IN_NAMES):
        raise ConfigError(
            f"track.wandb = {cfg.track.wandb}: expected a project's name, at most {LONGEST_NAME} characters without "
            f"any of {' '.join(NOT_IN_NAMES)}; WANDB_ENTITY names whose it is"
        )
    if cfg.track.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"track.wandb = {cfg.track.wandb}: wandb is not installed; pip install 'opensora-repro[track]', "
            "or leave the key empty"
        )
    if cfg.track.wandb and os.environ.get("RANK", "0") == "0" and not _may_send():  # one process sends
        raise ConfigError(f"track.wandb = {cfg.track.wandb}: wandb has no key here: run `wandb login`; {OTHERWISE}")


def _may_send() -> bool:
    """Whether wandb finds a key where it looks for one (environment, netrc, its settings), or is told to send nothing.

    Whether the key is right shows at the start: that takes its server.
    """
    import requests
    import wandb

    settings = wandb.setup().settings
    if settings.mode != "online" or settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return requests.utils.get_netrc_auth(settings.base_url) is not None


class Track:
    """A run at Weights & Biases; one that resumes goes on with its own. What fails there ends no training."""

    def __init__(self, cfg: Config | AutoencoderConfig, say: Callable[[str], None] = print) -> None:
        """Raises ConfigError where there is no access: WANDB_MODE=offline asks for none, and sends nothing."""
        import wandb

        self._wandb, self._say = wandb, say
        run_dir = Path(cfg.run.dir).resolve()
        try:
            self._run: Any = wandb.init(
                project=cfg.track.wandb,
                dir=str(run_dir),
                id=hashlib.sha256(str(run_dir).encode()).hexdigest()[:16],
                name=run_dir.name,
                config=config_dict(cfg),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"track.wandb = {cfg.track.wandb}: {' '.join(str(error).split())}; {OTHERWISE}") from None
        # Steps as a value: a resumed run makes some again, which wandb's own counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def add(self, values: Mapping[str, Any], step: int) -> None:
        self._log({name: value for name, value in values.items() if value is not None}, step)

    def add_image(self, name: str, picture: Any, step: int) -> None:
        self._log({name: self._wandb.Image(picture)}, step)

    def add_videos(self, name: str, files: Sequence[Path], step: int) -> None:
        self._log({name: [self._wandb.Video(str(path), format="mp4") for path in files]}, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self._try(lambda: self._run.alert(title=name, text=f"step {step}: {text}"))

    def close(self) -> None:
        self._try(lambda: self._run.finish())
        self._run = None

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        self._try(lambda: self._run.log({**values, "step": step}))

    def _try(self, send: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            send()
        except Exception as error:  # theirs, of many kinds
            self._run = None
            self._say(f"warning: wandb gets no more of this run: {type(error).__name__}: {one_line(error)}")
