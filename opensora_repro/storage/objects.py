"""The objects behind addresses, by fsspec: what there is, and one of them fetched, written or deleted, with patience.

Credentials are what the environment gives: AWS_ACCESS_KEY_ID and its like, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from opensora_repro.storage.addresses import (
    EXTRAS,
    READ_ONLY,
    AddressRefused,
    address_of,
    can_be_path,
    redacted,
    scratch_folder,
    shown,
)

TRIES, FIRST_PAUSE = 6, 0.5  # each pause is about twice the one before, a quarter of a minute in all
CONNECT, SILENCE = 30.0, 60.0  # seconds that a web server may take to answer, and between two bytes, of however many
THREADS = 32  # that wait for a store
LISTED, PAGE = 20, 1000  # objects that are worth a list of their folder, if it has few others; as an answer has them
KNOWN = 1 << 21  # objects whose facts are kept
_PASSING = (
    None, errno.EBUSY, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE,
    errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH,
)  # fmt: skip
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
CREDENTIALS = "; are the credentials, the region and the endpoint in the environment right?"
_BUSY = (408, 425, 429)  # of HTTP, and all from 500 on

T = TypeVar("T")


class Facts(NamedTuple):
    """Size in bytes, and a time of change in ns whose microseconds are a digest of the object's tag."""

    size: int
    mtime_ns: int


_known: dict[str, Facts] = {}  # by path: objects do not change while a process works on them


