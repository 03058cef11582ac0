"""Every check that needs an NVIDIA GPU, in one call of a few minutes.

    python -m benchmarks.gpu_checks [--out FILE]

The model on the GPU against itself on the CPU and against reference outputs, samplers, frozen encoders, and training
steps at full size with their time and memory. Prints a line a check and writes JSON; exits 1 if a check failed, and 0
with {"gpu": null} where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import relative_error, require, rms_error
from benchmarks.gpu_attention import captions_end_to_end, sampling_full_size
from benchmarks.gpu_graphs import full_size, same_samples, unrecordable
from benchmarks.gpu_memory import memory_full_size, same_numbers
from benchmarks.harness import environment, save

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.stdit import STDiT

REPO = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 480  # no check begins after this
NEEDED = ("torch", "numpy", "einops", "safetensors")  # without these there is nothing to check
FP32_TOLERANCE = 5e-5  # largest difference over largest value; float32 sums in another order
BF16_TOLERANCE = 3e-2  # root mean square of the difference over that of the values
GOLDEN_SLACK = 5  # times a case's own tolerance, which was set for one order of sums
GOLDEN_CASES = (
    "stdit_base", "stdit_T1", "stdit_nonsquare_scaled", "stdit_maskholes_patch222", "stdit_fractional_t_maskrepeat",
    "stdit_nomask", "stdit_nosigma", "pixart_image", "pixart_image_tpos", "pixart_video",
)  # fmt: skip
FROZEN_NEED = ("diffusers", "transformers", "sentencepiece", "ftfy")


class Skip(Exception):
    """A check cannot run here; the message says what it lacks."""


# ---------------------------------------------------------------------------------------------------------------------
# The checks; each takes the device and returns what it measured, and raises AssertionError where something is wrong.


def small_model(temporal_attention: bool) -> STDiT:
    """A model of a few blocks with random weights, also where a new one has zeros."""
    import torch

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    cfg = STDiTConfig(
        hidden_size=144, depth=4, num_heads=4, caption_channels=32, model_max_length=12,
        temporal_attention=temporal_attention,
    )  # fmt: skip
    model = STDiT(cfg)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def small_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents with an odd side, a fractional timestep, captions of different length."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 4, 5, 9, 16, generator=generator),
        torch.tensor([999.0, 12.5, 505.0]),
        torch.randn(3, 12, 32, generator=generator),
        torch.arange(12)[None] < torch.tensor([[12], [1], [7]]),
    )


def outputs_and_gradients(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    inputs = [value.to(device) for value in small_inputs()]
    model.zero_grad(set_to_none=True)
    out = model(*inputs)
    out.square().mean().backward()
    return {"output": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def parity(device: torch.device, temporal_attention: bool) -> dict[str, Any]:
    """float32 outputs and gradients, kept and recomputed, and bf16 autocast, against float32 on the CPU."""
    import torch

    model = small_model(temporal_attention)
    expected = outputs_and_gradients(model, torch.device("cpu"))
    model = model.to(device)
    errors: dict[str, Any] = {}
    for recompute in ("none", "selective", "full"):
        model.activation_checkpointing = recompute
        model.offload_activations = recompute == "full"
        found = outputs_and_gradients(model, device)
        assert found.keys() == expected.keys()
        worst = max(relative_error(found[name], expected[name]) for name in expected)
        errors[f"fp32, {recompute}"] = require(worst, FP32_TOLERANCE, "float32")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        half = model(*[value.to(device) for value in small_inputs()])
    errors["bf16 rms"] = require(rms_error(half, expected["output"]), BF16_TOLERANCE, "bf16")
    return errors


def golden_folder() -> Path:
    folder = Path(os.environ.get("OPENSORA_GOLDEN") or REPO.parent / "shared" / "golden")
    if not folder.is_dir():
        raise Skip(f"no reference outputs at {folder} (set OPENSORA_GOLDEN)")
    return folder


def golden(device: torch.device) -> dict[str, Any]:
    """The published code's outputs, small cases, in float32."""
    import torch

    from tests.golden import build_model, load_case

    folder = golden_folder()
    errors = {}
    for name in GOLDEN_CASES:
        case = load_case(folder, name)
        model = build_model(case).to(device).eval()
        mask = case.tensors.get("in.mask")
        given = [case["in.x"], case["in.timestep"], case["in.y"][:, 0], mask]
        with torch.no_grad():
            out = model(*[None if value is None else value.to(device) for value in given])
        tolerance = GOLDEN_SLACK * case.info["tolerances"]["out_rel"]
        errors[name] = require(relative_error(out, case["out"]), tolerance, name)
    return errors


