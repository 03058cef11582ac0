"""Time and memory of a whole recipe's runs, before any of them is there: orders of magnitude, for one machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from opensora_repro.config import AutoencoderConfig, Config
from opensora_repro.data.buckets import as_heaviest
from opensora_repro.parallel.device import choose_device, default_kind, device_name
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.budget import step_flops
from opensora_repro.planning.encoders import autoencoder_sizes, frozen_sizes
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.gpus import Gpu, find_gpu, gpu_of_device
from opensora_repro.planning.memory import needed_memory
from opensora_repro.planning.sizes import latent_shape, token_grid

# Of float32 on a core. Small models were measured at 25 to 55e9, by the processor and by how much a step has to do.
CORE_FLOPS = 55e9
GPU_UTILISATION = 0.33  # the best that is public; `stages.plan` asks for others
BACKWARD = 3  # times the forward's work, with it


@dataclass(frozen=True)
class Machine:
    """Where the runs are planned for; `gpu` None: this machine's cores, or a GPU whose speed is not known."""

    kind: str
    gpu: Gpu | None = None

    def __str__(self) -> str:
        return "this machine" if self.gpu is None else self.gpu.name

    def seconds(self, flops: float, dtype: str) -> float | None:
        if self.gpu is not None:
            return flops / (self.gpu.peak(dtype) * GPU_UTILISATION)
        return flops / (CORE_FLOPS * (os.cpu_count() or 1)) if self.kind == "cpu" else None


def machine_of(gpu: str | None) -> Machine:
    """One with a GPU of that name; None: this one. Raises ConfigError."""
    if gpu is not None:
        return Machine("cuda", find_gpu(gpu))
    kind = default_kind()
    return Machine(kind, gpu_of_device(device_name(choose_device(None, 0))) if kind == "cuda" else None)


def of_stage(cfg: Config, machine: Machine) -> tuple[float | None, float]:
    """Seconds (None: unknown) and bytes of a run of stage 1 to 3; encoding counts where there is no cache."""
    mesh = Mesh(0, cfg.parallel.tp_size * cfg.parallel.sp_size, cfg.parallel.tp_size, cfg.parallel.sp_size)
    heavy = as_heaviest(cfg)
    products = forward_products(heavy.model, token_grid(heavy.model, latent_shape(heavy)))
    samples = heavy.train.batch_size * heavy.train.accumulation
    flops = cfg.train.steps * sum(step_flops(heavy, products, frozen_sizes(heavy), samples)) / mesh.world_size
    return machine.seconds(flops, cfg.train.dtype), needed_memory(cfg, mesh, machine.kind).peak


def of_autoencoder(cfg: AutoencoderConfig, machine: Machine) -> float | None:
    """Seconds of stage 0's steps for an autoencoder of images; None for others, which nothing here counts."""
    if cfg.model.kind != "image":
        return None
    with planned(cfg) as (vae, _):
        sizes = autoencoder_sizes(replace(cfg.shared, vae=replace(cfg.shared.vae, path=vae)))
    samples = cfg.train.batch_size * cfg.train.accumulation
    flops = cfg.train.steps * samples * BACKWARD * (sizes.encode_flops + sizes.decode_flops)
    return machine.seconds(flops, cfg.train.dtype)


@contextmanager
def planned(cfg: AutoencoderConfig) -> Iterator[tuple[str, str]]:
    """Folders with the config.json of the autoencoder and of the text encoder that stage 0 will make."""
    levels = len(cfg.model.channels)
    vae = {
        "_class_name": "AutoencoderKL", "block_out_channels": list(cfg.model.channels), "in_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": cfg.model.layers_per_block, "latent_channels": cfg.model.latent_channels,
        "norm_num_groups": cfg.model.norm_groups, "mid_block_add_attention": cfg.model.attention,
    }  # fmt: skip
    width, heads = cfg.text.hidden_size, cfg.text.num_heads
    text = {
        "model_type": "t5", "d_model": width, "d_kv": width // heads, "d_ff": 2 * width, "num_heads": heads,
        "num_layers": cfg.text.depth, "vocab_size": cfg.text.vocab_size or 1,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        for name, content in (("vae", vae), ("text", text)):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(content), encoding="utf-8")
        yield f"{folder}/vae", f"{folder}/text"
