"""Tables as pandas frames, in which tests look at them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opensora_repro.data import manifest, tables


def read_manifest(path: str | Path, *, need_captions: bool = True) -> pd.DataFrame:
    return manifest.read_manifest(path, need_captions=need_captions).to_pandas()


def write_manifest(frame: pd.DataFrame, path: str | Path) -> None:
    manifest.write_manifest(pa.Table.from_pandas(frame, preserve_index=False), path)


def read_table(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":  # it may be one without rows
        return pq.read_table(path).to_pandas()
    table = tables.open_table(path)
    return pa.Table.from_batches(table.batches(), table.schema).to_pandas()


def write_table(frame: pd.DataFrame, path: Path) -> None:
    tables.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)
