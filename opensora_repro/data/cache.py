"""Encoded latents and texts on disk: what two passes over the same draw of a sample need not compute twice.

A cache is a folder of safetensors shards under the fingerprint of everything that its values depend on. A shard's own
header lists its entries, so there is no index that could disagree with it, and a shard gets its name only when it is
whole: work that is killed loses the entries since the last flush and nothing else. Several processes may write.

Captions are kept apart from the clips, once each and without the zeros that pad them: an entry is the tensors
"moments|DRAW|CAPTION|ID" and "fps|DRAW|CAPTION|ID", a caption "text|CAPTION" and "mask|CAPTION", CAPTION being a digest
of the two.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config
from opensora_repro.files import remove_leftovers, writing
from opensora_repro.storage.addresses import address_of, place, shown
from opensora_repro.storage.objects import facts_of, look_up, objects_below, read_object
from opensora_repro.storage.scratch import fetched, prefetch

if TYPE_CHECKING:
    import torch

    from opensora_repro.data.sampler import Assignment, Shape

Key = tuple[str, int]  # sample id, draw
CLIP_FIELDS, CAPTION_FIELDS = ("moments", "fps"), ("text", "mask")
FIELDS = CLIP_FIELDS + CAPTION_FIELDS
SHARD_BYTES = 64 * 2**20  # entries held back before they are written on their own


class LatentCache:
    """Tensors of (sample id, draw), those of FIELDS, returned bit for bit as they were put in."""

    def __init__(self, folder: str | Path, fingerprint: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        """`fingerprint` names all that the values depend on (weights, data section, manifest rows)."""
        self.fingerprint = fingerprint
        self.folder = place(folder) / hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard_bytes = shard_bytes
        self._where: dict[Key, tuple[Path, str]] = {}  # an entry's shard and caption
        self._captions: dict[str, Path] = {}
        self._scanned: set[Path] = set()
        self._pending: dict[Key, tuple[dict[str, torch.Tensor], str]] = {}
        self._pending_captions: dict[str, dict[str, torch.Tensor]] = {}
        remove_leftovers(self.folder)
        self._scan()

    def __len__(self) -> int:
        return sum(map(self._known, {**self._where, **self._pending}))

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys that have no entry yet, in order and each once; sees what other processes have flushed."""
        self._scan()
        return [key for key in dict.fromkeys(keys) if not self._known(key)]

    def _known(self, key: Key) -> bool:
        return key in self._pending or (key in self._where and self._where[key][1] in self._captions)

    def put(self, key: Key, entry: Mapping[str, torch.Tensor]) -> None:
        """Add an entry, on disk after `flush` or when many have gathered; a known key is left as it is."""
        if set(entry) != set(FIELDS):
            raise ValueError(f"a cache entry holds {', '.join(FIELDS)}, got {', '.join(sorted(entry))}")
        if self._known(key):
            return
        held = {field: entry[field].detach().cpu().contiguous() for field in FIELDS}
        text, mask = _without_padding(held["text"]), held["mask"]
        caption = _digest(text, mask)
        self._pending[key] = ({field: held[field].clone() for field in CLIP_FIELDS}, caption)
        if caption not in self._captions and caption not in self._pending_captions:
            self._pending_captions[caption] = {"text": text.clone(), "mask": mask.clone()}
        if sum(tensor.nbytes for tensor in self._pending_tensors().values()) >= self.shard_bytes:
            self.flush()

    def _pending_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for key, (clip, caption) in self._pending.items():
            tensors |= {_name(field, key, caption): tensor for field, tensor in clip.items()}
        for caption, held in self._pending_captions.items():
            tensors |= {f"{field}|{caption}": tensor for field, tensor in held.items()}
        return tensors

    def flush(self) -> None:
        """Write what is held back as one shard: beside its name, synced, then renamed. Raises OSError with the name."""
        from safetensors.torch import save

        if not self._pending:
            return
        tensors = self._pending_tensors()
        digest = hashlib.blake2b("\n".join(sorted(tensors)).encode(), digest_size=12).hexdigest()
        path = self.folder / f"shard-{digest}.safetensors"
        with writing(path) as file:
            file.write(save(tensors, metadata={"fingerprint": self.fingerprint}))
        self._where |= {key: (path, caption) for key, (_, caption) in self._pending.items()}
        self._captions |= dict.fromkeys(self._pending_captions, path)
        self._scanned.add(path)
        self._pending.clear()
        self._pending_captions.clear()

    def get(self, key: Key) -> dict[str, torch.Tensor]:
        """Return the entry's tensors; KeyError if there is none."""
        from safetensors import safe_open

        if not self._known(key):
            self._scan()
        if not self._known(key):
            raise KeyError(f"no cached entry for sample {key[0]!r}, draw {key[1]}")
        if key in self._pending:
            clip, caption = self._pending[key]
            clip = {field: tensor.clone() for field, tensor in clip.items()}
        else:
            path, caption = self._where[key]
            with safe_open(fetched(path), framework="pt") as shard:
                clip = {field: shard.get_tensor(_name(field, key, caption)) for field in CLIP_FIELDS}
        if caption in self._pending_captions:
            text, mask = (self._pending_captions[caption][field].clone() for field in CAPTION_FIELDS)
        else:
            with safe_open(fetched(self._captions[caption]), framework="pt") as shard:
                text, mask = (shard.get_tensor(f"{field}|{caption}") for field in CAPTION_FIELDS)
        return {**clip, "text": _padded(text, len(mask)), "mask": mask}

    @property
    def is_remote(self) -> bool:
        """Whether the shards are objects of a store."""
        return bool(address_of(self.folder))

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Bring the shards of entries that are soon to be read to this node."""
        known = [self._where[key] for key in keys if key in self._where]
        shards = {path for path, _ in known} | {self._captions[c] for _, c in known if c in self._captions}
        prefetch(map(os.fspath, shards))

    def _shards(self) -> list[Path]:
        """Those that have appeared since the last look."""
        found = objects_below(self.folder) if self.is_remote else self.folder.glob("shard-*.safetensors")
        named = (path for path in found if fnmatch(path.name, "shard-*.safetensors"))
        return sorted(path for path in named if path not in self._scanned)

    def _scan(self) -> None:
        """Take in shards that have appeared since the last look."""
        for path in self._shards():
            self._scanned.add(path)
            try:
                names, fingerprint = _read_header(path)
            except (OSError, ValueError) as error:
                warnings.warn(
                    f"{shown(str(path))}: unreadable, its entries will be encoded again ({error})", stacklevel=3
                )
                continue
            if fingerprint == self.fingerprint:
                for name in names:
                    field, rest = name.split("|", 1)
                    if field == "moments":
                        draw, caption, sample_id = rest.split("|", 2)
                        if not self._known((sample_id, int(draw))):
                            self._where[(sample_id, int(draw))] = (path, caption)
                    elif field == "mask":
                        self._captions.setdefault(rest, path)


def _name(field: str, key: Key, caption: str) -> str:
    return f"{field}|{key[1]}|{caption}|{key[0]}"


def _without_padding(text: torch.Tensor) -> torch.Tensor:
    """[L, C] without the rows at its end of which every bit is zero."""
    import torch

    (there,) = text.view(torch.uint8).any(dim=1).nonzero(as_tuple=True)
    return text[: int(there[-1]) + 1] if len(there) else text[:0]


def _padded(text: torch.Tensor, length: int) -> torch.Tensor:
    import torch

    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))


def _digest(text: torch.Tensor, mask: torch.Tensor) -> str:
    import torch

    found = hashlib.blake2b(f"{text.dtype} {list(text.shape)}".encode(), digest_size=12)
    for tensor in (mask, text):
        found.update(tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read_header(path: Path) -> tuple[list[str], str]:
    """Return a shard's tensor names and fingerprint; ValueError if the file is not as long as its header says."""
    (size, _), read = facts_of(path) if address_of(path) else (path.stat().st_size, 0), partial(_read_part, path)
    length = int.from_bytes(read(0, 8), "little")
    if not 0 < length <= size:
        raise ValueError("no safetensors header")
    header = json.loads(read(8, length))
    fingerprint = header.pop("__metadata__", {}).get("fingerprint", "")
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != 8 + length + end:
        raise ValueError("shorter than its header says")
    return list(header), fingerprint


