"""Copies of objects on this node, as many as $OPENSORA_SCRATCH_GB holds: those that were used last.

A copy lies under its object's path, is read-only, and has the object's size and time of change. What is unfinished lies
in SCRATCH/incoming, in a folder that its process holds locked: the next process deletes those of the dead.
Processes share the copies, each holding those locked that it has asked for last, and the count of their bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import itertools
import os
import shutil
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora_repro.storage.addresses import (
    EXTRAS,
    SCRATCH,
    SCRATCH_GB,
    AddressRefused,
    address_of,
    scratch_folder,
)
from opensora_repro.storage.objects import Facts, delete, download, facts_of, look_up, upload

DEFAULT_GB = 50.0
SPARE = 10**9  # bytes, or a twentieth of the disk, that copies leave to others
KEPT = 0.9  # of the limit, what is left where room is made
HELD_SHARE, HELD_LEAST = 1 / 64, 2  # of the limit or disk, that a process holds locked; and copies in any case
HELD_MOST = 128  # copies, each of which is an open file
TRIES = 3  # of fetching what is deleted or replaced in the same moment
PATIENCE, PAUSE = 60.0, 0.2  # seconds for others to let go of copies, where no other can be deleted
AT_A_TIME = 16  # objects that are fetched ahead side by side
COPY = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH  # the mode of a copy; what else lies there is nobody's to delete

_held: OrderedDict[str, tuple[int, int]] = OrderedDict()  # by path: an open file with a shared lock, its bytes
_guard = threading.RLock()
_own: list[tuple[Path, int]] = []  # this process's folder for what is unfinished, and its lock
_numbers = itertools.count()


def limit() -> int:
    """Return how many bytes of copies there may be. Raises AddressRefused."""
    given = os.environ.get(SCRATCH_GB, "")
    with contextlib.suppress(ValueError):
        if 0 < (size := float(given or DEFAULT_GB)) < float("inf"):
            return int(size * 1e9)
    raise AddressRefused(f"{SCRATCH_GB} = {given}: expected a number of gigabytes", os.fspath(scratch_folder()))


def ready() -> None:
    """See to it that copies can be kept, before many are asked for. Raises AddressRefused."""
    limit()
    try:
        unfinished_name(Path("x"))
    except AddressRefused:
        raise
    except OSError as error:
        why = f"no copies of objects can be kept here ({error.strerror}); set {SCRATCH} to another folder"
        raise AddressRefused(why, os.fspath(scratch_folder())) from None


def fetched(path: Path) -> Path:
    """Return `path` with the object's content there: a copy that holds, or a new one. A local path is as it is.

    The copy stays at least until this process has asked for others. Raises OSError; FileNotFoundError for no object.
    """
    if not address_of(path):
        return path
    facts = facts_of(path)
    if not _hold(path, facts):
        with _locked(_folder("locks") / hashlib.blake2b(os.fspath(path).encode(), digest_size=2).hexdigest()):
            for left in reversed(range(TRIES)):
                if _hold(path, facts):
                    break
                if not left:
                    why = "no copy can be kept: its folder keeps no exact times; set OPENSORA_SCRATCH to another"
                    raise OSError(errno.EIO, why, os.fspath(path))
                unfinished = unfinished_name(path)
                try:
                    with _room(facts.size):
                        facts, told = download(path, unfinished), facts.size
                        # Of some servers the size is known now alone
                        with _room(max(0, unfinished.stat().st_size - told), written=True):
                            _adopt(unfinished, path, facts)
                finally:
                    unfinished.unlink(missing_ok=True)
    return path


def prefetch(paths: Iterable[str]) -> None:
    """Fetch several objects side by side; what fails is told when it is used."""
    remote = [Path(path) for path in dict.fromkeys(paths) if address_of(path)]

    def fetch(path: Path) -> None:
        with contextlib.suppress(OSError):
            fetched(path)

    if remote:
        from concurrent.futures import ThreadPoolExecutor

        look_up(remote)
        with ThreadPoolExecutor(min(AT_A_TIME, len(remote))) as pool:
            list(pool.map(fetch, remote))


def publish(unfinished: Path, path: Path) -> None:
    """Make a finished file the object that `path` stands for, whole or not at all; an equal one is left untouched."""
    size = unfinished.stat().st_size
    with contextlib.suppress(OSError):
        if facts_of(path, again=True).size == size and filecmp.cmp(unfinished, fetched(path), shallow=False):
            return
    facts = upload(unfinished, path)
    try:
        with _room(size, patience=0, written=True):
            _adopt(unfinished, path, facts)
    except OSError:  # no room for a copy: it is fetched when it is needed
        unfinished.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete the object that `path` stands for, and its copy. Raises OSError."""
    delete(path)
    path.unlink(missing_ok=True)


