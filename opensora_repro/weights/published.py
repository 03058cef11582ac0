"""What a weights file alone tells: its model, the size that it was trained at, and how its release samples it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from opensora_repro.config import Config, DataConfig, SampleConfig, TextConfig, load_recorded
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.stdit import PIXELS_A_LATENT
from opensora_repro.weights.files import WeightsError, WeightsFile
from opensora_repro.weights.layouts import (
    HEADS_BY_WIDTH,
    KERNEL,
    Layout,
    Trained,
    dit_facts,
    recognise,
    stdit_facts,
    to_ours,
    trained_at,
)
from opensora_repro.weights.unwrap import NULL_CAPTION

DEFAULT_SIZE, DEFAULT_FRAMES = 256, 16  # where a file has no position table to tell
# Whose shapes tell the model; DiT's and Latte's classes besides
TELLING = (KERNEL, "blocks.0.mlp.fc1.weight", "final_layer.linear.weight")
TEXT, CLASSES = "y_embedder.y_proj.fc1.weight", "y_embedder.embedding_table.weight"
CLIP = "openai/clip-vit-base-patch32"  # what Open-Sora's DiT and Latte read text with

# Sampler, steps and guidance that each release uses.
SAMPLING = {
    "pixart": SampleConfig(sampler="dpm", steps=20, guidance=4.5),
    "pixart-ms": SampleConfig(sampler="dpm", steps=20, guidance=4.5),
    "stdit": SampleConfig(sampler="iddpm", steps=100, guidance=7.0),
    "dit": SampleConfig(sampler="iddpm", steps=250, guidance=4.0),
    "latte": SampleConfig(sampler="iddpm", steps=250, guidance=7.0),
}


@dataclass(frozen=True)
class Published:
    """`config` holds all but the model where that is a DiT or Latte: `model` is what to build."""

    layout: Layout
    family: str
    model: STDiTConfig | DiTConfig
    trained: Trained
    config: Config


def describe(file: WeightsFile, *, num_heads: int | None = None, family: str | None = None) -> Published:
    """Read the model off shapes, position tables and what comes with the file.

    `num_heads` is needed for widths that no published model has, `family` ("dit" or "latte") for video models of
    Open-Sora's that only the code that made them tells apart. Raises WeightsError.
    """
    where = str(file.path)
    layout = recognise(file.tensors, where)
    weights, tables = to_ours(layout, file.tensors, where)
    trained = trained_at(tables)
    if file.config is not None:
        config = load_recorded(file.config)
        return Published(layout, layout.family, config.model, trained, config)
    family = _family(layout, file, tables, family)
    model = (_dit if family in ("dit", "latte") else _stdit)(weights, file, trained, family, num_heads)
    height = (trained.rows * model.patch_size[1] if trained.rows else _sample_size(file)) * PIXELS_A_LATENT
    default = DEFAULT_FRAMES if family in ("stdit", "latte") else 1
    frames = (trained.frames or int(file.facts.get("sample_frames", default))) * model.patch_size[0]
    config = Config(
        model=model if isinstance(model, STDiTConfig) else STDiTConfig(),
        data=DataConfig(num_frames=frames, height=height, width=height),
        sample=SAMPLING[family],
        text=TextConfig(path=CLIP) if isinstance(model, DiTConfig) else TextConfig(),
    )
    return Published(layout, family, model, trained, config)


def _family(layout: Layout, file: WeightsFile, tables: Mapping[str, Tensor], wish: str | None) -> str:
    """Open-Sora's DiT and Latte have the same keys; of one frame they would be DiT's."""
    if layout.family != "dit-or-latte":
        return layout.family
    if "factorised" in file.facts:
        return "latte" if file.facts["factorised"] else "dit"
    if wish is None and (trained_at(tables).frames or 2) > 1:
        raise WeightsError(f"{file.path}: Open-Sora's DiT and Latte have the same keys: say which with --family")
    return wish or "dit"


def _sample_size(file: WeightsFile) -> int:
    return int(file.facts.get("sample_size", DEFAULT_SIZE // PIXELS_A_LATENT))


def _stdit(
    weights: Mapping[str, Tensor], file: WeightsFile, trained: Trained, family: str, num_heads: int | None
) -> STDiTConfig:
    facts = stdit_facts(weights)
    if not facts:
        raise _not_whole(file, weights, (*TELLING, TEXT))
    facts["num_heads"] = _heads(file, facts["hidden_size"], num_heads)
    if trained.space_scale is not None:
        facts["space_scale"] = trained.space_scale
    if trained.time_scale is not None and family == "stdit":
        facts["time_scale"] = trained.time_scale
    if family == "pixart-ms" and trained.rows:
        facts["base_size"] = trained.rows
    return replace(STDiTConfig(), **{**facts, **_known(STDiTConfig, file.facts)})


def _dit(
    weights: Mapping[str, Tensor], file: WeightsFile, trained: Trained, family: str, num_heads: int | None
) -> DiTConfig:
    facts = dit_facts(weights)
    if not facts:
        raise _not_whole(file, weights, (*TELLING, NULL_CAPTION if TEXT in weights else CLASSES))
    facts["num_heads"] = _heads(file, facts["hidden_size"], num_heads)
    still = trained.frames is None or trained.frames == 1
    facts |= {"factorised": family == "latte", "no_temporal_pos_emb": family == "latte" or still}
    return replace(DiTConfig(), **{**facts, **_known(DiTConfig, file.facts)})


def _not_whole(file: WeightsFile, weights: Mapping[str, Tensor], telling: tuple[str, ...]) -> WeightsError:
    missing = [key for key in telling if key not in weights]
    what = f"{', '.join(missing)} missing" if missing else "tensors of shapes that no such model has"
    return WeightsError(f"{file.path}: not whole weights: {what}")


def _heads(file: WeightsFile, width: int, wish: int | None) -> int:
    told = file.facts.get("num_heads")
    if wish is not None and told not in (None, wish):
        raise WeightsError(f"--num-heads {wish}: {file.path} was made with {told}")
    heads = wish if wish is not None else told or HEADS_BY_WIDTH.get(width)
    if heads is None:
        raise WeightsError(
            f"{file.path}: the file does not tell how many attention heads its {width} channels have: "
            "give them with --num-heads"
        )
    if heads < 1 or width % heads:
        raise WeightsError(f"{file.path}: its {width} channels cannot be shared among {heads} attention heads")
    return int(heads)


def _known(config: type, facts: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(config)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items() if key in names}
