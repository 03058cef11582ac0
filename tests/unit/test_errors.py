"""One line and an exit code, by whose fault it is; classes of errors that users see."""

from __future__ import annotations

import ast
import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opensora_repro
from opensora_repro.errors import DataError, TrainingError, UserError, run_command

FULL = OSError(errno.ENOSPC, "No space left on device", "out/manifest.parquet")
ENDS = {
    "mistake": (DataError("a.csv: row 3:\nno id"), 2, "error: a.csv: row 3: no id"),
    "absent": (
        FileNotFoundError(2, "No such file or directory", "a.csv"),
        2,
        "error: a.csv: No such file or directory",
    ),
    "in the way": (NotADirectoryError(20, "Not a directory", "out/x"), 2, "error: out/x: Not a directory"),
    "diverged": (TrainingError("diverged; saved: step-3"), 1, "error: diverged; saved: step-3"),
    "full disk": (FULL, 1, "error: cannot write out/manifest.parquet: No space left on device; all is kept"),
    "broken disk": (OSError(errno.EIO, "I/O error", "a.mp4"), 1, "error: a.mp4: I/O error; all is kept"),
    "memory": (MemoryError(), 1, "error: out of memory: this machine has no more. Take less; all is kept"),
    "card": (torch.OutOfMemoryError("CUDA full\n..."), 1, "error: CUDA full Take less; all is kept"),
    "stopped": (KeyboardInterrupt(), 130, "interrupted; all is kept"),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_is_one_line_and_an_exit_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, line = ENDS[name]

    def run() -> int:
        raise error

    assert run_command(run, kept="all is kept", less_memory="Take less") == code
    assert capsys.readouterr().err == f"{line}\n"


def test_ctrl_c_within_code_in_text_has_its_exit_code(tmp_path: Path, repo_dir: Path) -> None:
    """Which libraries run as they are imported; a module that is run as a command ends so."""
    run = "import sys; from opensora_repro.errors import run_command as r; sys.exit(r(lambda: exec(sys.argv[1])))"
    (tmp_path / "interrupted.py").write_text(run)
    command = [sys.executable, "-m", "interrupted", "raise KeyboardInterrupt"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(repo_dir)))}
    ended = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "interrupted; the same command goes on from here\n")


def test_an_output_that_nobody_reads_is_told_in_a_line() -> None:
    """As `| head` leaves it; a pipe of our own that breaks is another matter, and no output at all is none."""
    run = "import sys; from opensora_repro.errors import run_command as r; sys.exit(r(lambda: exec(sys.argv[1]) or 0))"
    told = "error: what read the output has ended; the same command goes on from here\n"
    broken = "error: [Errno 32] Broken pipe; the same command goes on from here\n"
    reader, writer = os.pipe()
    os.close(reader)
    for work, stdout, end in (
        ("print(1)", writer, (1, told)),  # at the end, as output is buffered
        ("print(1, flush=True)", writer, (1, told)),
        ("raise BrokenPipeError(32, 'Broken pipe')", subprocess.DEVNULL, (1, broken)),
        ("sys.stdout = None; raise BrokenPipeError(32, 'Broken pipe')", subprocess.DEVNULL, (1, broken)),
        ("import io; sys.stdout = io.StringIO(); raise BrokenPipeError(32, 'Broken pipe')", writer, (1, told)),
        ("import os; os.close(1); sys.stdout = None; print(1)", subprocess.DEVNULL, (0, "")),
    ):
        ended = subprocess.run([sys.executable, "-c", run, work], stdout=stdout, stderr=subprocess.PIPE, text=True)
        assert (ended.returncode, ended.stderr) == end
    os.close(writer)


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), KeyError("ours")])
def test_our_own_faults_are_raised(error: Exception) -> None:
    def run() -> int:
        raise error

    with pytest.raises(type(error), match="ours"):
        run_command(run)
    assert run_command(lambda: 7) == 7


def test_each_process_says_which_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        raise UserError("no")

    for rank, told in (("0", "error: no\n"), ("3", "error (process 3): no\n")):
        monkeypatch.setenv("RANK", rank)
        assert run_command(run) == 2
        assert capsys.readouterr().err == told


def test_every_error_for_users_is_a_user_error() -> None:
    """A class of the library that derives from ValueError is one; what is not for users derives from another."""
    root = Path(opensora_repro.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "NotFound", "Clash")):
                found.append(getattr(importlib.import_module(module), node.name))
    errors = [cls for cls in found if issubclass(cls, Exception)]
    assert len(errors) >= 12
    assert [cls for cls in errors if not issubclass(cls, UserError | TrainingError)] == []
