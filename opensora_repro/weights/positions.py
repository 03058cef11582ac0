"""Where a size's tokens lie in the position tables: what "rescaled positions" means from one stage to the next."""

from __future__ import annotations

import math

from opensora_repro.config import Config, load_recorded


def axes(cfg: Config, stride: int) -> dict[str, tuple[int, float]]:
    """Most tokens along each axis and the distance of their positions; `stride` is the autoencoder's, in pixels."""
    from opensora_repro.data.buckets import buckets_of  # late, for stages' --help

    frames, rows, columns = cfg.model.patch_size
    num_frames, height, width = (max(sizes) for sizes in zip(*(b.shape for b in buckets_of(cfg)), strict=True))
    return {
        "frames": (math.ceil(num_frames / frames), 1 / cfg.model.time_scale),
        "rows": (math.ceil(height / stride / rows), 1 / cfg.model.space_scale),
        "columns": (math.ceil(width / stride / columns), 1 / cfg.model.space_scale),
    }


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
            scale = "time_scale" if axis == "frames" else "space_scale"
            lines.append(
                f"note: positions of {axis} reach {reached:g}, the weights know them up to {known:g}; "
                f"model.{scale} = {count / (old_count * old_distance):g} would keep them there"
            )
    return lines


def _shown(count: int, distance: float) -> str:
    return f"0..{(count - 1) * distance:g} by {distance:g} ({count})"


def source_config(weights: str) -> Config | None:
    """The config of the run that `init.weights` belongs to, if there is one. Raises WeightsError, ConfigError."""
    from opensora_repro.run_folder import CONFIG_FILE
    from opensora_repro.weights.files import find_weights

    config = find_weights(weights).parent / CONFIG_FILE
    return load_recorded(config) if config.is_file() else None
