"""Published weights by name: where they are, under which licence, and how to fetch them and be sure of them."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opensora_repro.config import read_toml
from opensora_repro.errors import UserError
from opensora_repro.files import sha256_of, shipped

CATALOG = shipped("checkpoints/catalog.toml")
PROBE_SECONDS = 5.0  # how long the hub may take to answer before we say that there is no connection
SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int], None]


class CatalogError(UserError):
    """Weights that the catalog lacks, or that cannot be fetched or trusted; one line meant for the user."""


@dataclass(frozen=True)
class File:
    """A file by its path in the repository; `size` and `sha256` are known for certain or absent."""

    path: str
    size: int | None = None
    sha256: str = ""
    about_bytes: int | None = None  # an estimate to show before fetching


@dataclass(frozen=True)
class Entry:
    """Published weights: one file, or with `folder` the files of a folder of the repository."""

    name: str
    about: str
    licence: str
    layout: str  # whose keys the tensors have
    files: tuple[File, ...]
    repository: str = ""  # on the hub
    folder: str = ""
    url: str = ""  # of a file that is not on the hub

    @property
    def about_bytes(self) -> int:
        """About how much there is to fetch."""
        return sum(file.size or file.about_bytes or 0 for file in self.files)


def load_catalog() -> list[Entry]:
    """Read checkpoints/catalog.toml."""
    content = read_toml(CATALOG)
    return [Entry(**{**model, "files": tuple(File(**file) for file in model["files"])}) for model in content["model"]]


def find_entry(name: str) -> Entry:
    """Return the catalog's entry. Raises CatalogError, which names the closest one."""
    for entry in load_catalog():
        if entry.name == name:
            return entry
    raise CatalogError(f"{name}: not in the catalog of published weights; the closest name is {_closest(name, 0.0)}")


def find_cached(name: str) -> Path | None:
    """Where the hub's cache has the entry of that name, a file or a folder; None for a name that the catalog lacks.

    Nothing is fetched. Raises CatalogError, with the command that fetches it, where it is not there.
    """
    try:
        entry = find_entry(name)
    except CatalogError:
        return None
    if entry.url:
        raise CatalogError(_how_to_download(entry))
    from huggingface_hub import constants, try_to_load_from_cache

    paths = [try_to_load_from_cache(entry.repository, file.path) for file in entry.files]
    found = [Path(path) for path in paths if isinstance(path, str)]
    if len(found) < len(paths):
        raise CatalogError(
            f"{name}: not in the hub's cache {constants.HF_HUB_CACHE}: run `python -m stages.weights fetch {name}` "
            "once where there is a connection"
        )
    return _place(entry, found)


def means_published(name: str) -> bool:
    """Whether a name is the catalog's, or such a one without its ending or folder, or nearly: no path of a run."""
    given = Path(name.strip()).as_posix().lower()
    known = [text for entry in load_catalog() for text in (entry.name, os.path.splitext(entry.name)[0],
             entry.name.removesuffix(f"/{entry.folder}"), entry.repository)]  # fmt: skip
    alike = [text.lower() for text in known if text.count("/") == given.count("/")]
    return bool(difflib.get_close_matches(given, alike, n=1, cutoff=0.85))


def similar_name(name: str) -> str:
    """For the end of a line on a name that nothing has: the catalog's, if one is nearly alike."""
    close = _closest(name, 0.8)
    return f"; the catalog of published weights has {close}" if close else ""


def _closest(name: str, cutoff: float) -> str:
    """The catalog's most similar name; empty where none is as similar as `cutoff` (0 to 1)."""
    lower = {entry.name.lower(): entry.name for entry in load_catalog()}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=cutoff)
    return lower[close[0]] if close else ""


def fetch(entry: Entry, *, progress: Progress | None = None) -> Path:
    """Return the entry's file, or folder, in the hub's cache, fetched if need be and verified.

    When a connection drops, the newest huggingface_hub goes on where it broke while this call lasts, older releases at
    the next call. HF_HOME, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_TOKEN mean what they mean to huggingface_hub.
    `progress` is told how many bytes have been verified. Raises CatalogError; OSError for a full disk.
    """
    if entry.url:
        raise CatalogError(_how_to_download(entry))
    paths = []
    for file in entry.files:
        path = _download(entry, file)
        _verify(entry, file, path, progress)
        paths.append(path)
    return _place(entry, paths)


