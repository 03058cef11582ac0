"""PixArt and DiT weights between their published layout and diffusers', tensor by tensor.

"Published" are the keys of the .pth files of PixArt-alpha and facebookresearch/DiT, with the patch kernel as our models
hold it, [D, C, 1, p, p]; diffusers' are those of `PixArtTransformer2DModel` and `DiTTransformer2DModel`. Values never
change: a joined weight is split along its rows into views, and joined again by one copy.

The same weights mean the same model, with these exceptions:
- PixArt: the timestep's sinusoid equals ours (cosines first, `downscale_freq_shift=0`), and so do all layers. diffusers
  stretches positions to `sample_size // patch_size` steps an axis, which is our `base_size`; with `base_size=0` the two
  agree only on latents that cover as many places as the config's square, of whatever aspect ratio.
- DiT: diffusers' sinusoid has `downscale_freq_shift=1`, frequencies 10000^(-i/127) where the published model has
  10000^(-i/128), so its outputs differ from facebookresearch/DiT's. Its norm before the MLP has by default
  `norm_eps=1e-5`, the published model 1e-6, which `dit_diffusers_config` says. Away from the config's `sample_size` it
  stretches positions, where ours count on.

diffusers keeps no null caption: `y_embedder.y_embedding` is left out on the way there and absent on the way back.
Position tables follow from the config: they are left out on the way there; those that old diffusers files carry come
back as `pos_embed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora_repro.models.config import DiTConfig, ModelConfig, STDiTConfig

# A published module, or a lone parameter, and what diffusers calls it; several names: the rows are split among them.
# `#` stands for the block's number.
PIXART_NAMES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "blocks.#.scale_shift_table": ("transformer_blocks.#.scale_shift_table",),
    "blocks.#.attn.qkv": tuple(f"transformer_blocks.#.attn1.to_{part}" for part in "qkv"),
    "blocks.#.attn.proj": ("transformer_blocks.#.attn1.to_out.0",),
    "blocks.#.cross_attn.q_linear": ("transformer_blocks.#.attn2.to_q",),
    "blocks.#.cross_attn.kv_linear": tuple(f"transformer_blocks.#.attn2.to_{part}" for part in "kv"),
    "blocks.#.cross_attn.proj": ("transformer_blocks.#.attn2.to_out.0",),
    "blocks.#.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "blocks.#.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "final_layer.scale_shift_table": ("scale_shift_table",),
    "final_layer.linear": ("proj_out",),
}
# The embedders of timestep and label, which diffusers repeats in every block
DIT_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
FIRST_EMBEDDER = "transformer_blocks.0.norm1.emb."
REPEATED_EMBEDDER = re.compile(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.")
DIT_NAMES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    **{ours: (FIRST_EMBEDDER + theirs,) for ours, theirs in DIT_EMBEDDERS.items()},
    "blocks.#.adaLN_modulation.1": ("transformer_blocks.#.norm1.linear",),
    "blocks.#.attn.qkv": tuple(f"transformer_blocks.#.attn1.to_{part}" for part in "qkv"),
    "blocks.#.attn.proj": ("transformer_blocks.#.attn1.to_out.0",),
    "blocks.#.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "blocks.#.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "final_layer.adaLN_modulation.1": ("proj_out_1",),
    "final_layer.linear": ("proj_out_2",),
}
KERNEL = "x_embedder.proj.weight"
TABLE, THEIR_TABLE = "pos_embed", "pos_embed.pos_embed"
NOT_IN_DIFFUSERS = (TABLE, "pos_embed_temporal", "y_embedder.y_embedding")

# What diffusers lets a config say and the published models fix
COMMON_CONFIG: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
}
PIXART_NORM, DIT_NORM = "ada_norm_single", "ada_norm_zero"


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def pixart_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published layout of a PixArtTransformer2DModel's tensors, without the null caption.

    A lazy mapping is read tensor by tensor. Raises ValueError at a tensor that is foreign or incomplete.
    """
    return _from_diffusers(tensors, PIXART_NAMES)


