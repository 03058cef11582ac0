"""GPU checks of the fused kernels: exact, the same every time, as fast as a copy, and harmless to a loss curve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import require

if TYPE_CHECKING:
    import torch


def kernel_parity(device: torch.device) -> dict[str, Any]:
    """Every fused kernel and its gradients against float64, in all types, at small odd sizes and at XL/2's widths."""
    from tests.gpu import kernel_cases

    sizes = (kernel_cases.Sizes(2, 3, 5, 20, 2, 36), kernel_cases.Sizes(3, 7, 60, 1152, 16, 4608))
    found: dict[str, Any] = {}
    with kernel_cases.using("triton", device):
        for types in kernel_cases.TYPES:
            shares = [
                error
                for size in sizes
                for case in kernel_cases.cases(size, types, device).values()
                for error in kernel_cases.errors(case, types).values()
            ]
            tolerance = kernel_cases.TOLERANCE[types]
            found[types] = require(tolerance * max(shares), tolerance, types)
        errors = kernel_cases.adamw_errors([(1152, 1152), (1500,), (1,), ()], device)
        found |= {name: require(error, 1e-6, name) for name, error in errors.items()}
    return found


def kernel_repeatability(device: torch.device) -> dict[str, Any]:
    """Sums over tokens come out the same every time, bit for bit."""
    import torch

    from opensora_repro.kernels import ops
    from tests.gpu import kernel_cases

    cases = kernel_cases.cases(kernel_cases.Sizes(4, 16, 256, 1152, 16, 4608), "bf16 autocast", device)
    with kernel_cases.using("triton", device):
        for name, case in cases.items():
            outputs = case.run(ops, case.inputs)
            given = [value for value in case.inputs if value is not None]
            first, *others = (torch.autograd.grad(outputs, given, outputs, retain_graph=True) for _ in range(3))
            for again in others:
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name
    return {"cases": len(cases)}


def kernel_bandwidth(device: torch.device) -> dict[str, Any]:
    """Each kernel's share of a copy's bandwidth, and how many times as fast as eager it is."""
    from benchmarks import kernels

    rows = kernels.measure(device)
    low = [r["kernel"] for r in rows if r["share_of_copy"] < kernels.GOAL]
    shares = {r["kernel"]: f"{r['share_of_copy']:.2f} of a copy, {r['ratio']:.2f}x eager" for r in rows}
    return {**shares, f"below {kernels.GOAL:.0%} of a copy": low}


def kernel_curves(device: torch.device, dtype: str, steps: int = 200) -> dict[str, Any]:
    """Losses with fused and with eager kernels: float32 to 1e-4, bf16 within what rounding the first weights does."""
    from opensora_repro.models.config import STDiTConfig
    from tests.gpu.kernel_curve import curve, largest_gap

    cfg = STDiTConfig(hidden_size=96, depth=2, num_heads=4, caption_channels=32, model_max_length=12)
    run: dict[str, Any] = {"dtype": dtype, "steps": steps, "batch_size": 4, "size": (4, 8, 12), "lr": 1e-4}
    eager, fused = (curve(kernels, cfg, device, **run) for kernels in ("eager", "triton"))
    assert min(eager) < 0.95 * eager[0], f"the loss does not fall: {eager[0]} to {eager[-1]}"
    noise = largest_gap(curve("eager", cfg, device, **run, seed=1), eager)
    allowed = 1e-4 if dtype == "fp32" else max(2 * noise, 1e-3)
    gap = require(largest_gap(fused, eager), allowed, f"{dtype} curves of {steps} steps")
    return {"largest gap": gap, "gap between roundings": float(f"{noise:.2e}"), "last loss": round(fused[-1], 4)}
