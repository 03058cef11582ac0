"""What a run will find of a manifest's clips, before any is decoded: by the columns, and by stat of the files."""

from __future__ import annotations

import math
import os
import stat
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.config import DataConfig
from opensora_repro.errors import DataError

ALL_ROWS, SAMPLED_ROWS = 100_000, 10_000  # beyond so many rows, a sample of so many stands for them
THREADS = 32  # that wait for a file system; most of a local one's answers come at once
NOTABLE = 0.1  # share of the clips from which on a warning is due
MIXED_RATES = 1.5


@dataclass(frozen=True)
class Survey:
    """Counts of clips. Too short ones have files; squeezed and enlarged ones are usable."""

    manifest: str
    data: DataConfig
    rows: int
    looked_at: int
    missing: int
    first_missing: str
    too_short: int
    resplit: int  # of the too short ones, those that a limit of length has cut, not a scene's end
    longest: int  # frames
    squeezed: int
    factors: tuple[float, ...]  # of the enlarged ones, ascending
    short_side: int  # pixels with which none would be enlarged
    rates: tuple[float, ...]  # frames a second of usable videos, the most frequent first; none where single frames do
    images: bool  # all are single pictures

    @property
    def usable(self) -> int:
        return self.looked_at - self.missing - self.too_short

    @property
    def window(self) -> int:
        """Frames that a sample is taken from."""
        return (self.data.num_frames - 1) * self.data.frame_interval + 1


def keyed_sample(table: Any, count: int) -> Any:
    """So many rows in their order, chosen by their ids alone: the order in the file is no bias."""
    import numpy as np
    import pandas as pd

    if len(table) <= count:
        return table
    ids = (chunk.to_numpy(zero_copy_only=False) for chunk in table["id"].chunks)
    keys = np.concatenate([pd.util.hash_array(names, categorize=False) for names in ids])
    return table.take(np.sort(np.argpartition(keys, count)[:count]))


def survey(table: Any, data: DataConfig, manifest: str | Path) -> Survey:
    """Look at what `read_manifest` returned, with the data section's size and window."""
    import numpy as np

    looked = keyed_sample(table, ALL_ROWS if len(table) <= ALL_ROWS else SAMPLED_ROWS)
    paths = looked["path"].to_pylist()
    missing = np.array(_missing(paths), dtype=bool)
    frames, fps = looked["num_frames"].to_numpy(), looked["fps"].to_numpy()
    heights, widths = looked["height"].to_numpy(), looked["width"].to_numpy()
    too_short = ~missing & (frames < data.num_frames)
    usable = ~missing & ~too_short
    divided = looked["resplit"].to_pylist() if "resplit" in looked.column_names else [False] * len(looked)
    resplit = np.array([value == 1 for value in divided])
    factors = np.maximum(data.height / heights, data.width / widths)
    enlarged = usable & (factors > 1)
    sides = (np.minimum(heights, widths) * factors)[enlarged]
    rates = fps[usable & (frames > 1)] if data.num_frames > 1 else fps[:0]
    window = (data.num_frames - 1) * data.frame_interval + 1
    return Survey(
        manifest=str(manifest),
        data=data,
        rows=len(table),
        looked_at=len(looked),
        missing=int(missing.sum()),
        first_missing=paths[int(missing.argmax())] if missing.any() else "",
        too_short=int(too_short.sum()),
        resplit=int((too_short & resplit).sum()),
        longest=int(frames.max()),
        squeezed=int((usable & (frames < window)).sum()),
        factors=tuple(np.sort(factors[enlarged]).tolist()),
        short_side=math.ceil(sides.max()) if len(sides) else 0,
        rates=tuple(rate for rate, _ in Counter(np.round(rates, 3).tolist()).most_common()),
        images=bool((frames == 1).all()),
    )