def golden_full_size(device: torch.device, name: str = "xl_stdit_16x32x32") -> dict[str, Any]:
    """STDiT-XL/2 with hashed weights against the published code's output, in float32 and bf16."""
    import torch

    from tests.golden import hashed_model, hashed_tensor, load_case, model_config

    case = load_case(golden_folder(), name)
    batch, size = len(case.info["caption_lens"]), case.info["config"]["input_size"]
    x = hashed_tensor(f"{name}.in.x", (batch, 4, *size)).to(device)
    text = hashed_tensor(f"{name}.in.y", (batch, 1, 120, 4096))[:, 0].to(device)
    mask, timestep = case["mask"].to(device), case["timestep"].to(device)
    model = hashed_model(model_config(case.info, temporal_attention=True)).to(device)
    with torch.no_grad():
        full = model(x, timestep, text, mask)
        with torch.autocast(device.type, torch.bfloat16):
            half = model(x, timestep, text, mask)
    tolerance = GOLDEN_SLACK * case.info["tolerances"]["fp32_out_rel"]
    return {
        "fp32": require(relative_error(full, case["out"]), tolerance, "float32"),
        "bf16 rms": require(rms_error(half, case["out"]), BF16_TOLERANCE, "bf16"),
    }


def samplers(device: torch.device) -> dict[str, Any]:
    """Each sampler's latents against the same on the CPU: noise comes from CPU generators, so they start alike."""
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.sampling import sample_latents

    model = small_model(temporal_attention=True).eval()
    _, _, text, mask = small_inputs()
    errors = {}
    for sampler in ("iddpm", "ddim", "dpm"):
        results = []
        for where in (torch.device("cpu"), device):
            model = model.to(where)
            with torch.no_grad():
                latents = sample_latents(
                    model, DiffusionConfig(), shape=(4, 3, 6, 6), condition=text.to(where), mask=mask.to(where),
                    null_condition=model.null_condition(), steps=5, guidance=4.0, sampler=sampler,
                    generators=[torch.Generator().manual_seed(i) for i in range(3)], num_tokens=27,
                )  # fmt: skip
            results.append(latents)
        errors[sampler] = require(relative_error(results[1], results[0]), 20 * FP32_TOLERANCE, sampler)
    return errors


