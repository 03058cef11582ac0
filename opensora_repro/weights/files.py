"""Open files of weights by what they contain, never by their names, and without running code from them.

Tensors are mapped, not read: a file costs memory only as its tensors are copied out.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from opensora_repro.errors import UserError, is_out_of_memory
from opensora_repro.files import Sha256Memo, is_free, sha256_of, size_and_time
from opensora_repro.run_folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    STATE_FILE,
    checkpoints_folder,
    list_steps,
    step_of,
)
from opensora_repro.weights.catalog import CatalogError, Progress, find_cached, means_published, similar_name
from opensora_repro.weights.diffusers_layout import diffusers_kind, dit_facts, pixart_facts
from opensora_repro.weights.inert import inert_containers

# In this order in a folder; the averaged ones only when they are wanted.
EMA_FILES = ("ema.safetensors", "ema.pt")
OPEN_SORA_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Of the fields of 1.1's and 1.2's config.json, those that tell what the network is
OPEN_SORA_FIELDS: dict[str, type] = {
    "in_channels": int, "patch_size": list, "hidden_size": int, "depth": int, "num_heads": int, "mlp_ratio": float,
    "caption_channels": int, "model_max_length": int, "class_dropout_prob": float, "pred_sigma": bool,
    "qk_norm": bool, "qk_norm_legacy": bool, "input_sq_size": int,
}  # fmt: skip
EXPECTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "three integers",
    tuple: "a list",
    str: "text",
}
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
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of a folder's only weights file, whatever its name
OTHERS_SUFFIXES = (".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".zip")  # of weights that nothing here reads
# How files begin that lie beside weights
NO_WEIGHTS = ("optimizer", "scheduler", "lr_scheduler", "sampler", "null_caption")
FACTS_KEY = "opensora_repro.model"  # of a safetensors file's metadata: fields of the model's config, as JSON
NULL_CAPTION_FILE = "null_caption.safetensors"  # beside a diffusers model, which has no place for it
# Within the names of low-rank adapters as PEFT, diffusers, kohya's scripts and LyCORIS write them
LORA = re.compile(r"(^|[._])(lora|hada|lokr)[._]")
# And of what else changes a model instead of being one: rotations, scales, differences, adapters by number
ADAPTERS = re.compile(
    rf"{LORA.pattern}|(^|[._])(lora([AB]|\d+|_[AB])|b?oft|ia3|vera|lycoris)[._]|\.diff(_b)?$|^\w+:\d+:(up|down)$",
    re.IGNORECASE,
)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
NULL_CAPTION = "y_embedder.y_embedding"
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "temp_embed")
ROTARY = "rope.freqs"  # frequencies of rotary positions
_READ = Sha256Memo()  # what this process has read
BUFFERS = (NULL_CAPTION, ROTARY, *TABLES)  # not trained, so that an average of parameters leaves them out

# Keys of dicts that hold the weights, averaged ones first
EMA_HOLDERS = ("state_dict_ema", "ema", "ema_model", "model_ema", "ema_state_dict")
HOLDERS = ("state_dict", "model", "module", "model_state_dict")
AVERAGED = re.compile(r"(^|_)ema(_|$)")  # in keys of other names
# Words that wrapping modules put into names. Those of the first line stand anywhere and are no model's own: compiled,
# FSDP (also as of old), checkpointed, Lightning's. The others come first alone: data parallel, a trainer's, averages.
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
OUTER = ("module", "model", "online_model")
EMA_OUTER = ("ema_model", "model_ema", "ema")
COUNTERS = ("initted", "step", "n_averaged", "num_updates", "decay")  # that averaging modules keep beside the weights
# Every model has one of them: what stands before it, and before all other names, is a wrapper's, whatever it says.
PATCHES = ("x_embedder.proj.weight", "pos_embed.proj.weight")


class WeightsError(UserError):
    """Weights that are absent, unreadable or made for another model; the message is one line meant for the user."""


@dataclass(frozen=True)
class WeightsFile:
    """Tensors by name as the file has them, mapped, and what else is known about it."""

    path: Path
    container: str  # "safetensors", "torch", "torch (legacy)", "3 shards, torch"
    wrapper: str  # the keys that held the weights, as "module.state_dict"; empty: none
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)  # what it says of the model, named as our configs' fields
    files: tuple[Path, ...] = ()  # all that were opened
    notes: tuple[str, ...] = ()  # what was taken off the names or left out, in words
    config: Path | None = None  # the config.toml that tells their model

    @property
    def mapped(self) -> bool:
        return "legacy" not in self.container


def open_weights(path: str | Path, *, ema: bool = True) -> WeightsFile:
    """Open a file, a folder that holds one, a checkpoint, run, Open-Sora training folder, diffusers folder, or a name
    of the catalog. Raises WeightsError.

    `ema` prefers averaged weights where both are there.
    """
    found = find_weights(path, ema=ema)
    weights = _open_shards(found, ema) if found.name.endswith(".index.json") else _open_file(found, ema)
    weights = replace(strip_wrappers(weights, ema=ema), config=_own_config(Path(path), found))
    if found.name == "ema.pt":  # the average leaves out what is never trained
        weights.tensors.update(_buffers_of_model(found.parent, weights.tensors))
    if found.name in OPEN_SORA_FILES:
        weights.facts.update(_open_sora_facts(found.parent))
    if found.name.startswith("diffusion_pytorch_model"):
        beside = found.parent / NULL_CAPTION_FILE
        if beside.is_file():
            weights.tensors.update(_open_file(beside, ema).tensors)
        weights.facts.update(_diffusers_facts(found.parent))
    check_tensors(weights)
    return weights


def check_tensors(weights: WeightsFile) -> None:
    """Raise WeightsError unless there are a model's tensors by name and nothing else."""
    lora = next((key for key in weights.tensors if ADAPTERS.search(key)), None)
    if lora is not None:
        raise WeightsError(
            f"{weights.path}: this is a LoRA or its like (changes to a model's weights, first {lora}), not the weights "
            "of a model: sample the model with --lora, or merge it into its model (stages.weights merge; where it is "
            "not laid out as peft does it, with the program that made it), or give the model's own weights"
        )
    stray = next((key for key, value in weights.tensors.items() if not isinstance(value, Tensor)), None)
    if stray is not None or not weights.tensors:
        found_there = "nothing" if stray is None else f"{stray!r}"
        raise WeightsError(f"{weights.path}: expected tensors by name, found {found_there}")


