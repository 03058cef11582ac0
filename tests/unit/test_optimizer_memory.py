"""Optimizer state in host memory, and steps within the backward pass: the numbers of the plain step, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_repro.config import ConfigError, OptimConfig
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel import offload
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.offload import HostAdamW, chunks, on_device
from opensora_repro.training.checkpoint import optimizer_pieces
from opensora_repro.training.optim import build_optimizer, check_processes
from opensora_repro.training.step import Ema
from tests.training_world import World, make_world, metrics, newest_hashes

TINY = STDiTConfig(hidden_size=32, depth=3, num_heads=4, caption_channels=12, model_max_length=5)
PLAIN = OptimConfig(lr=1e-2, weight_decay=0.1)
STEPS = 4


class Run:
    """A tiny run under an engine; the samples follow from the step alone."""

    def __init__(self, optim: OptimConfig, checkpointing: str = "none") -> None:
        torch.manual_seed(0)
        self.model, self.optim = STDiT(TINY), optim
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        self.model.activation_checkpointing = checkpointing
        self.engine = TorchEngine(device="cpu")
        self.engine.prepare(self.model, build_optimizer(self.model, optim))
        self.ema = Ema(self.engine, 0.9, offload=optim.offload)
        self.norms: list[float] = []

    def step(self, number: int, factor: float) -> None:
        generator = torch.Generator().manual_seed(number)
        latents, text = (torch.randn(size, generator=generator) for size in ((2, 4, 3, 8, 8), (2, 5, 12)))
        lr = self.optim.lr / (1 + number)
        if self.optim.in_backward:
            self.engine.step_in_backward(lr, factor)
        self.engine.backward(self.model(latents, torch.tensor([3.0, 700.0]), text).square().mean())
        self.norms.append(float(self.engine.squared_gradients()))
        if not self.optim.in_backward:
            self.engine.step(lr, factor)
        self.ema.update()
        self.engine.zero_grad()

    def result(self) -> dict[str, Tensor]:
        """Weights, average, and the optimizer's state."""
        weights = {f"weight {name}": value.detach() for name, value in self.engine.masters.items()}
        average = {f"average {name}": value for name, value in self.ema.shadow.items()}
        state = {f"{kind} {name}": value for kind, name, value in optimizer_pieces(self.engine)}
        return {**weights, **average, **state}


def trained(optim: OptimConfig, checkpointing: str = "none") -> Run:
    run = Run(optim, checkpointing)
    for number in range(STEPS):
        run.step(number, 1.0 if number % 2 else 0.75)
    return run


def assert_equal(run: Run, expected: Run) -> None:
    found, reference = run.result(), expected.result()
    assert found.keys() == reference.keys()
    assert len(reference) == 5 * len(run.engine.masters)  # two moments and the number of steps besides
    for name in reference:
        assert torch.equal(found[name], reference[name]), name
    assert run.norms == expected.norms


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny model's tensors come in many parts, some of several."""
    monkeypatch.setattr(offload, "CHUNK", 3000)


# Within the backward pass


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_steps_in_backward_are_the_plain_ones(checkpointing: str) -> None:
    within = OptimConfig(lr=1e-2, weight_decay=0.1, in_backward=True, clip_norm=0)
    assert_equal(trained(within, checkpointing), trained(PLAIN))


def test_steps_in_backward_keep_one_gradient() -> None:
    def most_gradients(optim: OptimConfig) -> int:
        run, most = Run(optim), 0

        def count(_: Tensor) -> None:
            nonlocal most
            most = max(most, sum(p.grad.numel() for p in run.model.parameters() if p.grad is not None))

        for parameter in run.model.parameters():  # called before the engine's, which the first step registers
            parameter.register_post_accumulate_grad_hook(count)
        run.step(0, 1.0)
        assert all(parameter.grad is None for parameter in run.model.parameters())
        return most

    parameters = [parameter.numel() for parameter in STDiT(TINY).parameters()]
    assert most_gradients(PLAIN) == sum(parameters)
    assert most_gradients(OptimConfig(in_backward=True, clip_norm=0)) == max(parameters)


def test_without_its_call_the_backward_pass_makes_no_step() -> None:
    """A batch without a good sample moves nothing, and its gradients are no later step's."""
    run = Run(OptimConfig(in_backward=True, clip_norm=0))
    run.step(0, 1.0)
    before = {name: value.clone() for name, value in run.result().items()}
    (run.model(torch.zeros(1, 4, 1, 4, 4), torch.tensor([1.0]), torch.zeros(1, 5, 12)).sum() * 0).backward()
    assert float(run.engine.squared_gradients()) == 0
    run.engine.zero_grad()
    for name, value in run.result().items():
        assert torch.equal(value, before[name]), name


