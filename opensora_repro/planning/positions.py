"""Where a size's tokens lie in the position tables: what "rescaled positions" means from one stage to the next."""

from __future__ import annotations

import math
from dataclasses import fields

from opensora_repro.config import Config, load_recorded


def axes(cfg: Config, stride: int) -> dict[str, tuple[int, float]]:
    """Most tokens along each axis and the distance of their positions; `stride` is the autoencoder's, in pixels."""
    from opensora_repro.data.buckets import buckets_of  # late, for stages' --help
    from opensora_repro.planning.sizes import autoencoder_geometry

    model, (frames, rows, columns) = cfg.model, cfg.model.patch_size
    num_frames, height, width = (max(sizes) for sizes in zip(*(b.shape for b in buckets_of(cfg)), strict=True))
    latents = autoencoder_geometry(cfg.vae.path).latent_frames(num_frames)
    counts = [math.ceil(latents / frames), math.ceil(height / stride / rows), math.ceil(width / stride / columns)]
    down = across = 1 / model.space_scale
    if model.input_sq_size:  # both axes stretch to as many steps as a square of those pixels has tokens
        reach = round(math.sqrt(counts[1] * counts[2])) * model.input_sq_size / math.sqrt(height * width)
        down, across = reach / counts[1], reach / counts[2]
    distances = (1 / model.time_scale, down, across)
    return dict(zip(("frames", "rows", "columns"), zip(counts, distances, strict=True), strict=True))


def describe_rescaling(cfg: Config, source: Config | None, stride: int) -> list[str]:
    """Lines that tell the positions now and in the run that the weights come from, and warn of unknown ones."""
    now = axes(cfg, stride)
    if source is None:
        return ["positions: " + "; ".join(f"{axis} {_shown(*now[axis])}" for axis in now)]
    before = axes(source, stride)
    lines = ["positions: " + "; ".join(f"{axis} {_shown(*before[axis])} -> {_shown(*now[axis])}" for axis in now)]
    for axis, (count, distance) in now.items():
        old_count, old_distance = before[axis]
        known, reached = (old_count - 1) * old_distance, (count - 1) * distance
        if reached > known + max(old_distance, distance):
            line = f"note: positions of {axis} reach {reached:g}, the weights know them up to {known:g}"
            scale = "time_scale" if axis == "frames" else "space_scale"
            if any(field.name == scale for field in fields(cfg.model)):
                line += f"; model.{scale} = {count / (old_count * old_distance):g} would keep them there"
            lines.append(line)
    return lines


def _shown(count: int, distance: float) -> str:
    return f"0..{(count - 1) * distance:g} by {distance:g} ({count})"


def source_config(weights: str) -> Config | None:
    """The config of the run that `init.weights` belongs to, if there is one. Raises WeightsError, ConfigError."""
    from opensora_repro.run_folder import CONFIG_FILE
    from opensora_repro.weights.files import find_weights

    config = find_weights(weights).parent / CONFIG_FILE
    return load_recorded(config) if config.is_file() else None
