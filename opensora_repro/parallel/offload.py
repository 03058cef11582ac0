"""What training needs once a step alone, offloaded to host memory: Adam's moments and the weights' average.

They are streamed to the device for their update, a few tensors at a time: the numbers are the same as without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from opensora_repro.models.recompute import empty_host

CHUNK = 2**24  # elements of each kind that are streamed at once, or one larger tensor's


class HostAdamW(torch.optim.AdamW):
    """torch's fused AdamW with its moments in host memory. Its state has the same names and values.

    It takes `grad_scale` and `found_inf` as torch's own does.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            parts = chunks(params)
            states = [[self._state(param) for param in chunk] for chunk in parts]
            moments = [[state[kind] for kind in ("exp_avg", "exp_avg_sq") for state in chunk] for chunk in states]
            for chunk, found, moved in zip(parts, states, on_device(moments, params), strict=True):
                adamw(
                    chunk,
                    [param.grad for param in chunk if param.grad is not None],
                    moved[: len(chunk)],
                    moved[len(chunk) :],
                    [],
                    [state["step"] for state in found],
                    fused=True,
                    grad_scale=self.grad_scale,
                    found_inf=self.found_inf,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states, by the parameters' numbers; the moments do not pass through the device."""
        params = [param for group in self.param_groups for param in group["params"]]
        self.state.clear()
        for number, values in state_dict["state"].items():
            step = values["step"].to(params[number].device, torch.float32, copy=True)
            moments = {kind: to_host(values[kind], params[number].device) for kind in ("exp_avg", "exp_avg_sq")}
            self.state[params[number]] = {"step": step, **moments}

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = empty_host(param, param.device).zero_()
            state["exp_avg_sq"] = empty_host(param, param.device).zero_()
        return state


def to_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in host memory, pinned where `device`, to which it will be streamed, is a GPU."""
    return empty_host(tensor, device).copy_(tensor.detach())


def chunks(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours in parts of up to `CHUNK` elements."""
    parts: list[list[Tensor]] = []
    elements = 0
    for tensor in tensors:
        if not parts or elements + tensor.numel() > CHUNK:
            parts.append([])
            elements = 0
        parts[-1].append(tensor)
        elements += tensor.numel()
    return parts


def on_device(parts: Sequence[Sequence[Tensor]], beside: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of each part of tensors in host memory, copies on the device of `beside`; what becomes of them is copied back.

    On a GPU the next part comes and the one before leaves while one is worked on, so three are there at most; when
    the iterator ends, all have left.
    """
    device = beside[0].device if beside else torch.device("cpu")
    if device.type == "cuda":
        yield from _overlapping(parts, device)
        return
    for part in parts:
        there = [tensor.to(device, copy=True) for tensor in part]
        yield there
        for host, tensor in zip(part, there, strict=True):
            host.copy_(tensor)


def _overlapping(parts: Sequence[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    streams: Any = torch.get_device_module(device)
    main, (coming, leaving) = streams.current_stream(device), _side_streams(device)

    def begin(number: int) -> tuple[list[Tensor], Any]:
        there = [torch.empty_like(host, device=device) for host in parts[number]]  # memory of the main stream
        coming.wait_stream(main)
        with streams.stream(coming):
            for host, tensor in zip(parts[number], there, strict=True):
                tensor.copy_(host, non_blocking=True)
            return there, coming.record_event()

    prefetched, left = begin(0) if parts else None, None
    for number, part in enumerate(parts):
        assert prefetched is not None
        there, arrived = prefetched
        if left is not None:
            left.synchronize()  # else the host would run ahead and bring all parts at once
        prefetched = begin(number + 1) if number + 1 < len(parts) else None
        main.wait_event(arrived)
        yield there
        leaving.wait_stream(main)
        with streams.stream(leaving):
            for host, tensor in zip(part, there, strict=True):
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(leaving)
            left = leaving.record_event()
    leaving.synchronize()


@lru_cache(maxsize=8)
def _side_streams(device: torch.device) -> tuple[Any, Any]:
    module = torch.get_device_module(device)
    return module.Stream(device), module.Stream(device)
