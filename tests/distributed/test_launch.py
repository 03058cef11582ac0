"""What can go wrong between processes ends the whole job soon, names who is to blame, and is made good by resuming."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch_ranks import DEADLINE, LIMIT
from tests.training_world import (
    Command,
    World,
    free_port,
    make_world,
    metrics,
    newest_hashes,
    succeed,
    wait_for_step,
)

REPO = Path(__file__).resolve().parents[2]
STAGE = "stages.stage2_video"
PROCESSES, STEPS, KILLED_AFTER = 4, 16, 6
ALL_ENDED = 60.0  # seconds after a process died, at most


def start(scenario: str, tmp_path: Path, ranks: list[int], world_size: int) -> list[Command]:
    """Processes as torchrun would start them, without an agent: process 0 keeps the store."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Command(
            "tests.launch_ranks",
            [scenario, str(tmp_path / "logs")],
            tmp_path / f"{scenario}{rank}",
            {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared},
        )
        for rank in ranks
    ]


def codes(commands: list[Command]) -> list[int]:
    return [command.wait(60) for command in commands]


def start_working(tmp_path: Path) -> list[Command]:
    """Three processes, all of which have done an all-reduce."""
    commands = start("work", tmp_path, [0, 1, 2], world_size=3)
    end = time.monotonic() + 60
    while not all(Path(f"{command.log}.out").exists() and "working" in command.out for command in commands):
        assert time.monotonic() < end, [command.err for command in commands]
        time.sleep(0.05)
    return commands


def named(rank: int, command: Command) -> str:
    return rf"process {rank} \(host \S+, pid {command.pid}\)"


def test_a_process_that_never_starts_is_named(tmp_path: Path) -> None:
    commands = start("absent", tmp_path, [0, 2], world_size=3)
    assert codes(commands) == [2, 2]
    assert f"after {DEADLINE:.0f} s only 2 of 3 processes are here; silent: process 1." in commands[0].err


def test_a_process_without_process_0_says_so(tmp_path: Path) -> None:
    (command,) = start("absent", tmp_path, [1], world_size=2)
    assert codes([command]) == [2]
    assert re.search(r"error: process 0 at 127\.0\.0\.1:\d+ does not answer within 3 s", command.err)


def test_a_process_that_misses_the_first_all_reduce_is_named(tmp_path: Path) -> None:
    commands = start("no_collective", tmp_path, [0, 1], world_size=2)
    assert codes(commands) == [1, 1]
    reference = rf"error \(process 0\): the first all-reduce has not ended after 3 s; {named(1, commands[1])} is behind"
    assert re.search(reference, commands[0].err)


