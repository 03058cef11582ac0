"""Sides of a benchmark in processes of their own, and what is told of others on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import harness, processes, resources

FREED_MB = 300
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def answers() -> dict[str, processes.Ask]:
    return {"sleep": time.sleep, "left": left_after_freeing, "process": os.getpid, "end": lambda: os._exit(3)}


def left_after_freeing() -> int:
    """Bytes that the process holds after it has freed `FREED_MB`."""
    import torch

    torch.ones(FREED_MB << 18)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.exhaustive
@linux
def test_sides_live_on_in_processes_that_treat_memory_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    workers = {name: processes.Worker(answers, (), name == "keeps") for name in ("gives back", "keeps")}
    with processes.in_processes(workers, one_thread=True) as asks:
        numbers = [ask("process") for ask in asks.values() for _ in range(2)]
        assert len(set(numbers)) == 2 and os.getpid() not in numbers
        assert processes.seconds_of(asks["keeps"], "sleep", 0.3)() < 0.2  # CPU seconds
        left = {name: ask("left") for name, ask in asks.items()}
        memory = {name: ask("memory") for name, ask in asks.items()}
        assert min(about["peak_memory_mb"] for about in memory.values()) > FREED_MB
        assert processes.memory_columns(memory["gives back"])[0] == "given back"
        if memory["keeps"]["keeps_memory"]:  # glibc
            assert left["keeps"] - left["gives back"] > FREED_MB / 2 * 2**20
        for _ in range(2):  # when it ends, and after it has
            with pytest.raises(SystemExit, match="the process of 'keeps' ended"):
                asks["keeps"]("end")
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)


@linux
def test_own_work_and_that_of_started_processes_is_not_others() -> None:
    before = resources.processor_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    after = resources.processor_seconds()
    assert before is not None and after is not None
    assert 0.45 < after.own - before.own <= after.machine - before.machine + 0.1
    assert 1 <= after.processors == before.processors


def test_the_share_of_others_is_told_where_it_shows_in_wall_time() -> None:
    before, after = resources.ProcessorSeconds(100, 10, 2), resources.ProcessorSeconds(115, 20, 2)
    assert resources.others_share(10.0, before, after) == 0.25
    assert resources.others_share(10.0, before, after._replace(own=30)) == 0  # a clock's tick too many
    found = {"clock": "wall time", "others_share": 0.25}
    assert "others used 25 % of the machine" in harness.busy_note(found)
    assert not harness.busy_note(found | {"clock": "CPU time"})
    assert not any(harness.busy_note(found | {"others_share": share}) for share in (None, 0.0, 0.05))
