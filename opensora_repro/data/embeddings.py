"""Embeddings of clips beside a manifest: a Parquet table with `id` and `embedding`, a list of numbers of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from opensora_repro.data.tables import Table, in_batches, open_table, table_kind, table_writer
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

EMBEDDINGS_FILE = "embeddings.parquet"
KIND = np.dtype("<f2")  # half the bytes; moves a cosine by less than 1e-4
Advance = Callable[[int], object]


def write_embeddings(path: Path, found: Iterable[tuple[str, np.ndarray]], size: int) -> None:
    """Write (id, vector of `size` numbers) in order, the whole file or none; an equal one is left untouched."""
    import pyarrow as pa

    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float16(), size))])
    with table_writer(path, schema) as write:
        for batch in in_batches(found):
            ids, vectors = zip(*batch, strict=True)
            flat = pa.array(np.concatenate(vectors).astype(KIND))
            lists = pa.FixedSizeListArray.from_arrays(flat, size)
            write(pa.RecordBatch.from_arrays([pa.array(ids, pa.string()), lists], schema=schema))


def gather_embeddings(path: Path, ids: Any, file: BinaryIO, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
    """Put the embeddings of `ids`, a pyarrow array, into `file`, scaled to length 1; return them and whose they are.

    They are float16 [M, D] on the disk, in the order of the table, and int64 [M]: places in `ids`. Ids that are not
    asked for are passed over, and vectors that have no direction: zeros, and what is not finite. Raises DataError.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table, size, owners = _opened(path), 0, [np.empty(0, dtype=np.int64)]
    for batch in table.batches(["id", "embedding"]):
        places = pc.index_in(batch.column("id").cast(pa.string()), value_set=ids)
        usable = pc.and_(places.is_valid(), batch.column("embedding").is_valid())
        vectors = _numbers(path, batch.column("embedding").filter(usable))
        if len(vectors):
            size = size or vectors.shape[1]
            if vectors.shape[1] != size:
                raise DataError(f"{path}: embeddings of {size} and of {vectors.shape[1]} numbers; expected one length")
            largest = np.abs(vectors).max(axis=1)
            good = np.isfinite(largest) & (largest > 0)
            some = vectors[good] / largest[good, None]  # whose squares are neither infinite nor all 0
            file.write((some / np.linalg.norm(some, axis=1, keepdims=True)).astype(KIND).tobytes())
            owners.append(places.filter(usable).to_numpy().astype(np.int64)[good])
        advance(batch.num_rows)
    whose = np.concatenate(owners)
    named, times = np.unique(whose, return_counts=True)
    if len(named) < len(whose):
        twice = ids[int(named[times.argmax()])].as_py()
        raise DataError(f"{path}: id {one_line(twice)} has {times.max()} rows; expected one embedding a clip")
    file.flush()
    return np.memmap(file, KIND, "r", shape=(len(whose), size)) if len(whose) else np.empty((0, 1), KIND), whose


def _opened(path: Path) -> Table:
    import pyarrow as pa

    if table_kind(path) != "parquet":
        raise DataError(f"{path}: expected a Parquet table with the columns id and embedding")
    table = open_table(path)
    if missing := [name for name in ("id", "embedding") if name not in table.schema.names]:
        raise DataError(f"{path}: column {missing[0]} missing; expected id and embedding (a list of numbers)")
    kind = table.schema.field("embedding").type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{path}: column embedding holds {kind}, expected lists of float16, float32 or float64")
    return table


def _numbers(path: Path, lists: Any) -> np.ndarray:
    """Return float32 [rows, D] of lists that all have D numbers. Raises DataError."""
    import pyarrow.compute as pc

    if not len(lists):
        return np.empty((0, 0), dtype=np.float32)
    sizes = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(sizes) > 1 or not sizes[0]:
        raise DataError(f"{path}: embeddings of {', '.join(map(str, sorted(sizes)[:3]))} numbers; expected one length")
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(lists), sizes[0])
