"""Fused kernels in Triton's interpreter, in a process of their own: what it asks for must be known before Triton loads.

    TRITON_INTERPRET=1 python -m tests.kernel_world OUT.json CHECK [CHECK ...]

Each check leaves errors by name, as shares of what is allowed, or the text of what it raised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
Errors = dict[str, float]


def check_cases(types: str) -> Errors:
    """Every kernel against its twin in float64: a row that is no power of two, one tile."""
    import torch

    from tests.gpu import kernel_cases

    cpu = torch.device("cpu")
    found: Errors = {}
    with kernel_cases.using("triton", cpu):
        for name, case in kernel_cases.cases(kernel_cases.Sizes(2, 3, 5, 20, 2, 36), types, cpu).items():
            found |= {f"{name}: {what}": error for what, error in kernel_cases.errors(case, types).items()}
    return found


def check_many_tiles() -> Errors:
    """The same in tiles so small that each sample has several parts, and each part several tiles."""
    from opensora_repro.kernels.fused import gelu, rows

    rows.TILE, rows.PROGRAMS, gelu.WIDEST = 128, 4, 16
    tiles = rows.cut(15, 32, 2, long=True)
    assert (tiles.parts, tiles.steps) == (2, 2), tiles
    return check_cases("fp32")


def check_short_attention() -> Errors:
    """Frames up to the most, and heads that are no multiple of a piece; more frames are not for the kernel."""
    import torch

    from opensora_repro.kernels import ops
    from tests.gpu import kernel_cases

    cpu, found = torch.device("cpu"), {}
    with kernel_cases.using("triton", cpu):
        for frames, heads, size in ((1, 2, 8), (17, 1, 72), (ops.SHORT_FRAMES, 1, 40)):
            sizes = kernel_cases.Sizes(1, frames, 2, heads * size, heads, 8)
            case = kernel_cases.cases(sizes, "fp32", cpu)["attention over time"]
            assert ops.attends_in_place(case.inputs[0])
            found |= {f"{frames}: {what}": error for what, error in kernel_cases.errors(case, "fp32").items()}
        assert not ops.attends_in_place(torch.ones(1, ops.SHORT_FRAMES + 1, 1, 8))
        nowhere = ops.time_attention(torch.ones(1, 4, 0, 24, requires_grad=True), 1)
        nowhere.sum().backward()
        assert nowhere.shape == (1, 4, 0, 8)
    return found


def check_compiled() -> Errors:
    """torch.compile takes the attention of short videos as it is: one program for tokens of every size."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    from opensora_repro.models.layers import Attention
    from opensora_repro.models.recompute import run_block
    from tests.gpu import kernel_cases

    backend = CompileCounterWithBackend("aot_eager")
    layer, call = Attention(16, 2, over="time"), torch.compile(run_block, backend=backend, dynamic=True)
    found: Errors = {}
    for shape in ((2, 3, 4, 16), (3, 5, 4, 16)):
        results = []
        for kernels, run in (("eager", run_block), ("triton", call)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
            with kernel_cases.using(kernels, torch.device("cpu")):
                out = run("full", layer, x)
                results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        for i, (expected, got) in enumerate(zip(*results, strict=True)):
            found[f"{shape}: {i}"] = kernel_cases.rms(got - expected) / kernel_cases.rms(expected) / 1e-5
    graphs = [module for graph in backend.graphs for module in graph.modules() if hasattr(module, "graph")]
    operations = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("short_attention" in name for name in operations), operations
    assert backend.frame_count == 1, backend.frame_count
    return found


def check_adamw() -> Errors:
    """Tensors of one piece and of several; an average without memory is the new weights to the bit."""
    import torch

    from opensora_repro.kernels import ops
    from opensora_repro.kernels.fused import adamw
    from tests.gpu import kernel_cases

    adamw.STEPS, adamw.BLOCK = 2, 512
    cpu = torch.device("cpu")
    with kernel_cases.using("triton", cpu):
        errors = kernel_cases.adamw_errors([(7, 3), (1500,), (1,), ()], cpu)
        param, grad, mean, square, average = torch.randn(5, 1, 2000)
        options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        given = ([param], [grad], [mean], [square.abs()], [torch.ones(())])
        ops.adamw(*given, **options, averages=[average], average_weight=1.0)
        assert torch.equal(average, param)
    return {name: error / 1e-6 for name, error in errors.items()}


def check_models(dtype: str) -> Errors:
    """Outputs and gradients of whole models, as eager kernels give them in float32; not the same to the last bit.

    In bf16 the error may be three times that of eager kernels, for the interpreter cuts where they round.
    """
    import torch

    from opensora_repro.models.config import DiTConfig, STDiT2Config, STDiT3Config, STDiTConfig
    from opensora_repro.models.dit import DiT
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.models.stdit2 import STDiT2
    from opensora_repro.models.stdit3 import STDiT3
    from tests.gpu import kernel_cases

    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    latents, timestep = torch.randn(2, 4, 2, 4, 4, generator=generator), torch.tensor([7.0, 800.0])
    text, mask = torch.randn(2, 3, 8, generator=generator), torch.tensor([[True, True, True], [True, False, False]])
    tiny: dict[str, Any] = {"hidden_size": 24, "depth": 2, "num_heads": 2}
    captions: dict[str, Any] = {"caption_channels": 8, "model_max_length": 3}
    runs = {
        "stdit": (lambda: STDiT(STDiTConfig(**tiny, **captions)), (text, mask), "none"),
        "stdit, recomputed": (lambda: STDiT(STDiTConfig(**tiny, **captions)), (text, mask), "full"),
        "stdit, selective": (lambda: STDiT(STDiTConfig(**tiny, **captions)), (text, mask), "selective"),
        "pixart": (lambda: STDiT(STDiTConfig(**tiny, **captions, temporal_attention=False)), (text, mask), "none"),
        "latte": (lambda: DiT(DiTConfig(**tiny, num_classes=3, factorised=True)), (torch.tensor([1, 3]),), "none"),
    }
    told = {name: torch.tensor([24.0, 16.0]) for name in STDiT2Config.conditions}
    given = {"frame_mask": torch.tensor([[True, False], [True, True]])}
    named: dict[str, dict[str, Any]] = {"stdit2": told | given, "stdit3": {k: told[k] for k in STDiT3Config.conditions}}
    named |= {"stdit3, given frames": named["stdit3"] | given}
    runs |= {
        "stdit2": (lambda: STDiT2(STDiT2Config(**tiny, **captions)), (text, mask), "none"),
        "stdit3": (lambda: STDiT3(STDiT3Config(**tiny, **captions)), (text, mask), "none"),
        "stdit3, given frames": (lambda: STDiT3(STDiT3Config(**tiny, **captions)), (text, mask), "full"),
    }
    found: Errors = {}
    for name, (build, condition, recompute) in runs.items():
        results: list[dict[str, torch.Tensor]] = []
        for kernels, half in (("eager", False), ("eager", dtype == "bf16"), ("triton", dtype == "bf16")):
            torch.manual_seed(0)
            model = build()
            model.activation_checkpointing = recompute
            with torch.no_grad():
                for parameter in model.parameters():  # also what starts at zero
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            with kernel_cases.using(kernels, cpu):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    out = model(latents, timestep, *condition, **named.get(name, {}))
                out.square().mean().backward()
            gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            results.append({"output": out.detach(), **gradients})
        exact, eager, fused = results
        assert exact.keys() == fused.keys()
        assert any(not torch.equal(eager[key], fused[key]) for key in eager), "the same kernels ran twice"
        for key, expected in exact.items():
            size = max(kernel_cases.rms(expected), 1e-6)
            rounding = kernel_cases.rms(eager[key] - expected) / size
            allowed = 1e-5 if dtype == "fp32" else 3 * rounding + 1e-2
            found[f"{name}: {key}"] = kernel_cases.rms(fused[key] - expected) / size / allowed
    return found


def check_curve() -> Errors:
    """A training run, its clipping, optimizer and averaging included."""
    import torch

    from opensora_repro.kernels.fused import adamw
    from opensora_repro.models.config import STDiTConfig
    from tests.gpu.kernel_curve import curve, largest_gap

    adamw.STEPS = 1
    cfg = STDiTConfig(hidden_size=24, depth=2, num_heads=2, caption_channels=8, model_max_length=3)
    fused, eager = (curve(k, cfg, torch.device("cpu"), dtype="fp32", steps=6, lr=1e-2) for k in ("triton", "eager"))
    assert max(eager) > 1.02 * min(eager), f"nothing was learned: {eager}"
    return {"largest gap": largest_gap(fused, eager) / 1e-4}


def check_memory() -> Errors:
    """What a training step keeps for its backward pass, as the planner has it."""
    import dataclasses

    import torch

    from opensora_repro.planning.memory import activation_bytes
    from opensora_repro.planning.sizes import token_grid
    from tests.gpu import kernel_cases
    from tests.unit.test_plan_memory import TINY, Step, kept_bytes

    sizes, found = (2, 3, 8, 8), {}
    cfg = dataclasses.replace(TINY, depth=2, num_heads=1)  # the interpreter takes its time for every head
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    for kind in ("none", "selective", "full"):
        planned = activation_bytes(cfg, grid, 2, dtype="bf16", checkpointing=kind, device="cpu", fused=True).kept
        with kernel_cases.using("triton", torch.device("cpu")):
            found[kind] = abs(planned / kept_bytes(Step(cfg, sizes, "bf16", kind)) - 1) / 0.1
    return found


CHECKS: dict[str, Callable[[], Errors]] = {
    "fp32": lambda: check_cases("fp32"),
    "bf16 autocast": lambda: check_cases("bf16 autocast"),
    "bf16": lambda: check_cases("bf16"),
    "fp16": lambda: check_cases("fp16"),
    "short attention": check_short_attention,
    "compiled": check_compiled,
    "adamw": check_adamw,
    "models fp32": lambda: check_models("fp32"),
    "models bf16": lambda: check_models("bf16"),
    "memory": check_memory,
    "many tiles": check_many_tiles,  # the last one: it changes the tiles
    "curve": check_curve,
}


def run_checks(names: Sequence[str], out: Path) -> dict[str, Any]:
    """Run the checks in a process whose Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_world", str(out), *names]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def main() -> None:
    out, *names = sys.argv[1:]
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = CHECKS[name]()
        except Exception:
            results[name] = traceback.format_exc()
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
