"""The model families: all that tells one from another outside its own file, a row each.

To add a family: write the network in models/NAME.py and its config, which has what STDiTConfig's last lines name, in
models/config.py (and in `ModelConfig` there); the formula of its multiplications in planning/flops.py (`PRODUCTS`); and
a row below. Loading, recognising, converting and sampling its weights follow from these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opensora_repro.config import DataConfig, DiffusionConfig, SampleConfig, VaeConfig
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.models.config import DiTConfig, ModelConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.stdit2 import STDiT2
from opensora_repro.models.stdit3 import STDiT3
from opensora_repro.weights.diffusers_layout import (
    dit_diffusers_config,
    dit_from_diffusers,
    dit_to_diffusers,
    pixart_diffusers_config,
    pixart_from_diffusers,
    pixart_to_diffusers,
)
from opensora_repro.weights.files import NULL_CAPTION, WeightsError
from opensora_repro.weights.layouts import (
    KERNEL,
    SIZE_KEY,
    Layout,
    Trained,
    dit_facts,
    stdit2_facts,
    stdit3_facts,
    stdit_facts,
)

Network = CaptionedModel | DiT


@dataclass(frozen=True)
class Diffusers:
    """How diffusers has a family: its config.json from ours and the latents' side, its tensors from ours."""

    config: Callable[[Any, int], dict[str, Any]]
    tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Start:
    """How a model begins from another family's weights."""

    lacks: tuple[str, ...]  # patterns of the keys that these lack, all of them
    renames: Mapping[str, str] = field(default_factory=dict)  # how keys begin there, and here
    fits_captions: bool = False  # whether the null caption is cut, or lengthened by its last row, to the model's length


@dataclass(frozen=True)
class Family:
    """A published kind of model. Of the families that share a config class, the first whose `has` says so it is."""

    name: str
    config: type[Any]
    network: type[Any]  # what a config makes
    has: Callable[[Any], bool]  # whether a config of its class is this family's
    layouts: tuple[Layout, ...]  # the first that fits a file is its
    facts: Callable[[Mapping[str, Tensor]], dict[str, Any]]  # fields of the config that shapes tell
    sampling: SampleConfig  # sampler, steps and guidance that its release uses
    from_tables: Callable[[Trained], dict[str, Any]]  # fields of the config that stored position tables tell
    frames: int = 1  # of a sample, where a file does not tell
    trains: bool = False  # whether our stages start from its weights
    starts_from: Mapping[str, Start] = field(default_factory=dict)  # by name, others whose weights it may start from
    table: str = "pos_embed"  # what Open-Sora calls the spatial position table; "": it has none
    data: DataConfig | None = None  # what its release samples; None: by position tables, else squares
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    aesthetic: float | None = None  # score that its release adds to prompts
    diffusers: Diffusers | None = None
    no_place: Mapping[str, str] = field(default_factory=dict)  # formats (export.py) that cannot hold it, and why


