"""What one sequence-parallel step of STDiT sends: counted, by formula, and beside an all-to-all around every attention.

    python -m benchmarks.collectives [--sp-size N] [--out FILE]

Starts N gloo processes that share one batch by frames and counts every collective they issue, calls and bytes, in a
forward pass and in backward passes without and with activation checkpointing. The other side is the communication of
Open-Sora 1.0's own scheme (benchmarks/everywhere.py), counted in the same way. Bytes are those one rank sends to other
ranks; data parallelism's gradient averaging is the same on both sides and left out. Fails where a count is not its
formula, or where ours moves more than half of the other.

STDiT3 is counted likewise: of each pair of blocks one attends over time, so the formula is STDiT's. Beside it stands,
by formula alone, the split of places of Open-Sora 1.2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, save, table

if TYPE_CHECKING:
    from torch import Tensor

PHASES = ("forward", "backward", "backward, checkpointing")
UNCOUNTED = (
    "all_gather_coalesced", "all_reduce", "all_reduce_coalesced", "broadcast", "gather", "irecv", "isend", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
Counts = dict[str, list[int]]  # phase -> calls, bytes


@dataclass(frozen=True)
class Sizes:
    """Of a step: the formulas' symbols. Latents are [B, C, T * patch_frames, H, W], tokens [B, T, S, D]."""

    B: int = 2
    T: int = 16
    height: int = 16  # of latents
    width: int = 16
    D: int = 192
    depth: int = 4
    heads: int = 8
    captions: tuple[int, ...] = (5, 12)  # tokens of each sample's caption
    out_channels: int = 8
    element: int = 4  # bytes a number of the tokens takes

    @property
    def S(self) -> int:
        return self.height * self.width // 4


# The published STDiT-XL/2 on 16 frames of 512x512 in bf16, for the formulas alone.
PUBLISHED = Sizes(B=1, height=64, width=64, D=1152, depth=28, heads=16, captions=(120,), element=2)
# STDiT3-XL/2 on 102 frames of 480x854, which are 30 latents.
PUBLISHED_1_2 = Sizes(B=1, T=30, height=60, width=108, D=1152, depth=28, heads=16, captions=(300,), element=2)


