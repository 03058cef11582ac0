"""`--dry-run`: what a run would do and about what it would take, without building anything large."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from opensora_repro.config import Config, ParallelConfig, dump_toml
from opensora_repro.data.manifest import read_manifest
from opensora_repro.diffusion.flow import count_tokens
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.weight_files import open_weights
from opensora_repro.models.weights import check_complete
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.training.checkpoint import list_checkpoints
from opensora_repro.training.ema import horizon_warning
from opensora_repro.training.init import find_start, global_batch_size
from opensora_repro.training.stage import Stage

BYTES_WHOLE = 8  # of a parameter: float32 weight and gradient
BYTES_SPREAD = 12  # two Adam moments and the average, which ZeRO spreads over its ranks
BYTES_GEMINI = 22  # all of these and a bfloat16 weight, which Gemini spreads altogether
ACTIVATIONS_A_BLOCK = 34  # tensors of [tokens, hidden_size] that one block keeps for its backward, roughly
PUBLISHED_STRIDE = 8  # of the Stable Diffusion autoencoders


def plan(cfg: Config, stage: Stage) -> list[str]:
    """Lines to print. Raises what the run itself would for a wrong config, manifest or folder."""
    mesh = planned_mesh(cfg.parallel)
    lines = [*dump_toml(cfg).splitlines(), ""]

    def add(name: str, text: str) -> None:
        lines.append(f"# {name + ':':<14}{text}")

    start = find_start(cfg, mesh.data_size, report=lambda line: add("warning", line))
    rows = len(read_manifest(cfg.data.manifest))
    shape = latent_shape(cfg)
    tokens = count_tokens(shape, cfg.model.patch_size)
    samples = global_batch_size(cfg, mesh.data_size)
    parameters = count_parameters(cfg.model)
    flops = samples * training_flops(cfg.model, shape, recompute=cfg.train.activation_checkpointing)
    memory = parameters * parameter_bytes(cfg.parallel, mesh) + activation_bytes(cfg, tokens) / mesh.model_size

    add("stage", f"{stage.name}, {stage.title}")
    add("model", f"{parameters:,} parameters" + (", temporal attention" if cfg.model.temporal_attention else ""))
    add("latents", "x".join(map(str, shape)) + f" -> {tokens:,} tokens a sample, {tokens * samples:,} a step")
    batch = f"{cfg.train.batch_size} x {cfg.train.accumulation} micro-batches x {mesh.data_size} data ranks"
    add("processes", f"{mesh.world_size} = {mesh.data_size} data x {mesh.sp_size} sequence x {mesh.tp_size} tensor")
    add("step", f"{samples} samples ({batch}), about {flops / 1e12:.3g} TFLOP (transformer alone)")
    add("data", f"{rows:,} rows; {cfg.train.steps} steps are {cfg.train.steps * samples / rows:.3g} epochs")
    add("memory", f"about {_size(memory)} a process, without autoencoder and text encoder")
    add("start", _start(cfg, start.checkpoint))
    found = list_checkpoints(Path(cfg.run.dir))
    add("checkpoints", ", ".join(folder.name for folder in found) or "none yet")
    warning = horizon_warning(cfg.ema.decay, cfg.train.steps)
    if warning:
        add("warning", warning)
    return lines


def planned_mesh(parallel: ParallelConfig) -> Mesh:
    """Of torchrun's processes; without torchrun, of as many as one sample needs. Raises EngineError."""
    tp_size, sp_size = parallel.tp_size, parallel.sp_size
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", tp_size * sp_size))
    return Mesh(rank, world_size, tp_size, sp_size)


def parameter_bytes(parallel: ParallelConfig, mesh: Mesh) -> float:
    """Bytes that one process keeps for each parameter of the model."""
    if parallel.plugin == "gemini":
        return BYTES_GEMINI / mesh.world_size
    sharers = 1 if parallel.plugin == "ddp" else mesh.world_size // mesh.tp_size
    return (BYTES_WHOLE + BYTES_SPREAD / sharers) / mesh.tp_size


def _start(cfg: Config, checkpoint: Path | None) -> str:
    if checkpoint is not None:
        return f"resumes {checkpoint}"
    if cfg.init.weights:
        file = open_weights(cfg.init.weights)
        check_complete(file, cfg.model)
        return f"from the weights {file.path}"
    return "from weights drawn at random"


def latent_shape(cfg: Config) -> tuple[int, int, int, int]:
    """[C, T, h, w] of a sample's latents."""
    stride = autoencoder_stride(cfg.vae.path)
    return cfg.model.in_channels, cfg.data.num_frames, cfg.data.height // stride, cfg.data.width // stride


def autoencoder_stride(path: str) -> int:
    """Pixels a latent, from a local folder's config.json; the published autoencoders' for a hub name."""
    try:
        content = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return int(2 ** (len(content["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        return PUBLISHED_STRIDE


def count_parameters(cfg: STDiTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in STDiT(cfg).parameters())


def training_flops(cfg: STDiTConfig, shape: Sequence[int], *, recompute: bool) -> float:
    """Floating-point operations of one sample's forward and backward, a multiplication and an addition being two."""
    dim, text = cfg.hidden_size, cfg.model_max_length
    frames = -(-shape[1] // cfg.patch_size[0])
    tokens = count_tokens(shape, cfg.patch_size)
    places = tokens // frames
    seen = places if cfg.temporal_attention else tokens  # tokens that spatial attention looks at
    token = 4 * dim**2 + 2 * dim * seen + 2 * dim**2 + 2 * dim * text + 2 * cfg.mlp_ratio * dim**2
    if cfg.temporal_attention:
        token += 4 * dim**2 + 2 * dim * frames
    block = tokens * token + text * 2 * dim**2
    patch = dim * cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2] * (cfg.in_channels + cfg.out_channels)
    forward = 2 * (cfg.depth * block + tokens * patch)
    return forward * (4 if recompute else 3)


def activation_bytes(cfg: Config, tokens: int) -> float:
    """What one micro-batch keeps between forward and backward, roughly."""
    size = 2 if cfg.train.dtype == "bf16" else 4
    block = cfg.train.batch_size * tokens * cfg.model.hidden_size * size
    if cfg.train.activation_checkpointing:
        return block * (cfg.model.depth + ACTIVATIONS_A_BLOCK)
    return block * cfg.model.depth * ACTIVATIONS_A_BLOCK


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.3g} MiB"