def frozen_models(device: torch.device) -> dict[str, Any]:
    """The demo's autoencoder and text encoder, encoding and decoding as on the CPU."""
    import torch

    from opensora_repro.config import TextConfig, VaeConfig
    from opensora_repro.models.text import load_text_encoder
    from opensora_repro.models.vae import load_vae

    vae_folder, text_folder = REPO / "checkpoints" / "demo" / "vae", REPO / "checkpoints" / "demo" / "text"
    video = torch.rand(3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a red circle moving left", "", "a cyan triangle"]
    found: list[dict[str, Tensor]] = []
    for where in (torch.device("cpu"), device):
        vae = load_vae(VaeConfig(path=str(vae_folder), micro_batch_size=2), where, torch.float32)
        moments = vae.encode_moments(video.to(where))
        pixels = vae.decode(vae.sample_latents(moments, None)[None])
        text = load_text_encoder(TextConfig(path=str(text_folder)), 12, where, torch.float32)
        embedded, mask = text.encode(captions)
        streamed = load_text_encoder(TextConfig(path=str(text_folder), offload=True), 12, where, torch.float32)
        assert torch.equal(streamed.encode(captions)[0], embedded), "text.offload changes the embeddings"
        found.append({"moments": moments, "pixels": pixels, "text": embedded, "mask": mask.float()})
    on_cpu, on_gpu = found
    return {key: require(relative_error(on_gpu[key], on_cpu[key]), 10 * FP32_TOLERANCE, key) for key in on_cpu}


def training(device: torch.device, **options: Any) -> dict[str, Any]:
    """The published 16x256x256 step: STDiT-XL/2, 8 samples a GPU, activation checkpointing."""
    from benchmarks import gpu_step

    return gpu_step.measure(device, gpu_step.CASES["16x256"], **options)[0]


def training_case(device: torch.device, name: str) -> dict[str, Any]:
    """A published size with fused and with eager kernels; utilisation, and speed beside the published."""
    from benchmarks import gpu_step

    row = gpu_step.measure_case(device, name)
    assert row["flops"]["counted"] == row["flops"]["formula"], row["flops"]
    products = row["matmul_limit"].pop("products")
    return {**row, "slowest product": min(products.values())}


def kernel_parity(device: torch.device) -> dict[str, Any]:
    """Every fused kernel and its gradients against float64, in all types, at small odd sizes and at XL/2's widths."""
    from benchmarks import kernel_cases

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

    from benchmarks import kernel_cases
    from opensora_repro.kernels import ops

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
    from benchmarks.kernel_curve import curve, largest_gap
    from opensora_repro.models.config import STDiTConfig

    cfg = STDiTConfig(hidden_size=96, depth=2, num_heads=4, caption_channels=32, model_max_length=12)
    run: dict[str, Any] = {"dtype": dtype, "steps": steps, "batch_size": 4, "size": (4, 8, 12), "lr": 1e-4}
    eager, fused = (curve(kernels, cfg, device, **run) for kernels in ("eager", "triton"))
    assert min(eager) < 0.95 * eager[0], f"the loss does not fall: {eager[0]} to {eager[-1]}"
    noise = largest_gap(curve("eager", cfg, device, **run, seed=1), eager)
    allowed = 1e-4 if dtype == "fp32" else max(2 * noise, 1e-3)
    gap = require(largest_gap(fused, eager), allowed, f"{dtype} curves of {steps} steps")
    return {"largest gap": gap, "gap between roundings": float(f"{noise:.2e}"), "last loss": round(fused[-1], 4)}


def loop_without_waiting(device: torch.device) -> dict[str, Any]:
    """Training steps on cached samples, with fused and eager kernels, under CUDA's ban on waiting for the device."""
    from benchmarks import loop
    from benchmarks.kernel_cases import using
    from opensora_repro.models.config import STDiTConfig

    model = STDiTConfig(hidden_size=144, depth=2, num_heads=4, caption_channels=loop.DEMO_CAPTION, model_max_length=12)
    encoder = loop.demo_encoder(device, model.model_max_length)
    feed = loop.MadeUp(lambda number: loop.made_up_encoding(number, (4, 2, 4, 4), (12, loop.DEMO_CAPTION)), 2)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kernels in ("auto", "eager"):
            cfg = loop.loop_config(Path(folder) / kernels, model, size=32, frames=2, batch_size=2, steps=6)
            with using(kernels, device):
                trainer = loop.build_loop(cfg, encoder, feed, device, kind=loop.Strict)
                lines = loop.run_loop(trainer)
            assert all(line["loss"] > 0 for line in lines), lines
            found[f"{kernels}: strict steps"] = len(lines) - loop.Strict.FREE_STEPS
    return found


def encoders_beside(
    device: torch.device,
    model: STDiTConfig | None = None,
    *,
    vae: Callable[[Path], Path] | None = None,
    size: int = 256,
    frames: int = 16,
    batch_size: int = 4,
    steps: int = 12,
) -> dict[str, Any]:
    """STDiT-XL/2 on clips that an autoencoder of Stable Diffusion's size encodes, beside the step and in turn."""
    from benchmarks import loop
    from benchmarks.kernel_cases import using
    from opensora_repro.models.config import STDiTConfig

    model = model or STDiTConfig(caption_channels=loop.DEMO_CAPTION, space_scale=0.5)
    clips = [loop.made_up_clip(number, frames, size) for number in range(batch_size)]  # making them takes time
    feed = loop.MadeUp(lambda number: replace(clips[number % batch_size], id=f"sample {number}"), batch_size)
    with tempfile.TemporaryDirectory() as folder, using("auto", device):
        encoder = loop.demo_encoder(device, model.model_max_length, (vae or loop.random_vae)(Path(folder) / "vae"))
        run_dir = Path(folder) / "run"
        cfg = loop.loop_config(run_dir, model, size=size, frames=frames, batch_size=batch_size, steps=steps)
        result = loop.with_and_without_overlap(cfg, encoder, feed, device)
    return {**result, "largest_gap": require(result["largest_gap"], BF16_TOLERANCE, "losses")}


CHECKS: dict[str, tuple[Callable[[Any], dict[str, Any]], tuple[str, ...]]] = {  # what each needs besides NEEDED
    "stdit parity": (lambda device: parity(device, True), ()),
    "pixart parity": (lambda device: parity(device, False), ()),
    "captions end to end": (captions_end_to_end, ()),
    "kernels, parity": (kernel_parity, ("triton",)),
    "kernels, repeatability": (kernel_repeatability, ("triton",)),
    "kernels, bandwidth": (kernel_bandwidth, ("triton",)),
    "kernels, 200 steps in float32": (lambda device: kernel_curves(device, "fp32"), ("triton",)),
    "kernels, 200 steps in bf16": (lambda device: kernel_curves(device, "bf16"), ("triton",)),
    "samplers": (samplers, ()),
    "sampling, XL/2 16x32x32": (sampling_full_size, ()),
    "graphs, same samples": (same_samples, ()),
    "graphs, what cannot be recorded": (unrecordable, ()),
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
    "training, gemini": (lambda device: training(device, plugin="gemini"), ("colossalai",)),
}


# ---------------------------------------------------------------------------------------------------------------------


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
        if time.perf_counter() - began > BUDGET_SECONDS:
            results[name] = {"status": "failed", "reason": f"not begun within {BUDGET_SECONDS} s", "seconds": 0.0}
        else:
            results[name] = run_check(name, device)
        torch.cuda.empty_cache()
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
