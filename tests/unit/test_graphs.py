"""Sampling through graphs; one that runs its call again stands in for a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sides import random_weights
from opensora_repro.config import DiffusionConfig
from opensora_repro.diffusion.frame_masks import GivenFrames
from opensora_repro.diffusion.samplers import CallContext, LatentSampler
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.tensor import ColumnLinear
from opensora_repro.sampling.generate import MIN_GRAPH_STEPS, captures
from opensora_repro.sampling.graphs import WARM_UP, StepGraphs
from tests.gpu.graphs import Rerun, recording

CPU = torch.device("cpu")
STDIT = STDiTConfig(hidden_size=32, depth=2, num_heads=2, caption_channels=8, model_max_length=6)
DIT = DiTConfig(hidden_size=32, depth=2, num_heads=2, num_classes=10)


def wavy(x: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(3 * x) + timestep[:, None]


def inputs(step: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(batch, 5, generator=generator).to(dtype), torch.full((batch,), 10.0 * step)


def test_each_step_has_its_own_inputs_and_result() -> None:
    graphs, made = recording(CPU)
    with graphs(wavy) as call:
        results = [call(*inputs(step)) for step in range(8)]
    assert [graph.replays for graph in made] == [8 - WARM_UP]
    # Compared after the last step and the graph's end: samplers keep what they were given.
    for step, result in enumerate(results):
        assert torch.equal(result, wavy(*inputs(step))), step


def test_inputs_may_lie_in_memory_as_they_like() -> None:
    graphs, _ = recording(CPU)
    with graphs(wavy) as call:
        for step in range(6):
            x, timestep = inputs(step)
            x = x if step % 2 else x.t().contiguous().t()
            assert torch.equal(call(x, timestep[:1].expand(2)), wavy(x, timestep)), step


def test_another_shape_is_another_graph() -> None:
    graphs, made = recording(CPU)
    sizes = [(2, torch.float32)] * 4 + [(1, torch.float32)] * 5 + [(1, torch.float64)] * 4 + [(2, torch.float32)]
    with graphs(wavy) as call:
        for step, (batch, dtype) in enumerate(sizes):
            given = inputs(step, batch, dtype)
            assert torch.equal(call(*given), wavy(*given)), step
    assert [graph.replays for graph in made] == [4 - WARM_UP, 5 - WARM_UP, 4 - WARM_UP, 0]


def test_a_graph_ends_with_its_batch() -> None:
    """The next batch may have other text, and training other weights."""
    graphs, made = recording(CPU)
    for weight in (1.0, 2.0):
        with graphs(lambda x, timestep, weight=weight: weight * wavy(x, timestep)) as call:
            for step in range(4):
                assert torch.equal(call(*inputs(step)), weight * wavy(*inputs(step)))
    assert len(made) == 2


class Closing(Rerun):
    """Tells when it is closed."""

    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


class Spoilt(Closing):
    def capture(self, call: Callable[[], Tensor]) -> Tensor:
        call()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore advice")
        finally:
            raise RuntimeError("the recording had been called off")


def test_what_cannot_be_recorded_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Closing] = []

    def spoilt(device: torch.device) -> Spoilt:
        made.append(Spoilt(device))
        return made[-1]

    graphs = StepGraphs(spoilt)
    for _ in range(2):
        with graphs(wavy) as call:
            for step in range(6):
                assert torch.equal(call(*inputs(step)), wavy(*inputs(step)))
    assert [graph.closed for graph in made] == [True]  # it is not tried twice
    told = capsys.readouterr().err.strip()
    assert told == ("warning: sampling goes on without a CUDA graph (operation not permitted when stream is capturing)")


@pytest.mark.parametrize("call_number", [1, WARM_UP + 2])
def test_the_models_own_errors_are_raised(call_number: int) -> None:
    made: list[Closing] = []

    def closing(device: torch.device) -> Closing:
        made.append(Closing(device))
        return made[-1]

    calls = 0

    def failing(x: Tensor, timestep: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise ValueError("expected latents")
        return wavy(x, timestep)

    with pytest.raises(ValueError, match="expected latents"), StepGraphs(closing)(failing) as call:
        for step in range(6):
            call(*inputs(step))
    assert [graph.closed for graph in made] == [True]


def sample(
    model: STDiT | DiT,
    rows: list[int],
    *,
    objective: str,
    sampler: str,
    call_context: CallContext,
    given: GivenFrames | None = None,
    **more: Any,
) -> Tensor:
    text = isinstance(model, STDiT)
    condition = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)) if text else torch.arange(3)
    mask = torch.arange(6)[None] < torch.tensor([[6], [2], [4]])
    return LatentSampler(
        DiffusionConfig(objective=objective),
        sampler,
        steps=7,
        guidance=4.0,
        prepare_text=model.prepare_text if isinstance(model, STDiT) else None,
        call_context=call_context,
        **more,
    )(
        model,
        condition[rows],
        mask[rows] if text else None,
        model.null_condition(),
        shape=(4, 2, 4, 4),
        generators=[torch.Generator().manual_seed(row) for row in rows],
        given=given,
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("model_class", [STDiT, DiT])
@pytest.mark.parametrize(
    ("objective", "sampler"),
    [("flow", "euler"), ("flow", "ab2"), ("iddpm", "iddpm"), ("iddpm", "ddim"), ("iddpm", "dpm")],
)
def test_every_sampler_and_model(objective: str, sampler: str, model_class: type[STDiT | DiT], bf16: bool) -> None:
    torch.manual_seed(0)
    model = random_weights(STDiT(STDIT) if model_class is STDiT else DiT(DIT)).eval()
    graphs, made = recording(CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for rows in ([0, 1], [2]):  # the last batch is smaller
            plain, replayed = (
                sample(model, rows, objective=objective, sampler=sampler, call_context=way)
                for way in (nullcontext, graphs)
            )
            assert torch.equal(replayed, plain)
    assert [graph.replays for graph in made] == [7 - WARM_UP] * 2


@pytest.mark.parametrize(
    ("objective", "sampler"), [("flow", "euler"), ("flow", "ab2"), ("iddpm", "iddpm"), ("iddpm", "dpm")]
)
def test_masks_of_frames_are_replayed_as_they_change(objective: str, sampler: str) -> None:
    torch.manual_seed(0)
    model = random_weights(STDiT(STDIT)).eval()
    given = GivenFrames(torch.randn(2, 4, 2, 4, 4), torch.tensor([[0.0, 1.0], [1.0, 0.4]]))
    graphs, made = recording(CPU)
    plain, replayed, free = (
        sample(model, [0, 1], objective=objective, sampler=sampler, call_context=way, given=frames)
        for way, frames in ((nullcontext, given), (graphs, given), (nullcontext, None))
    )
    assert torch.equal(replayed, plain) and [graph.replays for graph in made] == [7 - WARM_UP]
    assert torch.equal(plain[0, :, 0], given.latents[0, :, 0]) and not torch.allclose(plain, free, atol=1e-2)


def test_guidance_in_an_interval_is_two_graphs() -> None:
    torch.manual_seed(0)
    model = random_weights(STDiT(STDIT)).eval()
    graphs, made = recording(CPU)
    levels = LatentSampler(DiffusionConfig(objective="flow"), "euler", steps=7, guidance=4.0).levels(8, 2, size=None)
    interval = (levels[3], 1.0)  # four calls with guidance, three without
    plain, replayed = (
        sample(model, [0, 1], objective="flow", sampler="euler", call_context=way, guidance_interval=interval)
        for way in (nullcontext, graphs)
    )
    assert torch.equal(replayed, plain)
    assert sorted(graph.replays for graph in made) == [3 - WARM_UP, 4 - WARM_UP]


def test_who_samples_through_graphs() -> None:
    model = STDiT(STDIT)
    assert captures(model, None, "cuda", MIN_GRAPH_STEPS) and captures(model, model, "cuda", 100)
    assert captures(DiT(DIT), None, "cuda", 100)
    assert not captures(model, model, "cpu", 100)
    assert not captures(model, model, "cuda", MIN_GRAPH_STEPS - 1)
    assert not captures(model, nn.Sequential(model), "cuda", 100)
    model.blocks[0].mlp.fc1 = ColumnLinear(32, 128)  # tensor parallelism changes the model in place
    assert not captures(model, model, "cuda", 100)
