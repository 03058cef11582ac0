"""torch's FSDP2 behind the engine: weights, gradients, optimizer state and average all spread over the processes.

Every rank holds an equal share of each parameter's rows (its first axis) in float32: the masters. A part of a block,
such as an attention or an MLP, is gathered whole before it is used and freed after, what lies outside of the blocks
once a pass; its gradients are averaged in float32, and each rank keeps its rows of them.

In a run in bfloat16 those parts are gathered whose weights autocast would round, and as bfloat16: the same numbers in
half the traffic, and no second copy. What autocast leaves alone, such as the blocks' modulation tables, is gathered in
float32, so the run is that of the other engines.

FSDP takes a twin of the model. The model itself stays a plain one, which each rank can evaluate at its own pace, and
has weights only then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from opensora_repro.parallel.engine import TorchEngine

ROUNDED = (nn.Linear, nn.Conv3d)  # layers whose weights autocast rounds


class FsdpEngine(TorchEngine):
    """For two processes or more."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        mesh = init_device_mesh(self.device.type, (self.mesh.world_size,))
        # Inputs are left to autocast: rounded to bfloat16, timesteps would be others.
        compute = torch.bfloat16 if self.half else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        twin = self._twin()
        # What embeds conditions is called as often as a batch needs, twice where frames are given, and in float32 by
        # some models: it is the root's, which gathers it once, for the ranks' exchanges must stay in step.
        for part in chain.from_iterable(map(_parts, twin.in_order())):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        self.wrapped = _Root(twin)
        fully_shard(self.wrapped, mesh=mesh)
        for part in self.wrapped.modules():
            if isinstance(part, FSDPModule):  # whose first use lays uneven shares elsewhere (in early releases)
                part.unshard()
                part.reshard()
        self._shards: dict[str, Any] = {name: value for name, value in twin.named_parameters() if name in self.working}
        self.masters = {name: _own_rows(shard) for name, shard in self._shards.items()}
        names = {id(parameter): name for name, parameter in self.working.items()}
        for group in optimizer.param_groups:
            group["params"] = [self.masters[names[id(parameter)]] for parameter in group["params"]]
        self.optimizer = optimizer
        self._shown = True
        self._hide()

    def _twin(self) -> Any:
        """The model again, with the very same tensors."""
        shared = [*self.model.parameters(), *self.model.buffers(), self._sequence_group]
        twin: nn.Module = copy.deepcopy(self.model, {id(value): value for value in shared})
        for module in twin.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if not value.requires_grad:  # FSDP would spread it, but what is not trained is whole on every rank
                    delattr(module, name)
                    module.register_buffer(name, value.detach())
        return twin

    # A step

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        self._hide()
        return super().accumulating(last=last)  # nothing: each micro-batch is averaged, as nobody keeps whole gradients

    def squared_gradients(self) -> Tensor:
        return super().squared_gradients() * self.mesh.world_size  # of rows that no other rank has

    def _optimizer_step(self, lr: float) -> None:
        for name, gradient in self._own_gradients().items():
            self.masters[name].grad = gradient
        super()._optimizer_step(lr)

    def zero_grad(self) -> None:
        super().zero_grad()
        for shard in self._shards.values():
            shard.grad = None

    def _gradients(self) -> list[Tensor]:
        return list(self._own_gradients().values())

    def _own_gradients(self) -> dict[str, Tensor]:
        return {name: _own_rows(shard.grad) for name, shard in self._shards.items() if shard.grad is not None}

    # Weights

    def whole(self, name: str, piece: Tensor) -> Tensor:
        shape, rows = self.whole_shape(name), self._rows(name)
        padded = torch.zeros(rows, *shape[1:], dtype=piece.dtype, device=self.device)
        padded[: len(piece)] = piece  # from where it may be kept
        gathered = padded.new_empty(rows * self.mesh.world_size, *shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        return gathered[: shape[0]]

    def take(self, name: str, whole: Tensor) -> Tensor:
        rows = self._rows(name)
        return whole[self.mesh.rank * rows : (self.mesh.rank + 1) * rows]

    def _rows(self, name: str) -> int:
        """Of each rank; the last ones may have fewer or none."""
        return -(-self.whole_shape(name)[0] // self.mesh.world_size)

    @torch.no_grad()
    def show(self, pieces: Mapping[str, Tensor]) -> None:
        """Afterwards every rank has whole weights until it trains on: evaluation need not keep step with the others."""
        for name, piece in pieces.items():
            self.working[name].data = self.whole(name, piece)
        self._shown = True

    def _hide(self) -> None:
        """Give the whole weights' memory back."""
        if self._shown:
            for parameter in self.working.values():
                parameter.data = parameter.data.new_empty(0)
        self._shown = False


class _Root(nn.Module):
    """Where FSDP's hooks begin. They see no inputs: they would move the captions' mask to the GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return super().__call__(lambda: self.model(*inputs, **named))

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts that hold nothing but layers that are rounded; of the rest the root takes care.

    They lie within what activation checkpointing runs again: a block itself is left in the midst of its second run, and
    hooks on it would wait for an end that never comes.
    """
    for child in module.children():
        owners = [part for part in child.modules() if next(part.parameters(recurse=False), None) is not None]
        callable_ = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if callable_ and owners and all(isinstance(owner, ROUNDED) for owner in owners):
            yield child
        else:
            yield from _parts(child)


def _own_rows(spread: Any) -> Tensor:
    """This rank's part of a DTensor, as a view of its memory."""
    with torch.no_grad():
        found: Tensor = spread.to_local().detach()
        return found
