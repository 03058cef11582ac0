"""Files and folders appear whole or not at all, and what killed writers leave is cleared away, but nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_repro import files
from opensora_repro.files import beside, remove_leftovers, replacing, write_text

LEAVE = "import sys, pathlib; from opensora_repro import files; files.beside(pathlib.Path(sys.argv[1])).touch(); {}"


def leave(path: Path, then: str) -> subprocess.Popen[bytes]:
    """Start a process that leaves an unfinished file, and wait until it did."""
    child = subprocess.Popen([sys.executable, "-c", LEAVE.format(then), path], stdin=subprocess.PIPE)
    while not list(path.parent.glob(f".{path.name}.*.{child.pid}-*.tmp")):
        time.sleep(0.01)
    return child


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    living, ended = leave(tmp_path / "living.json", "sys.stdin.read()"), leave(tmp_path / "ended.json", "pass")
    time.sleep(0.2)  # it has ended, and we have not asked how
    beside(tmp_path / "own.json").touch()
    beside(tmp_path / "folder").mkdir()
    assert len(hidden(tmp_path)) == 4
    remove_leftovers(tmp_path)
    assert [name.split(".")[1] for name in hidden(tmp_path)] == ["folder", "living", "own"]
    living.kill()
    for child in (living, ended):
        child.communicate()
    remove_leftovers(tmp_path)
    assert [name.split(".")[1] for name in hidden(tmp_path)] == ["folder", "own"]


def test_a_process_number_that_is_used_again_is_not_its_writer(tmp_path: Path) -> None:
    own = beside(tmp_path / "x")
    earlier = own.with_name(own.name.replace(f".{os.getpid()}-", f".{os.getpid()}-1"))
    earlier.mkdir()
    (earlier / "half").touch()
    remove_leftovers(tmp_path)
    assert hidden(tmp_path) == []


def test_containers_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one host name: on one machine their processes are numbered apart, on two these were booted apart."""
    told = {"/proc/self/ns/pid": os.readlink("/proc/self/ns/pid"), "boot_id": "0f0f0f0f-1111"}
    readlink, read_text = os.readlink, Path.read_text
    monkeypatch.setattr(os, "readlink", lambda path: told.get(str(path)) or readlink(path))
    monkeypatch.setattr(Path, "read_text", lambda path, **how: told.get(path.name) or read_text(path, **how))
    monkeypatch.setattr(files, "_machine", files._machine.__wrapped__)  # asked anew each time
    names = []
    for change in ({}, {"/proc/self/ns/pid": "pid:[1]"}, {"boot_id": "0f0f0f0e-1111"}):
        told |= change
        path = beside(tmp_path / "x")
        left = path.with_name(path.name.replace(f".{os.getpid()}-", ".999999999-"))
        left.touch()
        names.append(left.name)
    assert len(set(names)) == 3
    remove_leftovers(tmp_path)  # as the last of them
    assert hidden(tmp_path) == sorted(names[:2])


def test_a_folder_takes_the_place_of_another_or_is_gone(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replacing(tmp_path / "made") as folder:
            folder.mkdir()
            (folder / content).touch()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "made") as folder:
        folder.mkdir()
        (folder / "third").touch()
        _ = 1 / 0
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["made", "made/second"]


def test_an_equal_file_is_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "same")
    os.utime(path, (1, 1))
    write_text(path, "same")
    assert path.stat().st_mtime == 1
    write_text(path, "other")
    assert path.stat().st_mtime > 1 and path.read_text() == "other" and hidden(tmp_path) == []


def test_weights_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    """safetensors writes files that their owner alone may read; where all files are made so, these stay it."""
    tensors = {"x": torch.zeros(2)}
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            with replacing(tmp_path / f"{mode}.safetensors") as file:
                save_file(tensors, file)
            with replacing(tmp_path / f"{mode}") as folder:
                folder.mkdir()
                save_file(tensors, folder / "model.safetensors")
        finally:
            assert os.umask(before) == mask
        assert (tmp_path / f"{mode}.safetensors").stat().st_mode & 0o777 == mode
        assert (tmp_path / f"{mode}" / "model.safetensors").stat().st_mode & 0o777 == mode


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Errors of writes know no file, those of opening the hidden one; another file's error keeps its name."""
    path = tmp_path / "a.json"
    for error in (OSError(28, "full"), OSError(28, "full", str(beside(path) / "part"))):
        with pytest.raises(OSError, match="full") as told, replacing(path):
            raise error
        assert told.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as told, replacing(path):
        open(tmp_path / "absent").close()
    assert told.value.filename == str(tmp_path / "absent")
