"""The training loop reads nothing from the device but what has been sent to the host a step before.

On a CPU every value is at hand, so what is counted are the calls that would make a GPU's host wait.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loop import build_loop, made_up_clip, made_up_encoding, run_loop
from opensora_repro.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FrameMasksConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    VaeConfig,
)
from opensora_repro.data.dataset import BadSample, Clip
from opensora_repro.frozen.encoder import Encoded, Encoder
from opensora_repro.frozen.text import open_text_encoder
from opensora_repro.frozen.vae import open_vae
from opensora_repro.models.config import STDiTConfig
from opensora_repro.training.loop import Trainer
from opensora_repro.training.measure import MadeUp
from tests.tiny_models import TINY_TEXT_CHANNELS, make_tiny_text, make_tiny_vae

CPU = torch.device("cpu")
STEPS, LENGTH = 5, 6
WAITING_CALLS = ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__")
WAITING_OPS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
# Where values are read that have been on their way for a step, or lie in host memory: random numbers, captions' masks,
# and of masks of frames those that do (`generated_frames` asks).
MAY_READ = (
    ("device.py", "read"),
    ("gaussian.py", "draw_timesteps"),
    ("flow.py", "draw_timesteps"),
    ("frame_masks.py", "draw"),
    ("layers.py", "generated_frames"),
    ("cross_attention.py", "lay_out"),
)
OTHERS = ("transformers", "diffusers")  # what the frozen models do within is theirs


class Waits:
    """What both modes have found, each with the functions that led to it."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, call: str) -> None:
        callers = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        if any((path.name, name) in MAY_READ or set(OTHERS) & set(path.parts) for path, name in callers):
            return
        names = [name for path, name in callers if "opensora_repro" in path.parts or name.startswith("wait_")]
        self.found.append(" > ".join([*names, call]))


class Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING_CALLS:
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING_OPS or by_mask:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class Watched(Trainer):
    """Counts from the second step on: the first fills tables that are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.waits = Waits()

    def _step(self) -> None:
        if self.state.step == 0:
            super()._step()
            return
        with Calls(self.waits), Ops(self.waits):
            super()._step()


def cached(number: int) -> Encoded:
    return made_up_encoding(number, (4, 3, 4, 4), (LENGTH, TINY_TEXT_CHANNELS))


def clip(number: int) -> Clip | BadSample:
    return BadSample("sample 3", "3.mp4", "ends early") if number == 3 else made_up_clip(number, 3, 32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("frozen")
    make_tiny_vae(folder / "vae")
    make_tiny_text(folder / "text")
    vae = open_vae(VaeConfig(path=str(folder / "vae")), CPU, torch.float32)
    text = open_text_encoder(TextConfig(path=str(folder / "text")), LENGTH, CPU, torch.float32)
    return Encoder(vae, text, CPU, half=False)


def waits_of(
    run_dir: Path,
    encoder: Encoder,
    make: Callable[[int], Any],
    sabotage: Callable[[Tensor], Any] | None = None,
    *,
    given: float = 0.0,
) -> list[str]:
    """Train for some steps; `sabotage` gets each step's losses. `given`: share of samples with given frames."""
    cfg = Config(
        run=RunConfig(dir=str(run_dir)),
        data=DataConfig(num_frames=3, height=32, width=32),
        model=STDiTConfig(
            hidden_size=32, depth=2, num_heads=4, caption_channels=TINY_TEXT_CHANNELS, model_max_length=LENGTH
        ),
        train=TrainConfig(steps=STEPS, batch_size=2, dtype="fp32"),
        checkpoint=CheckpointConfig(every=STEPS),
        frame_masks=FrameMasksConfig(random=given),
    )
    trainer = build_loop(cfg, encoder, MadeUp(make, 2), CPU, kind=Watched)
    assert isinstance(trainer, Watched)
    if sabotage is not None:
        trainer.objective = Sabotaged(trainer.objective, sabotage)  # type: ignore[assignment]
    lines = run_loop(trainer)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return trainer.waits.found


class Sabotaged:
    """An objective that looks at its losses."""

    def __init__(self, objective: Any, look: Callable[[Tensor], Any]) -> None:
        self.objective, self.look = objective, look

    def losses(self, *args: Any, **given: Any) -> Tensor:
        losses: Tensor = self.objective.losses(*args, **given)
        self.look(losses)
        return losses


@pytest.mark.parametrize(("make", "given"), [(cached, 0.0), (cached, 1.0), (clip, 0.0)])
def test_no_step_waits_for_the_device(
    tmp_path: Path, encoder: Encoder, make: Callable[[int], Any], given: float
) -> None:
    assert waits_of(tmp_path / "run", encoder, make, given=given) == []


def wait_for_item(losses: Tensor) -> None:
    losses.sum().item()


def wait_for_truth(losses: Tensor) -> None:
    bool(losses.sum() > 0)


def wait_for_float(losses: Tensor) -> None:
    float(losses.detach().sum())


def wait_for_list(losses: Tensor) -> None:
    losses.tolist()


def wait_for_copy(losses: Tensor) -> None:
    losses.detach().cpu()


def wait_for_size(losses: Tensor) -> None:
    losses[losses > 0]


@pytest.mark.parametrize(
    "look", [wait_for_item, wait_for_truth, wait_for_float, wait_for_list, wait_for_copy, wait_for_size]
)
def test_a_look_at_the_device_is_noticed(tmp_path: Path, encoder: Encoder, look: Callable[[Tensor], Any]) -> None:
    found = waits_of(tmp_path / "run", encoder, cached, look)
    assert any(look.__name__ in line for line in found), found


def test_zero_lets_the_main_stream_wait_for_its_exchange_and_never_the_host(repo_dir: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "tests.stream_order"], cwd=repo_dir, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    exchange = ["exchange waits for main", "on exchange", "main waits for exchange", "prepare the next batch"]
    gather = ["prepare the next batch"]  # ZeRO-1 exchanges after the last micro-batch alone
    assert found["zero2"]["calls"] == 4 * exchange
    assert found["zero1"]["calls"] == found["hybrid"]["calls"] == 2 * (gather + exchange)
    assert all(plugin["same"] for plugin in found.values())
