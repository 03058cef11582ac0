"""AdamW over many float32 tensors in one launch, with the gradients' scale and the weights' average in the same pass.

The kernel finds its tensors in a table of addresses; each program works on a piece of one of them. Tables of what stays
the same from step to step are kept on the device, and the others reach it without anybody waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_repro.kernels.fused.rows import TYPES, power_of_two

BLOCK = 1024  # elements at once
STEPS = 16  # blocks a program works on, at most
ALIGNMENT = 16  # bytes, for the widest loads


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    averages: Sequence[Tensor] = (),
    average_weight: float = 0.0,
) -> None:
    """As eager.adamw. Gradients share one dtype; all else is float32, and all is contiguous."""
    device = params[0].device
    grads = [grad.contiguous() for grad in grads]
    lists = [params, grads, exp_avgs, exp_avg_sqs, averages or params]
    addresses = [[x.data_ptr() for x in tensors] for tensors in lists]
    for tensors in (params, exp_avgs, exp_avg_sqs, averages):
        assert all(x.is_contiguous() for x in tensors)
    assert all(x.dtype == torch.float32 for x in (*params, *exp_avgs, *exp_avg_sqs, *averages))
    # Gradients are new ones at every step; from pinned memory the table comes when the stream gets to it.
    pointers = torch.tensor(addresses, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    counts = torch.stack(list(steps)).double()
    rates, spreads = lr / (1 - betas[0] ** counts), (1 - betas[1] ** counts) ** -0.5
    numels = tuple(param.numel() for param in params)
    num_steps = min(STEPS, power_of_two(-(-max(numels) // BLOCK)))
    owners, starts, sizes = _pieces(numels, num_steps * BLOCK, device)
    if len(owners):
        _step[(len(owners),)](
            pointers, torch.stack([rates, spreads], dim=1).float(), owners, starts, sizes, len(params),
            torch.ones((), device=device) if grad_scale is None else grad_scale,
            torch.zeros((), device=device) if found_inf is None else found_inf,
            1 - lr * weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, average_weight,
            GRADIENT=_only_type(grads), AVERAGED=bool(averages),
            ALIGNED=all(address % ALIGNMENT == 0 for row in addresses for address in row),
            STEPS=num_steps, BLOCK=BLOCK,
        )  # fmt: skip


def _only_type(tensors: Sequence[Tensor]) -> tl.dtype:
    (dtype,) = {x.dtype for x in tensors}
    return TYPES[dtype]


@lru_cache(maxsize=4)
def _pieces(numels: tuple[int, ...], piece: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which tensor each program works on, from which element on, and every tensor's number of elements."""
    found = [(i, start) for i, numel in enumerate(numels) for start in range(0, numel, piece)]
    owners, starts = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T.contiguous().to(device).unbind(0)
    return owners, starts, torch.tensor(numels).to(device)


@triton.jit
def _tensor(pointers, row, count, owner, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor of the table's row, which holds `count` of them."""
    found = tl.load(pointers + row * count + owner).to(tl.pointer_type(TYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _step(
    pointers, corrections, owners, starts, sizes, count, grad_scale, found_inf,
    keep, beta1, rest1, beta2, rest2, eps, average_weight,
    GRADIENT: tl.constexpr, AVERAGED: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + tl.program_id(0))
    start = tl.multiple_of(tl.load(starts + tl.program_id(0)), 16)
    left = tl.load(sizes + owner) - start
    left = tl.where(tl.load(found_inf) == 0, left, 0)  # of a skipped step nothing is left to do
    factor = 1 / tl.load(grad_scale)
    rate = tl.load(corrections + 2 * owner)  # lr / (1 - beta1 ** step)
    spread = tl.load(corrections + 2 * owner + 1)  # 1 / sqrt(1 - beta2 ** step)
    param = _tensor(pointers, 0, count, owner, tl.float32, ALIGNED) + start
    grad = _tensor(pointers, 1, count, owner, GRADIENT, ALIGNED) + start
    exp_avg = _tensor(pointers, 2, count, owner, tl.float32, ALIGNED) + start
    exp_avg_sq = _tensor(pointers, 3, count, owner, tl.float32, ALIGNED) + start
    average = _tensor(pointers, 4, count, owner, tl.float32, ALIGNED) + start
    if left >= STEPS * BLOCK:
        for step in range(STEPS):
            _update(
                param, grad, exp_avg, exp_avg_sq, average, step * BLOCK, left, rate, spread,
                factor, keep, beta1, rest1, beta2, rest2, eps, average_weight, AVERAGED, True, BLOCK,
            )  # fmt: skip
    else:
        for step in range(STEPS):
            _update(
                param, grad, exp_avg, exp_avg_sq, average, step * BLOCK, left, rate, spread,
                factor, keep, beta1, rest1, beta2, rest2, eps, average_weight, AVERAGED, False, BLOCK,
            )  # fmt: skip


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, average, first, left, rate, spread,
    factor, keep, beta1, rest1, beta2, rest2, eps, average_weight,
    AVERAGED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block; WHOLE: all of it is there, which the compiler must know to move several elements at once."""
    at = first + tl.arange(0, BLOCK)
    if WHOLE:
        inside = tl.full([BLOCK], True, tl.int1)
    else:
        inside = at < left
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
    m = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + rest2 * g * g
    p = keep * tl.load(param + at, mask=inside, other=0.0) - rate * m / (tl.sqrt(v) * spread + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(param + at, p, mask=inside)
    if AVERAGED:
        a = tl.load(average + at, mask=inside, other=0.0)
        # As torch's lerp: from the nearer end, so that a weight of 1 gives the new weights themselves
        moved = tl.where(average_weight < 0.5, a + average_weight * (p - a), p - (1 - average_weight) * (p - a))
        tl.store(average + at, moved, mask=inside)
