"""Find frozen models: a local folder, or a hub name that the Hugging Face cache holds. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from opensora_repro.errors import UserError, is_out_of_memory
from opensora_repro.files import here_or_shipped
from opensora_repro.frozen.hub import HUB_NAME, in_cache, split_hub_name

if TYPE_CHECKING:
    from opensora_repro.config import Config

T = TypeVar("T")
R = TypeVar("R")
HashFile = Callable[[Path], str]  # a digest of a file's content


class ModelNotFound(UserError):
    """A frozen model is absent or unusable; the message is one line meant for the user."""


class FrozenModel(Generic[T]):
    """A frozen model whose files have been looked over, and whose weights are read when something first needs them."""

    def __init__(
        self,
        load: Callable[..., T],
        path: str,
        *,
        key: str,
        kind: str,
        weights: Sequence[str],
        tokenizer: Sequence[str] = (),
    ) -> None:
        """`load` takes a folder, as `load_frozen` calls it; `weights` are the names it tries, the first one found wins.

        `tokenizer` names what a tokenizer may consist of; a model that has one needs at least one of the files. Raises
        ModelNotFound for whatever can be seen without reading the weights.
        """
        self.where, self.kind = f"{key}={path}", kind
        self.folder = find_folder(path, key=key, kind=kind)
        try:
            self.config = read_object(self.folder / "config.json")
            self.files = [self.folder / "config.json", *_weight_files(self.folder, weights)]
            found = [self.folder / name for name in tokenizer if (self.folder / name).is_file()]
            if tokenizer and not found:
                raise ValueError(f"no {tokenizer[0]} or {tokenizer[1]}; are the tokenizer's files there?")
            self.files += found
        except (OSError, ValueError) as error:
            raise self.unusable(error) from error
        self._load = load

    @cached_property
    def model(self) -> T:
        """Loaded when it is first asked for. Raises ModelNotFound."""
        return _load(self._load, self.folder, self.where, self.kind)

    @property
    def loaded(self) -> bool:
        return "model" in self.__dict__

    def load(self) -> None:
        """Read the weights now, if they are not there. Raises ModelNotFound."""
        _ = self.model

    def part(self, load: Callable[..., Any]) -> Any:
        """What `load`, called as the model's own, makes of the folder. Raises ModelNotFound."""
        return _load(load, self.folder, self.where, self.kind)

    def release(self) -> None:
        """Let go of the weights; whoever asks for the model next reads them again."""
        self.__dict__.pop("model", None)

    def size(self, name: str) -> int:
        """A whole number of config.json. Raises ModelNotFound."""
        value = self.config.get(name)
        if type(value) is not int:
            raise self.unusable(ValueError(f"config.json has no number {name}"))
        return value

    def sizes(self, name: str) -> list[int]:
        """A list of whole numbers of config.json. Raises ModelNotFound."""
        value = self.config.get(name)
        if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
            raise self.unusable(ValueError(f"config.json has no numbers {name}"))
        return value

    def read(self, reader: Callable[[dict[str, Any]], R]) -> R:
        """What `reader` makes of config.json. Raises ModelNotFound where it raises ValueError or TypeError."""
        try:
            return reader(self.config)
        except (ValueError, TypeError) as error:
            raise self.unusable(error) from error

    def fingerprint(self, hash_file: HashFile, *settings: object) -> str:
        """Hash of the files' contents, wherever they lie, and of the settings that decide what is made of them."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*(f"{file.name} {hash_file(file)}" for file in self.files), *map(str, settings)):
            digest.update(f"{len(part)};{part};".encode())
        return digest.hexdigest()

    def unusable(self, error: Exception) -> ModelNotFound:
        return ModelNotFound(f"{self.where}: cannot be loaded as a {self.kind} ({_one_line(error)})")


def load_frozen(load: Callable[..., T], path: str, *, key: str, kind: str) -> T:
    """Return `load(folder, local_files_only=True)` for a local folder or a hub name.

    `key` is the config key that holds `path`, `kind` what is expected there; both appear in the error. Raises
    ModelNotFound.
    """
    return _load(load, find_folder(path, key=key, kind=kind), f"{key}={path}", kind)


def find_folder(path: str, *, key: str, kind: str) -> Path:
    """The local folder itself, one that comes with the product, or the one in the hub's cache. Raises ModelNotFound."""
    folder = here_or_shipped(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"{key}={path}: no config.json in this folder, expected a {kind}{_inside(path, folder, key)}"
            )
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(path):
        raise ModelNotFound(f"{key}={path}: no such folder, expected a {kind} (a local folder or a hub name)")
    cached = in_cache(path)
    if cached is None:
        raise ModelNotFound(_how_to_fetch(path, key))
    return cached


def _inside(path: str, folder: Path, key: str) -> str:
    """A hint at the part that `key` is about, of a run of stage 0 or a published pipeline."""
    part = "text" if "text" in key else "vae"
    found = sorted(file.parent.name for file in folder.glob(f"{part}*/config.json"))
    return f"; did you mean {path.rstrip('/')}/{found[0]}?" if found else ""


def bar_if_large(folder: str) -> None:
    """Let transformers show how far it has come with what takes more than a second or two; it does for anything."""
    from transformers.utils import logging

    if sum(file.stat().st_size for file in Path(folder).glob("*.*") if file.is_file()) < 1 << 30:
        logging.disable_progress_bar()


def _load(load: Callable[..., T], folder: Path, where: str, kind: str) -> T:
    try:
        return load(str(folder), local_files_only=True)
    except Exception as error:  # the libraries raise whatever the file at hand made them stumble over
        if is_out_of_memory(error):  # nothing is wrong with the files
            raise
        raise ModelNotFound(f"{where}: cannot be loaded as a {kind} ({_one_line(error)})") from error


def _weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """What the libraries read: the first of the names that is there, as one file, as an index with shards, or both.

    Raises ValueError where a file is absent or ends early.
    """
    for name in names:
        found = [folder / name] if (folder / name).is_file() else []
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_object(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ValueError(f"{index.name} has no weight_map")
            found += [index, *(folder / shard for shard in sorted(set(map(str, shards.values()))))]
        for file in found:
            if not file.is_file():
                raise ValueError(f"{file.name} is missing, which {index.name} lists")
            if file.suffix == ".safetensors":
                _check_whole(file)
        if found:
            return found
    raise ValueError(f"no {' or '.join(names)} in the folder")


def _check_whole(path: Path) -> None:
    """Raise ValueError for a safetensors file that is not as long as its header says, such as half a download."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # reads the header alone
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}; was it copied whole?") from None


def read_object(path: Path) -> dict[str, Any]:
    """Of a JSON file. Raises ValueError where it holds none, OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _how_to_fetch(name: str, key: str) -> str:
    from huggingface_hub import constants

    from opensora_repro.weights.catalog import load_catalog

    listed = any(entry.name == name for entry in load_catalog())
    repository, folder = split_hub_name(name)
    download = f'hf download {repository} --include "{folder}/*"' if folder else f"hf download {name}"
    command = f"python -m stages.weights fetch {name}" if listed else download
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


def frozen_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that trains in it, as the published runs did."""
    return torch.bfloat16 if device.type == "cuda" and cfg.train.dtype == "bf16" else torch.float32
