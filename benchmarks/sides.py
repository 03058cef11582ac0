"""The models that `benchmarks.train_step` compares, of equal width, depth and tokens.

ours      opensora_repro.models.stdit, as training builds it
plain     benchmarks.plain_stdit with the same weights: naive attention, nothing fused; what the original runs
          where none of its compiled extensions is installed
Latte     diffusers' LatteTransformer3DModel; of `depth` spatial and `depth` temporal blocks, each with its MLP
PixArt    diffusers' PixArtTransformer2DModel, frame by frame: no attention over time

Captions have all their tokens: no side gains by leaving out what others compute on padding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from opensora_repro.models.config import STDiTConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

Forward = Callable[["Tensor", "Tensor", "Tensor", "Tensor | None"], "Tensor"]
Module = TypeVar("Module", bound="nn.Module")
Batch = tuple["Tensor", "Tensor", "Tensor", "Tensor | None"]  # latents, timesteps, text, mask


@dataclass(frozen=True)
class Sizes:
    """Latents are [batch, 4, frames, rows, columns]; heads share the width."""

    hidden_size: int = 384
    num_heads: int = 6
    depth: int = 6
    caption_channels: int = 384
    caption_tokens: int = 120
    batch: int = 1
    frames: int = 16
    rows: int = 32
    columns: int = 32

    @property
    def config(self) -> STDiTConfig:
        return STDiTConfig(
            hidden_size=self.hidden_size, depth=self.depth, num_heads=self.num_heads,
            caption_channels=self.caption_channels, model_max_length=self.caption_tokens,
        )  # fmt: skip

    @property
    def latents(self) -> tuple[int, int, int, int, int]:
        return (self.batch, 4, self.frames, self.rows, self.columns)

    @property
    def tokens(self) -> int:
        return self.batch * self.frames * (self.rows // 2) * (self.columns // 2)


@dataclass(frozen=True)
class Side:
    """`forward` takes a batch and returns [B, 8, T, H, W]."""

    model: nn.Module
    forward: Forward


def random_weights(model: Module) -> Module:
    """The model, random also where a new one has zeros."""
    import torch

    for parameter in model.parameters():
        if not parameter.is_meta and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_ours(sizes: Sizes) -> Side:
    import torch

    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    model = random_weights(STDiT(sizes.config))
    return Side(model.train(), model)


def build_plain(sizes: Sizes) -> Side:
    from benchmarks.plain_stdit import PlainSTDiT

    model = PlainSTDiT(sizes.config, sizes.latents[1:])
    model.load_state_dict(build_ours(sizes).model.state_dict())
    return Side(model.train(), model)


def build_latte(sizes: Sizes) -> Side:
    model: Any = _diffusers().LatteTransformer3DModel(**_diffusers_config(sizes), video_length=sizes.frames)

    def forward(latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = model(latents, timestep, text, return_dict=False)[0]
        return output

    return Side(model.train(), forward)


def build_pixart(sizes: Sizes) -> Side:
    model: Any = _diffusers().PixArtTransformer2DModel(**_diffusers_config(sizes))

    def forward(latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        frames = latents.shape[2]
        images = latents.transpose(1, 2).flatten(0, 1)
        each = [value.repeat_interleave(frames, dim=0) for value in (text, timestep)]
        output: Tensor = model(images, *each, return_dict=False)[0]
        return output.unflatten(0, (-1, frames)).transpose(1, 2)

    return Side(model.train(), forward)


def _diffusers() -> Any:
    # It imports bitsandbytes where that is installed, which then warns of a kernel that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers

    return diffusers


def _diffusers_config(sizes: Sizes) -> dict[str, Any]:
    """As the published PixArt and Latte are configured, at other sizes."""
    if sizes.rows != sizes.columns:
        raise ValueError(f"diffusers' position tables are of square pictures, got {sizes.rows}x{sizes.columns}")
    return {
        "num_attention_heads": sizes.num_heads, "attention_head_dim": sizes.hidden_size // sizes.num_heads,
        "in_channels": 4, "out_channels": 8, "num_layers": sizes.depth, "cross_attention_dim": sizes.hidden_size,
        "attention_bias": True, "sample_size": sizes.rows, "patch_size": 2, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "caption_channels": sizes.caption_channels,
    }  # fmt: skip


SIDES: dict[str, Callable[[Sizes], Side]] = {
    "ours": build_ours,
    "plain": build_plain,
    "Latte": build_latte,
    "PixArt": build_pixart,
}


def inputs(sizes: Sizes, *, padded: bool = False) -> Batch:
    """A random batch; `padded`: captions of different length, the rest of them masked."""
    import torch

    length = sizes.caption_tokens
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, length + 1, (sizes.batch, 1), generator=generator) if padded else length
    return (
        torch.randn(*sizes.latents, generator=generator),
        torch.rand(sizes.batch, generator=generator) * 1000,
        torch.randn(sizes.batch, length, sizes.caption_channels, generator=generator),
        torch.arange(length)[None].expand(sizes.batch, length) < lengths,
    )


def forward_pass(side: Side, batch: Batch) -> Callable[[], None]:
    import torch

    def forward() -> None:
        with torch.inference_mode():
            side.forward(*batch)

    return forward


def training_step(side: Side, batch: Batch) -> Callable[[], None]:
    """Noise prediction loss, backward, and torch's fused AdamW on every side: the models differ, not the optimizers."""
    import torch

    from opensora_repro.config import OptimConfig
    from opensora_repro.training.optim import build_optimizer

    optimizer = build_optimizer(side.model, OptimConfig(lr=1e-5))
    target = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(2))

    def step() -> None:
        loss = (side.forward(*batch)[:, :4] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CALLS: dict[str, Callable[[Side, Batch], Callable[[], None]]] = {
    "forward": forward_pass,
    "training step": training_step,
}


def model_flops(name: str, sizes: Sizes) -> dict[str, dict[str, int | None]]:
    """FLOPs of a forward pass and of a step's forward and backward: by torch's counter, and by the planner's formula.

    The counter follows the model's own operations on tensors without data, so that counting costs nothing. The
    formula is of STDiT, ours and the plain one.
    """
    import torch

    from benchmarks.limits import counted_flops
    from opensora_repro.planning.flops import forward_products
    from opensora_repro.planning.sizes import token_grid

    with torch.device("meta"):
        side = SIDES[name](sizes)
        side.model.to("meta")  # what the model has put on the CPU by itself
        text = torch.empty(sizes.batch, sizes.caption_tokens, sizes.caption_channels)
        # No mask means all tokens; nobody could look into one that has no data.
        batch = (torch.empty(sizes.latents), torch.empty(sizes.batch), text, None)
        with torch.no_grad():
            forward = counted_flops(lambda: side.forward(*batch))
        training = counted_flops(lambda: side.forward(*batch).sum().backward())
    formula: dict[str, int | None] = {"forward": None, "training step": None}
    if name in ("ours", "plain"):
        products = forward_products(sizes.config, token_grid(sizes.config, sizes.latents[1:]))
        formula = {
            "forward": sizes.batch * products.forward_flops,
            "training step": sizes.batch * products.training_flops,
        }
    counted = {"forward": forward, "training step": training}
    return {what: {"counted": counted[what], "formula": formula[what]} for what in CALLS}
