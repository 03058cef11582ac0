"""The planner's memory against tensors counted on a CPU: what autograd saves, and the peak of whole training steps."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_repro.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from opensora_repro.diffusion.objective import build_objective
from opensora_repro.models import layers
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.training.ema import Ema
from opensora_repro.training.forward import ModelRunner
from opensora_repro.training.optim import build_optimizer
from opensora_repro.training.planning.encoders import frozen_sizes
from opensora_repro.training.planning.memory import activation_bytes, state_bytes, step_memory
from opensora_repro.training.planning.parameters import count_parameters, cut_parameters
from opensora_repro.training.planning.sizes import token_grid

CPU = torch.device("cpu")
TINY = STDiTConfig(hidden_size=64, depth=3, num_heads=4, caption_channels=48, model_max_length=7)
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {  # model; samples, frames, rows, columns
    "two samples": ({}, (2, 5, 12, 16)),
    "many frames": ({"depth": 1}, (1, 24, 8, 8)),
    "wide": ({"hidden_size": 128, "depth": 2, "model_max_length": 20}, (2, 4, 16, 16)),
    "deep": ({"depth": 6}, (1, 4, 16, 16)),
    "long captions, narrow MLP": (
        {"depth": 2, "caption_channels": 256, "model_max_length": 60, "mlp_ratio": 2.0}, (1, 6, 24, 16)
    ),
    "large patches, wide MLP": ({"patch_size": (1, 4, 4), "mlp_ratio": 6.0}, (1, 8, 32, 32)),
    "image": ({"temporal_attention": False}, (2, 1, 32, 32)),
    "more weights than activations": ({"hidden_size": 192, "depth": 4}, (1, 1, 8, 8)),
}  # fmt: skip
BASIC = ("two samples", "image", "more weights than activations")
each_case = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16"])
with_and_without = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])


class Step:
    """A model, its optimizer and average, and a batch; `losses` is a training step's forward pass."""

    def __init__(self, cfg: STDiTConfig, sizes: tuple[int, int, int, int], dtype: str, checkpointing: bool) -> None:
        samples, *latents = sizes
        self.model = STDiT(cfg)
        self.model.gradient_checkpointing = checkpointing
        self.batch = torch.randn(2, samples, cfg.in_channels, *latents)
        text = torch.randn(samples, cfg.model_max_length, cfg.caption_channels)
        mask = torch.ones(samples, cfg.model_max_length, dtype=torch.bool)
        drop_text = torch.zeros(samples, dtype=torch.bool)
        self.model_fn = ModelRunner(self.model, dtype, CPU).conditioned(text, mask, drop_text)
        self.timesteps = torch.full((samples,), 500.0)
        self.objective = build_objective(Config().diffusion)

    def loss(self) -> torch.Tensor:
        latents, noise = self.batch
        return self.objective.losses(self.model_fn, latents, noise, self.timesteps).mean()


class Counted(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive: what a GPU's allocator would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, num_bytes: int) -> None:
        self.now -= num_bytes


def saved_bytes(step: Step) -> int:
    """What autograd keeps between forward and backward, each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            saved.setdefault(pointer, tensor)  # held, so that no other can take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def case(name: str) -> tuple[STDiTConfig, tuple[int, int, int, int]]:
    changes, sizes = CASES[name]
    return dataclasses.replace(TINY, **changes), sizes


@each_case
@each_dtype
@with_and_without
def test_saved_for_backward(name: str, dtype: str, checkpointing: bool) -> None:
    cfg, sizes = case(name)
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    planned = activation_bytes(cfg, grid, sizes[0], dtype=dtype, checkpointing=checkpointing, device="cpu").kept
    assert planned == pytest.approx(saved_bytes(Step(cfg, sizes, dtype, checkpointing)), rel=0.1)


def peak_of_step(step: Step, *, lasting_gradients: bool = False) -> int:
    """With weights, average and the optimizer's state, which its first step makes."""
    with Counted() as counted:
        step.model.load_state_dict({k: v.clone() for k, v in step.model.state_dict().items()}, assign=True)
        optimizer = build_optimizer(step.model, OptimConfig())
        ema = Ema(SimpleNamespace(masters=dict(step.model.named_parameters())), 0.99)  # type: ignore[arg-type]
        for parameter in step.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not lasting_gradients)
        counted.peak = 0
        step.loss().backward()
        optimizer.step()
        ema.update()
    return counted.peak


def planned_peak(
    cfg: STDiTConfig, sizes: tuple[int, int, int, int], dtype: str, checkpointing: bool, *, accumulation: int = 1
) -> float:
    train = TrainConfig(batch_size=sizes[0], dtype=dtype, accumulation=accumulation)
    config = Config(model=cfg, train=train)
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    memory = step_memory(
        config, grid, count_parameters(cfg), frozen_sizes(config), Mesh(),
        checkpointing=checkpointing, encodes=False, device="cpu",
    )  # fmt: skip
    return memory.peak


