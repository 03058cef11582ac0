"""Tensor parallelism: linear layers cut by columns or rows over a group (Megatron-LM, arXiv:1909.08053).

A column-parallel layer makes a share of the output channels from the whole input; the row-parallel one after it takes
that share and adds the partial results up. So attention (by heads) and MLPs need one all-reduce each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_repro.models.layers import RMS_NORM_EPS, RMSNorm


@dataclass(frozen=True)
class Cut:
    """How one rank's part of a tensor is cut from the whole.

    Along `dim`, the whole is `parts` blocks of one size (queries, keys and values, say); every rank holds an equal
    share of each block, one block's after the other's.
    """

    dim: int
    parts: int
    rank: int
    size: int

    def take(self, whole: Tensor) -> Tensor:
        blocks = whole.unflatten(self.dim, (self.parts, self.size, -1))
        return blocks.select(self.dim + 1, self.rank).flatten(self.dim, self.dim + 1).contiguous()

    def join(self, pieces: list[Tensor]) -> Tensor:
        """Inverse of `take`, from all ranks' pieces."""
        blocks = [piece.unflatten(self.dim, (self.parts, -1)) for piece in pieces]
        return torch.stack(blocks, dim=self.dim + 1).flatten(self.dim, self.dim + 2)


class ColumnLinear(nn.Linear):
    """A share of a linear layer's output channels."""

    group: dist.ProcessGroup
    parts: int

    @classmethod
    def from_native_module(cls, native: nn.Linear, process_group: Any, parts: int = 1) -> ColumnLinear:
        """Cut the layer in place of `native`; the parameters stay the same objects, so optimizers keep them."""
        layer = _adopt(cls, native, process_group)
        layer.parts = parts
        return _cut_weights(layer, native)

    def cuts(self) -> dict[str, Cut]:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return {"weight": Cut(0, self.parts, rank, size), "bias": Cut(0, self.parts, rank, size)}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_SumOfGradients.apply(x, self.group), self.weight, self.bias)


class RowLinear(nn.Linear):
    """A share of a linear layer's input channels; the output is whole on every rank."""

    group: dist.ProcessGroup

    @classmethod
    def from_native_module(cls, native: nn.Linear, process_group: Any) -> RowLinear:
        return _cut_weights(_adopt(cls, native, process_group), native)

    def cuts(self) -> dict[str, Cut]:
        return {"weight": Cut(1, 1, dist.get_rank(self.group), dist.get_world_size(self.group))}

    def forward(self, x: Tensor) -> Tensor:
        # Added by the products themselves, which are rounded afterwards: added to their sum, it would be rounded again.
        bias = _Share.apply(self.bias, dist.get_world_size(self.group))
        out: Tensor = _Sum.apply(F.linear(x, self.weight, bias), self.group)
        return out


class HeadNorm(RMSNorm):
    """The norm of queries' or keys' heads, of which each rank has its own; the weight is all heads' and stays whole."""

    group: dist.ProcessGroup

    @classmethod
    def from_native_module(cls, native: RMSNorm, process_group: Any) -> HeadNorm:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight, layer.group = native.weight, _only(process_group)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = _SumOfGradients.apply(self.weight, self.group)
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), RMS_NORM_EPS)


def tensor_cuts(model: nn.Module) -> dict[str, Cut]:
    """How each cut parameter was cut, by its name."""
    return {
        f"{path}.{name}": cut
        for path, module in model.named_modules()
        if isinstance(module, (ColumnLinear, RowLinear))
        for name, cut in module.cuts().items()
    }


def _adopt(cls: Any, native: nn.Linear, process_group: Any) -> Any:
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.weight, layer.bias, layer.group = native.weight, native.bias, _only(process_group)
    return layer


def _only(process_group: Any) -> Any:
    """The group, of which ColossalAI may give a list."""
    if isinstance(process_group, (list, tuple)):
        (process_group,) = process_group
    return process_group


def _cut_weights(layer: Any, native: nn.Linear) -> Any:
    for name, cut in layer.cuts().items():
        parameter = getattr(layer, name)
        parameter.data = cut.take(parameter.data)
    layer.out_features, layer.in_features = layer.weight.shape
    return layer


class _SumOfGradients(torch.autograd.Function):
    """Forward: the input itself. Backward: what all ranks' shares say of it, added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Share(torch.autograd.Function):
    """Forward: 1/size of the whole, to be added up over the ranks. Backward: the gradient of the whole, on each."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, size: int) -> Tensor:
        return whole / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Sum(torch.autograd.Function):
    """Forward: the ranks' partial results added up. Backward: the gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
