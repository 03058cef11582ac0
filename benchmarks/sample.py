"""Sampling with guidance, ours beside a plain loop around the plain model, on this machine's CPU.

    python -m benchmarks.sample [--quick] [--one-thread] [--whole] [--steps N] [--seconds S] [--out FILE]
    python -m benchmarks.sample RUN [--prompts N|FILE] [--step-cache FILE[:THRESHOLD]] [--one-thread] [--out FILE]

The second measures what makes a run's sampling faster, see benchmarks/faster.py; the first, all that follows.

One prompt, 16 frames of 256x256 pixels as latents, IDDPM with guidance in one batch of the prompt and the null caption,
as the original samples.

plain         benchmarks/plain_stdit.py, called with the doubled batch at every step
ours          as stages.sample does: the text prepared once and, while it is short, folded into the projections around
              it; what precedes the first text computed once for both halves; freed memory kept for the next tensors
in between    the plain side with freed memory kept, and ours without prepared text

Each side is a process of its own, for how it treats memory is a part of it. All hold the same weights and must end at
the same latents before anything is timed; then whole runs of --steps steps are timed in turns, the preparation in them.
More steps, such as the recipe's 100, divide that by more; --whole runs those once, ours and plain, and compares. Shares
of the matmul limit (benchmarks/limits.py) are of each side's own FLOPs, as torch counts them. Where others use the
machine, --one-thread counts CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import faster
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
from benchmarks.limits import counted_flops, layer_shapes, matmul_limit, matmuls, share_of_limit
from benchmarks.processes import Ask, Worker, in_processes, memory_columns, seconds_of
from benchmarks.sides import Sizes, build_ours, build_plain

if TYPE_CHECKING:
    from torch import Tensor

FULL, QUICK = Sizes(), Sizes(depth=2, frames=8)
SECONDS, QUICK_SECONDS = 300.0, 30.0
PROMPTS = (25, 120)  # tokens of the prompt: a sentence, and as many as the model reads
GUIDANCE = 7.0
STEPS, CHECKED_STEPS, WHOLE_STEPS = 2, 8, 100
TOLERANCE = 1e-4  # largest difference over largest value, float32


@dataclass(frozen=True)
class Side:
    ours: bool
    prepared: bool = False
    keeps_memory: bool = False


SIDES = {
    "ours": Side(ours=True, prepared=True, keeps_memory=True),
    "plain": Side(ours=False),
    "plain, freed memory kept": Side(ours=False, keeps_memory=True),
    "ours, text not prepared": Side(ours=True, keeps_memory=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# A side's process


def build(side: Side, sizes: Sizes) -> Callable[[int, int], Tensor]:
    """`(tokens of the prompt, steps) -> latents [1, C, T, H, W]`, a whole sampling from the text on."""
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.samplers import LatentSampler

    model: Any = (build_ours if side.ours else build_plain)(sizes).model.eval()
    generator = torch.Generator().manual_seed(1)
    text, null = torch.randn(2, 1, sizes.caption_tokens, sizes.caption_channels, generator=generator).unbind(0)

    def run(prompt: int, steps: int) -> Tensor:
        return LatentSampler(
            DiffusionConfig(),
            "iddpm",
            steps=steps,
            guidance=GUIDANCE,
            prepare_text=model.prepare_text if side.prepared else None,
        )(
            model,
            text,
            torch.arange(sizes.caption_tokens)[None] < prompt,
            null[0],
            shape=sizes.latents[1:],
            generators=[torch.Generator().manual_seed(0)],
        )

    return run


def answers(side: Side, sizes: Sizes) -> dict[str, Ask]:
    """To ("run" or "flops", tokens of the prompt, steps) and ("latents"): those that the last run ended at."""
    sampling = build(side, sizes)
    last: list[Tensor] = []

    def run(prompt: int, steps: int) -> None:
        last[:] = [sampling(prompt, steps)]

    return {
        "run": run,
        "latents": lambda: last[0].numpy(),
        "flops": lambda *about: counted_flops(lambda: sampling(*about)),
    }


# ---------------------------------------------------------------------------------------------------------------------


def largest_difference(asks: dict[str, Ask], steps: int) -> float:
    """Of the last latents of any side to the plain one's, over their largest value; ends the benchmark if too large."""
    latents = {name: ask("latents") for name, ask in asks.items()}
    expected = latents["plain"]
    found = max(float(abs(value - expected).max() / abs(expected).max()) for value in latents.values())
    if not found < TOLERANCE:
        raise SystemExit(f"error: after {steps} steps latents differ by {found:.1e}; timing them would mean nothing")
    return float(f"{found:.2e}")


