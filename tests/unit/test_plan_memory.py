"""The planner's memory against tensors counted on a CPU: what autograd saves, and the peak of whole training steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opensora_repro.config import (
    Config,
    DataConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
)
from opensora_repro.diffusion.gaussian import build_objective
from opensora_repro.kernels import ops
from opensora_repro.kernels.ops import SHORT_FRAMES
from opensora_repro.models import layers
from opensora_repro.models.captioned import conditions_of
from opensora_repro.models.config import (
    ACTIVATION_CHECKPOINTING,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TrainedConfig,
)
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.parallel.offload import CHUNK
from opensora_repro.planning import memory
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.memory import activation_bytes, state_bytes, step_memory
from opensora_repro.planning.parameters import count_parameters, cut_parameters
from opensora_repro.planning.sizes import token_grid
from opensora_repro.training.adapters import apply_lora
from opensora_repro.training.optim import build_optimizer
from opensora_repro.training.step import Ema, ModelRunner
from opensora_repro.weights.families import family_of
from tests.live_bytes import LiveBytes

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
each_checkpointing = pytest.mark.parametrize("checkpointing", ACTIVATION_CHECKPOINTING)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """The planner is of what a GPU keeps: fused kernels or torch's, not what many tokens on a CPU go through."""
    before = ops.chosen()
    ops.choose("eager", "cpu")
    yield
    ops.choose(before, "cpu")


class Step:
    """A model and a batch; `loss` is a training step's forward pass. Not `masked`: nobody looks into the captions."""

    def __init__(
        self,
        cfg: TrainedConfig,
        sizes: tuple[int, int, int, int],
        dtype: str,
        checkpointing: str,
        *,
        masked: bool = True,
    ) -> None:
        samples, *latents = sizes
        self.model = family_of(cfg).network(cfg)
        self.model.activation_checkpointing = checkpointing
        self.batch = torch.randn(2, samples, cfg.in_channels, *latents)
        self.text = torch.randn(samples, cfg.model_max_length, cfg.caption_channels)
        self.mask = torch.ones(samples, cfg.model_max_length, dtype=torch.bool) if masked else None
        drop_text = torch.zeros(samples, dtype=torch.bool)
        size = (latents[0], 8 * latents[1], 8 * latents[2])
        self.told = conditions_of(cfg, size, torch.full((samples,), 24.0), frame_interval=1)
        self.model_fn = ModelRunner(self.model, dtype, CPU).conditioned(self.text, self.mask, drop_text, **self.told)
        self.timesteps = torch.full((samples,), 500.0)
        self.objective = build_objective(Config().diffusion)

    def given(self) -> list[torch.Tensor]:
        """All that is there before the step."""
        own = [self.batch, self.text, *self.told.values()]
        return [*self.model.state_dict().values(), *own, *([] if self.mask is None else [self.mask])]

    def loss(self) -> torch.Tensor:
        latents, noise = self.batch
        return self.objective.losses(self.model_fn, latents, noise, self.timesteps).mean()


def kept_bytes(step: Step) -> int:
    """What is alive between forward and backward: all that autograd and checkpointing keep, besides the weights."""
    with torch.no_grad():
        step.loss()  # fills the tables of positions
    with LiveBytes(ignored=step.given()) as live:
        loss = step.loss()
    assert loss.requires_grad
    return live.now


def case(name: str) -> tuple[STDiTConfig, tuple[int, int, int, int]]:
    changes, sizes = CASES[name]
    return dataclasses.replace(TINY, **changes), sizes


@each_case
@each_dtype
@each_checkpointing
def test_saved_for_backward(name: str, dtype: str, checkpointing: str) -> None:
    cfg, sizes = case(name)
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    planned = activation_bytes(cfg, grid, sizes[0], dtype=dtype, checkpointing=checkpointing, device="cpu").kept
    assert planned == pytest.approx(kept_bytes(Step(cfg, sizes, dtype, checkpointing)), rel=0.1)


