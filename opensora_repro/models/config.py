"""Model hyper-parameters, importable without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
# DiT's models by name (arXiv 2212.09748, table 1), PixArt's and STDiT's alike: hidden_size, depth, num_heads
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def is_costly(products: int, width: int) -> bool:
    """Whether "selective" checkpointing keeps a result, of which each value took so many multiplications.

    It does where they are more than in a projection of `width` channels: the MLP's second matrix, and attention over
    more than half as many tokens as there are channels.
    """
    return products > width


def block_layers(cfg: TrainedConfig, spans: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Channels in and out of each linear layer of a block with these self-attentions, by its name there."""
    dim, wide = cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio)
    found: dict[str, tuple[int, int]] = {}
    for name in ("attn", "attn_temp")[: len(spans)]:
        found |= {f"{name}.qkv": (dim, 3 * dim), f"{name}.proj": (dim, dim)}
    found |= {"cross_attn.q_linear": (dim, dim), "cross_attn.kv_linear": (dim, 2 * dim), "cross_attn.proj": (dim, dim)}
    return found | {"mlp.fc1": (dim, wide), "mlp.fc2": (wide, dim)}


def targeted_layers(cfg: TrainedConfig, targets: Sequence[str], spans: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Those of `block_layers` that `lora.targets` name, by all of their names, the begin or the end; none: all."""
    layers = block_layers(cfg, spans)
    return {k: v for k, v in layers.items() if not targets or any(f".{target}." in f".{k}." for target in targets)}


@dataclass(frozen=True)
class STDiTConfig:
    """PixArt (`temporal_attention=False`) or STDiT (`temporal_attention=True`).

    The defaults are the published XL/2 size. Field names follow Open-Sora 1.0's constructor; latent size and frame
    count are not here because the model takes any at call time.
    """

    architecture: str = "stdit"  # "stdit" (PixArt, too), "stdit2" (Open-Sora 1.1), "stdit3" (1.2): whose keys follow
    in_channels: int = 4  # channels of the latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows and columns in a token
    hidden_size: int = 1152  # channels of a token
    depth: int = 28  # blocks
    num_heads: int = 16  # attention heads
    mlp_ratio: float = 4.0  # width of the MLP over hidden_size
    caption_channels: int = 4096  # channels of the text encoder
    model_max_length: int = 120  # caption tokens; longer captions are cut
    class_dropout_prob: float = 0.1  # share of training samples that see the null caption, for guidance
    pred_sigma: bool = True  # also predict the variance (IDDPM): twice the output channels; flow models need none
    space_scale: float = 1.0  # spatial position = index / space_scale
    time_scale: float = 1.0  # temporal position = index / time_scale
    temporal_attention: bool = True  # true: STDiT; false: PixArt
    no_temporal_pos_emb: bool = True  # PixArt only: do not add a temporal table to the tokens
    size_conditioning: bool = False  # PixArt-1024-MS: also told the picture's size and aspect ratio
    base_size: int = 0  # PixArt only: positions stretch to so many steps an axis (1024-MS: 64); 0: root of the places

    # What any code may ask of a model's config. Without a type they are no fields, so no keys of a config file.
    conditioning = "t5"  # how prompts are read: "t5", many tokens; "clip", one pooled token; "class", a number
    num_classes = 0
    square = False  # whether it makes squares alone
    conditions = ()  # what forward is told of each sample beside its caption and timestep, by name
    qk_norm = qk_norm_legacy = False  # whether queries and keys are normed, and after the rotation
    rotary = False  # whether temporal attention turns queries and keys, in place of a table of positions
    input_sq_size = 0  # see STDiT2Config; 0: positions count on, whatever the size
    freeze_y_embedder = only_train_temporal = skip_y_embedder = False  # see STDiT3Config

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def block_spans(self) -> tuple[tuple[str, ...], ...]:
        """What the self-attentions of each kind of block attend over; such blocks take turns, `depth` times."""
        return (("space", "time"),) if self.temporal_attention else (("space_time",),)

    def stretched_to(self, places: int) -> int | None:
        """Steps that either axis's positions are stretched to in a frame of so many places; None: they count on."""
        return None if self.temporal_attention else self.base_size or math.isqrt(places)


@dataclass(frozen=True)
class STDiT2Config:
    """Open-Sora 1.1's network; the defaults are the published XL/2 size, names as in its constructor."""

    architecture: str = "stdit2"  # Open-Sora 1.1's
    in_channels: int = 4  # channels of the latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows and columns in a token
    hidden_size: int = 1152  # channels of a token
    depth: int = 28  # blocks
    num_heads: int = 16  # attention heads
    mlp_ratio: float = 4.0  # width of the MLP over hidden_size
    caption_channels: int = 4096  # channels of the text encoder
    model_max_length: int = 200  # caption tokens; longer captions are cut
    class_dropout_prob: float = 0.1  # share of training samples that see the null caption, for guidance
    pred_sigma: bool = True  # also predict the variance (IDDPM): twice the output channels; flow models need none
    qk_norm: bool = True  # RMSNorm of queries and keys
    qk_norm_legacy: bool = True  # temporal attention: rotary before the norm, as the published weights have it
    input_sq_size: int = 512  # side in pixels of the square at which spatial positions count tokens
    freeze_y_embedder: bool = False  # do not train the caption MLP

    # As STDiTConfig has them
    conditioning = "t5"
    num_classes = 0
    square = False
    temporal_attention = True
    space_scale = time_scale = 1.0
    base_size = 0
    size_conditioning = only_train_temporal = skip_y_embedder = False
    rotary = True
    block_spans = (("space", "time"),)
    conditions = ("fps", "height", "width", "num_frames", "ar")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def stretched_to(self, places: int) -> None:
        return None


@dataclass(frozen=True)
class STDiT3Config:
    """Open-Sora 1.2's network; the defaults are the published XL/2 size, names as in its constructor."""

    architecture: str = "stdit3"  # Open-Sora 1.2's
    in_channels: int = 4  # channels of the latents
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows and columns in a token
    hidden_size: int = 1152  # channels of a token
    depth: int = 28  # pairs of a spatial and a temporal block
    num_heads: int = 16  # attention heads
    mlp_ratio: float = 4.0  # width of the MLP over hidden_size
    caption_channels: int = 4096  # channels of the text encoder
    model_max_length: int = 300  # caption tokens; longer captions are cut
    class_dropout_prob: float = 0.1  # share of training samples that see the null caption, for guidance
    pred_sigma: bool = True  # twice the output channels; flow leaves the second half unused, published weights have it
    qk_norm: bool = True  # RMSNorm of queries and keys
    input_sq_size: int = 512  # side in pixels of the square at which spatial positions count tokens
    freeze_y_embedder: bool = False  # do not train the caption MLP
    skip_y_embedder: bool = False  # captions come embedded and packed, [1, tokens, hidden_size]
    only_train_temporal: bool = False  # train the temporal blocks alone

    # As STDiT2Config has them
    conditioning = "t5"
    num_classes = 0
    square = False
    temporal_attention = True
    space_scale = time_scale = 1.0
    base_size = 0
    size_conditioning = qk_norm_legacy = False
    rotary = True
    block_spans = (("space",), ("time",))
    conditions = ("fps", "height", "width")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def stretched_to(self, places: int) -> None:
        return None


@dataclass(frozen=True)
class DiTConfig:
    """DiT (`factorised=False`) or Latte (`factorised=True`).

    The defaults are the published DiT-XL/2 for the classes of ImageNet. Field names follow Open-Sora 1.0's
    constructor, but for `condition` and `num_classes`, its "label_1000".
    """

    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows, columns a token covers
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    condition: str = "label"  # "label", a class number, or "text", one pooled token
    num_classes: int = 1000  # label only
    caption_channels: int = 512  # text only; CLIP ViT-B/32 has 512
    pred_sigma: bool = True  # also predict the variance: twice the output channels
    factorised: bool = False  # even blocks attend within frames, odd ones over time; else all over all tokens
    no_temporal_pos_emb: bool = True  # DiT only: do not add a temporal table to the tokens

    # As STDiTConfig has them
    model_max_length = 1
    space_scale = time_scale = 1.0
    base_size = 0
    square = True
    conditions = ()

    @property
    def conditioning(self) -> str:
        return "class" if self.condition == "label" else "clip"

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def stretched_to(self, places: int) -> None:
        return None


TrainedConfig = STDiTConfig | STDiT2Config | STDiT3Config  # what a run's [model] may be
ModelConfig = TrainedConfig | DiTConfig
# By what model.architecture says
ARCHITECTURES: dict[str, type[TrainedConfig]] = {
    config().architecture: config for config in (STDiTConfig, STDiT2Config, STDiT3Config)
}
