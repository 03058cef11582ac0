"""Files that appear whole or not at all, and what killed writers leave behind."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from opensora_repro.storage.addresses import OBJECTS, AddressRefused, address_of, is_address, place, shown
from opensora_repro.storage.objects import facts_of, is_object
from opensora_repro.storage.scratch import fetched, publish, remove, unfinished_name


def user_path(text: str) -> Path:
    """Return a path as its user means it, `~` being the home folder: the type of options that take a local one."""
    if is_address(text):
        import argparse

        raise argparse.ArgumentTypeError(f"{one_line(text)}: expected a path of this machine, not an address")
    return Path(text).expanduser()


def user_place(text: str) -> Path:
    """As `user_path`, of an address too: the path of its object (see storage/addresses.py)."""
    try:
        return place(text)
    except AddressRefused as error:
        import argparse

        raise argparse.ArgumentTypeError(f"{error.filename}: {error.strerror}") from None


def shipped(name: str) -> Path:
    """Return where a file or folder of configs/ or checkpoints/ lies that comes with the product.

    In a checkout that is beside the package, in an installation within it.
    """
    package = Path(__file__).resolve().parent
    return (package if (package / "checkpoints").is_dir() else package.parent) / name


def is_free(path: str | Path) -> bool:
    """Whether nothing has the name yet, and something could: it is a possible one, and no file is in its way."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False


def here_or_shipped(path: str | Path) -> Path:
    """Return `path`; where nothing is there, what comes with the product under that name: it works in any folder."""
    path = Path(path).expanduser()
    if path.exists() or path.parts[:1] not in (("configs",), ("checkpoints",)):
        return path
    brought = shipped(os.fspath(path))
    return brought if brought.exists() else path


def _is_remote(path: Path) -> bool:
    return OBJECTS in os.fspath(path) and bool(address_of(path))


def is_file(path: Path) -> bool:
    """Whether a file is there, or an object. Raises OSError where a store does not tell."""
    return is_object(path) if _is_remote(path) else path.is_file()


