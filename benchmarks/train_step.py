"""One training step and one forward pass of STDiT, beside a plain one and diffusers' models, on this machine.

    python -m benchmarks.train_step [--quick] [--one-thread] [--seconds S] [--out FILE]
    python -m benchmarks.train_step --gpu [--out FILE]

On the CPU, float32: ours, the plain restatement of the published block with the same weights, and diffusers' Latte and
PixArt at equal width, depth and tokens (benchmarks/sides.py). Ours and the plain one must give the same output and
gradients before anything is timed. Each side is a process of its own, for how it treats memory is a part of it: ours
keeps freed memory for the next tensors, as our commands do on a CPU (opensora_repro/process.py), the others
do as torch does, and the plain one also runs with freed memory kept, which leaves what the models differ by. Forward
pass and training step (noise prediction loss, backward, AdamW) are timed in turns, and between them the matrix products
that set the limit (benchmarks/limits.py). A side's share of the limit is its own FLOPs, as torch counts them, over its
median time over the limit; Latte has an MLP more a block than ours, so compare shares with it, not times. Where others
use the machine, threads wait for each other and wall time says little: --one-thread counts the CPU seconds of one.

With --gpu: STDiT-XL/2 in bfloat16 at the published sizes, fused against eager kernels (tests/gpu/step.py).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    Run,
    add_options,
    clock_of,
    interleaved_seconds,
    side_by_side,
    table,
    timed,
    with_products,
)
from benchmarks.limits import layer_shapes, matmul_limit, matmuls, share_of_limit
from benchmarks.processes import Ask, Worker, in_processes, memory_columns, seconds_of
from benchmarks.sides import CALLS, SIDES, Sizes, inputs, model_flops
from opensora_repro.process import peak_memory

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.sides import Batch

FULL, QUICK = Sizes(), Sizes(depth=2, frames=8)
SECONDS, QUICK_SECONDS = 240.0, 30.0
TOLERANCE = 1e-4  # largest difference over largest value, float32


@dataclass(frozen=True)
class Side:
    model: str
    keeps_memory: bool = False


PROCESSES = {
    "ours": Side("ours", keeps_memory=True),
    "plain": Side("plain"),
    "plain, freed memory kept": Side("plain", keeps_memory=True),
    "Latte": Side("Latte"),
    "PixArt": Side("PixArt"),
}


def largest_difference(ours: nn.Module, plain: nn.Module, batch: Batch) -> float:
    """Largest relative difference of outputs and of every parameter's gradient."""
    outputs = [model(*batch) for model in (ours, plain)]
    for output in outputs:
        output.square().mean().backward()
    reference = dict(plain.named_parameters())
    pairs = [(outputs[0].detach(), outputs[1].detach())]
    pairs += [(p.grad, reference[name].grad) for name, p in ours.named_parameters()]  # type: ignore[misc]
    differences = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs]
    for model in (ours, plain):
        model.zero_grad(set_to_none=True)
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def check_equal(ours: nn.Module, plain: nn.Module, sizes: Sizes) -> float:
    """The largest difference with whole and with padded captions; ends the benchmark where it is too large."""
    found = max(largest_difference(ours, plain, inputs(sizes, padded=padded)) for padded in (False, True))
    if not found < TOLERANCE:
        raise SystemExit(f"error: the two models differ by {found:.1e}; timing them would mean nothing")
    return float(f"{found:.2e}")


def answers(model: str, sizes: Sizes) -> dict[str, Ask]:
    """One side's calls, and its size with what it takes of memory before the first of them."""
    side, batch = SIDES[model](sizes), inputs(sizes)
    before = peak_memory()
    calls: dict[str, Ask] = {what: make(side, batch) for what, make in CALLS.items()}
    return calls | {
        "about": lambda: {
            "parameters": sum(parameter.numel() for parameter in side.model.parameters()),
            "before_first_step_mb": round(before / 2**20),  # libraries and weights
            "energy_joules": None,  # no CPU tells it
        }
    }