@pytest.mark.parametrize(
    "name",
    [name if name in BASIC else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES],
)
@each_dtype
@with_and_without
def test_peak_of_a_training_step(name: str, dtype: str, checkpointing: bool) -> None:
    cfg, sizes = case(name)
    measured = peak_of_step(Step(cfg, sizes, dtype, checkpointing))
    assert planned_peak(cfg, sizes, dtype, checkpointing) == pytest.approx(measured, rel=0.1)


@with_and_without
def test_peak_of_a_second_micro_batch(checkpointing: bool) -> None:
    """The first one's gradients are there from the start."""
    cfg, sizes = case("two samples")
    measured = peak_of_step(Step(cfg, sizes, "bf16", checkpointing), lasting_gradients=True)
    planned = planned_peak(cfg, sizes, "bf16", checkpointing, accumulation=2)
    assert planned == pytest.approx(measured, rel=0.1)
    assert planned > planned_peak(cfg, sizes, "bf16", checkpointing)


@contextlib.contextmanager
def tensors_without_data() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tables = (layers.spatial_table, layers.temporal_table, layers._timestep_frequencies)
    for table in tables:
        table.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for table in tables:
            table.cache_clear()


@pytest.mark.exhaustive
@with_and_without
def test_peak_at_full_size(checkpointing: bool) -> None:
    """STDiT-XL/2, 64 frames of 512x512, bf16: every tensor of the step exists but for its data."""
    sizes = (1, 64, 64, 64)
    with tensors_without_data():
        step = Step(STDiTConfig(), sizes, "bf16", checkpointing)
        measured = peak_of_step(step)
    assert planned_peak(STDiTConfig(), sizes, "bf16", checkpointing) == pytest.approx(measured, rel=0.02)


# Layouts


def one_card(**changes: Any) -> float:
    config = Config(
        train=TrainConfig(batch_size=1), parallel=ParallelConfig("colossalai", "zero1"), model=STDiTConfig(**changes)
    )
    grid = token_grid(config.model, (4, 64, 64, 64))
    frozen = frozen_sizes(config)
    parameters = count_parameters(config.model)
    return step_memory(config, grid, parameters, frozen, Mesh(), checkpointing=True, encodes=False).peak


def test_64_frames_of_512_pixels_on_one_card() -> None:
    """XL/2, batch 1, bf16, ZeRO-1 on one card: the model's step stays under 40 GB."""
    assert 20e9 < one_card() < 40e9
    assert one_card(hidden_size=2304) > 40e9


def test_encoding_beside_the_model_takes_memory_of_its_own() -> None:
    def peak(overlap: bool, device: str = "cuda", cache: str = "") -> float:
        config = Config(train=TrainConfig(overlap=overlap), data=DataConfig(cache=cache, draws=1))
        grid, frozen = token_grid(config.model, (4, 16, 32, 32)), frozen_sizes(config)
        parameters = count_parameters(config.model)
        memory = step_memory(
            config, grid, parameters, frozen, Mesh(), checkpointing=True, encodes=not cache, device=device
        )
        return memory.peak

    assert peak(True) - peak(False) == pytest.approx(2 * frozen_sizes(Config()).encoding_values)
    assert peak(True, "cpu") == peak(False, "cpu")
    assert peak(True, cache="cache") == peak(False, cache="cache")


def test_states_of_every_plugin() -> None:
    """Bytes a parameter: weights, gradients, two moments, average; spread as the plugin spreads them."""
    parameters = count_parameters(TINY)

    def bytes_each(plugin: str, world_size: int, tp_size: int = 1, sp_size: int = 1) -> list[float]:
        parallel = ParallelConfig("colossalai", plugin, tp_size, sp_size)
        states = state_bytes(TINY, parameters, parallel, Mesh(0, world_size, tp_size, sp_size))
        return [value / parameters for value in dataclasses.astuple(states)]

    assert bytes_each("ddp", 8) == [4, 4, 8, 4]
    assert bytes_each("zero1", 8) == [4, 4, 1, 0.5]
    assert bytes_each("zero2", 8, sp_size=2) == [4, 0.5, 1, 0.5]
    assert bytes_each("gemini", 8) == [0.75, 0.5, 1, 0.5]
    own = 1 - cut_parameters(TINY) / parameters / 2
    assert bytes_each("hybrid", 8, tp_size=2) == pytest.approx([4 * own, 4 * own, 2 * own, own])


def test_more_processes_a_sample_keep_less() -> None:
    cfg, grid = STDiTConfig(), token_grid(STDiTConfig(), (4, 64, 64, 64))

    def kept(checkpointing: bool, **sizes: int) -> float:
        return activation_bytes(cfg, grid, 1, dtype="bf16", checkpointing=checkpointing, **sizes).kept

    for checkpointing in (False, True):
        assert kept(checkpointing, sp_size=2) == pytest.approx(kept(checkpointing) / 2, rel=0.03)
    assert kept(False) / 2 < kept(False, tp_size=2) < kept(False)
    assert kept(True, tp_size=2) == kept(True)  # the stream between blocks is whole on every process
    assert kept(True) < kept(False) / 10
    assert kept(True, sp_size=64) < kept(True, sp_size=63)  # 63 processes: one has two frames