def unfinished_name(path: Path) -> Path:
    """Return a name to write to what is to become `path`, which is cleared away if this process dies."""
    with _guard:
        if not _own:
            with _locked(_folder("locks") / "incoming"):
                _clear_dead()
                folder = _folder("incoming") / f"{os.getpid()}-{time.time_ns()}"
                folder.mkdir()
                _own.append((folder, os.open(folder, os.O_RDONLY)))
                fcntl.flock(_own[0][1], fcntl.LOCK_EX)
    return _own[0][0] / f"{next(_numbers)}{path.suffix}"


# ---- files that are worked on here, and are objects between two commands


def check_out(file: Path) -> None:
    """See to it that a file in an object's place is what was last written, here or on another node."""
    if not address_of(file):
        return
    mark = file.with_name(f".{file.name}.object")
    try:
        facts = facts_of(file, again=True)
    except FileNotFoundError:
        return
    if file.exists() and mark.exists() and mark.read_text(encoding="ascii") == repr(tuple(facts)):
        return  # what was done here since is not in the object: this process's forerunner was killed
    for old in file.parent.glob(f"{file.name}*"):
        old.unlink()
    unfinished = unfinished_name(file)
    download(file, unfinished)
    os.replace(unfinished, file)
    mark.write_text(repr(tuple(facts)), encoding="ascii")


def check_in(file: Path, copy: Path | None = None) -> None:
    """Make a file, or a copy of it, what its object is, for the next command, wherever it runs."""
    if address_of(file) and file.exists():
        facts = upload(copy or file, file)
        file.with_name(f".{file.name}.object").write_text(repr(tuple(facts)), encoding="ascii")


# ---- room


def _folder(name: str) -> Path:
    root = scratch_folder()
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
    elif root.stat().st_uid != os.getuid():
        raise AddressRefused("is another user's folder; set OPENSORA_SCRATCH to one of your own", os.fspath(root))
    (root / name).mkdir(exist_ok=True)
    return root / name


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _hold(path: Path, facts: Facts) -> bool:
    """Lock the copy of an object, and count it as used now; False where there is none that holds."""
    name = os.fspath(path)
    with _guard:
        if name in _held:
            handle, _ = _held[name]
        else:
            try:
                handle = os.open(name, os.O_RDONLY)
            except OSError:
                return False
            fcntl.flock(handle, fcntl.LOCK_SH)
        try:
            here, there = os.fstat(handle), os.stat(name)
            holds = here.st_ino == there.st_ino and here.st_mtime_ns == facts.mtime_ns
            holds = holds and here.st_size == (facts.size or here.st_size)
            if holds:
                os.utime(name, ns=(time.time_ns(), here.st_mtime_ns))
        except OSError:  # deleted in this moment
            holds = False
        if not holds:
            _held.pop(name, None)
            os.close(handle)
            return False
        _held[name] = handle, here.st_size
        _held.move_to_end(name)
        most = min(limit(), _disk().total) * HELD_SHARE
        while len(_held) > HELD_LEAST and (len(_held) > HELD_MOST or sum(size for _, size in _held.values()) > most):
            os.close(_held.popitem(last=False)[1][0])
        return True