def test_several_processes_are_refused() -> None:
    within = OptimConfig(in_backward=True, clip_norm=0)
    check_processes(within, 1)
    check_processes(PLAIN, 2)
    with pytest.raises(ConfigError, match="in_backward = true: expected false with 2 processes"):
        check_processes(within, 2)


# Host memory


@pytest.mark.usefixtures("small_chunks")
def test_state_in_host_memory_is_the_plain_one() -> None:
    offload = OptimConfig(lr=1e-2, weight_decay=0.1, offload=True)
    run = trained(offload)
    assert isinstance(run.engine.optimizer, HostAdamW)
    assert_equal(run, trained(PLAIN))


@pytest.mark.parametrize("back", [False, True], ids=["into host memory", "out of it"])
@pytest.mark.usefixtures("small_chunks")
def test_state_goes_on_on_the_other_side(back: bool) -> None:
    """As a checkpoint brings it: by the parameters' numbers."""
    offload = OptimConfig(lr=1e-2, weight_decay=0.1, offload=True)
    first, second = (trained(offload), Run(PLAIN)) if back else (trained(PLAIN), Run(offload))
    with torch.no_grad():
        for name, value in first.engine.masters.items():
            second.engine.masters[name].copy_(value)
            second.ema.shadow[name].copy_(first.ema.shadow[name])
    second.ema.updates = first.ema.updates
    second.engine.optimizer.load_state_dict(copy.deepcopy(first.engine.optimizer.state_dict()))
    first.norms.clear()
    for run in (first, second):
        run.step(9, 0.5)
    assert_equal(second, first)


@pytest.mark.usefixtures("small_chunks")
def test_parts_hold_all_and_no_more_than_they_may() -> None:
    tensors = [torch.zeros(size) for size in (0, 10, 2980, 20, 5000, 0, 1, 2999)]
    parts = [[tensor.numel() for tensor in part] for part in chunks(tensors)]
    assert parts == [[0, 10, 2980], [20], [5000], [0, 1, 2999]]
    assert chunks([]) == []


def test_visitors_are_copies_that_are_taken_back() -> None:
    parts = [[torch.zeros(3), torch.ones(2)], [torch.full((2,), 2.0)]]
    homes = [tensor.data_ptr() for part in parts for tensor in part]
    for there in on_device(parts, [torch.zeros(1)]):
        assert not {tensor.data_ptr() for tensor in there} & set(homes)
        for tensor in there:
            tensor += 1
    assert [tensor.tolist() for part in parts for tensor in part] == [[1, 1, 1], [2, 2], [3, 3]]
    assert [tensor.data_ptr() for part in parts for tensor in part] == homes


# Whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def train(world: World) -> Callable[..., Path]:
    def run(folder: Path, **changes: object) -> Path:
        from stages import stage2_video

        given = {"train__steps": 5, "checkpoint__every": 5, "optim__clip_norm": 0, "train__max_bad_steps": 1, **changes}
        arguments = world.arguments(folder, "clips", **given)
        assert stage2_video.main([str(world.root / "empty.toml"), *arguments]) == 0
        return folder

    return run


LESS = {
    "in backward": {"optim__in_backward": True},
    "host memory": {"optim__offload": True},
    "all that checkpointing has": {"train__activation_checkpointing": "selective", "train__offload_activations": True},
}


def test_whole_runs_are_the_plain_one(train: Callable[..., Path], tmp_path: Path) -> None:
    """Metrics and checkpoints, bit for bit; also where a run is resumed with and without."""
    plain = train(tmp_path / "plain")
    for name, changes in LESS.items():
        run = train(tmp_path / name, train__steps=3, **changes)
        train(run)  # the rest without
        other = train(tmp_path / f"{name}, later", train__steps=3)
        train(other, **changes)
        for folder in (run, other):
            assert metrics(folder) == metrics(plain), name
            assert newest_hashes(folder) == newest_hashes(plain), name


def test_a_non_finite_step_in_backward_ends_the_run_unsaved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages import stage2_video

    given = {"train__steps": 20, "train__max_bad_steps": 1, "checkpoint__every": 1, "checkpoint__keep": 0}
    changes = {"optim__lr": 1e30, "optim__clip_norm": 0, **LESS["in backward"], **given}
    arguments = world.arguments(tmp_path / "run", "clips", **changes)
    assert stage2_video.main([str(world.root / "empty.toml"), *arguments]) == 1
    assert "1 non-finite steps in a row" in capsys.readouterr().err
    saved = list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) == len(metrics(tmp_path / "run")) - 1 > 0
