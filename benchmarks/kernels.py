"""The fused kernels beside their eager twins on a GPU, and how near each comes to the speed of a plain copy.

    python -m benchmarks.kernels [--rounds N] [--out FILE]

At STDiT-XL/2's sizes, as bf16 training calls them. Bytes are those that must be read and written once: inputs and
outputs, backward also what is kept for it and the gradients. Their share of a copy's bandwidth, measured between the
same rounds, says what is left to gain. Where there is no GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, save, side_by_side, table
from tests.gpu.kernel_cases import Case, Sizes, cases, using

if TYPE_CHECKING:
    import torch

XL = Sizes(B=8, T=16, S=256, D=1152, H=16, F=4608)  # 16 frames of 256x256 pixels, 8 samples
TYPES = "bf16 autocast"
GOAL = 0.8  # share of the copy's bandwidth
ROUNDS = 30
FLUSH = 1 << 29  # bytes written before each call: none of its input is left in the cache, and the launch is in time
PARAMETERS = [(4608, 1152), (4608,), (1152, 4608), (1152,), (3456, 1152), (3456,), (1152, 1152), (1152,)] * 4


def timed(
    sides: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = ROUNDS, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds on the GPU of each call, a call of each side in turn."""
    import torch

    spoil = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, call in sides.items():
            spoil.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            if number >= warmup:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1000 for start, end in pairs] for name, pairs in events.items()}


def num_bytes(tensors: Sequence[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors if value is not None)


def measure_case(name: str, case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for the forward pass and one for the backward pass."""
    import torch

    from opensora_repro.kernels import eager, ops

    def both(run: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
        return {"ours": run(ops), "eager": run(eager), "copy": copy_call(device)}

    @torch.no_grad()
    def forward(kernels: Any) -> None:
        case.run(kernels, case.inputs)

    given = [value for value in case.inputs if value is not None]
    outputs = case.run(ops, case.inputs)
    moved = num_bytes(given) + num_bytes(outputs)
    rows = [row(f"{name}: forward", moved, timed(both(lambda k: lambda: forward(k)), device, rounds=rounds))]

    def backward(kernels: Any) -> Callable[[], object]:
        found = case.run(kernels, case.inputs)
        grads = [torch.randn_like(out) for out in found]
        return lambda: torch.autograd.grad(found, given, grads, retain_graph=True)

    moved = num_bytes(outputs) + num_bytes(given[case.passed :]) + num_bytes(case.kept(case.inputs, outputs))
    return [*rows, row(f"{name}: backward", moved, timed(both(backward), device, rounds=rounds))]


def measure_adamw(device: torch.device, rounds: int) -> dict[str, Any]:
    """Clipping, AdamW and averaging of four blocks' weights: one pass, or torch's two."""
    import torch

    from opensora_repro.kernels.adamw import FusedAdamW

    def make(fused: bool) -> Callable[[], None]:
        params = [torch.randn(shape, device=device).requires_grad_() for shape in PARAMETERS]
        shadows = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer: Any = FusedAdamW(params, lr=1e-4) if fused else torch.optim.AdamW(params, lr=1e-4, fused=True)
        optimizer.grad_scale = torch.full((), 1 / 0.999, device=device)
        optimizer.found_inf = torch.zeros((), device=device)
        if fused:
            optimizer.average_into(dict(zip(params, shadows, strict=True)), lambda: 0.01)
            return optimizer.step  # type: ignore[no-any-return]

        def step() -> None:
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(shadows, params, 0.01)

        return step

    elements = sum(torch.Size(shape).numel() for shape in PARAMETERS)
    moved = 4 * elements * 9  # weights, both moments and the average read and written, gradients read
    sides = {"ours": make(True), "eager": make(False), "copy": copy_call(device)}
    return row("clip, AdamW, average", moved, timed(sides, device, rounds=rounds))


def copy_call(device: torch.device, size: int = 1 << 29) -> Callable[[], object]:
    """Copies `size` bytes."""
    import torch

    source, target = torch.empty(2, size // 4, device=device).unbind(0)
    return lambda: target.copy_(source)


def row(name: str, moved: int, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    copy = 2 * (1 << 29) / statistics.median(times["copy"])
    ours = moved / statistics.median(times["ours"])
    return {
        "kernel": name,
        "bytes": moved,
        **side_by_side(times["ours"], times["eager"]),
        "gb_per_second": round(ours / 1e9, 1),
        "copy_gb_per_second": round(copy / 1e9, 1),
        "share_of_copy": round(ours / copy, 3),
    }


def measure(device: torch.device, sizes: Sizes = XL, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    import torch

    rows = []
    with using("triton", device):
        for name, case in cases(sizes, TYPES, device).items():
            if "part of" not in name and "by frame" not in name and name != "GELU":  # the same kernels once more
                rows += measure_case(name, case, device, rounds)
        torch.cuda.empty_cache()
        rows.append(measure_adamw(device, rounds))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/kernels.json)")
    args = parser.parse_args()

    import torch

    from opensora_repro.kernels.ops import missing_triton

    result: dict[str, Any] = {"benchmark": "kernels", "gpu": None, "environment": environment()}
    lacking = missing_triton() or ("" if torch.cuda.is_available() else "no NVIDIA GPU here")
    if lacking:
        path = save("kernels", {**result, "missing": lacking}, args.out)
        print(f"{lacking}: no kernel is measured; written to {path}")
        return 0
    device = torch.device("cuda", 0)
    rows = measure(device, rounds=args.rounds)
    name = torch.cuda.get_device_name(device)
    sizes = {**vars(XL), "types": TYPES}
    path = save("kernels", {**result, "gpu": name, "sizes": sizes, "goal": GOAL, "rows": rows}, args.out)
    shown = [
        (r["kernel"], r["ours"]["median_ms"], r["other"]["median_ms"], f"{r['ratio']:.2f}x", r["gb_per_second"],
         f"{100 * r['share_of_copy']:.0f} %")
        for r in rows
    ]  # fmt: skip
    title = f"fused kernels on {name}, tokens of {XL.B}x{XL.T}x{XL.S}, {XL.D} channels, {TYPES} (medians)"
    print(table(title, ("", "ours ms", "eager ms", "speed", "GB/s", "of a copy"), shown))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
