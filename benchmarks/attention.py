"""The three attentions of a block with their projections: ours, plain softmax attention, and what else one might do.

    python -m benchmarks.attention [--quick] [--one-thread] [--seconds S] [--out FILE]

Within a frame, over time, and to captions of different length, at heads of 64 to 128 channels; float32 at a width
scaled to the machine on a CPU, bf16 autocast at XL/2's token counts on a GPU. Beside ours stand

naive         benchmarks/plain_stdit.py: the whole matrix of weights in memory, one caption after the other
copied        ours, but queries, keys and values each copied into memory of their own first
masked        ours, but told nothing of the captions' lengths: all tokens of all captions, behind a mask

All sides hold the same weights and must give the same output and gradients before anything is timed, forward alone and
with backward. FLOPs by formula are those of real tokens; torch's count of each side shows what padding adds to them,
except in kernels that it does not know (None).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import rms_error
from benchmarks.harness import Run, add_options, clock_of, interleaved, side_by_side, table, with_products
from benchmarks.limits import counted_flops, matmul_limit, matmuls, share_of_limit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Call = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Sizes:
    samples: int
    frames: int
    places: int
    num_heads: int
    captions: tuple[int, ...]  # real tokens of each sample's caption
    width: int = 120  # tokens that the text encoder gives of each

    @property
    def tokens(self) -> int:
        return self.samples * self.frames * self.places


CPU_SIZES = Sizes(samples=2, frames=16, places=256, num_heads=4, captions=(14, 31))
GPU_SIZES = Sizes(samples=8, frames=16, places=256, num_heads=16, captions=(9, 14, 20, 25, 31, 40, 64, 120))
HEAD_SIZES, QUICK_HEAD_SIZES = (64, 72, 96, 128), (72,)
KINDS = ("space", "time", "captions")
SECONDS, QUICK_SECONDS = 240.0, 30.0
TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}  # root mean square of the difference over that of the values


def build(kind: str, sizes: Sizes, head_size: int, device: torch.device) -> tuple[nn.Module, dict[str, Call]]:
    """Our layer and, by side, what makes [B, T, S, D] of tokens [B, T, S, D], all with its weights."""
    import torch

    from opensora_repro.models.cross_attention import CrossAttention
    from opensora_repro.models.layers import Attention

    torch.manual_seed(0)
    dim = sizes.num_heads * head_size
    layer: nn.Module
    if kind == "captions":
        layer = CrossAttention(dim, sizes.num_heads).to(device)
        return layer, _to_captions(layer, sizes, device)
    layer = Attention(dim, sizes.num_heads, over=kind).to(device)
    return layer, _to_tokens(layer, kind, sizes.num_heads)


def _to_tokens(layer: Any, kind: str, heads: int) -> dict[str, Call]:
    import torch.nn.functional as F
    from einops import rearrange

    from benchmarks.plain_stdit import SelfAttention
    from opensora_repro.kernels import eager

    naive = SelfAttention(layer.qkv.in_features, heads)
    naive.qkv, naive.proj = layer.qkv, layer.proj
    there = "b t s d -> (b t) s d" if kind == "space" else "b t s d -> (b s) t d"
    back = "(b t) s d -> b t s d" if kind == "space" else "(b s) t d -> b t s d"

    def plain(x: Tensor) -> Tensor:
        out: Tensor = rearrange(naive(rearrange(x, there)), back, b=len(x))
        return out

    def copied(x: Tensor) -> Tensor:
        q, k, v = (part.contiguous() for part in eager.split_heads(layer.qkv(x), heads, kind))
        out = F.scaled_dot_product_attention(q, k, v)
        return layer.proj(eager.merge_heads(out, x.shape[1], x.shape[2], kind))  # type: ignore[no-any-return]

    return {"ours": layer, "naive": plain, "copied": copied}


def _to_captions(layer: Any, sizes: Sizes, device: torch.device) -> dict[str, Call]:
    import torch

    from benchmarks.plain_stdit import CrossAttention
    from opensora_repro.models.cross_attention import lay_out, varlen_kernel

    dim = layer.proj.in_features
    naive = CrossAttention(dim, sizes.num_heads)
    naive.q_linear, naive.kv_linear, naive.proj = layer.q_linear, layer.kv_linear, layer.proj
    text = torch.randn(sizes.samples, sizes.width, dim, generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.arange(sizes.width) < torch.tensor(sizes.captions)[:, None]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    known = lay_out(mask, sizes.samples, device, varlen=varlen_kernel(device, dtype, dim // sizes.num_heads))
    unknown = lay_out(mask.to(device), sizes.samples, device, known=False)
    read = [tokens[:length] for tokens, length in zip(text, sizes.captions, strict=True)]

    def plain(x: Tensor) -> Tensor:
        return naive(x.flatten(1, 2), read).view_as(x)  # type: ignore[no-any-return]

    return {
        "ours": lambda x: layer(x, known.take(text), known),
        "naive": plain,
        "masked": lambda x: layer(x, unknown.take(text), unknown),
    }


def formula(kind: str, sizes: Sizes, dim: int) -> int:
    """FLOPs of a forward pass, none on padding: projections of tokens and text, scores, weighted sums."""
    if kind != "captions":
        seen = sizes.places if kind == "space" else sizes.frames
        return 2 * sizes.tokens * (4 * dim**2 + 2 * dim * seen)
    read = sum(sizes.captions)
    per_sample = sizes.frames * sizes.places
    return 2 * (sizes.tokens * 2 * dim**2 + read * 2 * dim**2 + per_sample * read * 2 * dim)


def run(layer: nn.Module, call: Call, x: Tensor, *, backward: bool) -> Callable[[], list[Tensor]]:
    """The output alone, or also the gradients of the tokens and of every parameter."""
    import torch

    leaves = [x, *layer.parameters()]

    def work() -> list[Tensor]:
        with torch.set_grad_enabled(backward), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            out = call(x if backward else x.detach())
        found = [out.detach()]
        if backward:
            out.backward(found[0])
            found += [value.grad for value in leaves if value.grad is not None]
            for value in leaves:
                value.grad = None
        if x.is_cuda:
            torch.cuda.synchronize()
        return found

    return work


def largest_difference(layer: nn.Module, calls: dict[str, Call], x: Tensor) -> float:
    """Of ours to every other side; ends the benchmark where it is too large."""
    found = {name: run(layer, call, x, backward=True)() for name, call in calls.items()}
    worst = 0.0
    for name, results in found.items():
        for ours, other in zip(found["ours"], results, strict=True):
            error = rms_error(ours, other)
            if not error < TOLERANCE[x.device.type]:
                raise SystemExit(f"error: ours and {name} differ by {error:.1e}; timing them would mean nothing")
            worst = max(worst, error)
    return float(f"{worst:.2e}")


def measure_kind(
    kind: str, head_size: int, sizes: Sizes, device: torch.device, seconds: float, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """A row for each other side, forward alone and with backward."""
    import torch

    dim = sizes.num_heads * head_size
    layer, calls = build(kind, sizes, head_size, device)
    shape = (sizes.samples, sizes.frames, sizes.places, dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    difference = largest_difference(layer, calls, x)
    works = matmuls([(sizes.tokens, dim, dim)], torch.bfloat16 if x.is_cuda else torch.float32, device)
    products = {name: work.call for name, work in works.items()}
    rows = []
    for what, backward in (("forward", False), ("forward and backward", True)):
        runs = {name: run(layer, call, x, backward=backward) for name, call in calls.items()}
        counted = None if x.is_cuda else {name: counted_flops(work) for name, work in runs.items()}
        needed = formula(kind, sizes, dim) * (3 if backward else 1)
        times = interleaved(with_products(runs, products), rounds=100, seconds=seconds / 2, warmup=1, clock=clock)
        limit = matmul_limit(works, times)
        for other in list(calls)[1:]:
            row: dict[str, Any] = {
                "kind": kind, "head_size": head_size, "what": what, "other_side": other,
                "largest_difference": difference, "flops_by_formula": needed, "matmul_limit_gflops": limit["gflops"],
                **side_by_side(times["ours"], times[other]),
            }  # fmt: skip
            for key, name in (("ours", "ours"), ("other", other)):
                row[key] |= {"flops_counted": counted and counted[name]} | share_of_limit(needed, times[name], limit)
            rows.append(row)
    return rows


def report(result: dict[str, Any]) -> str:
    lines = [
        (
            f"{row['kind']}, heads of {row['head_size']}, {row['what']}",
            row["other_side"],
            row["ours"]["median_ms"],
            row["other"]["median_ms"],
            f"{row['ratio']:.2f}x",
            f"{100 * row['ours']['share_of_limit']:.0f} %",
        )
        for row in result["rows"]
    ]
    title = f"Attention, {result['dtype']}, {result['threads']} thread(s), {result['clock']} (medians)"
    return table(title, ("", "against", "ours ms", "other ms", "speed", "of the limit"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="heads of one size, less time")
    add("--seconds", type=float, help=f"time to spend measuring (default: {SECONDS:.0f})")
    add_options(parser, "attention")
    args = parser.parse_args()

    import torch

    record = Run("attention", one_thread=args.one_thread)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    heads = QUICK_HEAD_SIZES if args.quick else HEAD_SIZES
    clock = clock_of(args.one_thread)
    seconds = (args.seconds or (QUICK_SECONDS if args.quick else SECONDS)) / (len(heads) * len(KINDS))
    rows = [row for head in heads for kind in KINDS for row in measure_kind(kind, head, sizes, device, seconds, clock)]
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": "bf16 autocast" if device.type == "cuda" else "float32",
        "sizes": asdict(sizes),
        "rows": rows,
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None,
    }
    record.finish(found, report, args.out)


if __name__ == "__main__":
    main()
