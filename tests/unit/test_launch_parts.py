"""The parts of the launch that need no second process: the store, the table, the comparison, the verdicts."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from opensora_repro.config import Config, ParallelConfig, RunConfig, config_dict
from opensora_repro.errors import EngineError
from opensora_repro.parallel.preflight import (
    check_in,
    check_same,
    config_facts,
    difference,
    launch,
    table,
    weights_digest,
)
from opensora_repro.parallel.store import Place, listed, open_store
from opensora_repro.parallel.watchdog import GRACE, SILENCE, Failure, Watchdog, _is_collective
from tests.training_world import free_port

CPU = torch.device("cpu")
PLACES = [Place(0, "alpha", 100, "cpu"), Place(1, "alpha", 101, "cpu"), Place(2, "beta", 7, "cuda:0 (NVIDIA H100)")]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def test_one_process_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    watchdog = launch(0, 1, CPU, 600)
    watchdog.start()
    with watchdog.reporting(tmp_path / "logs"), watchdog.paused():
        watchdog.progress("step 1")
    check_same(watchdog, "data", {"data.manifest": "7 samples"})
    watchdog.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "logs").exists()


def test_table() -> None:
    assert table(PLACES) == [
        "3 processes on 2 hosts",
        "rank  host   pid  device",
        "   0  alpha  100  cpu",
        "   1  alpha  101  cpu",
        "   2  beta     7  cuda:0 (NVIDIA H100)",
    ]


def test_listed() -> None:
    assert [listed("a"), listed("ab"), listed("abc")] == ["a", "a and b", "a, b and c"]


def test_check_in_names_the_silent_processes(address: None) -> None:
    store = open_store(serve=True, timeout=5)
    assert [place.rank for place in check_in(store, 0, 1, CPU, deadline=1)] == [0]
    with pytest.raises(EngineError, match=r"only 1 of 4 processes are here; silent: process 1, 2 and 3\.") as caught:
        check_in(store, 0, 4, CPU, deadline=0.1)
    assert "\n" not in str(caught.value)


def test_a_restart_does_not_see_the_keys_of_the_start_before(address: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_store(serve=True, timeout=5)
    check_in(first, 0, 1, CPU)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = open_store(serve=False, timeout=5)
    assert first.check(["place/0"]) and not second.check(["place/0"])


def test_what_is_missing_for_the_store_is_named(address: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"^process 0 at 127\.0\.0\.1:\d+ does not answer within 1 s"):
        open_store(serve=False, timeout=1)
    for port in ("abc", "99999999", "-1"):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(EngineError, match=f"MASTER_PORT='{port}' in the environment: expected a port"):
            open_store(serve=True, timeout=1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(EngineError, match="MASTER_ADDR and MASTER_PORT are not set"):
        open_store(serve=True, timeout=1)


def test_difference_names_facts_and_holders() -> None:
    assert difference(PLACES, [{"a": "1", "b": "x"}] * 3) == ""
    line = difference(PLACES, [{"a": "1", "b": "x"}, {"a": "1", "b": "x"}, {"a": "2", "b": "x"}])
    assert line.startswith(
        "the processes were not started alike: a is 2 in process 2 on host beta, and 1 in the others. "
    )
    line = difference(PLACES, [{}, {"a": "1"}, {"a": "2"}])
    assert "a is 1 in process 1 on host alpha, 2 in process 2 on host beta, and none in the others" in line
    many = [{str(key): str(rank) for key in range(5)} for rank in range(3)]
    assert "; and 2 more. " in difference(PLACES, many)


def test_every_setting_is_a_fact() -> None:
    facts = config_facts(Config())
    assert len(facts) == sum(map(len, config_dict(Config()).values()))
    other = config_facts(Config(run=RunConfig(seed=1), parallel=ParallelConfig(timeout=5)))
    assert {key for key in facts if facts[key] != other[key]} == {"run.seed", "parallel.timeout"}


def test_weights_digest_sees_every_change() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    digest = weights_digest(weights)
    assert digest == weights_digest({name: tensor.clone() for name, tensor in weights.items()})
    changed = weights["a"].clone()
    changed[0, 1] = torch.nextafter(changed[0, 1], torch.tensor(9.0))
    swapped = weights["a"][:, [0, 2, 1]]
    others = [{**weights, "a": other} for other in (changed, swapped, weights["a"].view(3, 2), weights["a"].double())]
    others.append({"a": weights["a"], "c": weights["b"]})
    assert len({digest, *map(weights_digest, others)}) == 1 + len(others)
    assert weights_digest({}) == weights_digest({})


def test_errors_of_collectives_are_told_from_others() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4567"
    assert _is_collective(RuntimeError(gloo)) and _is_collective(torch.distributed.DistBackendError("NCCL error"))
    assert not _is_collective(RuntimeError("shape mismatch")) and not _is_collective(EngineError("gloo"))


@pytest.fixture
def watchdog(address: None) -> Watchdog:
    """Process 0 at step 4, not started; the other two said last, just now, that they are at step 3."""
    store = open_store(serve=True, timeout=5)
    for rank in range(3):
        store.set(f"beat/{rank}", "1 1 step 3")
    watchdog = Watchdog(0, PLACES, 30, store=store)
    watchdog.progress("step 3")
    watchdog.progress("step 4")
    watchdog._exchange(store, 1)
    assert watchdog._why_to_end(time.monotonic()) is None
    return watchdog


def test_verdict_on_silent_processes(watchdog: Watchdog) -> None:
    watchdog._exchanged += SILENCE + 1
    line = watchdog._why_to_end(watchdog._exchanged)
    assert line is not None
    assert line.startswith(f"{PLACES[1]} and {PLACES[2]} have been silent for 21 s: dead, or cut off. Start the same")


def test_verdict_on_a_standstill(watchdog: Watchdog) -> None:
    watchdog._since -= 31
    line = watchdog._why_to_end(watchdog._exchanged)
    assert line is not None
    behind = "; ".join(f"{place} is behind, at step 3" for place in PLACES[1:])
    assert re.match(rf"step 4 has not ended after 31 s; {re.escape(behind)}\. ", line)
    with watchdog.paused():
        watchdog._since -= 1000
        assert watchdog._why_to_end(watchdog._exchanged) is None
    assert watchdog._why_to_end(watchdog._exchanged) is None  # the clock starts anew


def test_verdict_on_a_store_that_does_not_answer(watchdog: Watchdog) -> None:
    line = watchdog._why_to_end(watchdog._exchanged + SILENCE + 1)
    assert line is not None and "through which the processes watch each other, is gone" in line


def test_verdict_after_anothers_failure(watchdog: Watchdog) -> None:
    """At once where it ended the job, after a while where it raised an error that all may have raised."""
    for grace in (False, True):
        watchdog._failure, watchdog._failure_seen = Failure(1, "because", grace), watchdog._exchanged
        assert watchdog._why_to_end(watchdog._exchanged + 1) == (None if grace else "because")
        assert watchdog._why_to_end(watchdog._exchanged + GRACE + 1) == "because"


@pytest.mark.parametrize(("chosen", "local_rank"), [(None, 1), ("cuda", 1), ("cuda:1", 0)])
def test_sampling_sets_its_gpu_before_it_touches_one(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, local_rank: int
) -> None:
    """Else every process of a machine would leave a context on the first GPU."""
    from opensora_repro.sampling.run import pick_device

    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("set", device)))
    monkeypatch.setattr(torch, "empty", lambda *_, device: done.append(("use", device)))
    assert pick_device(chosen, 1 if chosen == "cuda:1" else 2, local_rank) == torch.device("cuda", 1)
    assert done == [("set", torch.device("cuda", 1)), ("use", torch.device("cuda", 1))]