def _file_system(address: str) -> Any:
    scheme = address.partition("://")[0]
    try:
        import fsspec

        how: dict[str, Any] = {} if scheme in READ_ONLY else {"use_listings_cache": False}
        if scheme.startswith("http"):
            from aiohttp import ClientTimeout

            how["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=CONNECT, sock_read=SILENCE)}
        return fsspec.filesystem(scheme, **how)
    except ImportError:
        raise AddressRefused(f"needs a package: pip install 'opensora-repro[{EXTRAS[scheme]}]'", address) from None


def _tried(call: Callable[[Any, str], T], path: str | os.PathLike[str]) -> T:
    """Return what `call` makes of the file system and the address; what passes is waited for, with growing pauses.

    Raises OSError with the path: FileNotFoundError where no such object is.
    """
    address = address_of(path)
    files = _file_system(address)
    for left in reversed(range(TRIES)):
        try:
            return call(files, address)
        except Exception as error:
            failure = _failure(error, path)
            if left and failure.errno in _PASSING:
                time.sleep(FIRST_PAUSE * 2 ** (TRIES - 1 - left) * random.uniform(0.5, 1.0))
                continue
            raise failure from None  # the store's own words may hold an address with its signature
    raise AssertionError


def _failure(error: Exception, path: str | os.PathLike[str]) -> OSError:
    """Return an error of a store as an OSError about the path; those that may pass have a number of _PASSING."""
    name, words = os.fspath(path), " ".join(str(getattr(error, "strerror", None) or error).split())
    text, web = redacted(words) or type(error).__name__, address_of(path).startswith("http")
    if isinstance(error, AddressRefused):
        return error
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__ if web else None
        if isinstance(cause, Exception) and getattr(cause, "status", 0) not in (404, 410):
            return _failure(cause, path)  # fsspec's word for all that goes wrong with a web server
        bucket = "bucket does not exist" in words
        return FileNotFoundError(errno.ENOENT, "no such bucket" if bucket else "no such object", name)
    if isinstance(error, _FINAL):
        doubt = CREDENTIALS if isinstance(error, PermissionError) and not web else ""
        return type(error)(error.errno or errno.EACCES, text + doubt, name)
    if "Credentials" in type(error).__name__:
        return AddressRefused("no credentials in the environment", shown(name))
    status = next((v for v in (getattr(error, "status", None), getattr(error, "code", None)) if isinstance(v, int)), 0)
    if status:
        number = errno.EBUSY if status in _BUSY or status >= 500 else errno.EACCES
    elif isinstance(error, OSError):
        number = error.errno or errno.EIO
    elif any(word in type(error).__name__ for word in ("Timeout", "Connect", "Payload", "Response")):
        number = errno.ETIMEDOUT  # of aiohttp's and botocore's errors, which have no class in common
    else:
        number = errno.EINVAL
    if number == errno.EINVAL and not web:
        text += CREDENTIALS  # an expired token is a bad request, too
    return OSError(number, text, name)


def _facts(info: dict[str, Any]) -> Facts:
    """Return an object's facts. Tags and times come spelt in many ways; some stores have only one of them."""
    when: Any = info.get("LastModified") or info.get("mtime") or info.get("updated")
    seconds = int(when.timestamp()) if hasattr(when, "timestamp") else 1 << 30
    tags = [info.get(name) for name in ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified")]
    tag = hashlib.blake2b(repr([str(t).strip('"') for t in tags if t]).encode(), digest_size=8).digest()
    return Facts(int(info.get("size") or 0), seconds * 10**9 + int.from_bytes(tag, "big") % 10**6 * 1000)


def _learn(path: str, facts: Facts) -> Facts:
    if len(_known) >= KNOWN:
        _known.clear()
    _known[path] = facts
    return facts


def facts_of(path: str | os.PathLike[str], *, again: bool = False) -> Facts:
    """Return an object's facts, looked up once in a process. Raises OSError; IsADirectoryError for a folder."""
    name = os.fspath(path)
    if name in _known and not again:
        return _known[name]
    info = _tried(lambda files, address: files.info(address), path)
    if info["type"] != "file":
        raise IsADirectoryError(errno.EISDIR, "is a folder", name)
    return _learn(name, _facts(info))


def look_up(paths: Iterable[str | os.PathLike[str]], *, share: float = 0.0) -> None:
    """Learn the facts of many objects at once, side by side, by asking for each.

    `share`: about how much of their folders they are. Where it is enough, folders are listed, which takes one question
    for a page of objects, one page after the other. What is not there is left for `facts_of` to tell.
    """
    from concurrent.futures import ThreadPoolExecutor

    folders: defaultdict[str, list[str]] = defaultdict(list)
    for path in dict.fromkeys(os.fspath(path) for path in paths):
        if path not in _known and address_of(path):
            folders[os.path.dirname(path)].append(path)

    def ask(path: str) -> None:
        with contextlib.suppress(OSError):
            facts_of(path)

    def list_folder(folder: str) -> None:
        with contextlib.suppress(OSError):
            _tried(lambda files, address: _learn_all(Path(folder), files.ls(address, detail=True)), folder)

    with ThreadPoolExecutor(THREADS) as pool:
        for folder, names in folders.items():
            listed = len(names) >= LISTED and share * PAGE >= THREADS and not address_of(folder).startswith("http")
            for _ in [pool.submit(list_folder, folder)] if listed else [pool.submit(ask, name) for name in names]:
                pass


def _learn_all(beside: Path, infos: Iterable[dict[str, Any]]) -> list[Path]:
    """Return the paths of the objects that a list tells of, `beside` being the path of one of the same store."""
    scheme = address_of(beside).partition("://")[0]
    top = scratch_folder() / scheme
    found = []
    for info in infos:
        name = info["name"].removeprefix(f"{scheme}://")
        path = top / name
        if info["type"] != "file" or name.endswith("/"):
            continue
        if not can_be_path(name):
            print(f"warning: {scheme}://{name!a}: no file can have this name; left out", file=sys.stderr)
            continue
        _learn(os.fspath(path), _facts(info))
        found.append(path)
    return found


def objects_below(folder: Path) -> list[Path]:
    """Return the objects below an address, in order. Raises OSError."""
    return sorted(_tried(lambda files, at: _learn_all(folder, files.find(at, detail=True).values()), folder))


def objects_matching(pattern: Path) -> list[Path]:
    """Return the objects that a pattern with `*`, `?` or `**` stands for, in order. Raises OSError."""
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    return sorted(_tried(lambda files, at: _learn_all(fixed, files.glob(at, detail=True).values()), pattern))


def is_object(path: Path) -> bool:
    """Whether an object is there. Raises OSError where that cannot be told."""
    try:
        facts_of(path)
    except (FileNotFoundError, IsADirectoryError):
        return False
    return True


def reason_missing(path: Path) -> str:
    """Return why nothing is at an address: no such bucket, no such object or folder; "" where an object or folder is.

    A folder is what some object's name begins with. Stores list what is missing as empty, so this is asked for then.
    """

    def is_there(one: Path) -> bool:
        try:
            return bool(_tried(lambda files, address: files.info(address), one))
        except FileNotFoundError:
            return False

    if is_there(path):
        return ""
    with contextlib.suppress(OSError):  # a key may be good for a part of a bucket alone
        below = len(scratch_folder().parts) + 2  # after the scheme and the bucket
        return "no such object or folder" if is_there(Path(*path.parts[:below])) else "no such bucket"
    return "no such object or folder"


def download(path: Path, to: Path) -> Facts:
    """Fetch an object into a file and return its facts. Raises OSError."""

    def get(files: Any, address: str) -> Facts:
        facts = facts_of(path)
        files.get_file(address, os.fspath(to))
        if facts.size and to.stat().st_size != facts.size:  # replaced meanwhile, or cut short
            facts_of(path, again=True)
            raise OSError(errno.EIO, f"{to.stat().st_size} of {facts.size} bytes came")
        return facts

    return _tried(get, path)


def read_object(path: Path, start: int, length: int) -> bytes:
    """Return a part of an object. Raises OSError."""
    part = bytes(_tried(lambda files, address: files.cat_file(address, start=start, end=start + length), path))
    return part if len(part) <= length else part[start : start + length]  # some web servers know only the whole


def upload(file: Path, path: Path) -> Facts:
    """Write an object: whole, or it is not there; one of that name is replaced. Raises OSError."""
    if address_of(path).partition("://")[0] in READ_ONLY:
        raise AddressRefused(
            "can only be read from; choose a local folder, s3:// or gs:// to write to", address_of(path)
        )
    _known.pop(os.fspath(path), None)
    _tried(lambda files, address: files.put_file(os.fspath(file), address), path)
    return facts_of(path)


def delete(path: Path) -> None:
    """Delete an object, if there is one. Raises OSError."""
    _known.pop(os.fspath(path), None)
    with contextlib.suppress(FileNotFoundError):
        _tried(lambda files, address: files.rm_file(address), path)