def whole_sampling(asks: dict[str, Ask], prompt: int, steps: int) -> dict[str, Any]:
    """All the steps of a sampling, once by ours and once by the plain side."""
    both = {name: asks[name] for name in ("ours", "plain")}
    times = {name: [ask("seconds", "run", prompt, steps)] for name, ask in both.items()}
    difference = largest_difference(both, steps)
    both_sides = side_by_side(times["ours"], times["plain"])
    return {"steps": steps, "prompt_tokens": prompt, **both_sides, "largest_difference": difference}


def formula(sizes: Sizes, steps: int) -> int:
    """FLOPs of the model on the prompt's and the null caption's samples, all their tokens, at every step."""
    from opensora_repro.planning.flops import forward_products
    from opensora_repro.planning.sizes import token_grid

    return 2 * steps * forward_products(sizes.config, token_grid(sizes.config, sizes.latents[1:])).forward_flops


def measure(
    sizes: Sizes,
    prompts: Sequence[int],
    *,
    steps: int,
    checked: int,
    seconds: float,
    whole: int = 0,
    one_thread: bool = False,
    names: Sequence[str] = tuple(SIDES),
) -> dict[str, Any]:
    """Rows of ours against each other side, `seconds` of timing in all.

    `checked`: steps whose latents are compared; `whole`: steps of one sampling more with the first prompt, if any.
    """
    import torch

    works = matmuls(layer_shapes(sizes.config, 2 * sizes.tokens), torch.float32, torch.device("cpu"))
    products = {name: timed(work.call, clock_of(one_thread)) for name, work in works.items()}
    rows, limits, differences = [], {}, {}
    workers = {name: Worker(answers, (SIDES[name], sizes), SIDES[name].keeps_memory) for name in names}
    with in_processes(workers, one_thread) as asks:
        for prompt in prompts:
            what = f"prompt of {prompt} tokens"
            for ask in asks.values():
                ask("run", prompt, checked)
            differences[what] = largest_difference(asks, checked)
            calls = {name: seconds_of(ask, "run", prompt, steps) for name, ask in asks.items()}
            times = interleaved_seconds(
                with_products(calls, products), rounds=100, seconds=seconds / len(prompts), warmup=1
            )
            limits[what] = matmul_limit(works, times)
            flops = {name: ask("flops", prompt, steps) for name, ask in asks.items()}
            for other in names[1:]:
                row: dict[str, Any] = {"what": what, "other_side": other, **side_by_side(times["ours"], times[other])}
                for key, name in (("ours", "ours"), ("other", other)):
                    row[key] |= {"flops": flops[name]} | share_of_limit(flops[name], times[name], limits[what])
                rows.append(row)
        memory = {name: ask("memory") for name, ask in asks.items()}
        longer = whole_sampling(asks, prompts[0], whole) if whole else None
    return {
        "largest_difference": differences,
        "checked_steps": checked,
        "flops_by_formula": formula(sizes, steps),
        "matmul_limit": limits,
        "sides": memory,
        "rows": rows,
        "whole": longer,
    }


