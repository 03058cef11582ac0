"""What matrix products alone reach on this machine, and how much of that a model reaches.

The limit is the fastest of many plain products: those of the model's own layers, forward and backward, and a large
square one, each into memory that is there already. So whichever shape this machine likes best sets the measure. A
share of the limit is model FLOPs over seconds over the limit; work that is no matrix product is time without FLOPs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness import interleaved

if TYPE_CHECKING:
    import torch

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.planning.gpus import Gpu

SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the square product, by kind of device
AT_LEAST = {"cpu": 0.1, "cuda": 0.02}  # seconds that a timed call of a product lasts


class Work(NamedTuple):
    """A call and its FLOPs; a multiplication and its addition are two."""

    flops: int
    call: Callable[[], object]


def layer_shapes(cfg: STDiTConfig, tokens: int) -> list[tuple[int, int, int]]:
    """[M, K] x [K, N] of a block's layers on so many tokens, as (M, K, N)."""
    dim, wide = cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio)
    return [(tokens, dim, 3 * dim), (tokens, dim, dim), (tokens, dim, wide), (tokens, wide, dim)]


def matmuls(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    """For each shape a layer's product and the two of its backward pass, then the square one; by name."""
    import torch

    side = SQUARE[device.type]
    found: dict[str, Work] = {}
    for m, k, n in [*shapes, (side, side, side)]:
        x, weight, out = (torch.randn(size, dtype=dtype, device=device) for size in ((m, k), (n, k), (m, n)))
        to_x, to_weight = torch.empty_like(x), torch.empty_like(weight)
        sides = {
            "forward": (x, weight.t(), out),
            "gradient of the input": (out, weight, to_x),
            "gradient of the weight": (out.t(), x, to_weight),
        }
        for name, (a, b, into) in sides.items():
            call = _product(a, b, torch.empty_like(into))
            found[f"{m}x{k}x{n}, {name}"] = _lasting(Work(2 * m * k * n, call), device)
    return found


def _product(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> Callable[[], object]:
    import torch

    return lambda: torch.mm(a, b, out=into)


def _lasting(work: Work, device: torch.device) -> Work:
    """The same work so many times over that a clock's tick, a launch or a wait for the device no longer counts."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work.call()
    wait()
    start = time.perf_counter()
    work.call()
    wait()
    times = max(1, math.ceil(AT_LEAST[device.type] / max(time.perf_counter() - start, 1e-6)))

    def call() -> None:
        for _ in range(times):
            work.call()
        wait()

    return Work(times * work.flops, call)


def gflops(flops: float, seconds: float) -> float:
    return flops / seconds / 1e9


def matmul_limit(works: Mapping[str, Work], times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The fastest product and all others, in 1e9 FLOPs a second: medians of calls that took `times`.

    `best_gflops` is of the fastest single call of any product.
    """
    rates = {name: gflops(work.flops, statistics.median(times[name])) for name, work in works.items()}
    best = max(rates, key=lambda name: rates[name])
    return {
        "gflops": round(rates[best], 1),
        "best_gflops": round(max(gflops(work.flops, min(times[name])) for name, work in works.items()), 1),
        "product": best,
        "rounds": len(times[best]),
        "products": {name: round(rate, 1) for name, rate in rates.items()},
    }


def share_of_limit(flops: float, times: Sequence[float], limit: Mapping[str, Any]) -> dict[str, float]:
    """Of calls of so many FLOPs that took `times`: their rate and its share of the limit, medians against medians.

    `share_at_best` is of the fastest call against the fastest product's: what is left where others use the machine,
    too low rather than too high, since a short product finds a quiet moment sooner than a long step.
    """
    reached = gflops(flops, statistics.median(times))
    return {
        "gflops": round(reached, 1),
        "share_of_limit": round(reached / limit["gflops"], 3),
        "share_at_best": round(gflops(flops, min(times)) / limit["best_gflops"], 3),
    }


def measure_matmul_limit(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, Any]:
    """The limit by itself, where nothing else is to be timed between the products."""
    works = matmuls(shapes, dtype, device)
    times = interleaved({name: work.call for name, work in works.items()}, rounds=20, seconds=seconds)
    return matmul_limit(works, times)


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs that torch counts while `work` runs, attention as two matrix products; nothing runs on tensors "meta"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def data_sheet(device_name: str) -> Gpu | None:
    """The planner's entry for a GPU as the driver names it, such as "NVIDIA H100 80GB HBM3"."""
    from opensora_repro.planning.gpus import GPUS

    words = device_name.lower().replace("-", " ").split()
    found = [gpu for gpu in GPUS if set(gpu.name.lower().split("-")) <= set(words)]
    return max(found, key=lambda gpu: len(gpu.name.split("-")), default=None)
