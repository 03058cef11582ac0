"""What a start looks at before anything is built, and `--dry-run` alike: in one function, so that both say the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import validates
from opensora_repro.data.buckets import Bucket, as_sampled, assigned, global_batch_sizes, kept_buckets
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.packing import build_schedule
from opensora_repro.data.preflight import (
    SAMPLED_ROWS,
    bucket_rows,
    bucket_table,
    facts,
    keyed_sample,
    require_kept,
    require_usable,
    survey,
    table,
    warnings,
)
from opensora_repro.data.tables import kind_by_name
from opensora_repro.files import is_file, is_free
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.encoder import Encoder, open_encoder
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.text import survey_captions
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.build import check_installed, check_shards
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.budget import bucket_costs
from opensora_repro.planning.fit import check_memory
from opensora_repro.planning.sizes import token_grid
from opensora_repro.run_folder import check_folder, checkpoints_folder
from opensora_repro.sampling.generate import check_fit
from opensora_repro.storage.addresses import address_of, place
from opensora_repro.training.identity import adapted_identity, frozen_identity
from opensora_repro.training.start import Stage, Start
from opensora_repro.training.track import check_track
from opensora_repro.training.validate import chosen_rows
from opensora_repro.weights.files import NULL_CAPTION, open_weights, weights_to_come
from opensora_repro.weights.load import check_complete, inserts_temporal_attention


def preflight(
    cfg: Config,
    stage: Stage,
    mesh: Mesh,
    device: torch.device | None,
    frame: Any | None,
    start: Start,
    *,
    dry: bool = False,
    told: list[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """Lines for people, as they are found out. Raises, in one line, whatever would stop the run before its first step.

    `frame` is the training manifest, None where it is still to come. With `dry`, the manifests and `init.weights` may
    be absent: an earlier stage may have to make them yet. `told` takes up what is found of each manifest. The start's
    state takes up what the frozen models hold. `device` None: the run is planned for another machine, of which no
    device, memory or frozen models are here to be looked at.
    """
    _check_machine(cfg, device)
    if cfg.init.weights and (not start.resumes or cfg.lora.rank):
        if dry and _may_come(cfg):
            yield to_come("init.weights", cfg.init.weights)
        else:
            check_weights(cfg, stage)
    encoder = None
    try:
        encoder = open_encoder(cfg, device or torch.device("cpu"))
        _check_encoder(cfg, encoder)
        if start.resumes or not dry:
            start.state.identity |= frozen_identity(cfg, start, encoder)
            if cfg.lora.rank:
                start.state.identity |= adapted_identity(cfg, start)
    except ModelNotFound as error:
        if device is not None:
            raise
        yield f"not on this machine: {error}"
    if device is not None:
        yield check_memory(cfg, mesh, device)
    if frame is None:
        yield to_come("data.manifest", cfg.data.manifest)
    else:
        samples = global_batch_sizes(cfg, mesh.data_size)
        if cfg.data.packing_tokens:
            yield (
                f"packing: a step has {samples[0]:,} clips of any buckets, in rows of at most "
                f"{cfg.data.packing_tokens:,} tokens"
            )
        yield from clips(cfg, frame, "clips of", cfg.data.manifest, samples, here=device is not None, told=told)
        build_schedule(cfg, assigned(frame, cfg), samples).require_step()
    if validates(cfg) or cfg.evaluate.every:
        yield from _held_out_clips(cfg, here=device is not None, may_come=dry and not start.resumes, told=told)
    if frame is not None and encoder is not None:
        looked = keyed_sample(frame, SAMPLED_ROWS)["caption"].to_pylist()
        prompts = cfg.sample.prompts if cfg.sample.every else ()
        yield from survey_captions(encoder.text, looked, len(frame), prompts)


def _check_machine(cfg: Config, device: torch.device | None) -> None:
    """Places to write to, and what the run's layout and kernels need here. Raises what `preflight` does."""
    for folder in (cfg.run.dir, str(checkpoints_folder(Path(cfg.run.dir)))):
        check_folder("run.dir", folder)
    check_track(cfg)
    if cfg.data.cache:
        check_folder("data.cache", cfg.data.cache)
    if device is not None:
        check_installed(cfg.parallel)
        if cfg.text.shard:
            check_shards()
        choose(cfg.train.kernels, device.type)


