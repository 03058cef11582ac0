"""One training step and one forward pass of STDiT, beside a plain one and diffusers' models, on this machine.

    python -m benchmarks.train_step [--quick] [--one-thread] [--seconds S] [--out FILE]
    python -m benchmarks.train_step --gpu [--out FILE]

On the CPU, float32: ours, the plain restatement of the published block with the same weights, and diffusers' Latte and
PixArt at equal width, depth and tokens (benchmarks/sides.py). Ours and the plain one must give the same output and
gradients before anything is timed. Forward pass and training step (noise prediction loss, backward, AdamW) are timed in
turns, and between them the matrix products that set the limit (benchmarks/limits.py). A side's share of the limit is
its own FLOPs, as torch counts them, over its median time over the limit; Latte has an MLP more a block than ours, so
compare shares with it, not times. Peak memory is of a process for each side alone. Where others use the machine,
threads wait for each other and wall time says little: --one-thread counts the CPU seconds of a single one.

With --gpu: STDiT-XL/2 in bfloat16 at the published sizes, fused against eager kernels (benchmarks/gpu_step.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, interleaved, save, side_by_side, table
from benchmarks.limits import Work, layer_shapes, matmul_limit, matmuls, share_of_limit
from benchmarks.resources import peak_memory
from benchmarks.sides import CALLS, SIDES, Sizes, inputs, model_flops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from benchmarks.sides import Batch

FULL, QUICK = Sizes(), Sizes(depth=2, frames=8)
SECONDS, QUICK_SECONDS = 240.0, 30.0
BUSY = 0.3  # load a thread of which others' share of the machine shows in the numbers
TOLERANCE = 1e-4  # largest difference over largest value, float32


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


def in_turns(calls: Mapping[str, Callable[[], object]], works: Mapping[str, Work]) -> dict[str, Callable[[], object]]:
    """Both in one round, the products shared out behind the sides, so that each side has some of them beside it."""
    turns: dict[str, Callable[[], object]] = {}
    for i, (name, call) in enumerate(calls.items()):
        turns[name] = call
        turns |= {name: work.call for name, work in list(works.items())[i :: len(calls)]}
    return turns


def measure(sizes: Sizes, seconds: float, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Rows of ours against each other side, everyone's FLOPs, and the limit while each thing was timed."""
    import torch

    sides = {name: build(sizes) for name, build in SIDES.items()}
    difference = check_equal(sides["ours"].model, sides["plain"].model, sizes)
    flops = {name: model_flops(name, sizes) for name in sides}
    batch, works = inputs(sizes), matmuls(layer_shapes(sizes.config, sizes.tokens), torch.float32, torch.device("cpu"))
    rows, limits = [], {}
    for what, share in (("forward", 0.3), ("training step", 0.7)):
        calls = {name: CALLS[what](side, batch) for name, side in sides.items()}
        times = interleaved(in_turns(calls, works), rounds=100, seconds=share * seconds, warmup=1, clock=clock)
        limits[what] = matmul_limit(works, times)
        for other in list(sides)[1:]:
            row = {"what": what, "other_side": other, **side_by_side(times["ours"], times[other])}
            for key, name in (("ours", "ours"), ("other", other)):
                row[key] |= share_of_limit(flops[name][what]["counted"] or 0, times[name], limits[what])
            rows.append(row)
    return {
        "largest_difference": difference,
        "matmul_limit": limits,
        "sides": {name: {"flops": flops[name]} for name in sides},
        "rows": rows,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Memory: a process for each side, which does nothing else


def in_a_process(name: str, sizes: Sizes) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--side", name, "--sizes", json.dumps(asdict(sizes))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name} alone failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(name: str, sizes: Sizes) -> dict[str, Any]:
    """Two steps of one side; what it takes above the libraries, and in all."""
    side = SIDES[name](sizes)
    step, before = CALLS["training step"](side, inputs(sizes)), peak_memory()
    step()
    step()
    return {
        "parameters": sum(parameter.numel() for parameter in side.model.parameters()),
        "peak_memory_mb": round(peak_memory() / 2**20),
        "before_first_step_mb": round(before / 2**20),  # libraries and weights
        "energy_joules": None,  # no CPU tells it
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
    columns = ("", "side", "ours is", "ms", "GFLOP/s", "of the limit", "at best", "peak MB")
    sizes = Sizes(**result["sizes"])
    rounds = " and ".join(str(limit["rounds"]) for limit in result["matmul_limit"].values())
    title = (
        f"STDiT, {sizes.depth} blocks of {sizes.hidden_size} channels, latents {'x'.join(map(str, sizes.latents))}, "
        f"float32, {result['threads']} thread(s), {result['clock']} (medians of {rounds})"
    )
    last = [
        f"limit, {what}: {limit['gflops']} GFLOP/s ({limit['product']}), at best {limit['best_gflops']}"
        for what, limit in result["matmul_limit"].items()
    ]
    before, after = result["environment"]["load_before"], result["load_after"]
    if result["threads"] > 1 and max(before, after - 1) > BUSY * result["threads"]:
        last.append(f"others used the machine, load {before} before and {after} after: see --one-thread")
    return "\n".join([table(title, columns, lines), *last])


def _line(timed: dict[str, Any], about: dict[str, Any]) -> tuple[object, ...]:
    shares = (f"{100 * timed[share]:.0f} %" for share in ("share_of_limit", "share_at_best"))
    return timed["median_ms"], timed["gflops"], *shares, about["peak_memory_mb"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model, fewer frames, less time")
    add("--seconds", type=float, help=f"time to spend measuring on the CPU (default: {SECONDS:.0f})")
    add("--one-thread", action="store_true", help="CPU seconds of one thread instead of wall time of all")
    add("--gpu", action="store_true", help="measure the published sizes on a GPU instead")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)  # what `in_a_process` starts
    add("--sizes", type=json.loads, default={}, help=argparse.SUPPRESS)
    add("--out", type=Path, help="JSON file (default: benchmarks/results/train_step[_one_thread|_gpu].json)")
    args = parser.parse_args()
    if args.gpu:
        from benchmarks.gpu_step import run

        return run(args.out)
    if args.side:
        print(json.dumps(alone(args.side, Sizes(**args.sizes))))
        return 0

    import torch

    where, sizes = environment(), QUICK if args.quick else FULL
    clock = time.process_time if args.one_thread else time.perf_counter
    if args.one_thread:
        torch.set_num_threads(1)
    name = "train_step_one_thread" if args.one_thread else "train_step"
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "environment": where,
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if args.one_thread else "wall time",
        "dtype": "float32",
        "sizes": asdict(sizes),
        **measure(sizes, args.seconds or (QUICK_SECONDS if args.quick else SECONDS), clock),
    }
    for side, about in result["sides"].items():
        about |= in_a_process(side, sizes)
    result["load_after"] = round(os.getloadavg()[0], 2)
    path = save(name, result, args.out)
    print(report(result))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