def test_a_hung_collective_ends_with_everyones_stacks(tmp_path: Path) -> None:
    started = time.monotonic()
    commands = start("hang", tmp_path, [0, 1, 2], world_size=3)
    assert codes(commands) == [1, 1, 1]
    assert time.monotonic() - started < LIMIT + 30
    for rank, command in enumerate(commands):
        assert re.search(rf"error \(process {rank}\): step 2 has not ended after \d+ s", command.err)
        assert f"Stacks: {tmp_path / 'logs'}; start the same command again" in command.err
    stacks = [(tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in range(3)]
    assert "all_reduce" in stacks[0]
    assert "in hang" in stacks[1] and "in all_reduce\n" not in stacks[1]
    assert "all_reduce" in stacks[2]


def test_the_end_of_process_0_ends_the_others(tmp_path: Path) -> None:
    """With it the store is gone through which they would have asked who is alive."""
    commands = start_working(tmp_path)
    os.kill(commands[0].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert codes(commands) == [-signal.SIGKILL, 1, 1]
    assert time.monotonic() - killed < ALL_ENDED
    for command in commands[1:]:
        assert re.search(r"process 0 at 127\.0\.0\.1:\d+, .* is gone", command.err)


def test_a_frozen_process_is_named(tmp_path: Path) -> None:
    """It answers nothing, and no connection of its breaks."""
    commands = start_working(tmp_path)
    os.kill(commands[1].pid, signal.SIGSTOP)
    try:
        assert codes([commands[0], commands[2]]) == [1, 1]
    finally:
        os.kill(commands[1].pid, signal.SIGKILL)
    for command in (commands[0], commands[2]):
        assert re.search(named(1, commands[1]) + r" has been silent for \d+ s", command.err)


@pytest.mark.parametrize("scenario", ["error", "encoding"])
def test_an_error_of_one_process_is_told_by_the_others(tmp_path: Path, scenario: str) -> None:
    commands = start(scenario, tmp_path, [0, 1, 2], world_size=3)
    assert codes(commands) == [1, 1, 1]
    for rank in (0, 2):
        reference = rf"error \(process {rank}\): {named(1, commands[1])} ended: MemoryError: no room for the batch"
        assert re.search(reference, commands[rank].err)


def test_differing_facts_are_named_and_pauses_are_not_hangs(tmp_path: Path) -> None:
    commands = start("facts", tmp_path, [0, 1, 2], world_size=3)
    assert codes(commands) == [2, 2, 2]
    for command in commands:
        assert "paused" in command.out
        line = command.err.splitlines()[-1]
        assert re.search(r"not started alike: weights is \w+ in process 1 on host \S+, and \w+ in the others\.", line)
    header, columns, *rows = commands[0].out.splitlines()
    assert (header, columns.split()) == ("3 processes on 1 host", ["rank", "host", "pid", "device"])
    assert [row.split()[::2] for row in rows[:3]] == [[str(rank), str(c.pid)] for rank, c in enumerate(commands)]


# Whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {"train__steps": STEPS, "train__batch_size": 1, "checkpoint__every": 4, **changes}
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


def elastic(restarts: int, run_arguments: list[str]) -> list[str]:
    return [str(PROCESSES), str(restarts), STAGE, *run_arguments]


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """A run of four processes that nobody disturbs."""
    run_dir = world.root / "whole"
    succeed("tests.elastic", elastic(0, arguments(world, run_dir)), world.root / "log" / "whole")
    return run_dir


def assert_same_curve(run_dir: Path, whole: Path) -> None:
    """Bit for bit, as on one process."""
    assert metrics(run_dir) == metrics(whole)
    assert newest_hashes(run_dir) == newest_hashes(whole)


def pid_of(rank: int, out: str) -> int:
    """From the table that the job prints first."""
    assert f"{PROCESSES} processes on 1 host" in out
    found = re.search(rf"^ *{rank}  \S+ +(\d+)  cpu$", out, re.MULTILINE)
    assert found, out
    return int(found[1])


def test_settings_that_differ_are_named_before_anything_is_made(world: World, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    commands = [
        Command(
            STAGE,
            arguments(world, tmp_path / "run", train__steps=10 + rank),
            tmp_path / f"rank{rank}",
            {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared},
        )
        for rank in range(2)
    ]
    assert codes(commands) == [2, 2]
    for command in commands:
        assert "train.steps is 11 in process 1 on host" in command.err.splitlines()[-1]
        assert "and 10 in the others" in command.err
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_torchrun_ends_soon_after_a_kill_and_resumes(world: World, whole: Path, tmp_path: Path) -> None:
    """The real command, one of its processes killed; the same again continues the same curve."""
    run_dir = tmp_path / "run"
    options = ["--standalone", "--nproc-per-node", str(PROCESSES), "-m", STAGE]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments(world, run_dir)]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        job = subprocess.Popen(command, cwd=REPO, stdout=out_file, stderr=err_file)
    try:
        wait_for_lines(run_dir / "metrics.jsonl", KILLED_AFTER, job)
        victim = pid_of(2, out.read_text())
        os.kill(victim, signal.SIGKILL)
        assert job.wait(ALL_ENDED) != 0
    finally:
        job.kill()
    said = err.read_text()
    for rank in (0, 1, 3):
        assert re.search(rf"error \(process {rank}\): process 2 \(host \S+, pid {victim}\) has been silent", said)
        assert (run_dir / "logs" / f"rank{rank}.log").exists()
    assert len(metrics(run_dir)) < STEPS
    succeed("tests.elastic", elastic(0, arguments(world, run_dir)), tmp_path / "log" / "again")
    assert_same_curve(run_dir, whole)


def wait_for_lines(path: Path, count: int, job: subprocess.Popen[bytes], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert job.poll() is None, f"ended with {job.returncode}"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.exhaustive
def test_an_elastic_job_restarts_by_itself(world: World, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = Command("tests.elastic", elastic(1, arguments(world, run_dir)), tmp_path / "log" / "elastic")
    wait_for_step(run_dir, KILLED_AFTER, command)
    os.kill(pid_of(2, command.out), signal.SIGKILL)
    assert command.wait() == 0, command.err
    assert command.out.count(f"{PROCESSES} processes on 1 host") == 2
    assert f"resuming {run_dir} after step 4 of {STEPS}" in command.out
    assert_same_curve(run_dir, whole)


@pytest.mark.exhaustive
def test_slurm_script(tmp_path: Path) -> None:
    """SLURM's commands are stand-ins: `srun` starts the two nodes' tasks on this machine."""
    tools = {
        "scontrol": 'test "$*" = "show hostnames a[1-2]" && printf "localhost\\nlocalhost\\n"',
        "srun": 'test "$1" = --kill-on-bad-exit=1 && shift && { "$@" & "$@"; wait $!; }',
    }
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "a[1-2]", "JOB_ID": str(free_port()), "NNODES": "2", "GPUS_ON_NODE": "2"}
    environment = {**os.environ, **{f"SLURM_{name}": value for name, value in slurm.items()}}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    script = ["bash", "configs/slurm.sbatch", "tests.print_rank", "CONFIG.toml", "sample.prompts=['a b']"]
    done = subprocess.run(script, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = [
        f"RANK={rank} WORLD_SIZE=4 LOCAL_RANK={rank % 2} GROUP_RANK={rank // 2} "
        "arguments=['CONFIG.toml', \"sample.prompts=['a b']\"]"
        for rank in range(4)
    ]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.exhaustive
def test_colossalai_run(tmp_path: Path) -> None:
    """ColossalAI's launcher starts the same processes; torchrun must be on its PATH."""
    launcher = Path(sys.executable).with_name("colossalai")
    environment = {**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    port = str(free_port())
    command = [
        str(launcher),
        "run",
        "--nproc_per_node",
        "2",
        "--master_port",
        port,
        "-m",
        "tests.print_rank",
        "CONFIG.toml",
    ]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        line = f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK={rank} GROUP_RANK=0 arguments=['CONFIG.toml']"
        assert line in done.stdout.splitlines()
