"""Encoded latents and texts on disk: what two passes over the same draw of a sample need not compute twice.

A cache is a folder of safetensors shards under the fingerprint of everything that its values depend on. A shard's own
header lists its entries, so there is no index that could disagree with it, and a shard gets its name only when it is
whole: work that is killed loses the entries since the last flush and nothing else. Several processes may write.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_repro.data.files import beside, naming, remove_leftovers

if TYPE_CHECKING:
    import torch

Key = tuple[str, int]  # sample id, draw
FIELDS = ("moments", "text", "mask")
SHARD_BYTES = 64 * 2**20  # entries held back before they are written on their own


class LatentCache:
    """Tensors of (sample id, draw): "moments", "text" and "mask", returned bit for bit as they were put in."""

    def __init__(self, folder: str | Path, fingerprint: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        """`fingerprint` names all that the values depend on (weights, data section, manifest rows)."""
        self.fingerprint = fingerprint
        self.folder = Path(folder) / hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard_bytes = shard_bytes
        self._where: dict[Key, Path] = {}
        self._scanned: set[Path] = set()
        self._pending: dict[Key, dict[str, torch.Tensor]] = {}
        remove_leftovers(self.folder)
        self._scan()

    def __len__(self) -> int:
        return len(self._where) + len(self._pending)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys that have no entry yet, in order and each once; sees what other processes have flushed."""
        self._scan()
        return [key for key in dict.fromkeys(keys) if key not in self._where and key not in self._pending]

    def put(self, key: Key, entry: Mapping[str, torch.Tensor]) -> None:
        """Add an entry, on disk after `flush` or when many have gathered; a known key is left as it is."""
        if set(entry) != set(FIELDS):
            raise ValueError(f"a cache entry holds {', '.join(FIELDS)}, got {', '.join(sorted(entry))}")
        if key in self._where or key in self._pending:
            return
        self._pending[key] = {field: entry[field].detach().cpu().contiguous().clone() for field in FIELDS}
        if sum(t.nbytes for held in self._pending.values() for t in held.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held back as one shard: beside its name, synced, then renamed. Raises OSError with the name."""
        from safetensors.torch import save

        if not self._pending:
            return
        tensors = {_name(field, key): t for key, entry in self._pending.items() for field, t in entry.items()}
        digest = hashlib.blake2b("\n".join(sorted(tensors)).encode(), digest_size=12).hexdigest()
        path = self.folder / f"shard-{digest}.safetensors"
        unfinished = beside(path)
        try:
            with naming(path):
                with open(unfinished, "wb") as file:
                    file.write(save(tensors, metadata={"fingerprint": self.fingerprint}))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)  # a full disk's last bytes
            raise
        self._where.update(dict.fromkeys(self._pending, path))
        self._scanned.add(path)
        self._pending.clear()

    def get(self, key: Key) -> dict[str, torch.Tensor]:
        """Return the entry's tensors; KeyError if there is none."""
        from safetensors import safe_open

        if key in self._pending:
            return {field: t.clone() for field, t in self._pending[key].items()}
        if key not in self._where:
            self._scan()
        if key not in self._where:
            raise KeyError(f"no cached entry for sample {key[0]!r}, draw {key[1]}")
        with safe_open(self._where[key], framework="pt") as shard:
            return {field: shard.get_tensor(_name(field, key)) for field in FIELDS}

    def _scan(self) -> None:
        """Take in shards that have appeared since the last look."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path in self._scanned:
                continue
            self._scanned.add(path)
            try:
                names, fingerprint = _read_header(path)
            except (OSError, ValueError) as error:
                warnings.warn(f"{path}: unreadable, its entries will be encoded again ({error})", stacklevel=3)
                continue
            if fingerprint == self.fingerprint:
                for name in names:
                    field, key = _parse(name)
                    if field == FIELDS[0]:
                        self._where.setdefault(key, path)


def _name(field: str, key: Key) -> str:
    return f"{field}|{key[1]}|{key[0]}"


def _parse(name: str) -> tuple[str, Key]:
    field, draw, sample_id = name.split("|", 2)
    return field, (sample_id, int(draw))


def _read_header(path: Path) -> tuple[list[str], str]:
    """Return a shard's tensor names and fingerprint; ValueError if the file is not as long as its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    fingerprint = header.pop("__metadata__", {}).get("fingerprint", "")
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise ValueError("shorter than its header says")
    return list(header), fingerprint
