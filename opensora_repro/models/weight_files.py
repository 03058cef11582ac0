"""Open files of weights by what they contain, never by their names, and without running code from them.

Tensors are mapped, not read: a file costs memory only as its tensors are copied out.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora_repro.models.diffusers_layout import diffusers_kind, dit_facts, pixart_facts

# Keys under which training scripts keep the weights, averaged ones first: PixArt; Latte; PixArt; Latte and others.
EMA_WRAPPERS = ("state_dict_ema", "ema")
WRAPPERS = ("state_dict", "model")
# In this order in a folder; the averaged ones only when they are wanted.
EMA_FILES = ("ema.safetensors", "ema.pt")
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model/pytorch_model.bin.index.json",  # what Open-Sora's training leaves in epoch*-global_step*/
    "model/model.safetensors.index.json",
    "model/pytorch_model.bin",
)
FACTS_KEY = "opensora_repro.model"  # of a safetensors file's metadata: fields of the model's config, as JSON
NULL_CAPTION_FILE = "null_caption.safetensors"  # beside a diffusers model, which has no place for it
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class WeightsError(ValueError):
    """Weights that are absent, unreadable or made for another model; the message is one line meant for the user."""


@dataclass(frozen=True)
class WeightsFile:
    """Tensors by name as the file has them, mapped, and what else is known about it."""

    path: Path
    container: str  # "safetensors", "torch", "torch (legacy)", "3 shards, torch"
    wrapper: str  # the key that held the weights; empty: none
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)  # what it says of the model, named as our configs' fields
    files: tuple[Path, ...] = ()  # all that were opened

    @property
    def mapped(self) -> bool:
        return "legacy" not in self.container


def open_weights(path: str | Path, *, ema: bool = True) -> WeightsFile:
    """Open a file, checkpoint, run, Open-Sora training folder or diffusers folder. Raises WeightsError.

    `ema` prefers averaged weights where both are there.
    """
    found = find_weights(path, ema=ema)
    if found.name.endswith(".index.json"):
        weights = _open_shards(found)
    else:
        weights = _open_file(found, ema)
    if found.name == "ema.pt":  # the average leaves the null caption out: it is never trained
        weights.tensors.update(_null_caption_of_model(found.parent, weights.tensors))
    if found.name.startswith("diffusion_pytorch_model"):
        beside = found.parent / NULL_CAPTION_FILE
        if beside.is_file():
            weights.tensors.update(_open_file(beside, ema).tensors)
        weights.facts.update(_diffusers_facts(found.parent))
    stray = next((key for key, value in weights.tensors.items() if not isinstance(value, Tensor)), None)
    if stray is not None or not weights.tensors:
        found_there = "nothing" if stray is None else f"{stray!r}"
        raise WeightsError(f"{found}: expected tensors by name, found {found_there}")
    return weights


def find_weights(path: str | Path, *, ema: bool = True) -> Path:
    """The weights file or shard index that `path` means: itself, a checkpoint's, or that of a run's newest checkpoint.

    Raises WeightsError.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such weights file, checkpoint or run")
    for folder in (*_newest_steps(path), path, path / "transformer"):
        for name in (*EMA_FILES, *MODEL_FILES) if ema else MODEL_FILES:
            if (folder / name).is_file():
                return folder / name
    raise WeightsError(
        f"{path}: no weights in this folder: expected a run with checkpoints/step-*/model.safetensors, a checkpoint, "
        "an Open-Sora folder epoch*-global_step*, or a diffusers model"
    )


def _newest_steps(run: Path) -> list[Path]:
    """A run's newest whole checkpoint: ours, or Open-Sora's; none in other folders."""
    ours = [step for step in run.glob("checkpoints/step-*") if (step / "model.safetensors").is_file()]
    if ours:
        return [max(ours, key=lambda step: int(step.name.removeprefix("step-")))]
    steps = {
        (int(match[1]), int(match[2])): folder
        for folder in run.iterdir()
        if (match := re.fullmatch(r"epoch(\d+)-global_step(\d+)", folder.name)) and folder.is_dir()
    }
    return [steps[max(steps)]] if steps else []


