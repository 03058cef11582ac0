"""What parallel runs are made of, without processes: the layout of ranks, cuts of tensors, shared batches and files."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.torch_version import TorchVersion

from opensora_repro.config import ParallelConfig
from opensora_repro.data.sampler import BatchSampler, Schedule, SharedBatches, everything, interleave
from opensora_repro.errors import EngineError
from opensora_repro.parallel.build import build_engine
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.parallel.tensor import Cut
from opensora_repro.parallel.tensor_file import TensorFile
from opensora_repro.run_folder import CheckpointError, TrainState, list_checkpoints
from opensora_repro.training.save import CheckpointWriter, share_out
from opensora_repro.training.step import Ema
from tests.checkpoints import prepared


def test_ranks_are_laid_out_data_sequence_tensor() -> None:
    meshes = [Mesh(rank, 12, tp_size=2, sp_size=3) for rank in range(12)]
    places = [(mesh.data_rank, *divmod(mesh.member, mesh.tp_size)) for mesh in meshes]
    assert places == [(d, s, t) for d in range(2) for s in range(3) for t in range(2)]
    assert {mesh.data_size for mesh in meshes} == {2}
    assert meshes[0].model_groups() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert meshes[0].sequence_groups() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_too_few_processes_stop_with_the_arithmetic() -> None:
    with pytest.raises(EngineError, match=r"6 processes are not divisible by .*tp_size=2 x .*sp_size=2 = 4"):
        Mesh(0, 6, tp_size=2, sp_size=2)


@pytest.mark.parametrize(("shape", "dim", "parts"), [((12, 5), 0, 3), ((8, 5), 0, 2), ((12,), 0, 3), ((5, 8), 1, 1)])
def test_cuts_join_to_the_whole(shape: tuple[int, ...], dim: int, parts: int) -> None:
    whole = torch.randn(shape)
    cuts = [Cut(dim, parts, rank, 2) for rank in range(2)]
    pieces = [cut.take(whole) for cut in cuts]
    assert {piece.numel() for piece in pieces} == {whole.numel() // 2}
    assert torch.equal(cuts[0].join(pieces), whole)


def test_a_cut_takes_the_same_heads_of_queries_keys_and_values() -> None:
    qkv = torch.arange(12)  # three blocks of four channels: two heads of two
    assert Cut(0, 3, 1, 2).take(qkv).tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_group_reads_each_sample_once(size: int) -> None:
    sampler = BatchSampler(Schedule(everything(7), [4], seed=3), [(1, 8, 8)])
    for step in range(4):
        parts = [SharedBatches(sampler, member, size).batch(step) for member in range(size)]
        assert interleave(parts) == list(sampler.batch(step))


def test_loads_are_shared_out_evenly() -> None:
    owners = share_out([5, 4, 3, 3, 3], 2)
    loads = [sum(size for size, owner in zip([5, 4, 3, 3, 3], owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [8, 10]


def test_several_writers_make_one_readable_file(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True, False]),
        "step": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "long": torch.arange(3),
        "turned": torch.randn(4, 3).T,
    }
    layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    files = [TensorFile(tmp_path / "x.safetensors", layout) for _ in range(2)]
    files[0].create()
    names = list(tensors)
    files[1].write({name: tensors[name] for name in names[1::2]})
    files[0].write({name: tensors[name] for name in names[::2]})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


class Saving:
    """A tiny run that saves behind its training."""

    def __init__(self, run_dir: Path) -> None:
        self.model = nn.Linear(3, 2)
        self.engine = prepared(self.model)
        self.ema = Ema(self.engine, 0.9)
        self.run_dir = run_dir
        self.writer = CheckpointWriter(run_dir, self.engine, "[run]\n", keep=0, background=True)


def test_a_background_save_holds_the_weights_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Saving(tmp_path)
    go, write = threading.Event(), TensorFile.write
    monkeypatch.setattr(TensorFile, "write", lambda *given: (go.wait(60), write(*given)))
    before = run.model.weight.detach().clone()
    run.writer.save(TrainState(step=1), run.ema)  # comes back though nothing is written yet
    assert list_checkpoints(tmp_path) == []
    with torch.no_grad():
        run.model.weight.add_(1)
        run.ema.shadow["weight"].add_(1)
    go.set()
    run.writer.wait()
    (folder,) = list_checkpoints(tmp_path)
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], before)
    assert torch.equal(load_file(folder / "ema.safetensors")["weight"], before)


def test_a_failed_background_save_is_raised_at_the_next_one(tmp_path: Path) -> None:
    run = Saving(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    run.writer.save(TrainState(step=1), run.ema)
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        run.writer.save(TrainState(step=2), run.ema)
    (tmp_path / "checkpoints").unlink()
    run.writer.save(TrainState(step=3), run.ema)
    run.writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_fsdp_says_which_torch_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    fsdp = ParallelConfig(plugin="fsdp")
    assert build_engine(fsdp, "cpu").mesh == Mesh()  # one process has nobody to share with
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    with pytest.raises(EngineError, match=r"expected torch 2.6 or newer, found 2.5.1: update it, or set"):
        build_engine(fsdp, "cpu")


def test_without_colossalai_the_torch_engine_works_and_the_other_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ["colossalai", *(name for name in sys.modules if name.startswith("colossalai."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("opensora_repro.parallel.colossal", "opensora_repro.parallel.cpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert build_engine(ParallelConfig(), "cpu").mesh == Mesh()
    with pytest.raises(EngineError, match="the package colossalai is not installed: pip install colossalai, or set"):
        build_engine(ParallelConfig(engine="colossalai", plugin="zero2"), "cpu")
