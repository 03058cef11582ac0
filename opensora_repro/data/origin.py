"""Where a manifest comes from: a version of what it holds, and the tool, its options and the manifests it was made of.

Every data tool writes it into its manifest's Parquet metadata, as JSON; rows are as they would be without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.options import fields_in
from opensora_repro.files import digest, is_file
from opensora_repro.storage.scratch import fetched

KEY = b"opensora_repro.origin"
MANIFEST_FILE = "manifest.parquet"
BATCH_ROWS = 1 << 16
# Options that tell where, or who works, not what comes out
PLACES = ("input", "inputs", "table", "out")
WORKERS = (
    "workers", "runner", "address", "cpus", "gpus", "memory", "gpu_nodes", "model_workers", "device", "per_host",
    "batch_size", "concurrency", "timeout", "retries", "price_in", "price_out", "thumbnails", "dry_run", "share",
)  # fmt: skip
SECRETS = ("key", "token", "password")  # within the names of options whose values nobody should read


@dataclass(frozen=True)
class Maker:
    """The tool that writes, as its command line has it."""

    tool: str
    options: dict[str, Any]
    given: str  # what it reads
    out: Path

    def parents(self) -> list[dict[str, str]]:
        """The manifest that was read, by name and version: the one given, or what was probed of other files."""
        for path in (Path(self.given), self.out / "probe" / MANIFEST_FILE):
            if path.suffix == ".parquet" and is_file(path):
                return [{"file": path.name, "version": version_of(path)}]
        return []


_maker: ContextVar[Maker | None] = ContextVar("maker", default=None)


@contextmanager
def making(maker: Maker) -> Iterator[None]:
    """In this context manifests are this tool's."""
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


def made_by(tool: str, args: Any) -> Any:
    """As `making`, also around a function; of a tool whose options are the dataclass `args`."""
    given = args.input if hasattr(args, "input") else args.table
    return making(Maker(tool, told_options(args), given, Path(args.out)))


def told_options(args: Any) -> dict[str, Any]:
    """Those that were given and decide what comes out: not where things lie, nor who works."""
    found = {}
    for item in fields_in(type(args)):
        value = getattr(args, item.name)
        passed = item.name in PLACES + WORKERS or any(word in item.name for word in SECRETS)
        if not passed and value != item.default and value not in (None, (), []):
            found[item.name] = _shown(value)
    return found


def _shown(value: Any) -> Any:
    """As JSON has it; of files the names."""
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    if isinstance(value, bool | int | float):
        return value
    text = str(value)
    return os.path.basename(os.path.normpath(text)) if isinstance(value, Path) or os.path.exists(text) else text


class Version:
    """Digest of a table's columns by name, whatever batches they come in, but for `path`: where files lie is not what
    they are."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {}

    def add(self, batch: Any) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name != "path":
                told = self._columns.setdefault(name, hashlib.blake2b(digest_size=8))
                told.update(_as_bytes(column))

    def text(self) -> str:
        return digest([{name: told.hexdigest() for name, told in sorted(self._columns.items())}], size=8)


def _as_bytes(column: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        texts = column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # lists, structs, bytes
        texts = pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())
    told = pc.binary_join_element_wise(pc.utf8_length(texts).cast(pa.string()), texts, ":")
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], pc.fill_null(told, "-")), "")[0]
    return bytes(joined.as_buffer())


@contextmanager
def recorded(path: Path, writer: Any) -> Iterator[Version | None]:
    """What takes the batches of a file that `writer` writes, and adds its origin in the end; None: it has none."""
    maker = _maker.get()
    if maker is None or path.name != MANIFEST_FILE or not hasattr(writer, "add_key_value_metadata"):
        yield None
        return
    version = Version()
    yield version
    content = {"version": version.text(), "tool": maker.tool, "options": maker.options, "parents": maker.parents()}
    writer.add_key_value_metadata({KEY: json.dumps(content, sort_keys=True).encode()})


def read_origin(path: Path) -> dict[str, Any] | None:
    """What a manifest's metadata tells; None: nothing, as of CSV and of manifests that no tool here wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix != ".parquet":
        return None
    try:
        content = json.loads((pq.read_metadata(fetched(path)).metadata or {})[KEY])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):
        return None
    return content if isinstance(content, dict) else None


def version_of(path: Path) -> str:
    """Of a manifest in Parquet: as its metadata tells, else of what it holds."""
    import pyarrow.parquet as pq

    told = read_origin(path)
    if told is not None:
        return str(told.get("version"))
    version = Version()
    with pq.ParquetFile(fetched(path)) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            version.add(batch)
    return version.text()