def report(result: dict[str, Any]) -> str:
    """A line for each side and prompt."""
    lines: list[tuple[object, ...]] = []
    for row in result["rows"]:
        if row["other_side"] == "plain":
            lines.append((row["what"], "ours", "", *_line(row["ours"], result["sides"]["ours"])))
        memory = result["sides"][row["other_side"]]
        lines.append((row["what"], row["other_side"], f"{row['ratio']:.2f}x", *_line(row["other"], memory)))
    sizes = Sizes(**result["sizes"])
    title = (
        f"{result['steps']} steps with guidance, {sizes.depth} blocks of {sizes.hidden_size} channels, latents "
        f"{'x'.join(map(str, sizes.latents[1:]))}, float32, {result['threads']} thread(s), {result['clock']} (medians)"
    )
    heading = ("", "side", "ours is", "ms", "GFLOPs", "of the limit", "freed memory", "peak MB")
    return "\n".join([table(title, heading, lines), *_whole_line(result["whole"])])


def _line(found: dict[str, Any], memory: dict[str, Any]) -> tuple[object, ...]:
    limit = f"{100 * found['share_of_limit']:.0f} %"
    return found["median_ms"], f"{found['flops'] / 1e9:.0f}", limit, *memory_columns(memory)


def _whole_line(whole: dict[str, Any] | None) -> list[str]:
    if whole is None:
        return []
    ours, plain = (whole[side]["median_ms"] / 1e3 for side in ("ours", "other"))
    return [
        f"a whole sampling, {whole['steps']} steps, prompt of {whole['prompt_tokens']} tokens: ours {ours:.0f} s, "
        f"plain {plain:.0f} s: {whole['ratio']:.2f}x; latents differ by {whole['largest_difference']:.1e}"
    ]


def measure_run(args: argparse.Namespace) -> None:
    from opensora_repro.config.prompts import read_prompts
    from opensora_repro.errors import UserError

    record = Run("sample_faster", one_thread=args.one_thread)
    clock = clock_of(args.one_thread)
    try:
        prompts = int(args.prompts) if args.prompts.isdigit() else read_prompts(Path(args.prompts))
        found = faster.measure(args.run, prompts, batch_size=faster.BATCH, cache=args.step_cache, clock=clock)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    record.finish(found, faster.report, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="a run or checkpoint, whose sampling is made faster by parts")
    add(
        "--prompts",
        default=str(faster.PROMPTS),
        metavar="N|FILE",
        help="with RUN: of the demo's (%(default)s), or texts",
    )
    add("--step-cache", metavar="FILE[:THRESHOLD]", help="with RUN: of stages.calibrate (that beside the checkpoint)")
    add("--quick", action="store_true", help="a smaller model, fewer frames, one prompt, less time")
    add("--whole", action="store_true", help=f"also {WHOLE_STEPS} steps, once by ours and plain: a quarter of an hour")
    add("--steps", type=int, default=STEPS, help="sampling steps of a timed run (default: %(default)s)")
    add("--seconds", type=float, help=f"time to spend measuring (default: {SECONDS:.0f})")
    add_options(parser, "sample")
    args = parser.parse_args()

    if args.run is not None:
        return measure_run(args)
    sizes = QUICK if args.quick else FULL
    record = Run("sample", one_thread=args.one_thread)
    found = measure(
        sizes,
        PROMPTS[:1] if args.quick else PROMPTS,
        steps=args.steps,
        checked=max(args.steps, 2 if args.quick else CHECKED_STEPS),
        seconds=args.seconds or (QUICK_SECONDS if args.quick else SECONDS),
        whole=WHOLE_STEPS if args.whole else 0,
        one_thread=args.one_thread,
    )
    about = {
        "dtype": "float32",
        "sizes": asdict(sizes),
        "steps": args.steps,
        "guidance": GUIDANCE,
        "energy_joules": None,  # no CPU tells it
        **found,
    }
    record.finish(about, report, args.out)


if __name__ == "__main__":
    main()
