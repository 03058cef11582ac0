"""What can be sampled: a run, a checkpoint, or published weights in any layout; and the models that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opensora_repro.config import Config, ConfigError, load_recorded
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.text import ClassLabels, ConditionEncoder, load_clip_text
from opensora_repro.models.vae import FrameVAE, load_vae
from opensora_repro.models.weight_files import CONFIG_FILE, STATE_FILE, WeightsFile, open_weights
from opensora_repro.models.weights import LoadReport, load_model_weights
from opensora_repro.training.checkpoint import list_checkpoints, list_steps
from opensora_repro.training.encode import frozen_dtype, open_encoder
from opensora_repro.training.init import take_null_caption
from opensora_repro.training.published import describe


@dataclass(frozen=True)
class Source:
    """Weights, the model that they make, and the defaults of their run or release."""

    path: Path
    weights: Path | WeightsFile
    model: STDiTConfig | DiTConfig
    config: Config


def find_source(path: Path, *, ema: bool = True, num_heads: int | None = None, family: str | None = None) -> Source:
    """Look at a run (its newest checkpoint), a checkpoint, or published weights. Raises ConfigError, WeightsError.

    A name of the catalog, which no file here has, means what the hub's cache holds of it.
    """
    checkpoint = _own_checkpoint(path)
    if checkpoint is not None:
        config = load_recorded(checkpoint / CONFIG_FILE)
        name = "ema.safetensors" if ema else "model.safetensors"
        return Source(checkpoint, checkpoint / name, config.model, config)
    file = open_weights(path, ema=ema)
    found = describe(file, num_heads=num_heads, family=family)
    return Source(path, file, found.model, found.config)


def _own_checkpoint(path: Path) -> Path | None:
    """The folder itself if it is one of our checkpoints, or a run's newest; None for anything else."""
    if not path.is_dir():
        return None
    found = list_checkpoints(path) or list_steps(path)
    if found or (path / STATE_FILE).is_file():
        checkpoint = found[-1] if found else path
        if not (checkpoint / CONFIG_FILE).is_file():
            raise ConfigError(f"{checkpoint}: {CONFIG_FILE} is missing; this is not a whole checkpoint")
        return checkpoint
    if not any(path.iterdir()):
        raise ConfigError(f"{path}: no checkpoint in this run yet (looked for checkpoints/step-*)")
    return None


def empty_model(source: Source) -> STDiT | DiT:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return STDiT(source.model) if isinstance(source.model, STDiTConfig) else DiT(source.model)


def load_models(source: Source, device: torch.device) -> tuple[STDiT | DiT, FrameVAE, ConditionEncoder, LoadReport]:
    """The model in float32, its autoencoder, and what makes a condition of prompts: T5, CLIP, or class numbers.

    Raises WeightsError, ModelNotFound.
    """
    model = empty_model(source)
    report = load_model_weights(model, source.weights)
    model = model.eval().to(device)
    if isinstance(model, STDiT):
        encoder = open_encoder(replace(source.config, model=model.cfg), device).load()
        if report.lacks_null_caption:
            take_null_caption(model, encoder.text)
        return model, encoder.vae, encoder.text, report
    dtype = frozen_dtype(source.config, device)
    vae = load_vae(source.config.vae, device, dtype)
    if model.cfg.condition == "text":
        return model, vae, load_clip_text(source.config.text, device, dtype), report
    return model, vae, ClassLabels(model.cfg.num_classes), report