def peak_of_step(step: Step, optim: OptimConfig | None = None, *, lasting_gradients: bool = False) -> int:
    """With weights, average and the optimizer's state, which its first step makes."""
    optim = optim or OptimConfig()
    engine = TorchEngine(device="cpu")
    with LiveBytes() as counted:
        step.model.load_state_dict({k: v.clone() for k, v in step.model.state_dict().items()}, assign=True)
        engine.prepare(step.model, build_optimizer(step.model, optim))
        ema = Ema(engine, 0.99, offload=optim.offload)
        for parameter in engine.working.values():
            parameter.grad = torch.zeros_like(parameter)
        engine.step(1e-4, 1.0)
        engine.zero_grad()
        if lasting_gradients:
            for parameter in engine.working.values():
                parameter.grad = torch.zeros_like(parameter)
        counted.peak = 0
        if optim.in_backward:
            engine.step_in_backward(1e-4, 1.0)
        engine.backward(step.loss())
        if not optim.in_backward:
            engine.step(1e-4, 1.0)
        ema.update()
    engine.close()
    return counted.peak


def planned_peak(
    cfg: TrainedConfig,
    sizes: tuple[int, int, int, int],
    dtype: str,
    checkpointing: str,
    optim: OptimConfig | None = None,
    **train: Any,
) -> float:
    given = TrainConfig(batch_size=sizes[0], dtype=dtype, activation_checkpointing=checkpointing, **train)
    config = Config(model=cfg, train=given, optim=optim or OptimConfig())
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    return step_memory(
        config, grid, count_parameters(cfg), frozen_sizes(config), Mesh(), encodes=False, device="cpu"
    ).peak  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name in BASIC else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES],
)
@each_dtype
@each_checkpointing
def test_peak_of_a_training_step(name: str, dtype: str, checkpointing: str) -> None:
    cfg, sizes = case(name)
    measured = peak_of_step(Step(cfg, sizes, dtype, checkpointing))
    assert planned_peak(cfg, sizes, dtype, checkpointing) == pytest.approx(measured, rel=0.1)