def strip_wrappers(weights: WeightsFile, *, ema: bool) -> WeightsFile:
    """With the model's own names. Raises WeightsError where two tensors would have one."""
    try:
        tensors, notes = strip_names(weights.tensors, ema=ema)
    except NameClash as error:
        raise WeightsError(f"{weights.path}: {error}") from None
    return replace(weights, tensors=tensors, notes=tuple(notes))


def recorded_sha256(file: Path, progress: Progress | None = None) -> str:
    """The file's sha256. Raises WeightsError for one of our checkpoints' that is no longer what was written.

    `progress` is told how many bytes have been read.
    """
    found, before = _READ.recall(file), size_and_time(file)
    if found is None:
        found = sha256_of(file, progress)
        _READ.remember(file, before, found)
    state = file.parent / STATE_FILE
    try:
        recorded = json.loads(state.read_text(encoding="utf-8"))["sha256"][file.name]
    except (OSError, KeyError, TypeError):  # not one of ours
        return found
    except ValueError:
        raise WeightsError(
            f"{state}: damaged, so that nobody knows whether {file.name} is what was written: restore it or take "
            "another checkpoint; away from its checkpoint a file is taken as it is"
        ) from None
    if found != recorded:
        raise WeightsError(
            f"{file}: damaged or changed since it was written (its sha256 is not the one that {STATE_FILE} records): "
            "restore it or take another checkpoint; away from its checkpoint a file is taken as it is"
        )
    return found