def our_formula(z: Sizes, p: int) -> Counts:
    """Per block an all-to-all of 3 * B * (T / p) * S * D and one of a third; once, the float32 output is gathered."""
    block = 4 * z.B * (z.T // p) * z.S * z.D * (p - 1) // p * z.element
    output = (p - 1) * z.B * z.out_channels * (z.T // p) * z.height * z.width * 4
    return {
        "forward": [2 * z.depth + 1, z.depth * block + output],
        "backward": [2 * z.depth, z.depth * block],
        "backward, checkpointing": [4 * z.depth, 2 * z.depth * block],
    }


def everywhere_formula(z: Sizes, p: int) -> Counts:
    """As benchmarks/everywhere.py derives it."""
    block = 10 * z.B * (z.T // p) * z.S * z.D * (p - 1) // p * z.element
    ends = (p - 1) * z.B * (z.T // p) * z.S * z.D * z.element
    text = 2 * (p - 1) * sum(z.captions) * z.D // p * z.element
    return {
        "forward": [6 * z.depth + 1, z.depth * block + ends],
        "backward": [8 * z.depth + 1, z.depth * (block + text) + ends],
        "backward, checkpointing": [14 * z.depth + 1, z.depth * (2 * block + text) + ends],
    }


def places_formula(z: Sizes, p: int) -> Counts:
    """Open-Sora 1.2's: tokens are split by place, and swapped for heads around spatial and cross-attention.

    A pair of blocks has one of the former, four times the tokens' channels, and two of the latter, twice each. What
    is gathered at the ends, and captions' gradients, are left out in its favour.
    """
    pair = 8 * z.B * z.T * (z.S // p) * z.D * (p - 1) // p * z.element
    return {
        "forward": [6 * z.depth, z.depth * pair],
        "backward": [6 * z.depth, z.depth * pair],
        "backward, checkpointing": [12 * z.depth, 2 * z.depth * pair],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the collectives issued meanwhile, [calls, bytes this rank sends to others]; raise at a kind not known."""
    import torch.distributed as dist

    total = [0, 0]
    kept: dict[str, Callable[..., Any]] = {}

    def counted(name: str, sent: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            total[0] += 1
            total[1] += sent(*args, **kwargs)
            return kept[name](*args, **kwargs)

        return call

    def unknown(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"torch.distributed.{name} was called, whose bytes are not counted here")

        return call

    replaced = {name: unknown(name) for name in (*UNCOUNTED, "all_to_all") if hasattr(dist, name)}
    replaced |= {name: counted(name, sent) for name, sent in SENT.items()}
    for name, call in replaced.items():
        kept[name] = getattr(dist, name)
        setattr(dist, name, call)
    try:
        yield total
    finally:
        for name, call in kept.items():
            setattr(dist, name, call)


def _all_to_all_sends(
    received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int], group: Any
) -> int:
    import torch.distributed as dist

    return (sum(sent_sizes) - sent_sizes[dist.get_rank(group)]) * sent.element_size()


def _all_gather_sends(whole: Any, own: Tensor, group: Any) -> int:
    import torch.distributed as dist

    return (dist.get_world_size(group) - 1) * own.numel() * own.element_size()


SENT: dict[str, Callable[..., int]] = {
    "all_to_all_single": _all_to_all_sends,
    "all_gather_into_tensor": _all_gather_sends,
    "all_gather": _all_gather_sends,
}


def count_phases(forward: Callable[[bool], Tensor]) -> Counts:
    """Count a forward and its backward, without and with checkpointing; `forward` takes which."""
    counts: Counts = {}
    for checkpointing in (False, True):
        with counting() as total:
            out = forward(checkpointing)
        assert counts.setdefault("forward", list(total)) == total  # checkpointing changes nothing in it
        with counting() as total:
            out.square().mean().backward()
        counts["backward, checkpointing" if checkpointing else "backward"] = list(total)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# The two sides, in each process


def our_step(z: Sizes, group: Any, network: str = "STDiT") -> Callable[[bool], Tensor]:
    import torch

    from opensora_repro.models.config import STDiT3Config, STDiTConfig
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.models.stdit3 import STDiT3
    from opensora_repro.parallel.sequence import FrameParallel, apply_sequence_parallelism

    length = max(z.captions)
    size: dict[str, Any] = {"hidden_size": z.D, "depth": z.depth, "num_heads": z.heads, "caption_channels": 32}
    size["model_max_length"] = length
    model: Any = STDiT3(STDiT3Config(**size)) if network == "STDiT3" else STDiT(STDiTConfig(**size))
    names = STDiT3Config.conditions if network == "STDiT3" else ()
    told: dict[str, Any] = {name: torch.full((1,), 24.0) for name in names}
    apply_sequence_parallelism(model, group)
    call = FrameParallel(model, group, model.cfg.patch_size[0])
    latents = torch.randn(z.B, 4, z.T, z.height, z.width)
    mask = torch.arange(length) < torch.tensor(z.captions)[:, None]

    def forward(checkpointing: bool) -> Tensor:
        model.activation_checkpointing = "full" if checkpointing else "none"
        return call(latents, torch.full((z.B,), 500), torch.randn(z.B, length, 32), mask, **told)

    return forward


def everywhere_step(z: Sizes, group: Any) -> Callable[[bool], Tensor]:
    import torch

    from benchmarks.everywhere import EverywhereModel

    model = EverywhereModel(z.D, z.depth, z.heads, group)
    tokens, text = torch.randn(z.B, z.T * z.S, z.D), torch.randn(sum(z.captions), z.D)

    def forward(checkpointing: bool) -> Tensor:
        model.gradient_checkpointing = checkpointing
        out: Tensor = model(tokens, text)
        return out

    return forward


def work(rank: int, size: int, folder: str, sizes: Sizes) -> None:
    """One process: count both sides and write rank's counts to the folder."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = dist.group.WORLD
    steps = {"ours": our_step(sizes, group), "everywhere": everywhere_step(sizes, group)}
    counts = {name: count_phases(step) for name, step in {**steps, "STDiT3": our_step(sizes, group, "STDiT3")}.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


def count_in_processes(size: int, sizes: Sizes) -> dict[str, Counts]:
    """Both sides' counts of one rank; RuntimeError where a process fails or ranks differ."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=work, args=(rank, size, folder, sizes)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a process failed; what it said is above")
        ranks: list[dict[str, Counts]] = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(size)]
    if any(counts != ranks[0] for counts in ranks):
        raise RuntimeError("the ranks do not send the same")
    return ranks[0]


# ---------------------------------------------------------------------------------------------------------------------
# The report


def compare(counted: dict[str, Counts], sizes: Sizes, size: int) -> list[dict[str, Any]]:
    """A row a phase, and one for the whole step without and with checkpointing."""
    sides = {
        "ours": (counted["ours"], our_formula(sizes, size)),
        "everywhere": (counted["everywhere"], everywhere_formula(sizes, size)),
    }
    parts = {phase: [phase] for phase in PHASES}
    parts |= {"step": ["forward", PHASES[1]], "step, checkpointing": ["forward", PHASES[2]]}
    rows = []
    for name, phases in parts.items():
        row: dict[str, Any] = {"phase": name}
        for side, (counts, formula) in sides.items():
            row[side] = {
                "calls": sum(counts[phase][0] for phase in phases),
                "bytes": sum(counts[phase][1] for phase in phases),
                "formula_calls": sum(formula[phase][0] for phase in phases),
                "formula_bytes": sum(formula[phase][1] for phase in phases),
            }
        row["share"] = round(row["ours"]["bytes"] / row["everywhere"]["bytes"], 4)
        rows.append(row)
    return rows


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Where a count is not its formula, or ours moves more than half."""
    found = []
    for row in rows:
        for side in ("ours", "everywhere"):
            counts = row[side]
            if (counts["calls"], counts["bytes"]) != (counts["formula_calls"], counts["formula_bytes"]):
                found.append(f"{row['phase']}: {side} counts are not the formula's: {counts}")
        if row["share"] > 0.5:
            found.append(f"{row['phase']}: ours moves {row['share']:.0%} of the other scheme's bytes")
    return found


def published_step(size: int, sizes: Sizes, other: Callable[[Sizes, int], Counts]) -> dict[str, Any]:
    """A step of a published model with checkpointing, by the formulas."""
    ours, theirs = (
        sum(formula(sizes, size)[phase][1] for phase in ("forward", PHASES[2])) for formula in (our_formula, other)
    )
    return {**asdict(sizes), "ours": ours, "other": theirs, "share": round(ours / theirs, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sp-size", type=int, default=2, choices=(2, 4, 8), help="processes that share a batch (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/collectives.json)")
    args = parser.parse_args()

    sizes = Sizes()
    counted = count_in_processes(args.sp_size, sizes)
    rows = compare(counted, sizes, args.sp_size)
    found = faults(rows)
    if counted["STDiT3"] != our_formula(sizes, args.sp_size):
        found.append(f"STDiT3's counts are not the formula's: {counted['STDiT3']}")
    published = published_step(args.sp_size, PUBLISHED, everywhere_formula)
    published_1_2 = published_step(args.sp_size, PUBLISHED_1_2, places_formula)
    result = {
        "benchmark": "collectives",
        "environment": environment(),
        "sp_size": args.sp_size,
        "sizes": {**asdict(sizes), "S": sizes.S},
        "rows": rows,
        "STDiT3": counted["STDiT3"],
        "published_size": published,
        "published_size_1_2": published_1_2,
        "faults": found,
    }
    path = save("collectives", result, args.out)
    sides = ("ours", "everywhere")
    shown = [
        (r["phase"], *(r[s][k] for s in sides for k in ("calls", "bytes", "formula_bytes")), f"{r['share']:.1%}")
        for r in rows
    ]
    columns = ("", *(f"{side} {what}" for side in sides for what in ("calls", "bytes", "formula")), "share")
    title = (
        f"Collectives of one step, sp_size={args.sp_size}, per rank: B={sizes.B} T={sizes.T} S={sizes.S} D={sizes.D}"
    )
    print(table(f"{title} depth={sizes.depth}, float32", columns, shown))
    print(
        "STDiT-XL/2, 16 frames of 512x512, bf16, checkpointing, by formula: a rank sends "
        f"{published['ours'] / 1e9:.2f} GB a step, "
        f"{published['other'] / 1e9:.2f} GB with all-to-all everywhere ({published['share']:.1%})"
    )
    print(
        "STDiT3-XL/2, 30 latent frames of 480x854, likewise: "
        f"{published_1_2['ours'] / 1e9:.2f} GB a step, {published_1_2['other'] / 1e9:.2f} GB by 1.2's split of places "
        f"({published_1_2['share']:.1%}); counts of a small one are the formula's"
    )
    print(f"written to {path}")
    if found:
        raise SystemExit("error: " + "; ".join(found))


if __name__ == "__main__":
    main()