SUCCESSORS: dict[str, tuple[TrainedConfig, tuple[int, int, int, int]]] = {
    "STDiT2": (
        STDiT2Config(hidden_size=96, depth=2, num_heads=4, caption_channels=48, model_max_length=7), (2, 4, 16, 16)
    ),
    "STDiT2 without q/k norm": (
        STDiT2Config(
            hidden_size=48, depth=2, num_heads=4, caption_channels=48, model_max_length=7, qk_norm=False
        ), (2, 5, 12, 16)
    ),
    "STDiT3": (
        STDiT3Config(hidden_size=64, depth=2, num_heads=4, caption_channels=48, model_max_length=7), (2, 5, 12, 16)
    ),
    "STDiT3, many frames": (
        STDiT3Config(hidden_size=64, depth=1, num_heads=4, caption_channels=48, model_max_length=7), (1, 24, 8, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUCCESSORS)
@each_dtype
@each_checkpointing
def test_steps_of_1_1_and_1_2(name: str, dtype: str, checkpointing: str) -> None:
    """What is saved for the backward pass, and the peak of the step."""
    cfg, sizes = SUCCESSORS[name]
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    planned = activation_bytes(cfg, grid, sizes[0], dtype=dtype, checkpointing=checkpointing, device="cpu").kept
    assert planned == pytest.approx(kept_bytes(Step(cfg, sizes, dtype, checkpointing)), rel=0.05)
    measured = peak_of_step(Step(cfg, sizes, dtype, checkpointing))
    assert planned_peak(cfg, sizes, dtype, checkpointing) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("frozen", ["freeze_y_embedder", "only_train_temporal"])
def test_what_is_not_trained_has_weights_alone(frozen: str) -> None:
    cfg = STDiT3Config(
        hidden_size=192, depth=3, num_heads=4, caption_channels=480, model_max_length=4, **{frozen: True}
    )
    sizes = (1, 1, 8, 8)  # few activations
    measured = peak_of_step(Step(cfg, sizes, "fp32", "full"))
    assert planned_peak(cfg, sizes, "fp32", "full") == pytest.approx(measured, rel=0.05)
    assert measured < 0.98 * planned_peak(dataclasses.replace(cfg, **{frozen: False}), sizes, "fp32", "full")


@each_checkpointing
def test_peak_of_a_second_micro_batch(checkpointing: str) -> None:
    """The first one's gradients are there from the start."""
    cfg, sizes = case("two samples")
    measured = peak_of_step(Step(cfg, sizes, "bf16", checkpointing), lasting_gradients=True)
    planned = planned_peak(cfg, sizes, "bf16", checkpointing, accumulation=2)
    assert planned == pytest.approx(measured, rel=0.1)
    assert planned > planned_peak(cfg, sizes, "bf16", checkpointing)


@each_dtype
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("name", ["deep", "more weights than activations"])
def test_peak_with_offloaded_activations(name: str, checkpointing: str, dtype: str) -> None:
    cfg, sizes = case(name)
    step = Step(cfg, sizes, dtype, checkpointing)
    step.model.offload_activations = True
    tokens = token_grid(cfg, (cfg.in_channels, *sizes[1:])).tokens * sizes[0]
    elsewhere = 4 * cfg.depth * tokens * cfg.hidden_size  # the float32 stream before every block
    planned = planned_peak(cfg, sizes, dtype, checkpointing, offload_activations=True)
    assert planned == pytest.approx(peak_of_step(step) - elsewhere, rel=0.1)
    assert planned <= planned_peak(cfg, sizes, dtype, checkpointing)


@each_dtype
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", BASIC)
def test_peak_with_the_optimizer_in_host_memory(name: str, checkpointing: str, dtype: str) -> None:
    assert memory.CHUNK == CHUNK
    cfg, sizes = case(name)
    offload = OptimConfig(offload=True)
    elsewhere = 3 * 4 * count_parameters(cfg)  # two moments and the average
    measured = peak_of_step(Step(cfg, sizes, dtype, checkpointing), offload) - elsewhere
    assert planned_peak(cfg, sizes, dtype, checkpointing, offload) == pytest.approx(measured, rel=0.1)


@each_dtype
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", BASIC)
def test_peak_with_the_step_in_the_backward_pass(name: str, checkpointing: str, dtype: str) -> None:
    cfg, sizes = case(name)
    within = OptimConfig(in_backward=True, clip_norm=0)
    measured = peak_of_step(Step(cfg, sizes, dtype, checkpointing), within)
    planned = planned_peak(cfg, sizes, dtype, checkpointing, within, max_bad_steps=1)
    assert planned == pytest.approx(measured, rel=0.1)
    assert planned <= planned_peak(cfg, sizes, dtype, checkpointing)


@each_dtype
@each_checkpointing
@pytest.mark.parametrize("name", BASIC)
def test_peak_with_adapters(name: str, checkpointing: str, dtype: str) -> None:
    """Frozen weights have no gradients, moments or average, and blocks' matrices are bfloat16 where the run is."""
    cfg, sizes = case(name)
    train = TrainConfig(batch_size=sizes[0], dtype=dtype, activation_checkpointing=checkpointing)
    config = Config(model=cfg, train=train, lora=LoraConfig(rank=4))
    step = Step(cfg, sizes, dtype, checkpointing)
    apply_lora(step.model, config)
    grid = token_grid(cfg, (cfg.in_channels, *sizes[1:]))
    frozen = frozen_sizes(config)
    planned = step_memory(config, grid, count_parameters(cfg), frozen, Mesh(), encodes=False, device="cpu").peak
    measured = peak_of_step(step)
    assert measured < planned_peak(cfg, sizes, dtype, checkpointing)
    assert 0.95 * measured <= planned <= 1.35 * measured  # without checkpointing, gates that need no gradient keep less


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
@each_checkpointing
def test_peak_at_full_size(checkpointing: str) -> None:
    """STDiT-XL/2, 64 frames of 512x512, bf16: every tensor of the step exists but for its data."""
    sizes = (1, 64, 64, 64)
    with tensors_without_data():
        step = Step(STDiTConfig(), sizes, "bf16", checkpointing, masked=False)
        measured = peak_of_step(step)
    assert planned_peak(STDiTConfig(), sizes, "bf16", checkpointing) == pytest.approx(measured, rel=0.02)


# Layouts


def one_card(train: TrainConfig, **changes: Any) -> float:
    config = Config(train=train, parallel=ParallelConfig("colossalai", "zero1"), model=STDiTConfig(**changes))
    grid = token_grid(config.model, (4, 64, 64, 64))
    frozen, parameters = frozen_sizes(config), count_parameters(config.model)
    return step_memory(config, grid, parameters, frozen, Mesh(), encodes=False).peak


def test_a_row_bounds_what_a_packed_step_takes() -> None:
    """However many clips a step has; between its rows gradients stay."""
    grid, parameters = token_grid(TINY, (4, 2, 8, 8)), count_parameters(TINY)

    def peak(train: TrainConfig, row: int = 0) -> float:
        config = Config(train=train, data=DataConfig(packing_tokens=row), model=TINY)
        return step_memory(config, grid, parameters, frozen_sizes(config), Mesh(), encodes=False).peak

    expected = peak(TrainConfig(batch_size=3, accumulation=2))
    assert peak(TrainConfig(batch_size=64), row=2 * grid.tokens + 1) == expected
    assert peak(TrainConfig(batch_size=3), row=99 * grid.tokens) == expected


@pytest.mark.parametrize("kernels", ["eager", "auto"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_64_frames_of_512_pixels_on_one_card(checkpointing: str, kernels: str) -> None:
    """XL/2, batch 1, bf16, ZeRO-1 on one card: the model's step stays under 40 GB."""
    train = TrainConfig(batch_size=1, kernels=kernels, activation_checkpointing=checkpointing)
    assert 20e9 < one_card(train) < 40e9
    assert one_card(train, hidden_size=2304) > 40e9
    assert one_card(dataclasses.replace(train, offload_activations=True)) < one_card(train) - 5e9
    assert one_card(dataclasses.replace(train, activation_checkpointing="none")) > 100e9


def test_workspace_of_temporal_attention() -> None:
    """The float32 sums of flash attention's way back, where no kernel for short videos takes its place."""
    cfg = STDiTConfig()
    grid = token_grid(cfg, (4, 16, 64, 64))
    padded = 8 * 1024 * 128 * 16 * 96 * 4  # [B * S, round128(T), heads, round32(head size)]

    def found(frames: int = 16, **changes: Any) -> memory.Activations:
        given = {"dtype": "bf16", "checkpointing": "full", "fused": False, **changes}
        return activation_bytes(cfg, dataclasses.replace(grid, frames=frames), 8, **given)

    assert padded < found().workspace < 1.02 * padded
    assert found().backward_peak > padded + found(device="cpu").kept
    assert found(fused=True).workspace < found().workspace / 5  # spatial attention's alone
    assert found(fused=True).backward_peak < found().backward_peak
    assert SHORT_FRAMES == memory.SHORT_FRAMES
    longer = [found(frames, fused=True).workspace for frames in (SHORT_FRAMES, SHORT_FRAMES + 1)]
    assert longer[1] > 1.9 * longer[0]
    assert found(tp_size=2).workspace == found(sp_size=2).workspace == found().workspace / 2
    assert found(device="cpu").workspace == found(dtype="fp32").workspace == 0


def test_encoding_beside_the_model_takes_memory_of_its_own() -> None:
    def peak(overlap: bool, device: str = "cuda", cache: str = "") -> float:
        config = Config(train=TrainConfig(overlap=overlap), data=DataConfig(cache=cache, draws=1))
        grid, frozen = token_grid(config.model, (4, 16, 32, 32)), frozen_sizes(config)
        parameters = count_parameters(config.model)
        memory = step_memory(config, grid, parameters, frozen, Mesh(), encodes=not cache, device=device)
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
    assert bytes_each("fsdp", 8, sp_size=2) == [0.5, 0.5, 1, 0.5]
    own = 1 - cut_parameters(TINY) / parameters / 2
    assert bytes_each("hybrid", 8, tp_size=2) == pytest.approx([4 * own, 4 * own, 2 * own, own])


@each_dtype
def test_fsdp_gathers_a_block_at_a_time_and_all_for_samples(dtype: str) -> None:
    def peak(plugin: str, world_size: int, sample_every: int = 0) -> float:
        cfg = STDiTConfig()
        config = Config(
            model=cfg,
            train=TrainConfig(batch_size=1, dtype=dtype),
            sample=SampleConfig(every=sample_every),
            parallel=ParallelConfig("torch", plugin),
        )
        grid, frozen = token_grid(cfg, (4, 16, 32, 32)), frozen_sizes(config)
        return step_memory(config, grid, count_parameters(cfg), frozen, Mesh(0, world_size), encodes=False).peak

    whole, states = 4 * count_parameters(STDiTConfig()), 20 * count_parameters(STDiTConfig())
    saved = peak("ddp", 64) - peak("fsdp", 64)
    # Less what is gathered for a while, and more for autocast's copies, which nobody makes
    assert (1 - 1 / 64) * states - whole / 8 < saved < states + whole / 2
    assert peak("fsdp", 1) == peak("ddp", 1)
    assert peak("fsdp", 64, 100) > peak("fsdp", 64) and peak("fsdp", 64, 100) > whole


def test_more_processes_a_sample_keep_less() -> None:
    cfg, grid = STDiTConfig(), token_grid(STDiTConfig(), (4, 64, 64, 64))

    def kept(checkpointing: str, **sizes: int) -> float:
        return activation_bytes(cfg, grid, 1, dtype="bf16", checkpointing=checkpointing, **sizes).kept

    for checkpointing in ACTIVATION_CHECKPOINTING:
        assert kept(checkpointing, sp_size=2) == pytest.approx(kept(checkpointing) / 2, rel=0.03)
    assert kept("none") / 2 < kept("none", tp_size=2) < kept("none")
    assert kept("full", tp_size=2) == kept("full")  # the stream between blocks is whole on every process
    assert kept("full") < kept("none") / 10
    assert kept("full", sp_size=64) < kept("full", sp_size=63)  # 63 processes: one has two frames


def test_a_spread_text_encoder_takes_a_share_and_a_block() -> None:
    """T5-XXL in bfloat16; with one process nothing is spread. It encodes between steps, not beside them."""

    def found(processes: int, **text: bool) -> memory.Memory:
        config = Config(text=TextConfig(**text))
        grid, frozen = token_grid(config.model, (4, 16, 32, 32)), frozen_sizes(config)
        mesh = Mesh(0, processes)
        return step_memory(config, grid, count_parameters(config.model), frozen, mesh, encodes=True)

    whole, sizes = found(8), frozen_sizes(Config())
    blocks = [4096 * (4 * 4096 + 3 * 10240) + 2 * 4096, 32128 * 4096]
    assert sizes.text_part == max(blocks)
    saved = 2 * (sizes.text_parameters * 7 / 8 - 2 * sizes.text_part)
    assert whole.encoders - found(8, shard=True).encoders == pytest.approx(saved)
    assert whole.peak - found(8, shard=True).peak >= saved
    assert found(1, shard=True) == found(1)
    assert found(8, offload=True).encoders == 2 * sizes.vae_parameters
