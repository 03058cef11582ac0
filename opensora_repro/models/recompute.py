"""Activation checkpointing of blocks: what is kept between the forward and the backward pass, and where.

"full" keeps a block's input alone and runs the whole block again. "selective" also keeps the costly results: of the
operations that multiply most for each value they give. Norms, modulation, activations and the cheaper matrix
products are computed again from the input and from what was kept; the numbers are the same in any case.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from opensora_repro.models.config import is_costly

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}  # where a product's left matrix stands
_ATTENTION = (  # what scaled_dot_product_attention becomes on one device or another
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
LEAVING = 2  # inputs on their way to host memory at once; the last ones stay, as they are needed first


def run_block(keep: str, block: Any, x: Tensor, *rest: Any) -> Tensor:
    """Return block(x, *rest), of which autograd keeps what `keep` says, one of ACTIVATION_CHECKPOINTING.

    The block must draw no random numbers, and tell the channels of `x` in its `hidden_size`.
    """
    if keep == "none":
        return cast(Tensor, block(x, *rest))
    keeping: dict[str, Any] = {}
    if keep == "selective":
        keeping["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, block.hidden_size))
    return cast(Tensor, checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=False, **keeping))


def _policy(width: Any, _: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    if operation in _PRODUCTS:
        costly = is_costly(args[_PRODUCTS[operation]].shape[-1], width)
    elif operation in _ATTENTION:  # queries and keys [N, H, L, d]: products with the keys, then with the values
        costly = is_costly(2 * args[1].shape[-2], width)
    else:
        costly = False
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


class HostStack:
    """Block inputs of one forward pass in host memory, which its backward pass takes back, the last one first.

    On a GPU they travel on a stream of their own, to pinned memory and back, the next one while a block computes; no
    more than `LEAVING` take up its memory on the way. On a CPU they are copied likewise.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device) if device.type == "cuda" else None
        self._hosts: list[Tensor] = []
        self._leaving: deque[tuple[int, Tensor, Any]] = deque()
        self._coming: dict[int, tuple[Tensor, Any]] = {}

    def holding(self, x: Tensor) -> saved_tensors_hooks:
        """In this context autograd saves `x` in host memory, and everything else as usual."""

        storage = x.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Tensor | int:
            return self._put(tensor) if tensor.untyped_storage()._cdata == storage else tensor

        return saved_tensors_hooks(pack, lambda kept: self._get(kept) if isinstance(kept, int) else kept)

    def _put(self, tensor: Tensor) -> int:
        tensor = tensor.detach()
        host = empty_host(tensor, self._device)
        arrived = self._copy(host, tensor)
        self._hosts.append(host)
        self._leaving.append((len(self._hosts) - 1, tensor, arrived))
        while len(self._leaving) > LEAVING:
            # Its memory may be used again once it has left, which later work on this stream waits for.
            self._wait(self._leaving.popleft()[2])
        return len(self._hosts) - 1

    def _get(self, place: int) -> Tensor:
        tensor = self._fetch(place)
        self._coming.pop(place, None)
        while self._leaving and self._leaving[-1][0] >= place:
            self._wait(self._leaving.pop()[2])
        if place and not (self._leaving and self._leaving[-1][0] == place - 1):
            self._begin(place - 1)
        return tensor

    def _fetch(self, place: int) -> Tensor:
        for number, tensor, _ in self._leaving:
            if number == place:
                return tensor
        tensor, arrived = self._begin(place)
        self._wait(arrived)
        return tensor

    def _begin(self, place: int) -> tuple[Tensor, Any]:
        if place not in self._coming:
            tensor = torch.empty_like(self._hosts[place], device=self._device)
            self._coming[place] = (tensor, self._copy(tensor, self._hosts[place]))
        return self._coming[place]

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy behind what the device has been told to compute up to now; what to wait for."""
        if self._streams is None:
            target.copy_(source)
            return None
        side = _side_stream(self._device)
        side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(side):
            target.copy_(source, non_blocking=True)
            return side.record_event()

    def _wait(self, event: Any) -> None:
        if event is not None:
            self._streams.current_stream(self._device).wait_event(event)


def empty_host(like: Tensor, device: torch.device) -> Tensor:
    """Host memory for a tensor of that shape, pinned where it is to travel to and from a GPU."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=device.type == "cuda")
    except RuntimeError:  # the machine lets no more memory be pinned: copies take about twice as long
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)
