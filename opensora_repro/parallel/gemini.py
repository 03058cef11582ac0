"""ColossalAI's Gemini behind the engine: weights, gradients and optimizer state all spread over the processes (ZeRO-3).

Working weights are bfloat16 and live in chunks. Between uses a rank holds an equal shard of every chunk; an operation
on a weight gathers its chunk first, and the backward pass leaves the averaged gradients where the weights were. The
float32 masters are chunks of the same layout, of which a rank only ever holds its shards. A shard ends in the midst of
a tensor, so a rank's piece of a parameter may be any slice of it, or empty.

Chunks stay on their device, and their exchanges are not asynchronous: Gemini frees what an exchange reads as soon as
that is begun, which only the order of one stream makes safe.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from colossalai.zero.gemini import GeminiDDP, GeminiManager
from torch import Tensor, nn

from opensora_repro.parallel.colossal import ColossalEngine

warnings.filterwarnings("ignore", "TypedStorage is deprecated", module="colossalai")

CHUNK_SIZE = 2**25  # elements that are gathered at once: 64 MiB of weights
CHUNKS = 8  # at least about as many: a small model is spread too


class GeminiEngine(ColossalEngine):
    """Trains bfloat16 working weights: equal to the other engines but for their rounding."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        initial = {name: parameter.data for name, parameter in self.working.items()}  # float32
        chunk_size = _chunk_size(sum(value.numel() for value in initial.values()), self.mesh.world_size)
        self.plugin = _Plugin(
            chunk_config_dict={self.mesh.world_size: {"chunk_size": chunk_size, "keep_gathered": False}},
            precision="bf16",
            enable_async_reduce=False,
        )
        self.sharded: _Sharded
        self.sharded, *_ = Booster(plugin=self.plugin).boost(self.model)
        self.wrapped = self.sharded
        for name, parameter in self.model.named_parameters():
            if name in self.fixed:  # frozen: Gemini leaves it alone, but has rounded it
                parameter.data = self.fixed[name]
        self._chunks = self.sharded.chunk_manager.get_chunks(self.working.values())
        self._places = {name: self._place(parameter) for name, parameter in self.working.items()}
        self.masters = {name: self._own(name, chunk.paired_chunk) for name, chunk in self._by_name().items()}
        for name, value in initial.items():
            self.load(name, value)
        self._zero_group = None  # of the other plugins' slices
        self._gradient_sums: list[Tensor] = []
        names = {id(parameter): name for name, parameter in self.working.items()}
        for group in optimizer.param_groups:
            group["params"] = [self.masters[names[id(parameter)]] for parameter in group["params"]]
        self.optimizer = optimizer
        self.eval_forward = self.sharded.local_forward

    def _by_name(self) -> dict[str, Any]:
        """Every trained parameter's chunk of working weights."""
        return {name: self.sharded.chunk_manager.get_chunk(parameter) for name, parameter in self.working.items()}

    def _place(self, parameter: nn.Parameter) -> Place:
        chunk = self.sharded.chunk_manager.get_chunk(parameter)
        return Place(chunk.tensors_info[parameter].offset, parameter.numel(), chunk.shard_size)

    def _own(self, name: str, chunk: Any) -> Tensor:
        """This rank's piece of a parameter, a view of a chunk's shard."""
        found: Tensor = chunk.payload[self._places[name].in_shard(self.mesh.rank)]
        return found

    # A step

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()  # every micro-batch is reduced: nobody could keep whole gradients

    def backward(self, loss: Tensor) -> None:
        """Add the averaged gradients to this rank's float32 sums; the working weights are in their place again."""
        self.sharded.backward(loss)
        shards = [chunk.payload[: chunk.get_valid_length()] for chunk in self._chunks]
        if self._gradient_sums:
            torch._foreach_add_(self._gradient_sums, shards)
        else:
            self._gradient_sums = [shard.float() for shard in shards]
        self._refresh()

    def squared_gradients(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for shard in self._gradient_sums:
            total += torch.linalg.vector_norm(shard).double().square()
        return total

    def step(self, lr: float, factor: float | Tensor, skip: Tensor | None = None) -> None:
        sums = dict(zip(self._chunks, self._gradient_sums, strict=True))
        for name, chunk in self._by_name().items():
            self.masters[name].grad = sums[chunk][self._places[name].in_shard(self.mesh.rank)]
        super().step(lr, factor, skip)
        self._refresh()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._gradient_sums = []

    def _gradients(self) -> list[Tensor]:
        return self._gradient_sums

    def _refresh(self) -> None:
        """Round the masters to working weights."""
        self.sharded.scatter()
        for chunk in self._chunks:
            chunk.optim_update()

    # Weights

    def whole(self, name: str, piece: Tensor) -> Tensor:
        shape, place = self.whole_shape(name), self._places[name]
        piece = piece.to(self.device)  # from where it may be kept
        flat = piece.new_empty(shape.numel())
        flat[place.part(self.mesh.rank)] = piece
        for rank in range(self.mesh.world_size):
            part = place.part(rank)
            if part.start < part.stop:
                dist.broadcast(flat[part], src=rank)
        return flat.view(shape)

    def take(self, name: str, whole: Tensor) -> Tensor:
        return whole.flatten()[self._places[name].part(self.mesh.rank)]

    @torch.no_grad()
    def load(self, name: str, whole: Tensor) -> None:
        self.masters[name].copy_(self.take(name, whole))
        self._set_working({name: self.masters[name]})

    @torch.no_grad()
    def show(self, pieces: Mapping[str, Tensor]) -> None:
        """Afterwards every rank has whole weights until it trains on: evaluation need not keep step with the others."""
        self._set_working(pieces)
        self.sharded.gather()

    def _set_working(self, pieces: Mapping[str, Tensor]) -> None:
        self.sharded.scatter()
        for name, piece in pieces.items():
            self._own(name, self.sharded.chunk_manager.get_chunk(self.working[name])).copy_(piece)

    def close(self) -> None:
        GeminiManager._get_layout_info.cache_clear()  # whose keys would keep the chunks for ever
        super().close()


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its chunk, of which every rank holds `shard_size` elements."""

    offset: int
    numel: int
    shard_size: int

    def part(self, rank: int) -> slice:
        """A rank's slice of the flattened parameter, possibly empty."""
        begin = rank * self.shard_size - self.offset
        start, stop = (min(max(edge, 0), self.numel) for edge in (begin, begin + self.shard_size))
        return slice(start, stop)

    def in_shard(self, rank: int) -> slice:
        """The same elements within the rank's shard."""
        part, begin = self.part(rank), rank * self.shard_size - self.offset
        return slice(part.start - begin, part.stop - begin) if part.start < part.stop else slice(0, 0)


def _chunk_size(num_elements: int, world_size: int) -> int:
    size = min(CHUNK_SIZE, -(-num_elements // CHUNKS))
    return size + -size % world_size


class _Plugin(GeminiPlugin):
    """GeminiPlugin with the model wrapper below; the optimizer works on the masters and is none of its business."""

    def configure(self, model: nn.Module, optimizer: Any = None, *rest: Any, **named: Any) -> tuple[Any, ...]:
        assert optimizer is None
        return _Sharded(model, **self.gemini_config, zero_group=self.zero_group), None, None, None, None


class _Sharded(GeminiDDP):
    """GeminiDDP that takes its inputs and buffers as they are: rounded to bfloat16, timesteps would be others."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        self.scatter()
        self.gemini_manager.pre_iter(*inputs)
        with ColoParamOpHookManager.use_hooks(*self.hooks):
            return _plain(self.module(*inputs, **named))

    def local_forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Evaluate on the weights that `gather` has made whole. No exchange with the other ranks."""
        assert all(chunk.is_gathered for chunk in self._weight_chunks()), "evaluation comes after engine.show"
        return _plain(self.module(*inputs, **named))

    def gather(self) -> None:
        """Make all working weights whole on every rank. Collective."""
        for chunk in self._weight_chunks():
            self.chunk_manager.access_chunk(chunk)

    def scatter(self) -> None:
        """Keep this rank's shards alone."""
        for chunk in self._weight_chunks():
            self.chunk_manager.release_chunk(chunk)

    def _weight_chunks(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self.chunk_manager.get_chunks(self.fp16_params)
        return found

    def _init_chunks(self, *inputs: Any, **named: Any) -> None:
        """Make the chunks where they stay: nothing is offloaded.

        Gemini tells a shard at work from an offloaded one by its device, and where that is a CPU it takes all of them
        for offloaded: there they are brought back by hand.
        """
        self.chunk_manager.move_chunk = _stay
        super()._init_chunks(*inputs, **named)
        for chunk in (chunk for group in self.chunk_manager.chunk_groups.values() for chunk in group):
            if chunk.cuda_shard is None:
                chunk.cuda_shard, chunk.cpu_shard = chunk.cpu_shard, None

    def _cast_buffers(self) -> None:
        pass


def _stay(*_: Any, **__: Any) -> None:
    pass


def _plain(output: Tensor) -> Tensor:
    """Gemini's tensors are of a class of its own; what leaves the model is like any other engine's."""
    with torch._C.DisableTorchFunction():
        return output.as_subclass(Tensor)
