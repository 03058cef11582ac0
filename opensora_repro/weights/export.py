"""Write weights in the layouts that other tools read: Open-Sora's and PixArt's .pth, diffusers' folders, safetensors.

Values never change: loading what was written gives the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opensora_repro.config import Config, dump_toml
from opensora_repro.files import replacing
from opensora_repro.models.config import ModelConfig, TrainedConfig
from opensora_repro.models.layers import spatial_positions, temporal_positions
from opensora_repro.run_folder import CONFIG_FILE, MODEL_FILE
from opensora_repro.weights.families import CLASSES_ONLY, family_of
from opensora_repro.weights.files import FACTS_KEY, NULL_CAPTION, NULL_CAPTION_FILE, SUFFIXES, WeightsError
from opensora_repro.weights.layouts import KERNEL

FORMATS = ("opensora", "pixart", "diffusers", "safetensors")
PIPELINE = {"transformer": "VideoModel", "pipeline": "TextToVideoPipeline"}  # of sampling/pipeline.py, by their modules


@dataclass(frozen=True)
class Grid:
    """Tokens of a sample, for the position tables that published files carry."""

    frames: int
    rows: int
    cols: int


def is_pipeline(model: ModelConfig) -> bool:
    """Whether diffusers has no class that computes this model, whose folder is then a pipeline with code of its own."""
    return model.conditioning == "t5" and family_of(model).diffusers is None


def export(
    weights: Mapping[str, Tensor], model: ModelConfig, grid: Grid, to: str, out: Path, config: Config | None = None
) -> None:
    """Write `weights` (our keys) as `to`, one of FORMATS: a file, or for diffusers a folder, that must not exist yet.

    As "opensora", STDiT2 and STDiT3 become a folder, as they are released, unless `out` is named as a file of weights.
    A pipeline's samples are made by `config`, of which its folder keeps a copy without this machine's places.

    Raises WeightsError where the layout has no place for the model, OSError when the disk has none.
    """
    if out.exists():
        raise WeightsError(f"{out}: exists already; move it away, or name another --out")
    _check_place(model, to)
    if model.conditioning == "t5" and NULL_CAPTION not in weights and to != "diffusers":
        raise WeightsError(f"--to {to}: it needs a null caption, and these weights (diffusers') have none")
    try:
        with replacing(out) as unfinished:
            if to == "safetensors":
                size = {"sample_size": _sample_size(model, grid), "sample_frames": grid.frames}
                facts = {"format": "pt", FACTS_KEY: json.dumps(asdict(model) | size)}
                save_file(_contiguous(weights), unfinished, facts)
            elif to == "diffusers" and is_pipeline(model):
                _write_pipeline(weights, model, config or Config(), unfinished)
            elif to == "diffusers":
                _write_diffusers(weights, model, grid, unfinished)
            elif to == "pixart":
                torch.save({"state_dict": _image_layout(weights, model, grid)}, unfinished)
            elif not family_of(model).table and out.suffix not in SUFFIXES:
                _write_release(weights, model, unfinished)
            else:
                torch.save({**weights, **position_tables(model, grid)}, unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: torch, safetensors and Python differ
        raise OSError(f"{out}: cannot be written ({' '.join(str(error).split())[:200]})") from error


def position_tables(model: ModelConfig, grid: Grid) -> dict[str, Tensor]:
    """The buffers of Open-Sora's models, float32 [1, S, D] and [1, T, D], under their names there; of 1.1 on, none."""
    if not family_of(model).table:
        return {}
    dim, base_size = model.hidden_size, model.stretched_to(grid.rows * grid.cols)
    spatial = spatial_positions(dim, grid.rows, grid.cols, scale=model.space_scale, base_size=base_size)
    temporal = temporal_positions(dim, grid.frames, scale=model.time_scale)
    return {family_of(model).table: spatial.float()[None], "pos_embed_temporal": temporal.float()[None]}


def _check_place(model: ModelConfig, to: str) -> None:
    reason = family_of(model).no_place.get(to)
    if reason is None and to == "diffusers" and model.conditioning == "clip":
        reason = CLASSES_ONLY
    if reason is not None:
        raise WeightsError(f"--to {to}: {reason}")
    if to in ("pixart", "diffusers") and not is_pipeline(model) and (model.patch_size[0] != 1 or model.mlp_ratio != 4):
        raise WeightsError(f"--to {to}: it has patches of one frame and model.mlp_ratio=4 only")


def _image_layout(weights: Mapping[str, Tensor], model: ModelConfig, grid: Grid) -> dict[str, Tensor]:
    """As PixArt-alpha saves an image model: no frame axis in the patch kernel, one position table."""
    tables = position_tables(model, grid)
    return {**weights, KERNEL: weights[KERNEL].squeeze(2), "pos_embed": tables["pos_embed"]}


def _write_diffusers(weights: Mapping[str, Tensor], model: ModelConfig, grid: Grid, folder: Path) -> None:
    theirs = family_of(model).diffusers
    assert theirs is not None, "checked before"
    config = theirs.config(model, _sample_size(model, grid))
    tensors = theirs.tensors(weights)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_contiguous(tensors), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    if NULL_CAPTION in weights:
        save_file({NULL_CAPTION: weights[NULL_CAPTION].contiguous()}, folder / NULL_CAPTION_FILE, {"format": "pt"})


def _write_pipeline(weights: Mapping[str, Tensor], model: ModelConfig, config: Config, folder: Path) -> None:
    """As diffusers loads what it has no classes for: files that import ours, which it runs if told to trust them."""
    import diffusers

    component, pipeline = PIPELINE
    index = {"_class_name": [pipeline, PIPELINE[pipeline]], "_diffusers_version": diffusers.__version__,
             component: [component, PIPELINE[component]]}  # fmt: skip
    (folder / component).mkdir(parents=True)
    for module, place in {component: folder / component, pipeline: folder}.items():
        code = f'"""Needs opensora-repro."""\n\nfrom opensora_repro.sampling.pipeline import {PIPELINE[module]}\n'
        (place / f"{module}.py").write_text(f'{code}\n__all__ = ["{PIPELINE[module]}"]\n', encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = replace(config, model=cast("TrainedConfig", model))
    (folder / component / CONFIG_FILE).write_text(dump_toml(config), encoding="utf-8")
    save_file(_contiguous(weights), folder / component / MODEL_FILE, {"format": "pt"})


def _write_release(weights: Mapping[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """As 1.1's and 1.2's models are released, whose code reads such a folder: the weights, and a config.json."""
    folder.mkdir()
    name = type(model).__name__.removesuffix("Config")
    fields = {key: value for key, value in asdict(model).items() if key != "architecture"}
    config = {"architectures": [name], "model_type": name, **fields}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_contiguous(weights), folder / "model.safetensors", {"format": "pt"})


def _sample_size(model: ModelConfig, grid: Grid) -> int:
    """Latents along a side; PixArt's positions stretch to it."""
    side = model.base_size or math.isqrt(grid.rows * grid.cols)
    return side * model.patch_size[1]


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: no two of one memory, as the parts of a joined weight and repeated ones are."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        whole = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        address = value.untyped_storage().data_ptr()
        result[key] = value if whole and address not in seen else value.clone(memory_format=torch.contiguous_format)
        seen.add(address)
    return result