def _read_part(path: Path, start: int, length: int) -> bytes:
    if address_of(path):  # the whole shard is fetched when an entry of it is read
        return read_object(path, start, length)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)


class CacheRows:
    """A manifest's rows under names that change with what they hold, and with the bucket that a draw goes to.

    So a clip or caption that was changed is encoded again, and rows that were added leave the others' entries valid.
    """

    def __init__(self, table: Any, cfg: Config, assignment: Assignment) -> None:
        """`table` is what `read_manifest` returned, `assignment` its rows'."""
        import numpy as np

        from opensora_repro.data.buckets import buckets_of

        self.draws, self._buckets = cfg.data.draws, buckets_of(cfg)
        self._of = [assignment.buckets(draw) for draw in range(self.draws)] if cfg.data.buckets else []
        self._ids, self._paths = table["id"], table["path"]
        batches = table.select(["path", "caption", "num_frames", "fps"]).to_batches(max_chunksize=1 << 14)
        for column in self._paths.chunks:
            look_up(column.to_pylist(), share=1.0)  # of objects, side by side
        rows = (row for batch in batches for row in zip(*(column.to_pylist() for column in batch), strict=True))
        self._content = np.frombuffer(b"".join(_row_digest(*row) for row in rows), np.uint64)

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, index: int) -> str:
        return str(self._ids[index].as_py())

    def path(self, index: int) -> str:
        return shown(str(self._paths[index].as_py()))

    def shape(self, index: int, draw: int) -> Shape | None:
        """What a draw of a row is cut to; None: no bucket takes it."""
        bucket = self._of[draw][index] if self._of else 0
        return None if bucket < 0 else self._buckets[bucket].shape

    def key(self, index: int, draw: int) -> Key:
        size = "@" + "x".join(map(str, self.shape(index, draw) or ())) if self._of else ""
        return f"{self.id(index)}#{self._content[index].tobytes().hex()}{size}", draw

    def keys_of(self, index: int) -> Iterator[Key]:
        """Of all draws that a bucket takes."""
        return (self.key(index, draw) for draw in range(self.draws) if self.shape(index, draw))

    def keys(self) -> Iterator[Key]:
        for index in range(len(self)):
            yield from self.keys_of(index)


def _row_digest(path: str, caption: str, num_frames: int, fps: float) -> bytes:
    try:
        if address_of(path):
            file = "{} {}".format(*facts_of(path))
        else:
            stat = os.stat(path)
            file = f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        file = "absent"
    return hashlib.blake2b("\0".join((caption, str(num_frames), str(fps), file)).encode(), digest_size=8).digest()
