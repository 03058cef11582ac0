"""One process of a small group: how much of a run it holds, and how much of a checkpoint it would write, as JSON."""

from __future__ import annotations

import gc
import json

import torch

from opensora_repro.config import OptimConfig, ParallelConfig
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.build import build_engine
from opensora_repro.run_folder import TrainState
from opensora_repro.training.checkpoint import optimizer_pieces
from opensora_repro.training.optim import build_optimizer
from opensora_repro.training.save import take_snapshot
from opensora_repro.training.step import Ema

TINY = STDiTConfig(hidden_size=48, depth=2, num_heads=4, caption_channels=12, model_max_length=6)


def main(arguments: list[str]) -> int:
    (plugin,) = arguments
    torch.manual_seed(0)
    model = STDiT(TINY)
    whole = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(ParallelConfig("torch" if plugin == "fsdp" else "colossalai", plugin), "cpu")
    try:
        engine.prepare(model, build_optimizer(model, OptimConfig()), half=True)
        initial = {name: piece.clone() for name, piece in engine.masters.items()}
        for scale in (float("nan"), 1.0):
            with torch.autocast("cpu", torch.bfloat16):
                output = engine.train_forward(torch.randn(1, 4, 2, 4, 4), torch.tensor([5.0]), torch.randn(1, 6, 12))
            engine.backward(output.mean() * scale)
            square = engine.sum(engine.squared_gradients())
            engine.step(1e-3, 1, 1 - square.isfinite().float())
            if scale != 1:
                kept = not square.isfinite() and all(initial[name].equal(engine.masters[name]) for name in initial)
            engine.zero_grad()
        del initial, output, square
        kept_between = held()
        ema = Ema(engine, 0.9)
        snapshot = take_snapshot(engine, ema, TrainState(step=1), copy=True)
        moments = [piece for kind, _, piece in optimizer_pieces(engine) if kind == "exp_avg"]
        found = {
            "whole": whole,
            "kept": kept,
            "held": kept_between,
            "masters": _count(engine.masters.values()),
            "average": _count(ema.shadow.values()),
            "moments": _count(moments),
            "written": sum(_count(tensors.values()) for tensors in snapshot.own.values()),
        }
        print(json.dumps(found), flush=True)
    finally:
        engine.close()
    return 0


def held(dtype: torch.dtype = torch.float32) -> int:
    """Elements of all memory of the dtype that there is."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.dtype == dtype]
    return sum({storage.data_ptr(): storage.nbytes() // dtype.itemsize for storage in storages}.values())


def _count(tensors: object) -> int:
    return sum(tensor.numel() for tensor in tensors)  # type: ignore[attr-defined]
