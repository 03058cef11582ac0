"""What ZeRO's engines ask of streams during steps, on a CPU that claims to have some; printed as JSON by plugin."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from opensora_repro.config import OptimConfig, ParallelConfig
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel import colossal
from opensora_repro.parallel.cpu import GlooAccelerator
from opensora_repro.training.optim import build_optimizer

TINY = STDiTConfig(hidden_size=48, depth=2, num_heads=4, caption_channels=12, model_max_length=6)
MICRO_BATCHES, STEPS = 2, 2
calls: list[str] = []


class NamedStream:
    """Notes who waits for whom; a CPU does all at once, so that waiting is no work."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: NamedStream) -> None:
        calls.append(f"{self.name} waits for {other.name}")


MAIN = NamedStream("main")


class Streams(GlooAccelerator):
    def Stream(self, device: Any = None, priority: int = 0, **options: Any) -> NamedStream:
        return NamedStream("exchange")

    def current_stream(self, device: Any = None) -> NamedStream:
        return MAIN

    @contextlib.contextmanager
    def stream(self, stream_: NamedStream) -> Any:
        calls.append(f"on {stream_.name}")
        yield

    def synchronize(self, device: Any = None) -> None:
        calls.append("the host waits for the device")


def weights_after_steps(plugin: str, accelerator: type[GlooAccelerator]) -> list[torch.Tensor]:
    """Train a model for some steps of two micro-batches; notes in `calls` what happens."""
    colossal.GlooAccelerator = accelerator
    torch.manual_seed(0)
    model = STDiT(TINY)
    engine = colossal.ColossalEngine(ParallelConfig(engine="colossalai", plugin=plugin), "cpu")
    engine.prepare(model, build_optimizer(model, OptimConfig()))
    calls.clear()
    for _ in range(STEPS):
        for number in range(MICRO_BATCHES):
            with engine.accumulating(last=number == MICRO_BATCHES - 1):
                text = torch.randn(1, 6, 12)
                loss = engine.train_forward(torch.randn(1, 4, 2, 4, 4), torch.tensor([5.0]), text).mean()
                engine.backward(loss)
            calls.append("prepare the next batch")
        engine.step(1e-3, 1)
        engine.zero_grad()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    dist.destroy_process_group()
    return weights


def main() -> int:
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign, assignment]
    found = {}
    for plugin in ("zero1", "zero2", "hybrid"):
        plain = weights_after_steps(plugin, GlooAccelerator)
        beside = weights_after_steps(plugin, Streams)
        same = all(torch.equal(one, other) for one, other in zip(plain, beside, strict=True))
        found[plugin] = {"calls": list(calls), "same": same}
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
