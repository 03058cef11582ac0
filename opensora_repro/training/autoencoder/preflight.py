"""What stage 0 looks at before anything is built, and `--dry-run` alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opensora_repro.config import AutoencoderConfig, ConfigError, config_dict, dump_toml, parse_config, read_toml
from opensora_repro.data.buckets import assigned, global_batch_sizes, kept_buckets
from opensora_repro.data.packing import build_schedule
from opensora_repro.data.preflight import facts, require_usable, survey, table, warnings
from opensora_repro.frozen.perceptual import load_lpips
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.device import choose_device
from opensora_repro.parallel.mesh import launched_as, meeting_place
from opensora_repro.planning.sizes import autoencoder_geometry
from opensora_repro.run_folder import CONFIG_FILE, TrainState, check_folder, list_checkpoints, newest_checkpoint
from opensora_repro.training.autoencoder.model import check_models
from opensora_repro.training.autoencoder.picture_start import has_room
from opensora_repro.training.autoencoder.report import latents_told
from opensora_repro.training.identity import check_manifest
from opensora_repro.training.preflight import find_manifest, to_come
from opensora_repro.training.start import FREE_KEYS, FREE_SECTIONS, Start
from opensora_repro.training.step import horizon_warning
from opensora_repro.training.track import check_track
from opensora_repro.training.validate import chosen_rows

FREE = {*FREE_KEYS, "model.image", "loss.lpips_path", "text.vocab_size"}


def dry_run(cfg: AutoencoderConfig) -> Iterator[str]:
    """Lines to print, as they are found out. Raises what the run itself would."""
    _, world_size, local_rank = launched_as()
    if world_size > 1:
        meeting_place()
    yield from dump_toml(cfg).splitlines()
    yield ""
    start = find_start(cfg, world_size)
    captions, may_come = bool(cfg.text.vocab_size), not start.resumes
    manifest = find_manifest(cfg.data.manifest, need_captions=captions, may_come=may_come)
    if manifest is not None:
        told: list[str] = []
        check_manifest(cfg.shared, start, manifest, told.append)
        yield from (f"# {line}" for line in told)
    yield f"# stage:        stage0_autoencoder, {cfg.model.kind} autoencoder"
    yield f"# latents:      {latents_told(cfg)}"
    (samples, *_) = global_batch_sizes(cfg.shared, world_size)
    frames = samples * cfg.data.num_frames
    yield f"# step:         {samples} clips, {frames} frames; {cfg.train.steps} steps"
    yield f"# start:        {f'resumes {start.checkpoint}' if start.resumes else cfg.init.weights or 'a new model'}"
    found = ", ".join(folder.name for folder in list_checkpoints(Path(cfg.run.dir))) or "none yet"
    yield f"# checkpoints:  {found}"
    for line in preflight(cfg, manifest, start, choose_device(None, local_rank), dry=True):
        yield f"# {line}"


def preflight(
    cfg: AutoencoderConfig,
    manifest: Any | None,
    start: Start,
    device: torch.device,
    *,
    dry: bool = False,
    told: list[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """Lines for people. Raises, in one line, whatever would stop the run before its first step.

    `manifest`: the training clips' table; None where it is still to come, which only a dry run may say.
    """
    check_folder("run.dir", cfg.run.dir)
    check_track(cfg)
    check_models(cfg)
    if cfg.loss.lpips_path:
        load_lpips(cfg.loss.lpips_path)
    choose(cfg.train.kernels, device.type)
    _check_sides(cfg)
    if manifest is None:
        yield to_come("data.manifest", cfg.data.manifest)
    else:
        yield from _clips(cfg, manifest, "clips of", cfg.data.manifest, told)
        build_schedule(cfg.shared, assigned(manifest, cfg.shared), start.state.global_batch_sizes).require_step()
    if cfg.validation.every and cfg.data.val_manifest:
        may_come = dry and not start.resumes
        held_out = find_manifest(cfg.data.val_manifest, need_captions=False, may_come=may_come)
        if held_out is None:
            yield to_come("data.val_manifest", cfg.data.val_manifest)
        else:
            held_out = held_out.take(chosen_rows(held_out["id"].to_pylist(), cfg.validation.max_samples))
            yield from _clips(cfg, held_out, "held-out clips of", cfg.data.val_manifest, told)
    elif cfg.validation.every:
        yield "warning: no data.val_manifest: PSNR and SSIM are those of training clips"
    model = cfg.model
    fresh = model.kind == "image" and not cfg.init.weights and not start.resumes
    if fresh and not has_room(model.channels, model.norm_groups, model.latent_channels):
        yield (
            "warning: GroupNorm's groups, or the latents, have no room for three colours: it begins as noise, not as a "
            "codec, and takes many more steps; model.norm_groups from 3 to a quarter of the narrowest model.channels "
            "and model.latent_channels of 3 or more have it"
        )
    warning = horizon_warning(cfg.ema.decay, cfg.train.steps)
    if warning:
        yield f"warning: {warning}"


def _check_sides(cfg: AutoencoderConfig) -> None:
    stride = cfg.spatial_stride
    if cfg.model.kind == "video":
        stride = autoencoder_geometry(cfg.model.image).spatial_stride
    for bucket in kept_buckets(cfg.shared):
        if bucket.height % stride or bucket.width % stride:
            height, width = (max(stride, round(side / stride) * stride) for side in (bucket.height, bucket.width))
            raise ConfigError(
                f"data.buckets: {bucket}: a side is no multiple of {stride}, the autoencoder's stride; "
                f'the nearest size that fits is resolution = "{width}x{height}"'
            )
        if min(bucket.height, bucket.width) < 11:
            raise ConfigError(f"data: {bucket}: a side is below 11 pixels, the window of SSIM")


def _clips(cfg: AutoencoderConfig, manifest: Any, title: str, path: str, told: Any) -> Iterator[str]:
    found = survey(manifest, cfg.data, path)
    require_usable(found)
    yield from table(found, title)
    if told is not None:
        told.append(facts(found, title, ()))
    for line in warnings(found):
        yield f"warning: {line}"


def find_start(cfg: AutoencoderConfig, data_size: int, report: Any = print) -> Start:
    """Look into `run.dir`. Raises ConfigError when it holds a run with other settings, CheckpointError when damaged."""
    run_dir = Path(cfg.run.dir)
    samples = global_batch_sizes(cfg.shared, data_size)
    found = newest_checkpoint(run_dir, report)
    if found is None:
        return Start(None, TrainState(global_batch_sizes=samples))
    checkpoint, state = found
    file = checkpoint / CONFIG_FILE
    try:
        recorded = parse_config(read_toml(file), where=str(file), kind=AutoencoderConfig)
    except ConfigError:
        raise ConfigError(f"{run_dir} holds a run of another stage: set another run.dir") from None
    changes = changed_settings(recorded, cfg)
    if state.global_batch_sizes != samples:
        changes.append(f"samples a step = {state.global_batch_sizes} there, {samples} here")
    if changes:
        shown = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise ConfigError(
            f"{run_dir} holds a run with other settings: {shown}. Restore them to resume it, or set another run.dir "
            f"for a new run (with init.weights={run_dir} it starts from this run's weights)"
        )
    if cfg.train.steps < state.step:
        raise ConfigError(
            f"train.steps = {cfg.train.steps}: {run_dir} has made {state.step} steps already; set train.steps="
            f"{state.step} or more"
        )
    return Start(checkpoint, state)


def changed_settings(recorded: AutoencoderConfig, current: AutoencoderConfig) -> list[str]:
    """`section.key = OLD there, NEW here` for every setting that changes the run."""
    old, new = (config_dict(replace(cfg, data=replace(cfg.data, buckets=()))) for cfg in (recorded, current))
    buckets = [[replace(bucket, batch_size=0) for bucket in cfg.data.buckets] for cfg in (recorded, current)]
    found = ["data.buckets differ"] if buckets[0] != buckets[1] else []
    return found + [
        f"{section}.{key} = {old[section][key]!r} there, {new[section][key]!r} here"
        for section in new
        if section not in FREE_SECTIONS
        for key in new[section]
        if f"{section}.{key}" not in FREE and old[section][key] != new[section][key]
    ]
