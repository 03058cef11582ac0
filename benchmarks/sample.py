"""Sampling with guidance, ours beside a plain loop around the plain model, on this machine's CPU.

    python -m benchmarks.sample [--quick] [--one-thread] [--steps N] [--seconds S] [--out FILE]

One prompt, 16 frames of 256x256 pixels as latents, IDDPM with guidance in one batch of the prompt and the null caption,
as the original samples. The plain side is benchmarks/plain_stdit.py called with the doubled batch at every step; ours
prepares the text once, folds it into the projections around it while it is short, and computes once for both halves
what precedes the first text. A third side is ours without all that. Both models hold the same weights and must end at
the same latents before anything is timed; then whole runs of --steps steps are timed in turns, the preparation in
them. More steps, such as the recipe's 100, divide it by more.

Shares of the matmul limit (benchmarks/limits.py) are of each side's own FLOPs, as torch counts them. Where others use
the machine, --one-thread counts the CPU seconds of a single one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, interleaved, save, side_by_side, table
from benchmarks.limits import counted_flops, layer_shapes, matmul_limit, matmuls, share_of_limit
from benchmarks.resources import peak_memory
from benchmarks.sides import Sizes, build_ours, build_plain
from benchmarks.train_step import in_turns

if TYPE_CHECKING:
    from torch import Tensor

FULL, QUICK = Sizes(), Sizes(depth=2, frames=8)
SECONDS, QUICK_SECONDS = 300.0, 30.0
PROMPTS = (25, 120)  # tokens of the prompt: a sentence, and as many as the model reads
GUIDANCE = 7.0
STEPS, CHECKED_STEPS = 2, 8
TOLERANCE = 1e-4  # largest difference over largest value, float32

Run = Callable[[], "Tensor"]


def build(name: str, sizes: Sizes, prompt: int, steps: int) -> Run:
    """A whole sampling of one prompt with so many tokens, from its text to latents [1, C, T, H, W]."""
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.flow import count_tokens
    from opensora_repro.diffusion.sampling import sample_latents

    model: Any = (build_plain if name == "plain" else build_ours)(sizes).model.eval()
    generator = torch.Generator().manual_seed(1)
    text, null = torch.randn(2, 1, sizes.caption_tokens, sizes.caption_channels, generator=generator).unbind(0)
    mask = torch.arange(sizes.caption_tokens)[None] < prompt

    def run() -> Tensor:
        return sample_latents(
            model,
            DiffusionConfig(),
            shape=sizes.latents[1:],
            condition=text,
            mask=mask,
            null_condition=null[0],
            steps=steps,
            guidance=GUIDANCE,
            sampler="iddpm",
            generators=[torch.Generator().manual_seed(0)],
            num_tokens=count_tokens(sizes.latents[1:], sizes.config.patch_size),
            prepare_text=model.prepare_text if name == "ours" else None,
        )

    return run


SIDES = ("ours", "plain", "ours, text not prepared")


def largest_difference(sizes: Sizes, prompt: int, steps: int) -> float:
    """Of ours to the plain one's latents, over their largest value; ends the benchmark where it is too large."""
    ours, plain = (build(name, sizes, prompt, steps)() for name in ("ours", "plain"))
    found = float((ours - plain).abs().max() / plain.abs().max())
    if not found < TOLERANCE:
        raise SystemExit(f"error: after {steps} steps latents differ by {found:.1e}; timing them would mean nothing")
    return float(f"{found:.2e}")


def formula(sizes: Sizes, steps: int) -> int:
    """FLOPs of the model on the prompt's and the null caption's samples, all their tokens, at every step."""
    from opensora_repro.training.planning.flops import forward_products
    from opensora_repro.training.planning.sizes import token_grid

    return 2 * steps * forward_products(sizes.config, token_grid(sizes.config, sizes.latents[1:])).forward_flops