def find_weights(path: str | Path, *, ema: bool = True) -> Path:
    """The weights file or shard index that `path` means: itself, a folder's, a checkpoint's, or that of a run's newest
    checkpoint; a name of the catalog, which no file here has, means what the hub's cache holds of it.

    Raises WeightsError.
    """
    path = Path(path)
    if os.path.isfile(path):  # False of names that no file can have, too
        return path
    if not os.path.isdir(path):
        return find_weights(_cached(str(path)), ema=ema)
    for folder in (*_newest_steps(path), path, path / "transformer"):
        for name in (*EMA_FILES, *MODEL_FILES) if ema else MODEL_FILES:
            if (folder / name).is_file():
                return folder / name
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    others = [file for file in others if not file.name.startswith((".", *NO_WEIGHTS))]
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(file.name for file in others[:4]) + (", ..." if len(others) > 4 else "")
        raise WeightsError(f"{path}: {len(others)} weights files in this folder ({names}): name one of them")
    if (path / CONFIG_FILE).is_file():
        raise WeightsError(f"{path}: no checkpoint in this run yet (looked for checkpoints/step-*)")
    raise WeightsError(
        f"{path}: no weights in this folder: expected a run with checkpoints/step-*/model.safetensors, a checkpoint, "
        "an Open-Sora folder epoch*-global_step*, a diffusers model, or one file of weights"
    )


def weights_to_come(path: str) -> bool:
    """Whether this may be a run that an earlier stage has to make, or has begun, without a checkpoint so far."""
    run = Path(path)
    if not is_free(run):
        begun = os.path.isfile(run / CONFIG_FILE) and not (run / "checkpoints").exists()
        return begun and not any(file.suffix in SUFFIXES for file in run.iterdir())
    if means_published(path):  # fetched, not made
        return False
    if run.suffix.lower() not in (*SUFFIXES, *OTHERS_SUFFIXES):
        return True
    return "checkpoints" in run.parts and run.name in (EMA_FILES[0], MODEL_FILE)


def _cached(name: str) -> Path:
    try:
        found = find_cached(name)
    except CatalogError as error:
        raise WeightsError(str(error)) from None
    if found is None:
        raise WeightsError(f"{name}: no such weights file, checkpoint or run{similar_name(name)}")
    return found


def _own_config(asked: Path, found: Path) -> Path | None:
    """The config.toml beside the weights, where they go by our names or a folder was given: else it may be anything."""
    config = found.parent / CONFIG_FILE
    ours = found.name in ("ema.safetensors", "model.safetensors") or asked.is_dir()
    return config if ours and config.is_file() else None


def _newest_steps(run: Path) -> list[Path]:
    """The newest whole checkpoint of a run, or of its folder of checkpoints: ours, or Open-Sora's; else none."""
    steps = [*list_steps(checkpoints_folder(run)), *list_steps(run)]
    ours = [step for step in steps if any((step / name).is_file() for name in (MODEL_FILE, ADAPTER_FILE))]
    if ours:
        return [max(ours, key=step_of)]
    theirs = {
        (int(match[1]), int(match[2])): folder
        for folder in run.iterdir()
        if (match := re.fullmatch(r"epoch(\d+)-global_step(\d+)", folder.name)) and folder.is_dir()
    }
    return [theirs[max(theirs)]] if theirs else []


def release(tensor: Tensor) -> None:
    """Let go of a mapped tensor's pages, which otherwise count as this process's memory until the file is closed.

    Reading it again would read the file again.
    """
    _advise(tensor, "MADV_DONTNEED")


def _advise(tensor: Tensor, advice: str) -> None:
    """Advise the kernel on the whole pages within the tensor alone; where there is no such advice, do nothing."""
    if _LIBC is None or not hasattr(mmap, advice) or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), getattr(mmap, advice))


def _open_file(path: Path, ema: bool) -> WeightsFile:
    """With the names that the file has."""
    kind = _sniff(path)
    try:
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = (file.metadata() or {}).get(FACTS_KEY, "{}")
                return WeightsFile(path, kind, "", tensors, _recorded_facts(path, told), files=(path,))
        with inert_containers():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, error)) from None
    except Exception as error:  # a damaged pickle makes torch stumble over anything
        if is_out_of_memory(error):
            raise
        raise WeightsError(f"{path}: damaged or cut off, cannot be read ({_one_line(error)}): fetch it again") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    tensors, holders = take_out(content, ema=ema)
    return WeightsFile(path, kind, ".".join(holders), tensors, files=(path,))