def _check_encoder(cfg: Config, encoder: Encoder) -> None:
    """Whether the frozen models fit the model and every bucket. Raises ConfigError."""
    stride = encoder.vae.spatial_stride
    for bucket in kept_buckets(cfg) if cfg.data.buckets else ():
        if min(bucket.height, bucket.width) < stride:
            raise ConfigError(f"data.buckets: {bucket}: a side is below {stride}, the autoencoder's stride")
    check_fit(as_sampled(cfg), encoder.vae, encoder.text)
    for bucket in kept_buckets(cfg):
        encoder.vae.check_frames(bucket.num_frames, f"data.buckets: {bucket}")
        check_tokens(cfg, bucket, encoder.vae)


def _held_out_clips(cfg: Config, *, here: bool, may_come: bool, told: list[dict[str, Any]] | None) -> Iterator[str]:
    path = cfg.data.val_manifest
    held_out = find_manifest(path, may_come=may_come)
    if held_out is None:
        yield to_come("data.val_manifest", path)
        return
    held_out = held_out.take(chosen_rows(held_out["id"].to_pylist(), cfg.validation.max_samples))
    yield from clips(cfg, held_out, "held-out clips of", path, (), here=here, told=told)


def check_tokens(cfg: Config, bucket: Bucket, vae: Autoencoder) -> None:
    """Raise ConfigError where a row of `data.packing_tokens` has no room for a bucket's clips.

    Or where they have fewer frames of latents than processes share a sample.
    """
    grid, room, sharers = token_grid(cfg.model, vae.latent_shape(*bucket.shape)), cfg.data.packing_tokens, cfg.parallel
    if 0 < room < grid.tokens:
        raise ConfigError(
            f"data.packing_tokens = {room}: expected at least {grid.tokens}, the tokens of a clip of data.buckets "
            f"({bucket})"
        )
    if grid.frames < sharers.sp_size:
        raise ConfigError(
            f"parallel.sp_size = {sharers.sp_size}: there are only {grid.frames} latent frames to share of {bucket}"
        )


def is_to_come(path: str) -> bool:
    """Whether nothing has the name: an earlier stage may make it. What is there, but wrong, is a mistake."""
    there = place(path)
    return not is_file(there) if address_of(there) else is_free(there)


def _may_come(cfg: Config) -> bool:
    """Whether an earlier stage may have to make `init.weights` yet: none makes what lies in the run's own folder."""
    weights, own = Path(cfg.init.weights).absolute(), Path(cfg.run.dir).absolute()
    return own not in (weights, *weights.parents) and weights_to_come(cfg.init.weights)


def find_manifest(path: str, *, need_captions: bool = True, may_come: bool = True) -> Any | None:
    """The manifest's rows, None where it is to come, as none is that a run began with. Raises DataError."""
    if not may_come or not is_to_come(path):
        return read_manifest(path, need_captions=need_captions)
    kind_by_name(place(path))  # what comes under another name will not be one
    return None


def to_come(key: str, path: str) -> str:
    return f"not yet there: {key} = {path}, which an earlier stage has to make; it is looked at when the run starts"


def check_weights(cfg: Config, stage: Stage) -> Path:
    """The file that `init.weights` means. Raises WeightsError, ConfigError where the model or the stage is another."""
    file = open_weights(cfg.init.weights)
    inserted = check_complete(file, cfg.model)
    lacking = [key for key in inserted if key != NULL_CAPTION]
    if cfg.lora.rank and lacking:
        raise ConfigError(
            f"init.weights = {cfg.init.weights} lacks {len(lacking)} tensors of the model (first {lacking[0]}), and "
            f"lora.rank = {cfg.lora.rank} trains adapters alone: train the model first, with lora.rank=0"
        )
    if inserts_temporal_attention(inserted) and not stage.takes_image_models:
        raise ConfigError(f"init.weights = {cfg.init.weights} is an image model: {stage.name} goes on from a video run")
    return file.path


def clips(
    cfg: Config,
    frame: Any,
    title: str,
    manifest: str,
    samples: Sequence[int],
    *,
    here: bool,
    told: list[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """The table of a manifest's clips, that of its buckets, and what to do about it.

    `samples`: as `bucket_rows` takes them; none: of held-out clips. Raises DataError where no clip can be used `here`.
    """
    found = survey(frame, cfg.data, manifest)
    if here:
        require_usable(found)
    if here and samples:
        require_kept(found)
    yield from table(found, title)
    rows = bucket_rows(found, samples, bucket_costs(cfg)) if samples else []
    if samples:
        yield from bucket_table(found, rows)
    if told is not None:
        told.append(facts(found, title, rows))
    for line in warnings(found):
        yield f"warning: {line}"
