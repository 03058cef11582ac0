"""Clips of mixed shapes, packed into rows or one bucket after the other: the same clips, forward and backward.

    python -m benchmarks.packing [--quick] [--one-thread] [--seconds S] [--out FILE]

On the CPU, float32. Both sides have room for ROOM tokens a pass. Of a bucket as many clips go through at once as fit;
there are so many of each that no bucket's last pass is cut short. Packed rows take the clips in a random order, a step
of STEP clips at a time, first-fit-decreasing. Told are tokens a second, and how much of all passes' room is left empty:
neither side computes anything there, but memory has to be there for a full pass. Beside them stands, counted alone,
what batches in that random order would be padded with, were each clip padded to the largest of its batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Run, add_options, clock_of, interleaved, side_by_side, table
from benchmarks.sides import Sizes, random_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOM, STEP = 1024, 64
# Latents' frames, rows and columns: pictures and clips, square, wide and tall
SHAPES = [(1, 16, 16), (1, 12, 20), (1, 20, 12), (1, 24, 24), (4, 12, 20), (4, 20, 12), (4, 16, 16), (8, 16, 16),
          (16, 8, 12), (8, 20, 20)]  # fmt: skip
FULL, QUICK = Sizes(depth=3, caption_channels=64, caption_tokens=40), Sizes(hidden_size=192, num_heads=6, depth=2)
SECONDS, QUICK_SECONDS = 240.0, 30.0
Shape = tuple[int, int, int]
Pass = list[tuple[Shape, int]]  # how many clips of each shape go through at once


def tokens_of(shape: Shape) -> int:
    return shape[0] * (shape[1] // 2) * (shape[2] // 2)


def bucket_passes() -> list[Pass]:
    """As many clips of each shape as make about as many tokens."""
    most = max(map(tokens_of, SHAPES))
    return [
        [(shape, ROOM // tokens_of(shape))] for shape in SHAPES for _ in range(max(1, most // tokens_of(shape) // 4))
    ]


def in_random_order(passes: Sequence[Pass]) -> list[Shape]:
    import numpy as np

    clips = [shape for one in passes for shape, count in one for _ in range(count)]
    return [clips[i] for i in np.random.default_rng(0).permutation(len(clips))]


def packed_passes(clips: Sequence[Shape]) -> list[Pass]:
    from opensora_repro.data.packing import first_fit_decreasing

    found = []
    for first in range(0, len(clips), STEP):
        step = clips[first : first + STEP]
        for row in first_fit_decreasing([tokens_of(shape) for shape in step], ROOM):
            own = [step[i] for i in row]
            found.append([(shape, own.count(shape)) for shape in dict.fromkeys(own)])
    return found


def padding(clips: Sequence[Shape], at_once: int = 4) -> float:
    """Share of what batches of so many clips hold, each padded to the largest sides of its batch."""
    held = 0
    for first in range(0, len(clips), at_once):
        batch = clips[first : first + at_once]
        largest = tuple(max(sides) for sides in zip(*batch, strict=True))
        held += len(batch) * largest[0] * (largest[1] // 2) * (largest[2] // 2)
    return 1 - sum(map(tokens_of, clips)) / held


def work(model: nn.Module, passes: Sequence[Pass], sizes: Sizes) -> Callable[[], None]:
    """Forward and backward of all passes; a pass of one shape is a plain batch."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def inputs(one: Pass) -> tuple[Any, ...]:
        latents = [torch.randn(count, 4, *shape, generator=generator) for shape, count in one]
        clips = sum(count for _, count in one)
        text = torch.randn(clips, sizes.caption_tokens, sizes.caption_channels, generator=generator)
        lengths = torch.randint(5, sizes.caption_tokens, (clips, 1), generator=generator)
        mask = torch.arange(sizes.caption_tokens) < lengths
        batch: Tensor | list[Tensor] = latents[0] if len(latents) == 1 else latents
        return batch, 1000 * torch.rand(clips, generator=generator), text, mask

    given = [inputs(one) for one in passes]

    def call() -> None:
        for batch in given:
            out = model(*batch)
            losses = [x.square().mean((1, 2, 3, 4)).sum() for x in (out if isinstance(out, list) else [out])]
            torch.stack(losses).sum().backward()
        model.zero_grad(set_to_none=True)

    return call


def measure(sizes: Sizes, seconds: float, *, one_thread: bool = False) -> dict[str, Any]:
    import torch

    from opensora_repro.models.packing import PackedSTDiT
    from opensora_repro.process import keep_freed_memory

    keep_freed_memory()  # as our commands do
    torch.manual_seed(0)
    model = random_weights(PackedSTDiT(sizes.config)).train()
    buckets = bucket_passes()
    clips = in_random_order(buckets)
    passes = {"packed": packed_passes(clips), "buckets": buckets}
    calls = {name: work(model, found, sizes) for name, found in passes.items()}
    times = interleaved(calls, rounds=20, seconds=seconds, warmup=1, clock=clock_of(one_thread))
    row = {"what": "mixed clips, forward and backward", "other_side": "buckets",
           **side_by_side(times["packed"], times["buckets"])}  # fmt: skip
    tokens = sum(map(tokens_of, clips))
    for key, name in (("ours", "packed"), ("other", "buckets")):
        row[key] |= {
            "tokens_per_s": round(1000 * tokens / row[key]["median_ms"]),
            "passes": len(passes[name]),
            "room_left": round(1 - tokens / (ROOM * len(passes[name])), 4),
        }
    return {"clips": len(clips), "tokens": tokens, "room": ROOM, "padded_to_largest": round(padding(clips), 3),
            "rows": [row]}  # fmt: skip


def report(result: dict[str, Any]) -> str:
    (row,) = result["rows"]
    lines = [
        (name, row[side]["tokens_per_s"], f"{row[side]['median_ms']:.0f}", row[side]["passes"],
         f"{100 * row[side]['room_left']:.1f} %")
        for name, side in (("packed", "ours"), ("buckets", "other"))
    ]  # fmt: skip
    title = (
        f"{result['clips']} clips of {len(SHAPES)} shapes, {result['tokens']:,} tokens, {result['room']} a pass, "
        f"float32, {result['threads']} thread(s), {result['clock']}"
    )
    padded = f"padded to the largest of four in the same order, {100 * result['padded_to_largest']:.0f} % were padding"
    return "\n".join([table(title, ("side", "tokens/s", "ms", "passes", "room left"), lines), padded])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model, less time")
    add("--seconds", type=float, help=f"time to spend measuring (default: {SECONDS:.0f})")
    add_options(parser, "packing")
    args = parser.parse_args()
    sizes = replace(QUICK, caption_channels=64, caption_tokens=40) if args.quick else FULL
    record = Run("packing", one_thread=args.one_thread)
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    found = {"sizes": asdict(sizes), **measure(sizes, seconds, one_thread=args.one_thread)}
    record.finish(found, report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