def pixart_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a PixArtTransformer2DModel's tensors, views of the published ones; the null caption is left out.

    Raises ValueError at a tensor that PixArt does not have, such as STDiT's temporal attention.
    """
    return dict(_to_diffusers(tensors, PIXART_NAMES))


def dit_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published layout of a DiTTransformer2DModel's tensors.

    Raises ValueError at a tensor that is foreign or incomplete, and when a block's embedders of timestep and label
    differ from the first block's, which is all that the published layout can hold.
    """
    kept = [key for key in tensors if not REPEATED_EMBEDDER.match(key)]
    for key in tensors.keys() - set(kept):
        first = REPEATED_EMBEDDER.sub(FIRST_EMBEDDER, key)
        if first not in tensors or not torch.equal(tensors[key], tensors[first]):
            raise ValueError(f"{key} differs from block 0's; the published layout has one such embedder for all blocks")
    return _from_diffusers(tensors, DIT_NAMES, kept)


def dit_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a DiTTransformer2DModel's tensors: views of the published ones, the embedders copied for every block.

    Raises ValueError at a tensor that DiT does not have.
    """
    blocks = sorted({int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))})
    result = {}
    for key, tensor in _to_diffusers(tensors, DIT_NAMES):
        result[key] = tensor
        if key.startswith(FIRST_EMBEDDER):
            name = key.removeprefix(FIRST_EMBEDDER)
            result.update({f"transformer_blocks.{block}.norm1.emb.{name}": tensor.clone() for block in blocks if block})
    return result


def _to_diffusers(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield diffusers' keys and tensors."""
    for key in tensors:
        if key in NOT_IN_DIFFUSERS:
            continue
        name = _split_key(key, "blocks", names)
        if name is None:
            raise ValueError(f"{key}: diffusers' model has no such tensor")
        parts = [part.replace("#", name.block) + name.suffix for part in names[name.module]]
        tensor = tensors[key]
        if key == KERNEL and tensor.ndim == 5:
            if tensor.shape[2] != 1:
                raise ValueError(f"{key}: a patch of {tensor.shape[2]} frames; diffusers' model is for images")
            tensor = tensor.squeeze(2)
        yield from zip(parts, tensor.chunk(len(parts)), strict=True)


def _from_diffusers(
    tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], keys: list[str] | None = None
) -> dict[str, Tensor]:
    owner = {part: module for module, parts in names.items() for part in parts}
    sources: dict[str, list[str]] = {}  # published key -> diffusers' keys, in the order of the rows
    for key in tensors if keys is None else keys:
        if key == THEIR_TABLE:
            sources[TABLE] = [key]
            continue
        name = _split_key(key, "transformer_blocks", owner)
        if name is None:
            raise ValueError(f"{key}: not a tensor of the diffusers model that was expected")
        module = owner[name.module]
        parts = [part.replace("#", name.block) + name.suffix for part in names[module]]
        sources[module.replace("#", name.block) + name.suffix] = parts

    result = {}
    for key, parts in sources.items():
        missing = next((part for part in parts if part not in tensors), None)
        if missing is not None:
            raise ValueError(f"{missing} is missing, a part of {key}")
        result[key] = tensors[parts[0]] if len(parts) == 1 else torch.cat([tensors[part] for part in parts])
    if KERNEL in result:
        result[KERNEL] = result[KERNEL].unsqueeze(2)
    return result


class _Name(NamedTuple):
    module: str  # a key of the table, its block's number replaced by #
    block: str
    suffix: str  # ".weight", ".bias" or nothing


def _split_key(key: str, blocks: str, modules: Mapping[str, Any]) -> _Name | None:
    """Find the table's module that `key` belongs to."""
    match = re.match(rf"{blocks}\.(\d+)\.", key)
    block = match[1] if match else ""
    pattern = f"{blocks}.#.{key[match.end() :]}" if match else key
    for name in (key, pattern):  # the first block's embedders are named in full
        module, _, kind = name.rpartition(".")
        if name in modules:
            return _Name(name, block, "")
        if module in modules and kind in ("weight", "bias"):
            return _Name(module, block, f".{kind}")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def pixart_diffusers_config(model: STDiTConfig, sample_size: int) -> dict[str, Any]:
    """Return PixArtTransformer2DModel's config.json; `sample_size` is the side of the square latents.

    diffusers' MLP is always four times as wide as the tokens. Raises ValueError for what it has no place for.
    """
    return {
        "_class_name": "PixArtTransformer2DModel",
        **COMMON_CONFIG,
        **_sizes(model, sample_size),
        "attention_type": "default",
        "caption_channels": model.caption_channels,
        "cross_attention_dim": model.hidden_size,
        "interpolation_scale": model.space_scale,
        "norm_eps": 1e-6,
        "norm_type": PIXART_NORM,
        "use_additional_conditions": model.size_conditioning,
    }


