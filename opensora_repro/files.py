"""Files that appear whole or not at all, and what killed writers leave behind."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def user_path(text: str) -> Path:
    """Return a path as its user means it, `~` being the home folder: the type of options that take one."""
    return Path(text).expanduser()


def beside(path: Path) -> Path:
    """Return a hidden name in the same folder, this process's own, to write to before renaming to `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names this file: those of writing know none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is `path` at the end of the block, whole or not at all; an equal one is left untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(path)
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not (path.is_file() and filecmp.cmp(unfinished, path, shallow=False)):
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all; an equal one is left untouched."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Let what was created, renamed or removed in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files in `folder` whose writers, processes of this machine, are gone."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.tmp"):
        try:
            gone = not _is_running(int(path.name.split(".")[-2]))
        except ValueError:
            continue  # not our file: leave it
        if gone:
            path.unlink(missing_ok=True)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the file's sha256 in hex; `progress` is called with the number of bytes read so far."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def one_line(text: object) -> str:
    """Return `text` with line breaks and control characters escaped: a file's name cannot forge or hide a message."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def safe_name(text: str) -> str:
    """Return a file name without a dot that stands for `text` alone, whoever wrote it.

    Letters, digits, _ and - of ASCII stay; where anything else was there, or more than 100 of them, a digest follows.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:100]
    if plain == text and plain:
        return plain
    return f"{plain}-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


def _is_running(pid: int) -> bool:
    """False also for a process that has ended and only waits for its parent to take notice."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:1]
    except OSError:
        return os.name != "posix" or not Path("/proc/self").exists()
    return state not in (["Z"], ["X"])