def _recorded_facts(path: Path, told: str) -> dict[str, Any]:
    """What `stages.weights` has written of the model. Raises WeightsError for what it has not."""
    try:
        facts = json.loads(told)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise WeightsError(f"{path}: its metadata's {FACTS_KEY} is no JSON object: write the file without it")
    return facts


def _sniff(path: Path) -> str:
    """The container by its first bytes. Raises WeightsError that says what else it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch (legacy)"
    raise WeightsError(f"{path}: {_what_else(head)}")


def _check_zip(path: Path) -> None:
    """Raise WeightsError for an archive that is not torch's; whether that is whole, torch sees."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return
    if "constants.pkl" in names:
        raise WeightsError(f"{path}: is a TorchScript program, not weights: save the tensors of its state_dict() alone")
    if "data.pkl" not in names:
        raise WeightsError(f"{path}: is an archive, not weights: unpack it, or save its tensors by name")


def _what_else(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "is empty: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it points to: run `git lfs pull` where it was cloned"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights (an error page saved under this name?): fetch it again"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, whose weights are quantised: take the weights that it was made of"
    return "is neither a torch nor a safetensors file"


def _refusal(path: Path, error: Exception) -> str:
    """Torch's words name what the pickle asks for; where they name nothing, the file is damaged."""
    asked = re.search(r"(?:GLOBAL|function|class)[\s'`]+([\w.]+)", str(error))
    if asked is None:
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        return f"{path}: damaged, or holds more than tensors and plain containers ({_one_line(ValueError(reason))})"
    return (
        f"{path}: refused: this pickle asks for {asked[1]}, expected only tensors and plain containers; if you trust "
        "whoever made it, load it with the code that made it and save its tensors alone (safetensors.torch.save_file)"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _open_shards(index: Path, ema: bool) -> WeightsFile:
    tensors: dict[str, Tensor] = {}
    kinds = set()
    shards = list(_shard_names(index))
    for name in shards:
        shard = _open_file(index.parent / name, ema)
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


def _buffers_of_model(folder: Path, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Null caption and rotary frequencies of the trained weights beside an average, where it lacks them."""
    lacking = [name for name in (NULL_CAPTION, ROTARY) if name not in average]
    if lacking == [ROTARY] and "fps_embedder.mlp.0.weight" not in average:  # a model without rotary positions
        return {}
    try:
        trained = open_weights(folder, ema=False).tensors
    except WeightsError:
        return {}  # told as missing when the weights are checked against the model
    return {name: trained[name] for name in lacking if name in trained}


def _open_sora_facts(folder: Path) -> dict[str, Any]:
    """What 1.1's or 1.2's config.json says of the network; of its training, nothing. Raises WeightsError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or "caption_channels" not in config or "_class_name" in config:
        return {}
    facts = {key: config[key] for key in OPEN_SORA_FIELDS if key in config}
    for key, value in facts.items():
        expected = OPEN_SORA_FIELDS[key]
        good = type(value) is expected or (expected is float and type(value) is int)
        if key == "patch_size":
            good = good and len(value) == 3 and all(type(size) is int for size in value)
        if not good:
            raise WeightsError(f"{path}: {key} = {json.dumps(value)}: expected {EXPECTED[expected]}")
    return facts


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


# ---------------------------------------------------------------------------------------------------------------------
# What training puts around weights: dicts that hold them, and words before, or within, their names


class NameClash(UserError):
    """Two tensors of one copy of the weights would have one name; the message is one line."""


def take_out(content: Mapping[Any, Any], *, ema: bool) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The weights in nested dicts, and the keys that led to them, outermost first.

    `ema` prefers averaged weights where both are there; they take what is not averaged from the others.
    """
    first, second = (EMA_HOLDERS, HOLDERS) if ema else (HOLDERS, EMA_HOLDERS)
    held = {key: content[key] for key in (*first, *second) if _holds(content.get(key))}
    held = held or _held_otherwise(content, ema=ema)
    if not held:
        return dict(content), ()
    key = next(iter(held))
    tensors, inner = take_out(held[key], ema=ema)
    if key in EMA_HOLDERS:
        names = {_bare(str(name))[0] for name in tensors}
        for holder in HOLDERS:
            others = take_out(held[holder], ema=False)[0] if holder in held else {}
            bare = {_bare(str(name))[0]: value for name, value in others.items()}
            tensors |= {name: bare[name] for name in BUFFERS if name in bare and name not in names}
    return tensors, (key, *inner)


def _held_otherwise(content: Mapping[Any, Any], *, ema: bool) -> dict[Any, Any]:
    """Under whatever key the only thing that holds tensors as modules name them; an average may stand beside it."""
    if any(isinstance(value, Tensor) and value.numel() > 1 for value in content.values()):
        return {}
    names = [str(key) for key, value in content.items() if isinstance(key, str) and _holds_named(value)]
    averaged = [name for name in names if AVERAGED.search(name)]
    trained = [name for name in names if name not in averaged]
    chosen = (averaged or trained) if ema else (trained or averaged)
    return {chosen[0]: content[chosen[0]]} if len(chosen) == 1 else {}


def _holds_named(value: Any) -> bool:
    """An optimizer's state goes by numbers, or has tensors of its own names."""
    return isinstance(value, Mapping) and any(
        (isinstance(item, Tensor) and "." in str(key)) or _holds_named(item) for key, item in value.items()
    )


def _holds(value: Any) -> bool:
    """Whether there are tensors in it, at whatever depth."""
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) or _holds(item) for item in value.values())


def strip_names(tensors: Mapping[Any, Any], *, ema: bool) -> tuple[dict[str, Any], list[str]]:
    """The weights under the model's own names, and what to tell the user of it.

    Where a file has the trained and the averaged weights side by side, `ema` chooses; what that copy lacks (buffers,
    and parameters that were not trained) comes from the other. Raises NameClash.
    """
    copies: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    origin: dict[tuple[bool, str], str] = {}
    words: dict[str, None] = {}
    for key, value in tensors.items():
        name, taken = _bare(str(key))
        averaged = any(word in EMA_OUTER for word in taken)
        if name in copies[averaged]:
            raise NameClash(f"{origin[averaged, name]} and {key} are both {name}, once wrappers' words are taken off")
        copies[averaged][name], origin[averaged, name] = value, str(key)
        words |= dict.fromkeys(taken)
    for averaged, copy in copies.items():
        if before := _before_all(copy):
            words[before[:-1]] = None
            copies[averaged] = {name.removeprefix(before): value for name, value in copy.items()}
    if not words:
        return copies[False], []
    notes = [f"{' and '.join(f'{word}.' for word in words)} taken off the names"]
    counters = _drop_counters(copies)
    if counters:
        notes.append(f"{' and '.join(counters)} left out (no weights)")
    if not copies[True] or not copies[False]:
        return copies[True] or copies[False], notes
    chosen, other = copies[ema], copies[not ema]
    filled = {name: value for name, value in other.items() if name not in chosen}
    kind, rest = ("averaged", "trained") if ema else ("trained", "averaged")
    notes.append(f"the {kind} of two copies taken" + (f", {len(filled)} tensors of the {rest} one" if filled else ""))
    return {**chosen, **filled}, notes


def _before_all(names: Iterable[str]) -> str:
    """What stands before all names, with its last dot; empty where a model's own come first."""
    own = [name for name in names if name not in COUNTERS]
    ends = (name.removesuffix(end) for name in own for end in PATCHES if name.endswith(f".{end}"))
    return next((before for before in ends if all(name.startswith(before) for name in own)), "")


def _bare(name: str) -> tuple[str, list[str]]:
    """The name without wrappers' words, and these."""
    own: list[str] = []
    words: list[str] = []
    for part in name.split("."):
        wraps = part in INNER or (not own and part in (*OUTER, *EMA_OUTER))
        (words if wraps else own).append(part)
    return (".".join(own), words) if own else (name, [])


def _drop_counters(copies: Mapping[bool, dict[str, Any]]) -> list[str]:
    found = []
    for copy in copies.values():
        for name in COUNTERS:
            if isinstance(copy.get(name), Tensor) and copy[name].numel() == 1:
                del copy[name]
                found.append(name)
    return found
