"""Blocks through torch.compile: the same numbers, one program for all blocks and for tokens of every size."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from benchmarks.sides import random_weights
from opensora_repro.config import Config, ConfigError, ParallelConfig, TrainConfig, check_config
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.training.model import apply_compile, compiles
from tests import video_models

SIZES = ((2, 4, 8, 8, 12), (3, 4, 8, 8, 9), (2, 5, 6, 10, 12), (4, 3, 12, 8, 5))  # samples, T, H, W, caption tokens
TINY = STDiTConfig(hidden_size=32, depth=4, num_heads=2, caption_channels=16, model_max_length=12)


@pytest.fixture(autouse=True)
def forget_programs() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def new_model(checkpointing: str = "none") -> STDiT:
    torch.manual_seed(0)
    model = random_weights(STDiT(TINY))
    model.activation_checkpointing = checkpointing
    return model


def outputs_and_gradients(model: STDiT, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    samples, frames, rows, columns, tokens = sizes
    generator = torch.Generator().manual_seed(1)
    # Captions of one length would be another program, without a mask. The longest has every token or does not.
    lengths = tokens - (samples > 2) - torch.arange(samples)[:, None] % (tokens - 1)
    out = model(
        torch.randn(samples, 4, frames, rows, columns, generator=generator),
        torch.rand(samples, generator=generator) * 1000,
        torch.randn(samples, tokens, 16, generator=generator),
        torch.arange(tokens)[None] < lengths,
    )
    model.zero_grad(set_to_none=True)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


KINDS = [("full", False), ("none", False), ("full", True), ("selective", False), ("selective", True)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("checkpointing", "offload"),
    KINDS,
)
def test_one_program_for_all_blocks_and_sizes(checkpointing: str, offload: bool) -> None:
    """Selective checkpointing has another for tokens so many that their attention is costly."""
    plain, compiled = new_model(checkpointing), new_model(checkpointing)
    compiled.offload_activations = offload
    compiled.compile_blocks(backend=CompileCounterWithBackend("aot_eager"))
    for sizes in SIZES:
        assert_alike(outputs_and_gradients(compiled, sizes), outputs_and_gradients(plain, sizes), 1e-5)
    assert counters["stats"]["unique_graphs"] == (2 if checkpointing == "selective" else 1)
    assert not counters["graph_break"]


def test_a_run_compiles_each_kind_of_step_once() -> None:
    """Train, validate, sample, a short batch, one sample, captions of one length, empty ones; then all of it again."""
    model = new_model()
    model.compile_blocks(backend=CompileCounterWithBackend("eager"))

    def train(samples: int, frames: int, side: int, lengths: list[int]) -> None:
        latents, text = torch.randn(samples, 4, frames, side, side), torch.randn(samples, 12, 16)
        mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
        model(latents, torch.rand(samples) * 1000, text, mask).square().mean().backward()

    def validate_and_sample(samples: int) -> None:
        latents, text = torch.randn(samples, 4, 4, 8, 8), torch.randn(samples, 12, 16)
        mask = torch.arange(12)[None] < torch.arange(2, samples + 2)[:, None]
        with torch.no_grad():
            model(latents, torch.rand(samples) * 1000, text, mask)
            model(latents, torch.rand(samples) * 1000, model.prepare_text(text, mask, null=model.null_condition()))

    def run(frames: int, side: int, more: int) -> int:
        train(4, frames, side, [3, 5, 7, 9 + more])
        validate_and_sample(4 - more)
        train(3, frames, side, [3, 5, 8 + more])  # a sample could not be read
        train(1, frames, side, [4 + more])
        train(4, frames, side, [6 + more] * 4)
        train(4, frames, side, [0, 5, 7, 9 + more])
        validate_and_sample(2)
        return counters["stats"]["unique_graphs"]  # type: ignore[no-any-return]

    programs = run(4, 8, 0)
    assert programs == 4  # captions of several lengths, one sample, captions of one length, an empty one
    assert run(5, 12, 1) == run(3, 6, 2) == programs
    assert not counters["graph_break"] and not counters["recompile_limit"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("stdit3", 2), *(pytest.param(name, 1, marks=pytest.mark.exhaustive) for name in ("stdit", "stdit2"))],
)
def test_each_kind_of_block_is_one_program(name: str, kinds: int) -> None:
    """And another where frames are given, for any number of frames and samples."""
    plain, compiled = video_models.make_model(name), video_models.make_model(name)
    compiled.compile_blocks(backend=CompileCounterWithBackend("eager"))

    def results(model: Any, masked: bool, samples: int, size: tuple[int, int, int]) -> list[torch.Tensor]:
        inputs, told = video_models.make_inputs(model.cfg, samples, size)
        frame_mask = video_models.some_frames(samples, size[0]) if masked else None
        out = model(*inputs, **told, frame_mask=frame_mask)
        model.zero_grad(set_to_none=True)
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    for programs, masked in ((kinds, False), (2 * kinds, True)):
        for sizes in ((2, (3, 6, 8)), (3, (4, 8, 8)), (4, (5, 6, 6))):
            assert_alike(results(compiled, masked, *sizes), results(plain, masked, *sizes), 1e-5)
        assert counters["stats"]["unique_graphs"] == programs
    assert not counters["graph_break"] and not counters["recompile_limit"]


def test_weights_keep_their_names() -> None:
    model = new_model()
    model.compile_blocks(backend="eager")
    outputs_and_gradients(model, SIZES[0])
    assert model.state_dict().keys() == new_model().state_dict().keys()


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's code for a CPU needs g++")
@pytest.mark.parametrize("checkpointing", ACTIVATION_CHECKPOINTING)
def test_the_compilers_own_code(checkpointing: str) -> None:
    plain, compiled = new_model(checkpointing), new_model(checkpointing)
    apply_compile(compiled, Config(train=TrainConfig(compile="on")))
    for sizes in SIZES[:2]:
        assert_alike(outputs_and_gradients(compiled, sizes), outputs_and_gradients(plain, sizes), 1e-4)


def test_who_compiles() -> None:
    def chosen(compile: str, device: str, **parallel: Any) -> bool:
        cfg = Config(train=TrainConfig(compile=compile), parallel=ParallelConfig(**parallel))
        return compiles(cfg, device)

    pytest.importorskip("triton")
    assert chosen("auto", "cuda") and chosen("auto", "cuda", engine="colossalai", plugin="zero1")
    assert not chosen("auto", "cpu") and not chosen("off", "cuda")
    assert not chosen("auto", "cuda", plugin="fsdp")
    assert not chosen("auto", "cuda", sp_size=2)
    assert chosen("on", "cpu")


def test_layouts_that_alter_the_blocks_are_refused() -> None:
    layout = ParallelConfig(engine="colossalai", plugin="hybrid", tp_size=2)
    with pytest.raises(ConfigError, match=r'train\.compile = "on": expected off or auto with'):
        check_config(Config(train=TrainConfig(compile="on"), parallel=layout))
    check_config(Config(parallel=layout))
