"""Every check that needs an NVIDIA GPU, in one call of a few minutes.

    python -m tests.gpu.checks [--out FILE]

The model on the GPU against itself on the CPU and against reference outputs, samplers, frozen encoders, and training
steps at full size with their time and memory. Prints a line a check and writes JSON; exits 1 if a check failed, and 0
with {"gpu": null} where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import Skip
from benchmarks.harness import environment, save
from tests.gpu.attention import captions_end_to_end, packed_rows, sampling_full_size
from tests.gpu.graphs import full_size, same_samples, unrecordable
from tests.gpu.kernels import kernel_bandwidth, kernel_curves, kernel_parity, kernel_repeatability
from tests.gpu.loop import encoders_beside, loop_without_waiting
from tests.gpu.memory import memory_full_size, same_numbers
from tests.gpu.models import frozen_models, golden, golden_full_size, parity, samplers

if TYPE_CHECKING:
    import torch

BUDGET_SECONDS = 480  # no check begins after this
NEEDED = ("torch", "numpy", "einops", "safetensors")  # without these there is nothing to check
FROZEN_NEED = ("diffusers", "transformers", "sentencepiece", "ftfy")


def training(device: torch.device, **options: Any) -> dict[str, Any]:
    """The published 16x256x256 step: STDiT-XL/2, 8 samples a GPU, activation checkpointing."""
    from tests.gpu import step

    return step.measure(device, step.CASES["16x256"], **options)[0]


def training_case(device: torch.device, name: str) -> dict[str, Any]:
    """A published size with fused and with eager kernels; utilisation, and speed beside the published."""
    from tests.gpu import step

    row = step.measure_case(device, name)
    assert row["flops"]["counted"] == row["flops"]["formula"], row["flops"]
    products = row["matmul_limit"].pop("products")
    return {**row, "slowest product": min(products.values())}


# Each takes the device and returns what it measured, and raises AssertionError where something is wrong; with the
# packages that it needs besides NEEDED.
CHECKS: dict[str, tuple[Callable[[Any], dict[str, Any]], tuple[str, ...]]] = {
    "stdit parity": (lambda device: parity(device, True), ()),
    "pixart parity": (lambda device: parity(device, False), ()),
    "captions end to end": (captions_end_to_end, ()),
    "packed rows": (packed_rows, ()),
    "kernels, parity": (kernel_parity, ("triton",)),
    "kernels, repeatability": (kernel_repeatability, ("triton",)),
    "kernels, bandwidth": (kernel_bandwidth, ("triton",)),
    "kernels, 200 steps in float32": (lambda device: kernel_curves(device, "fp32"), ("triton",)),
    "kernels, 200 steps in bf16": (lambda device: kernel_curves(device, "bf16"), ("triton",)),
    "samplers": (samplers, ()),
    "sampling, XL/2 16x32x32": (sampling_full_size, ()),
    "graphs, same samples": (same_samples, ()),
    "graphs, XL/2": (full_size, ()),
    "reference outputs": (golden, ()),
    "reference outputs, XL/2": (golden_full_size, ()),
    "autoencoder and text encoder": (frozen_models, FROZEN_NEED),
    "training loop, nobody waits": (loop_without_waiting, FROZEN_NEED),
    "training loop, encoders beside the model": (encoders_beside, FROZEN_NEED),
    "training, 16x256": (lambda device: training_case(device, "16x256"), ()),
    "training, 16x512": (lambda device: training_case(device, "16x512"), ()),
    "training, 64x512": (lambda device: training_case(device, "64x512"), ()),
    "memory, options that change no number": (same_numbers, ()),
    "memory, XL/2 64x64x64": (memory_full_size, ()),
    "training, optimizer not fused": (lambda device: training(device, fused_optimizer=False), ()),
    "training, zero2": (lambda device: training(device, plugin="zero2"), ("colossalai",)),
    "training, hybrid": (lambda device: training(device, plugin="hybrid"), ("colossalai",)),
    "graphs, what cannot be recorded": (unrecordable, ()),  # last: nothing is recorded after it
}


def missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def run_check(name: str, device: Any) -> dict[str, Any]:
    """Return status, seconds and what was measured; a fault in one check never keeps the next from running."""
    check, packages = CHECKS[name]
    start = time.perf_counter()
    try:
        lacking = missing(packages)
        if lacking:
            raise Skip(f"missing packages: {', '.join(lacking)}")
        result: dict[str, Any] = {"status": "passed", **check(device)}
    except Skip as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        result = {"status": "failed", "reason": f"{type(error).__name__} at {where}: {error}"}
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def run_all(device: Any) -> dict[str, dict[str, Any]]:
    import torch

    began = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for name in CHECKS:
        torch.cuda.empty_cache()
        if time.perf_counter() - began > BUDGET_SECONDS:
            results[name] = {"status": "failed", "reason": f"not begun within {BUDGET_SECONDS} s", "seconds": 0.0}
        else:
            results[name] = run_check(name, device)
        shown = {key: value for key, value in results[name].items() if key != "status"}
        print(f"{results[name]['status']:<8}{name}: {shown}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu_checks.json)")
    args = parser.parse_args()

    lacking = missing(NEEDED)
    if lacking:
        save("gpu_checks", {"gpu": None, "missing": lacking}, args.out)
        print(f"nothing checked, missing packages: {', '.join(lacking)}")
        return 1 if "torch" not in lacking else 0
    import torch

    if not torch.cuda.is_available():
        save("gpu_checks", {"gpu": None, "environment": environment()}, args.out)
        print("no NVIDIA GPU here: nothing to check")
        return 0
    # Parity is about our code, so float32 is float32; training runs in bf16 whatever this says.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    checks = run_all(torch.device("cuda", 0))
    result = {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "environment": environment(),
        "checks": checks,
    }
    path = save("gpu_checks", result, args.out)
    failed = [name for name, check in checks.items() if check["status"] == "failed"]
    print(f"{properties.name}: {len(checks) - len(failed)} of {len(checks)} without a fault; written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