def here_or_published(path: Path) -> Path:
    """The path, or where nothing is there what the hub's cache holds of weights of that name. Raises CatalogError."""
    found = path if path.exists() else find_cached(str(path))
    if found is None:
        raise CatalogError(f"{path}: no such run, checkpoint or weights file{similar_name(str(path))}")
    return found


def _how_to_download(entry: Entry) -> str:
    return f"{entry.name} is not on the hub: get it with `curl -L -C - -O {entry.url}`, give its path"


def _place(entry: Entry, paths: list[Path]) -> Path:
    """What to hand on: the only file, or the folder of all. Raises CatalogError where they are of several revisions."""
    if not entry.folder:
        return paths[0]
    folders = {path.parent for path in paths}
    if len(folders) > 1:  # the repository changed between fetching them
        raise CatalogError(f"{entry.name}: the files are of different revisions of {entry.repository}; fetch again")
    return folders.pop()


def _download(entry: Entry, file: File) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(entry.repository, file.path), str):
        _reach_hub(entry, file)
    try:
        return Path(hf_hub_download(entry.repository, file.path, etag_timeout=PROBE_SECONDS))
    except Exception as error:  # httpx's, requests' or the hub's own, according to its release
        text = " ".join(str(error).split()) or type(error).__name__
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
            reason = f"the disk is full; free some space, or let HF_HOME name a larger disk than {constants.HF_HOME}'s"
            raise OSError(errno.ENOSPC, reason, f"{entry.repository}/{file.path}") from error
        reason = f"fetching it failed ({text[:200]}); fetch again"
        raise CatalogError(f"{entry.repository}/{file.path}: {reason}") from error


def _reach_hub(entry: Entry, file: File) -> None:
    """Ask for the file's headers first, so that an absent file or network is noticed at once."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # where every supported release has them
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    hub = constants.ENDPOINT
    try:
        get_hf_file_metadata(hf_hub_url(entry.repository, file.path), timeout=PROBE_SECONDS)
    except Exception as error:
        if isinstance(error, GatedRepoError):
            reason = f"{hub} wants its terms accepted first; then set HF_TOKEN"
        elif isinstance(error, RepositoryNotFoundError):
            reason = f"{hub} has no such repository, or shows it only to those with a HF_TOKEN"
        elif isinstance(error, EntryNotFoundError):
            reason = f"{hub} has the repository but not this file"
        elif isinstance(error, HfHubHTTPError):
            reason = " ".join(str(error).split())[:200]
        else:
            reason = f"not in the hub's cache {constants.HF_HUB_CACHE}, and "
            reason += "HF_HUB_OFFLINE forbids fetching it" if constants.HF_HUB_OFFLINE else f"no connection to {hub}"
        raise CatalogError(f"{entry.repository}/{file.path}: {reason}") from error


def _verify(entry: Entry, file: File, path: Path, progress: Progress | None) -> None:
    """Compare the file with what the catalog or else the hub says of it; raise CatalogError at a difference."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise CatalogError(_mismatch(path, f"{size} bytes", f"{file.size} bytes"))
    expected = file.sha256 or _hub_sha256(entry, file, path)
    if expected:
        found = sha256_of(path, progress)
        if found != expected:
            raise CatalogError(_mismatch(path, f"sha256 {found}", f"sha256 {expected}"))


def _mismatch(path: Path, found: str, expected: str) -> str:
    return f"{path}: has {found}, expected {expected}; delete {path.resolve()} and fetch again"


def _hub_sha256(entry: Entry, file: File, path: Path) -> str:
    """Return the sha256 that the hub gives of a large file; nothing for a small one, or without a connection.

    The cache names a file by it, behind a link; where the disk has no links the hub is asked.
    """
    if path.is_symlink():
        etag = Path(os.readlink(path)).name
    else:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            etag = get_hf_file_metadata(hf_hub_url(entry.repository, file.path), timeout=PROBE_SECONDS).etag or ""
        except Exception:  # no connection: the file stands as it is
            return ""
    return etag if SHA256.fullmatch(etag) else ""