def dit_diffusers_config(model: DiTConfig, sample_size: int) -> dict[str, Any]:
    """Return DiTTransformer2DModel's config.json; the null label is not counted there. Raises as PixArt's."""
    return {
        "_class_name": "DiTTransformer2DModel",
        **COMMON_CONFIG,
        **_sizes(model, sample_size),
        "norm_eps": 1e-6,
        "norm_type": DIT_NORM,
        "num_embeds_ada_norm": model.num_classes,
    }


def pixart_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a PixArtTransformer2DModel's config.json says, named as STDiTConfig's fields.

    Also `size_conditioning` (PixArt-1024-MS), `sample_size` (latents) and `base_size`, the steps that positions are
    stretched to along either axis. Older configs name the class Transformer2DModel. Raises ValueError if this is not
    PixArt's.
    """
    facts = _common_facts(
        {"out_channels": 8, "sample_size": 128, **config},
        {"norm_type": PIXART_NORM, "norm_eps": 1e-6, "attention_type": "default"},
    )
    sample_size = facts["sample_size"]
    space_scale = config.get("interpolation_scale")
    size_conditioning = config.get("use_additional_conditions")
    if config.get("caption_channels") is None:
        raise ValueError("config.json has no caption_channels: not PixArt's")
    return {
        **facts,
        "base_size": sample_size // facts["patch_size"][1],
        "caption_channels": config["caption_channels"],
        "temporal_attention": False,
        "space_scale": float(max(sample_size // 64, 1) if space_scale is None else space_scale),
        "size_conditioning": sample_size == 128 if size_conditioning is None else size_conditioning,
    }


def dit_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a DiTTransformer2DModel's config.json says, named as DiTConfig's fields, and `sample_size` (latents).

    Raises ValueError if this is not DiT's.
    """
    facts = _common_facts({"out_channels": None, "sample_size": 32, **config}, {"norm_type": DIT_NORM})
    return {**facts, "num_classes": config.get("num_embeds_ada_norm", 1000)}


def diffusers_kind(config: Mapping[str, Any]) -> str:
    """Return "pixart" or "dit", whose config.json this is; raises ValueError if neither's."""
    kinds = {PIXART_NORM: "pixart", DIT_NORM: "dit"}
    classes = {"PixArtTransformer2DModel": "pixart", "DiTTransformer2DModel": "dit"}
    kind = classes.get(config.get("_class_name", "")) or kinds.get(config.get("norm_type", ""))
    if kind is None:
        name = str(config.get("_class_name") or config.get("model_type"))
        use = ": vae.path takes it" if "autoencoder" in name.lower() else ""
        raise ValueError(f"config.json describes {name}, neither PixArt nor DiT{use}")
    return kind


def _sizes(model: ModelConfig, sample_size: int) -> dict[str, Any]:
    frames, rows, cols = model.patch_size
    if frames != 1 or rows != cols:
        raise ValueError(f"patch_size={model.patch_size}: diffusers' models have square patches of one frame")
    if model.hidden_size % model.num_heads:
        raise ValueError(f"num_heads={model.num_heads} does not divide hidden_size={model.hidden_size}")
    return {
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels,
        "num_attention_heads": model.num_heads,
        "num_layers": model.depth,
        "out_channels": model.out_channels,
        "patch_size": rows,
        "sample_size": sample_size,
    }


def _common_facts(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Read what both models' configs say, but for what is `fixed`; absent keys have diffusers' defaults."""
    fixed = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False, **fixed}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json says {key}={config[key]!r}, the published model has {value!r}")
    in_channels = config.get("in_channels", 4)
    out_channels = config["out_channels"] or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"config.json says out_channels={out_channels}, expected {in_channels} or {2 * in_channels}")
    num_heads = config.get("num_attention_heads", 16)
    patch_size = config.get("patch_size", 2)
    return {
        "in_channels": in_channels,
        "patch_size": (1, patch_size, patch_size),
        "hidden_size": num_heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "num_heads": num_heads,
        "mlp_ratio": 4.0,
        "pred_sigma": out_channels == 2 * in_channels,
        "sample_size": config["sample_size"],
    }