def _adopt(unfinished: Path, path: Path, facts: Facts) -> None:
    """Make a file the copy of an object."""
    os.utime(unfinished, ns=(time.time_ns(), facts.mtime_ns))
    unfinished.chmod(COPY)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, path)


@contextmanager
def _room(size: int, patience: float = PATIENCE, *, written: bool = False) -> Iterator[None]:
    """In this context there is room for `size` more bytes: the copies that were used longest ago make it.

    `written`: they are on the disk by now. Raises OSError (no space left) for an object that is larger than the limit,
    or the disk, or where all others are in use.
    """
    most, until, reserved = limit(), time.monotonic() + patience, unfinished_name(Path("x.room"))
    try:
        while lacking := _reserve(size, most, reserved, written):
            if size > min(most, _disk().total) or time.monotonic() > until:
                raise OSError(errno.ENOSPC, lacking, os.fspath(scratch_folder()))
            time.sleep(PAUSE)
        yield
    finally:
        reserved.unlink(missing_ok=True)


def _reserve(size: int, most: int, reserved: Path, written: bool) -> str:
    """Count the bytes and leave a file of no content but their size, by which others see them; "", or what there is
    no room for."""
    with _locked(_folder("locks") / "room") as handle:
        counted = int(os.pread(handle, 32, 0) or 0)
        short = 0 if written else _short_of(size)
        if counted + size > most or short > 0:
            counted = _clear(max(0, int(most * KEPT) - size), short + int(counted * (1 - KEPT)) if short > 0 else 0)
            short = 0 if written else _short_of(size)
        fits = counted + size <= most and short <= 0
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(counted + size * fits).encode(), 0)
        if fits:
            with reserved.open("wb") as file:
                file.truncate(size)
            return ""
    more = f"{size / 1e9:.3g} GB more, with what is in use, are above"
    return f"{more} {SCRATCH_GB} = {most / 1e9:.3g}" if short <= 0 else f"{more} what its disk has; set {SCRATCH}"


def _short_of(size: int) -> int:
    """Return how many bytes the disk has too few for `size` more, beside what clips that are written now may take."""
    disk = _disk()
    return size + min(SPARE, disk.total // 20) - disk.free


def _disk() -> Any:
    return shutil.disk_usage(scratch_folder())


def _clear(target: int, to_free: int) -> int:
    """Delete copies, those used longest ago first, down to `target` bytes with what is on its way, and at least
    `to_free` of them; return how many there are."""
    with _locked(_folder("locks") / "incoming"):
        _clear_dead()
    total = 0
    for reserved in _folder("incoming").glob("*/*.room"):
        with contextlib.suppress(OSError):
            total += reserved.stat().st_size
    copies = []
    for scheme in EXTRAS:
        for folder, _, names in os.walk(scratch_folder() / scheme):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    status = os.lstat(path)
                    if stat.S_IMODE(status.st_mode) == COPY:
                        copies.append((status.st_atime_ns, status.st_size, path))
    total += sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= target and to_free <= 0:
            break
        if _is_free(Path(path), delete=True):
            total, to_free = total - size, to_free - size
    return total


def _clear_dead() -> None:
    """Delete what processes left that are gone. The caller holds the lock under which such folders begin."""
    for folder in _folder("incoming").iterdir():
        if not (_own and folder == _own[0][0]) and _is_free(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_free(path: Path, *, delete: bool = False) -> bool:
    """Whether no process holds a file or a folder locked; with `delete`, a file is deleted while that is so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if delete:
            if os.fstat(handle).st_ino != os.stat(path).st_ino:
                return False  # another copy by now
            os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _begin_in_child() -> None:
    """A forked process holds nothing of its parent's; closing a handle leaves the parent's lock."""
    global _guard
    _guard = threading.RLock()
    for handle, _ in _held.values():
        os.close(handle)
    for _, handle in _own:
        os.close(handle)
    _held.clear()
    _own.clear()


os.register_at_fork(after_in_child=_begin_in_child)
