"""Addresses such as s3://bucket/folder/a.mp4, and the path that each stands under on this node.

An object's path is SCRATCH/opensora-objects/SCHEME/BUCKET/KEY, whether a copy of it is there or not. So it can be
joined, compared and made relative like any other path; `shown` turns it back into its address wherever it is told.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import unicodedata
from functools import lru_cache
from pathlib import Path

OBJECTS = "opensora-objects"  # in every object's path: what does not hold it is local, and is asked nothing more
SCRATCH, SCRATCH_GB = "OPENSORA_SCRATCH", "OPENSORA_SCRATCH_GB"  # variables of the environment
EXTRAS = {"s3": "s3", "gs": "gcs", "hf": "", "http": "http", "https": "http"}  # scheme: the extra that reads it
READ_ONLY = ("hf", "http", "https")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_USER = re.compile(r"(?<=://)[^/\s?#]*@")
_SECRET = (
    r"x-(?:amz|goog)-[\w-]+|awsaccesskeyid|googleaccessid|signature|sig|key-pair-id|api_?key|access_?key"
    r"|[\w-]+[_-]key|(?:[\w-]*[_-])?(?:token|secret|password|passwd|pwd|credentials?|auth|authorization|bearer|jwt)"
    r"|hdn(?:ea|ts|tl)"
)
_SIGNED = re.compile(rf"(?<=[?&#;])({_SECRET})=[^&#\s'\"]*", re.IGNORECASE)


class AddressRefused(PermissionError):
    """An address that cannot be used: as it is written, or for want of a package or of credentials."""

    def __init__(self, reason: str, address: str) -> None:
        super().__init__(errno.EACCES, reason, redacted(address))


def is_address(text: str | os.PathLike[str]) -> bool:
    return _ADDRESS.match(os.fspath(text)) is not None


def redacted(text: str) -> str:
    """Return `text` without what gives access: names and passwords, and the values of signed queries."""
    if "://" not in text:
        return text
    return _SIGNED.sub(r"\1=...", _USER.sub("...@", text))


@lru_cache(maxsize=8)
def _root(given: str) -> str:
    if not given:
        return os.path.join(os.path.realpath(tempfile.gettempdir()), f"{OBJECTS}-{os.getuid()}")
    return os.path.join(os.path.realpath(os.path.expanduser(given)), OBJECTS)


def scratch_folder() -> Path:
    """Where copies are kept on this node: in $OPENSORA_SCRATCH, or a folder of the user's in the temporary one."""
    return Path(_root(os.environ.get(SCRATCH, "")))


def place(text: str | os.PathLike[str]) -> Path:
    """Return the path that an address stands under; that of a local path is the path, `~` being the home folder.

    Raises AddressRefused for one that holds credentials, which belong in the environment, or that no object can have.
    """
    text = os.fspath(text)
    found = _ADDRESS.match(text)
    if found is None:
        return Path(text).expanduser()
    scheme, name = found[1], found[2].rstrip("/")
    if scheme not in EXTRAS:
        raise AddressRefused(f"is of no store that can be used: expected {', '.join(f'{s}://' for s in EXTRAS)}", text)
    if redacted(text) != text:
        raise AddressRefused("holds credentials; leave them out and set them in the environment", text)
    if not can_be_path(name):
        raise AddressRefused("is no address of an object: expected scheme://bucket/folder/name", text)
    return Path(_root(os.environ.get(SCRATCH, "")), scheme, name)


def can_be_path(name: str) -> bool:
    """Whether bucket and key can be a path's parts, and a line of a message: keys may hold anything."""
    control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
    return not control and not any(part in ("", ".", "..") for part in name.split("/"))


def within(folder: Path, name: str) -> Path:
    """Return the path that a manifest in `folder` means by a name: an address, or a path that may be relative."""
    return place(name) if is_address(name) else folder / os.path.expanduser(name)


def address_of(path: str | os.PathLike[str]) -> str:
    """Return the address that a path stands for, "" for a local one."""
    text = os.fspath(path)
    if OBJECTS not in text:
        return ""
    root, text = _root(os.environ.get(SCRATCH, "")), os.path.abspath(text)
    if not text.startswith(f"{root}/"):
        return ""
    scheme, _, name = os.path.normpath(text)[len(root) + 1 :].partition("/")
    return f"{scheme}://{name}" if scheme in EXTRAS and name else ""


def shown(text: str) -> str:
    """Return a text with addresses where it holds their paths, and without credentials."""
    root = _root(os.environ.get(SCRATCH, ""))
    if root in text:
        text = re.sub(rf"{re.escape(root)}/({'|'.join(EXTRAS)})/", r"\1://", text)
    return redacted(text)


def relative(path: Path, folder: Path) -> str:
    """Return how a manifest in `folder` names a file: relative to it, or by its address where it lies elsewhere."""
    there, here = address_of(path), address_of(folder)
    if bucket(there) != bucket(here):
        return there or os.path.abspath(path)
    return os.path.relpath(path, folder)


def bucket(address: str) -> str:
    """Return scheme and bucket (or host) of an address, "" of none."""
    return "/".join(address.split("/")[:3])