def beside(path: Path) -> Path:
    """Return a hidden name in the same folder, this process's own, to write to before renaming to `path`.

    Of an object it is a name on this node.
    """
    if _is_remote(path):
        return unfinished_name(path)
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}-{_started('self')}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write a file or a folder to; it becomes `path` at the end of the block, or is deleted.

    A file equal to the one that is there is left out. Errors of a write, which know no file, name `path`. An object is
    written under its own name, when the file is whole: stores show no half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(path)
    try:
        yield unfinished
        _let_others_read(unfinished)
        if _is_remote(path):
            publish(unfinished, path)
        elif not (unfinished.is_file() and path.is_file() and filecmp.cmp(unfinished, path, shallow=False)):
            if path.is_dir() and unfinished.is_dir():  # a file never takes a folder's place
                remove_folder(path)
            os.replace(unfinished, path)
    except OSError as error:
        if error.errno is None or not str(error.filename or unfinished).startswith(str(unfinished)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _delete(unfinished)


def _let_others_read(unfinished: Path) -> None:
    """Give files the mode of any that Python makes: safetensors' may be read by their owner alone."""
    for file in unfinished.rglob("*") if unfinished.is_dir() else [unfinished]:
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0o077)  # which only setting it tells
    os.umask(mask)
    return mask


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is `path` at the end of the block, whole and on the disk, or not at all; see `replacing`."""
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all; an equal one is left untouched."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def put_in_place(unfinished: Path, path: Path) -> None:
    """Rename a file of `beside(path)` that is whole; an object is written."""
    if _is_remote(path):
        publish(unfinished, path)
    else:
        os.replace(unfinished, path)


def remove_file(path: Path) -> None:
    """Delete a file or an object, if it is there."""
    if _is_remote(path):
        remove(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Let what was created, renamed or removed in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a folder; its name goes first, so that half of it is never seen."""
    if folder.exists():
        doomed = beside(folder.with_name(f"{folder.name}.old"))
        _delete(doomed)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what is unfinished in `folder` and whose writers are gone: processes that this one would see.

    Those of another machine or another container are nobody's business here, be their names and numbers the same.
    """
    for path in folder.glob(f".*.{_machine()}.*.tmp"):
        writer = re.fullmatch(r"(\d+)-(\d+)", path.name.split(".")[-2])
        if writer and not _is_running(int(writer[1]), writer[2]):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the file's sha256 in hex; `progress` is called with the number of bytes read so far."""
    digest = hashlib.sha256()
    done = 0
    with fetched(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def digest(parts: Sequence[Any], size: int = 16) -> str:
    """Return 2 `size` hex digits of JSON-able parts, such as what a record is known by."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=size).hexdigest()


def size_and_time(file: Path) -> list[Any]:
    """Return a file's size in bytes and its time of change in ns, nothing for one that is not there."""
    with contextlib.suppress(OSError, ValueError):
        if _is_remote(file):
            return list(facts_of(file))
        status = os.stat(file)
        return [status.st_size, status.st_mtime_ns]
    return []


def place_of(file: Path) -> str:
    """Return a file's real path as UTF-8 text: of the hub's cache, whose links stay, what they lead to.

    Of an object it is the address.
    """
    if _is_remote(file):
        return address_of(file)
    with contextlib.suppress(ValueError):  # a null character
        file = Path(os.path.realpath(file))
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def content_of(file: Path) -> str:
    """Return the file's sha256, or 32 digits of its place if it cannot be read: why, is told when it is used."""
    try:
        return sha256_of(file)
    except (OSError, ValueError):
        return digest([place_of(file)])


class Sha256Memo:
    """sha256 of whole files, remembered by path, size and time of change: a file that was changed is read again.

    `find` and `save` reach what outlasts the process: by real path, [size in bytes, time of change in ns, sha256].
    """

    def __init__(
        self, find: Callable[[str], Any] | None = None, save: Callable[[str, list[Any]], None] | None = None
    ) -> None:
        known: dict[str, Any] = {}
        self.find, self.save = find or known.get, save or known.__setitem__

    @classmethod
    def in_file(cls, path: Path) -> Sha256Memo:
        """Return one that a JSON file keeps. It only saves time: absent, damaged or read-only, it is done without."""
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = dict(json.loads(fetched(path).read_text(encoding="utf-8")))

        def save(place: str, facts: list[Any]) -> None:
            known[place] = facts
            with contextlib.suppress(OSError):
                write_text(path, json.dumps(known, indent=1) + "\n")

        return cls(known.get, save)

    def recall(self, file: Path) -> str | None:
        """The sha256 in hex of a file that is as it was when it was read, None for another."""
        facts = self.find(place_of(file))
        known = isinstance(facts, list) and len(facts) == 3 and facts[:2] == size_and_time(file)
        return str(facts[2]) if facts and known else None

    def remember(self, file: Path, before: list[Any], content: str) -> None:
        """Take note of a content, unless the file could not be read, or was changed while it was."""
        if len(content) == 64 and size_and_time(file) == before:
            self.save(place_of(file), [*before, content])

    def __call__(self, file: Path) -> str:
        """The file's `content_of`. The hub's cache names large files by it: tens of gigabytes need not be read."""
        real = Path(place_of(file))
        if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
            return real.name
        known, before = self.recall(file), size_and_time(file)
        if known is None:
            known = content_of(file)
            self.remember(file, before, known)
        return known


def one_line(text: object) -> str:
    """Return `text` with line breaks and control characters escaped: a file's name cannot forge or hide a message.

    Objects are named by their addresses, without what gives access to them.
    """
    told = str(text)
    if OBJECTS in told or "://" in told:
        told = shown(told)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in told)


def safe_name(text: str) -> str:
    """Return a file name without a dot that stands for `text` alone, whoever wrote it.

    Letters, digits, _ and - of ASCII stay; where anything else was there, or more than 100 of them, a digest follows.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:100]
    if plain == text and plain:
        return plain
    return f"{plain}-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


@lru_cache(maxsize=1)
def _machine() -> str:
    """Host, boot and the processes' numbering: one that containers do not share, though they share the others."""
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:40]]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8])
        parts.append(re.sub(r"\D", "", os.readlink("/proc/self/ns/pid")))
    return "-".join(parts)


def _started(pid: int | str) -> str:
    """When a process began, in ticks of the kernel's clock: a number that is used again is known by it. 0: not told."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else "0"


def _stat(pid: int | str) -> list[str]:
    """What follows the name in /proc/PID/stat: state, parent and so on; nothing where no such process is shown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _is_running(pid: int, started: str) -> bool:
    """False also for a process that has ended and only waits for its parent to take notice."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    if not _stat("self") or os.readlink("/proc/self") != str(os.getpid()):
        return True  # no /proc, or one that numbers processes otherwise
    fields = _stat(pid)
    return bool(fields) and fields[0] not in ("Z", "X") and _started(pid) == started


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file, or something else in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