# Patterns of the keys of temporal attention
TEMPORAL_KEYS = r"blocks\.\d+\.attn_temp\.(qkv|proj)\.(weight|bias)"
_PIXART_KEYS = ("t_block.1.weight", "blocks.0.cross_attn.q_linear.weight", "blocks.0.scale_shift_table")
_TEMPORAL_KEY = "blocks.0.attn_temp.qkv.weight"
_STDIT2_KEYS = ("t_block_temp.1.weight", "fl_embedder.mlp.0.weight", _TEMPORAL_KEY)
_STDIT3_KEYS = ("t_block.1.weight", "fps_embedder.mlp.0.weight", "spatial_blocks.0.cross_attn.q_linear.weight")
_LINEAR = r"\.(weight|bias)"
# What 1.1's model has beside PixArt-1024-MS's tensors, and 1.2's beside PixArt-Sigma's
_OF_STDIT2 = (
    TEMPORAL_KEYS,
    r"blocks\.\d+\.attn(_temp)?\.[qk]_norm\.weight",
    r"blocks\.\d+\.scale_shift_table_temporal",
    rf"(fl|fps)_embedder\.mlp\.[02]{_LINEAR}",
    rf"t_block_temp\.1{_LINEAR}",
    r"rope\.freqs",
)
_OF_STDIT3 = (
    r"spatial_blocks\.\d+\.attn\.[qk]_norm\.weight",
    r"temporal_blocks\..+",
    rf"fps_embedder\.mlp\.[02]{_LINEAR}",
    r"rope\.freqs",
)
_DIT_KEYS = ("blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight")
_THEIR_PIXART_KEY = "adaln_single.linear.weight"
_THEIR_SIZE_KEY = "adaln_single.emb.resolution_embedder.linear_1.weight"
_THEIR_DIT_KEYS = ("proj_out_1.weight", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")
# diffusers' PixArt classes have no place for the null caption: pipelines encode the empty text instead.
_THEY_LACK = (re.escape(NULL_CAPTION),)
# Open-Sora's two have the same keys: only the code that made them tells them apart.
_DIT_OR_LATTE = Layout("Open-Sora DiT or Latte", _DIT_KEYS, ("temp_embed",))

_PIXART_SAMPLING = SampleConfig(sampler="dpm", steps=20, guidance=4.5)
_DIFFUSERS_PIXART = Diffusers(pixart_diffusers_config, pixart_to_diffusers)
_NO_TEMPORAL = "it has no place for temporal attention (a video model); use opensora or safetensors"
_NOT_PIXART = "these are DiT or Latte weights, expected PixArt's; use opensora or diffusers"
CLASSES_ONLY = "its DiT knows classes and single images only; use opensora or safetensors"

FAMILIES = (
    Family(
        name="stdit2",
        config=STDiT2Config,
        network=STDiT2,
        has=lambda cfg: True,
        layouts=(Layout("Open-Sora STDiT2", (*_PIXART_KEYS, *_STDIT2_KEYS)),),
        facts=stdit2_facts,
        sampling=SampleConfig(sampler="iddpm", steps=100, guidance=7.0, fps=8),  # every third frame of 24 a second
        from_tables=lambda found: {},
        frames=16,
        trains=True,
        starts_from={"pixart-ms": Start(_OF_STDIT2, fits_captions=True)},
        table="",
        data=DataConfig(num_frames=16, frame_interval=3, height=240, width=426),
        no_place={"pixart": _NO_TEMPORAL},
    ),
    Family(
        name="stdit3",
        config=STDiT3Config,
        network=STDiT3,
        has=lambda cfg: True,
        layouts=(Layout("Open-Sora STDiT3", _STDIT3_KEYS),),
        facts=stdit3_facts,
        sampling=SampleConfig(sampler="euler", steps=30, guidance=7.0, fps=24),
        from_tables=lambda found: {},
        frames=51,
        trains=True,
        starts_from={"pixart": Start(_OF_STDIT3, {"blocks.": "spatial_blocks."}, fits_captions=True)},
        table="",
        data=DataConfig(num_frames=51, frame_interval=1, height=240, width=426),
        diffusion=DiffusionConfig(objective="flow", schedule="open_sora_1_2"),
        vae=VaeConfig(path="hpcai-tech/OpenSora-VAE-v1.2", micro_batch_size=4),
        aesthetic=6.5,
        no_place={"pixart": _NO_TEMPORAL},
    ),
    Family(
        name="stdit",
        config=STDiTConfig,
        network=STDiT,
        has=lambda cfg: cfg.temporal_attention,
        layouts=(Layout("Open-Sora STDiT", (*_PIXART_KEYS, _TEMPORAL_KEY), (_STDIT2_KEYS[0],)),),
        facts=stdit_facts,
        sampling=SampleConfig(sampler="iddpm", steps=100, guidance=7.0),
        from_tables=lambda found: {"space_scale": found.space_scale, "time_scale": found.time_scale},
        frames=16,
        trains=True,
        starts_from={"pixart": Start((TEMPORAL_KEYS,))},
        no_place={"pixart": _NO_TEMPORAL},
    ),
    Family(
        name="pixart-ms",
        config=STDiTConfig,
        network=STDiT,
        has=lambda cfg: cfg.size_conditioning,
        layouts=(
            Layout("PixArt-alpha 1024-MS", (*_PIXART_KEYS, SIZE_KEY), (_TEMPORAL_KEY,), kernel_axes=4),
            Layout("Open-Sora PixArt-MS", (*_PIXART_KEYS, SIZE_KEY), (_TEMPORAL_KEY,)),
            Layout(
                "diffusers PixArt 1024-MS",
                (_THEIR_PIXART_KEY, _THEIR_SIZE_KEY),
                lacks=_THEY_LACK,
                to_ours=pixart_from_diffusers,
            ),
        ),
        facts=stdit_facts,
        sampling=_PIXART_SAMPLING,
        from_tables=lambda found: {"space_scale": found.space_scale, "base_size": found.rows},
        diffusers=_DIFFUSERS_PIXART,
    ),
    Family(
        name="pixart",
        config=STDiTConfig,
        network=STDiT,
        has=lambda cfg: True,
        layouts=(
            Layout("PixArt-alpha", _PIXART_KEYS, (_TEMPORAL_KEY, SIZE_KEY), kernel_axes=4),
            Layout("Open-Sora PixArt", _PIXART_KEYS, (_TEMPORAL_KEY, SIZE_KEY)),
            Layout(
                "diffusers PixArt",
                (_THEIR_PIXART_KEY,),
                (_THEIR_SIZE_KEY,),
                lacks=_THEY_LACK,
                to_ours=pixart_from_diffusers,
            ),
        ),
        facts=stdit_facts,
        sampling=_PIXART_SAMPLING,
        from_tables=lambda found: {"space_scale": found.space_scale},
        trains=True,
        diffusers=_DIFFUSERS_PIXART,
    ),
    Family(
        name="dit",
        config=DiTConfig,
        network=DiT,
        has=lambda cfg: not cfg.factorised,
        layouts=(
            Layout("DiT", _DIT_KEYS, ("pos_embed_temporal", "temp_embed"), kernel_axes=4),
            _DIT_OR_LATTE,
            Layout("diffusers DiT", _THEIR_DIT_KEYS, to_ours=dit_from_diffusers),
        ),
        facts=dit_facts,
        sampling=SampleConfig(sampler="iddpm", steps=250, guidance=4.0),
        from_tables=lambda found: {"factorised": False, "no_temporal_pos_emb": found.frames in (None, 1)},
        table="pos_embed_spatial",
        diffusers=Diffusers(dit_diffusers_config, dit_to_diffusers),
        no_place={"pixart": _NOT_PIXART},
    ),
    Family(
        name="latte",
        config=DiTConfig,
        network=DiT,
        has=lambda cfg: True,
        layouts=(Layout("Latte", (*_DIT_KEYS, "temp_embed")), _DIT_OR_LATTE),
        facts=dit_facts,
        sampling=SampleConfig(sampler="iddpm", steps=250, guidance=7.0),
        from_tables=lambda found: {"factorised": True, "no_temporal_pos_emb": True},
        frames=16,
        table="pos_embed_spatial",
        no_place={"pixart": _NOT_PIXART, "diffusers": CLASSES_ONLY},
    ),
)


def family_of(cfg: ModelConfig) -> Family:
    """The family of a model's config."""
    return next(family for family in FAMILIES if type(cfg) is family.config and family.has(cfg))


def empty_model(cfg: ModelConfig) -> Network:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return family_of(cfg).network(cfg)  # type: ignore[no-any-return]


# What the names of every autoencoder's weights begin with: image, temporal, diffusers' of videos
_AUTOENCODERS = ("encoder.conv_in.", "encoder.down_blocks.", "spatial_vae.", "temporal_vae.")


def recognise(tensors: Mapping[str, Tensor], where: str) -> Layout:
    """The layout by its keys. Raises WeightsError that names some of the keys of unknown weights."""
    kernel = tensors.get(KERNEL)
    for layout in (layout for family in FAMILIES for layout in family.layouts):
        marked = all(key in tensors for key in layout.marks) and not any(key in tensors for key in layout.absent)
        if marked and layout.kernel_axes in (None, None if kernel is None else kernel.ndim):
            return layout
    if any(key.removeprefix("vae.").startswith(_AUTOENCODERS) for key in tensors):
        raise WeightsError(f"{where}: an autoencoder's weights, which vae.path takes as a folder, not a model's")
    if any(key.startswith("encoder.block.0.") for key in tensors):
        raise WeightsError(f"{where}: a T5 encoder's weights, which text.path takes as a folder, not a model's")
    some = ", ".join(list(tensors)[:3])
    raise WeightsError(f"{where}: these are not PixArt, STDiT, DiT or Latte weights (its first keys: {some})")


def families_of(layout: Layout) -> dict[str, Family]:
    """By name the families whose files have this layout; several where keys do not tell."""
    return {family.name: family for family in FAMILIES if layout in family.layouts}


def start_of(layout: Layout, target: Family) -> Start | None:
    """How a model of that family begins from these weights, where they are another family's; else None."""
    sources = families_of(layout)
    if target.name in sources:
        return None
    return next((start for name, start in target.starts_from.items() if name in sources), None)


def fits(layout: Layout, target: Family) -> bool:
    """Whether these weights are for a model of that family: its own, or those of one that it starts from."""
    return target.name in families_of(layout) or start_of(layout, target) is not None


def architectures_from(family: Family) -> list[str]:
    """What `model.architecture` may be of models that our stages start from such weights."""
    takers = [taker for taker in FAMILIES if taker.trains and (taker is family or family.name in taker.starts_from)]
    return list(dict.fromkeys(taker.config().architecture for taker in takers))