def measure(
    sizes: Sizes, prompts: tuple[int, ...], steps: int, checked: int, seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    import torch

    works = matmuls(layer_shapes(sizes.config, 2 * sizes.tokens), torch.float32, torch.device("cpu"))
    rows, limits, differences = [], {}, {}
    for prompt in prompts:
        what = f"prompt of {prompt} tokens"
        differences[what] = largest_difference(sizes, prompt, checked)
        runs = {name: build(name, sizes, prompt, steps) for name in SIDES}
        flops = {name: counted_flops(run) for name, run in runs.items()}
        times = interleaved(in_turns(runs, works), rounds=100, seconds=seconds / len(prompts), warmup=1, clock=clock)
        limits[what] = matmul_limit(works, times)
        for other in SIDES[1:]:
            row: dict[str, Any] = {"what": what, "other_side": other, **side_by_side(times["ours"], times[other])}
            for key, name in (("ours", "ours"), ("other", other)):
                row[key] |= {"flops": flops[name]} | share_of_limit(flops[name], times[name], limits[what])
            rows.append(row)
    return {
        "largest_difference": differences,
        "checked_steps": checked,
        "flops_by_formula": formula(sizes, steps),
        "matmul_limit": limits,
        "rows": rows,
    }


def memory_alone(name: str, sizes: Sizes, prompt: int, steps: int) -> int:
    """Largest resident megabytes of a process that does nothing but sample."""
    about = json.dumps({"name": name, "sizes": asdict(sizes), "prompt": prompt, "steps": steps})
    command = [sys.executable, "-m", "benchmarks.sample", "--alone", about]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name} alone failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def report(result: dict[str, Any]) -> str:
    lines: list[tuple[object, ...]] = []
    for row in result["rows"]:
        for side, name in (("ours", "ours"), ("other", row["other_side"])):
            if side == "ours" and name in [line[1] for line in lines if line[0] == row["what"]]:
                continue
            ratio = "" if side == "ours" else f"{row['ratio']:.2f}x"
            found, memory = row[side], result["peak_memory_mb"][name]
            flops, share = f"{found['flops'] / 1e9:.0f}", f"{100 * found['share_of_limit']:.0f} %"
            lines.append((row["what"], name, ratio, found["median_ms"], flops, share, memory))
    sizes = Sizes(**result["sizes"])
    title = (
        f"{result['steps']} steps with guidance, {sizes.depth} blocks of {sizes.hidden_size} channels, latents "
        f"{'x'.join(map(str, sizes.latents[1:]))}, float32, {result['threads']} thread(s), {result['clock']} (medians)"
    )
    return table(title, ("", "side", "ours is", "ms", "GFLOPs", "of the limit", "peak MB"), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model, fewer frames, one prompt, less time")
    add("--steps", type=int, default=STEPS, help="sampling steps of a timed run (default: %(default)s)")
    add("--seconds", type=float, help=f"time to spend measuring (default: {SECONDS:.0f})")
    add("--one-thread", action="store_true", help="CPU seconds of one thread instead of wall time of all")
    add("--alone", type=json.loads, help=argparse.SUPPRESS)  # what `memory_alone` starts
    add("--out", type=Path, help="JSON file (default: benchmarks/results/sample[_one_thread].json)")
    args = parser.parse_args()
    if args.alone:
        build(args.alone["name"], Sizes(**args.alone["sizes"]), args.alone["prompt"], args.alone["steps"])()
        print(round(peak_memory() / 2**20))
        return 0

    import torch

    where, sizes = environment(), QUICK if args.quick else FULL
    clock = time.process_time if args.one_thread else time.perf_counter
    if args.one_thread:
        torch.set_num_threads(1)
    prompts, seconds = PROMPTS[:1] if args.quick else PROMPTS, QUICK_SECONDS if args.quick else SECONDS
    checked = max(args.steps, 2 if args.quick else CHECKED_STEPS)
    result: dict[str, Any] = {
        "benchmark": "sample",
        "environment": where,
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if args.one_thread else "wall time",
        "dtype": "float32",
        "sizes": asdict(sizes),
        "steps": args.steps,
        "guidance": GUIDANCE,
        "energy_joules": None,  # no CPU tells it
        **measure(sizes, prompts, args.steps, checked, args.seconds or seconds, clock),
        "peak_memory_mb": {name: memory_alone(name, sizes, prompts[0], args.steps) for name in SIDES},
        "load_after": round(os.getloadavg()[0], 2),
    }
    path = save("sample_one_thread" if args.one_thread else "sample", result, args.out)
    print(report(result))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