def _missing(paths: Sequence[str]) -> list[bool]:
    """Whether each path is no file that holds something. Threads, because a network's file system takes its time."""
    size = max(1, min(1000, -(-len(paths) // THREADS)))
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [found for part in pool.map(lambda part: [_is_missing(path) for path in part], parts) for found in part]


def _is_missing(path: str) -> bool:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return True
    return not stat.S_ISREG(status.st_mode) or status.st_size == 0


def require_usable(found: Survey) -> None:
    """Raise DataError where no clip can be used."""
    if found.usable:
        return
    reasons = []
    if found.missing:
        folder = Path(found.manifest).absolute().parent
        reasons.append(f"{found.missing:,} files are missing or empty, first {found.first_missing!r} (paths are "
                       f"relative to {folder}): mend the column path")  # fmt: skip
    if found.too_short:
        reasons.append(f"{found.too_short:,} clips have fewer than data.num_frames = {found.data.num_frames} frames, "
                       f"the longest has {found.longest}: lower data.num_frames, or {_longer(found)}")  # fmt: skip
    sampled = f" that were looked at of {found.rows:,}" if found.looked_at < found.rows else ""
    raise DataError(
        f"{found.manifest}: none of the {found.looked_at:,} clips{sampled} can be used: {'; '.join(reasons)}"
    )


def table(found: Survey, title: str) -> Iterator[str]:
    """Lines for people, a row a kind."""
    data, factors = found.data, found.factors
    sampled = f"; a keyed sample of {found.looked_at:,} is looked at" if found.looked_at < found.rows else ""
    yield f"{title} {found.manifest}: {found.rows:,}{sampled}"
    by = "" if not factors else f"by {statistics.median(factors):.3g} (median), {factors[-1]:.3g} at most"
    for name, count, note in (
        ("usable", found.usable, ""),
        ("missing", found.missing, f"no file, or an empty one; first {found.first_missing!r}"),
        ("too short", found.too_short, f"fewer than {data.num_frames} frames"),
        ("squeezed", found.squeezed, f"shorter than the window of {found.window} frames, so that motion is faster"),
        ("enlarged", len(factors), f"smaller than {data.height}x{data.width}: {by}"),
    ):
        yield f"  {name:>9} {count:>9,} {count / found.looked_at:>7.1%}{f'  {note}' if count and note else ''}"
    if found.rates:
        low, high = min(found.rates), max(found.rates)
        yield f"  {'fps':>9} {f'{low:g} to {high:g}, mostly {found.rates[0]:g}' if high > low else f'{low:g}'}"


def warnings(found: Survey) -> Iterator[str]:
    """What to do about it where it concerns more than a tenth of the clips."""
    data, total = found.data, found.looked_at
    bad = found.missing + found.too_short
    if bad > NOTABLE * total:
        remedies = []
        if found.missing:
            remedies.append("see that the column path is right for the missing ones")
        if found.too_short:
            remedies.append(_longer(found))
        limit = data.max_bad_fraction
        stops = f", and the run stops beyond data.max_bad_fraction = {limit:g}" if bad > limit * total else ""
        yield f"{bad / total:.0%} of the clips in {found.manifest} cannot be used{stops}: {'; '.join(remedies)}"
    if len(found.factors) > NOTABLE * total:
        remedy = "take larger pictures"
        if not found.images:
            remedy = f"data_tools.split --short-side {found.short_side} keeps that much where the videos have it"
        yield (
            f"{len(found.factors) / total:.0%} of the clips in {found.manifest} are enlarged, which blurs them: "
            f"{remedy}, or lower data.height and data.width"
        )
    if found.rates and max(found.rates) > MIXED_RATES * min(found.rates):
        yield (
            f"frame rates in {found.manifest} reach from {min(found.rates):g} to {max(found.rates):g}, so the same "
            f"motion is shown at different speeds: data_tools.split --fps {found.rates[0]:g} makes them equal"
        )


def _longer(found: Survey) -> str:
    if found.resplit > found.too_short / 2:
        return f"data_tools.split --max-frames divided them: give it at least {found.window}, or leave it out"
    return f"data_tools.split --min-frames {found.window} leaves out what is too short for a whole window"