def measure(
    sizes: Sizes, seconds: float, *, one_thread: bool = False, names: Sequence[str] = tuple(PROCESSES)
) -> dict[str, Any]:
    """Rows of ours against each other side, everyone's FLOPs, and the limit while each thing was timed."""
    import torch

    difference = check_equal(SIDES["ours"](sizes).model, SIDES["plain"](sizes).model, sizes)
    shapes = layer_shapes(sizes.config, sizes.tokens)
    works = matmuls(shapes, torch.float32, torch.device("cpu"))
    products = {name: timed(work.call, clock_of(one_thread)) for name, work in works.items()}
    flops = {name: model_flops(PROCESSES[name].model, sizes) for name in names}
    workers = {name: Worker(answers, (PROCESSES[name].model, sizes), PROCESSES[name].keeps_memory) for name in names}
    rows, limits = [], {}
    with in_processes(workers, one_thread) as asks:
        for what, share in (("forward", 0.3), ("training step", 0.7)):
            calls = {name: seconds_of(ask, what) for name, ask in asks.items()}
            times = interleaved_seconds(with_products(calls, products), rounds=100, seconds=share * seconds, warmup=1)
            limits[what] = matmul_limit(works, times)
            for other in names[1:]:
                row = {"what": what, "other_side": other, **side_by_side(times["ours"], times[other])}
                for key, name in (("ours", "ours"), ("other", other)):
                    row[key] |= share_of_limit(flops[name][what]["counted"] or 0, times[name], limits[what])
                rows.append(row)
        about = {name: ask("about") | ask("memory") for name, ask in asks.items()}
    return {
        "largest_difference": difference,
        "matmul_limit": limits,
        "sides": {name: {"flops": flops[name], "model": PROCESSES[name].model, **about[name]} for name in names},
        "rows": rows,
    }


# ---------------------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """A line for each side and what is timed, then the limit."""
    lines = []
    for row in result["rows"]:
        if row["other_side"] == "plain":
            lines.append((row["what"], "ours", "", *_line(row["ours"], result["sides"]["ours"])))
        ratio = f"{row['ratio']:.2f}x"
        lines.append((row["what"], row["other_side"], ratio, *_line(row["other"], result["sides"][row["other_side"]])))
    columns = ("", "side", "ours is", "ms", "GFLOP/s", "of the limit", "at best", "freed memory", "peak MB")
    sizes = Sizes(**result["sizes"])
    rounds = " and ".join(str(limit["rounds"]) for limit in result["matmul_limit"].values())
    title = (
        f"STDiT, {sizes.depth} blocks of {sizes.hidden_size} channels, latents {'x'.join(map(str, sizes.latents))}, "
        f"float32, {result['threads']} thread(s), {result['clock']} (medians of {rounds})"
    )
    limits = [
        f"limit, {what}: {limit['gflops']} GFLOP/s ({limit['product']}), at best {limit['best_gflops']}"
        for what, limit in result["matmul_limit"].items()
    ]
    return "\n".join([table(title, columns, lines), *limits])


def _line(timed: dict[str, Any], about: dict[str, Any]) -> tuple[object, ...]:
    shares = (f"{100 * timed[share]:.0f} %" for share in ("share_of_limit", "share_at_best"))
    return timed["median_ms"], timed["gflops"], *shares, *memory_columns(about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model, fewer frames, less time")
    add("--seconds", type=float, help=f"time to spend measuring on the CPU (default: {SECONDS:.0f})")
    add("--gpu", action="store_true", help="measure the published sizes on a GPU instead")
    add_options(parser, "train_step")
    args = parser.parse_args()
    if args.gpu:
        from tests.gpu.step import run

        return run(args.out)
    sizes = QUICK if args.quick else FULL
    record = Run("train_step", one_thread=args.one_thread)
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    found = {"dtype": "float32", "sizes": asdict(sizes), **measure(sizes, seconds, one_thread=args.one_thread)}
    record.finish(found, report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
