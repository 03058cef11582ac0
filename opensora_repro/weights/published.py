"""What a weights file alone tells: its model, the size that it was trained at, and how its release samples it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from torch import Tensor

from opensora_repro.config import Config, DataConfig, TextConfig, load_recorded
from opensora_repro.models.config import ARCHITECTURES, ModelConfig
from opensora_repro.models.stdit import PIXELS_A_LATENT
from opensora_repro.weights.families import Family, families_of, family_of, recognise
from opensora_repro.weights.files import EXPECTED, WeightsError, WeightsFile
from opensora_repro.weights.layouts import HEADS_BY_WIDTH, Layout, Trained
from opensora_repro.weights.load import to_ours, trained_at

DEFAULT_SIZE = 256  # where a file has no position table to tell
CLIP = "openai/clip-vit-base-patch32"  # what Open-Sora's DiT and Latte read text with


@dataclass(frozen=True)
class Published:
    """`model` is what to build; `config` has it, too, where it is of the kind that is trained."""

    layout: Layout
    family: Family
    model: ModelConfig
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
        return Published(layout, family_of(config.model), config.model, trained, config)
    kind = _family(layout, file, trained, family)
    model = _model(kind, weights, file, trained, num_heads)
    told = int(file.facts.get("sample_size", DEFAULT_SIZE // PIXELS_A_LATENT))
    height = (trained.rows * model.patch_size[1] if trained.rows else told) * PIXELS_A_LATENT
    frames = (trained.frames or int(file.facts.get("sample_frames", kind.frames))) * model.patch_size[0]
    config = Config(
        data=kind.data or DataConfig(num_frames=frames, height=height, width=height),
        vae=kind.vae,
        diffusion=kind.diffusion,
        sample=kind.sampling,
        text=TextConfig(path=CLIP) if model.conditioning == "clip" else TextConfig(),
    )
    if kind.config in ARCHITECTURES.values():
        config = replace(config, model=cast(Any, model))
    return Published(layout, kind, model, trained, config)


def _family(layout: Layout, file: WeightsFile, trained: Trained, asked: str | None) -> Family:
    """Open-Sora's DiT and Latte have the same keys; of one frame they would be DiT's."""
    families = families_of(layout)
    if len(families) == 1:
        return next(iter(families.values()))
    if "factorised" in file.facts:
        return families["latte" if file.facts["factorised"] else "dit"]
    if asked is None and (trained.frames or 2) > 1:
        raise WeightsError(f"{file.path}: Open-Sora's DiT and Latte have the same keys: say which with --family")
    return families[asked or "dit"]


def _model(
    family: Family, weights: Mapping[str, Tensor], file: WeightsFile, trained: Trained, num_heads: int | None
) -> ModelConfig:
    try:
        facts = family.facts(weights)
    except ValueError as error:
        raise WeightsError(f"{file.path}: not whole weights: {error}") from None
    _check_facts(family, file)
    facts["num_heads"] = _heads(file, facts["hidden_size"], facts.get("num_heads"), num_heads)
    facts |= {key: value for key, value in family.from_tables(trained).items() if value is not None}
    model: ModelConfig = replace(family.config(), **{**facts, **_known(family.config, file.facts)})
    return model


def _check_facts(family: Family, file: WeightsFile) -> None:
    """Raise WeightsError where what comes with the file is not of the type that the model's config has there."""
    usual = family.config()
    for key, value in file.facts.items():
        expected = type(getattr(usual, key, value))
        kinds = {tuple: (list, tuple), float: (int, float)}.get(expected, (expected,))
        if type(value) not in kinds:
            raise WeightsError(f"{file.path}: it says {key} = {value!r} of its model: expected {EXPECTED[expected]}")


def _heads(file: WeightsFile, width: int, shown: int | None, asked: int | None) -> int:
    """`shown`: what its shapes tell."""
    told = file.facts.get("num_heads", shown)
    if asked is not None and told not in (None, asked):
        raise WeightsError(f"--num-heads {asked}: {file.path} was made with {told}")
    heads = asked if asked is not None else told or HEADS_BY_WIDTH.get(width)
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
