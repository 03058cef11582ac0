"""Find frozen models: a local folder, or a hub name that the Hugging Face cache holds. Nothing is downloaded here."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class ModelNotFound(ValueError):
    """A frozen model is absent or unusable; the message is one line meant for the user."""


def load_frozen(load: Callable[..., T], path: str, *, key: str, kind: str) -> T:
    """Return `load(path, local_files_only=True)` for a local folder or a hub name.

    `key` is the config key that holds `path`, `kind` what is expected there; both appear in the error. Raises
    ModelNotFound.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"{key}={path}: no config.json in this folder, expected a {kind}")
        return _load(load, str(folder), f"{key}={path}", kind)
    if folder.exists() or not HUB_NAME.fullmatch(path):
        raise ModelNotFound(f"{key}={path}: no such folder, expected a {kind} (a local folder or a hub name)")
    if not _in_cache(path):
        raise ModelNotFound(_how_to_fetch(path, key))
    return _load(load, path, f"{key}={path}", kind)


def _load(load: Callable[..., T], path: str, where: str, kind: str) -> T:
    try:
        return load(path, local_files_only=True)
    except Exception as error:  # the libraries raise whatever the file at hand made them stumble over
        raise ModelNotFound(f"{where}: cannot be loaded as a {kind} ({_one_line(error)})") from error


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _how_to_fetch(name: str, key: str) -> str:
    from huggingface_hub import constants

    from opensora_repro.models.catalog import CatalogError, load_catalog

    command = f"hf download {name}"
    with contextlib.suppress(CatalogError):  # an installation without the catalog
        if any(entry.name == name for entry in load_catalog()):
            command = f"python -m stages.weights fetch {name}"
    return (
        f"{key}={name}: neither a folder here nor in the hub's cache {constants.HF_HUB_CACHE}; "
        f"run `{command}` once where there is a connection, or give a local folder"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def check_complete(info: dict[str, Any]) -> None:
    """Raise ValueError when the libraries would have left some weights at random values."""
    missing = sorted(map(str, info.get("missing_keys", ()))) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:
        raise ValueError(f"{len(missing)} weights are missing or misshapen, first {missing[0]}")


def fingerprint(*parts: nn.Module | str) -> str:
    """Return a hash of modules' weights (values and dtype) and of plain strings."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in sorted(part.named_parameters()):
                digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{len(part)};{part};".encode())
    return digest.hexdigest()