def release(tensor: Tensor) -> None:
    """Let go of a mapped tensor's pages, which otherwise count as this process's memory until the file is closed.

    Reading it again would read the file again.
    """
    _advise(tensor, "MADV_DONTNEED")


def use_large_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MiB for a tensor that nothing was written to yet: filling it then takes about half as long."""
    _advise(tensor, "MADV_HUGEPAGE")


def _advise(tensor: Tensor, advice: str) -> None:
    """Advise the kernel on the whole pages within the tensor alone; where there is no such advice, do nothing."""
    if _LIBC is None or not hasattr(mmap, advice) or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), getattr(mmap, advice))


def _open_file(path: Path, ema: bool) -> WeightsFile:
    kind = _sniff(path)
    try:
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                facts = json.loads((file.metadata() or {}).get(FACTS_KEY, "{}"))
                return WeightsFile(path, kind, "", tensors, facts, files=(path,))
        content, kind = _load_pickle(path, kind)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, error)) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged or cut off, cannot be read ({_one_line(error)}): fetch it again") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    for key in (*EMA_WRAPPERS, *WRAPPERS) if ema else (*WRAPPERS, *EMA_WRAPPERS):
        inner = content.get(key)
        if isinstance(inner, Mapping) and inner:
            return WeightsFile(path, kind, key, _without_prefix(inner), files=(path,))
    return WeightsFile(path, kind, "", _without_prefix(content), files=(path,))


def _without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Names as the model has them: data-parallel and compiled modules put a word before all of theirs."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(str(key).startswith(prefix) for key in tensors):
            return {key.removeprefix(prefix): value for key, value in tensors.items()}
    return dict(tensors)


def _sniff(path: Path) -> str:
    """The container by its first bytes. Raises WeightsError that says what else it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch (legacy)"
    raise WeightsError(f"{path}: {_what_else(head)}")


def _what_else(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "is empty: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it points to: run `git lfs pull` where it was cloned"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights (an error page saved under this name?): fetch it again"
    return "is neither a torch nor a safetensors file"


def _load_pickle(path: Path, kind: str) -> tuple[Any, str]:
    if kind == "torch":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), kind
    return torch.load(path, map_location="cpu", weights_only=True), kind


def _refusal(path: Path, error: Exception) -> str:
    """Torch's words name what the pickle asks for; where they name nothing, the file is damaged."""
    asked = re.search(r"(?:GLOBAL|global|function|class)[\s'`]+([\w.]+\.[\w.]+)", str(error))
    if asked is None:
        return f"{path}: damaged, or holds more than tensors and plain containers ({_one_line(error)})"
    return f"{path}: refused: this pickle asks for {asked[1]}, expected only tensors and plain containers"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _open_shards(index: Path) -> WeightsFile:
    tensors: dict[str, Tensor] = {}
    kinds = set()
    shards = list(_shard_names(index))
    for name in shards:
        shard = _open_file(index.parent / name, ema=False)
        tensors |= shard.tensors
        kinds.add(shard.container)
    kind = f"{len(shards)} shards, {' and '.join(sorted(kinds))}"
    return WeightsFile(index, kind, "", tensors, files=(index, *(index.parent / name for name in shards)))


def _shard_names(index: Path) -> Iterator[str]:
    """Names of an index's shards, each once, all of them there. Raises WeightsError."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f'{index}: not an index of shards (expected {{"weight_map": {{key: file}}}})') from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index}: names {name!r}, expected files of its own folder")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index}: the shard {name} is missing")
        yield name


def _null_caption_of_model(folder: Path, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    key = "y_embedder.y_embedding"
    if key in average:
        return {}
    try:
        return {key: open_weights(folder, ema=False).tensors[key]}
    except (WeightsError, KeyError):
        return {}  # told as missing when the weights are checked against the model


def _diffusers_facts(folder: Path) -> dict[str, Any]:
    """What a diffusers model's config.json says; nothing where there is none. Raises WeightsError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or "_class_name" not in config:
        return {}
    try:
        return pixart_facts(config) if diffusers_kind(config) == "pixart" else dit_facts(config)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: {_one_line(error)}") from None
