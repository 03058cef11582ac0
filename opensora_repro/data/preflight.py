"""What a run will find of a manifest's clips, before any is decoded: by the columns, and by stat of the files."""

from __future__ import annotations

import math
import os
import stat
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from opensora_repro.config import DataConfig
from opensora_repro.data.buckets import Bucket, Rule
from opensora_repro.data.manifest import FILMED_RATE, LINEAGE, SLOW, filmed_rates
from opensora_repro.data.sample_frames import frames_at_rate, interval_of
from opensora_repro.errors import DataError
from opensora_repro.storage.addresses import address_of, place, shown
from opensora_repro.storage.objects import facts_of, look_up
from opensora_repro.storage.scratch import ready

ALL_ROWS, SAMPLED_ROWS = 100_000, 10_000  # beyond so many rows, a sample of so many stands for them
THREADS = 32  # that wait for a file system; most of a local one's answers come at once
NOTABLE = 0.1  # share of the clips from which on a warning is due
MIXED_RATES = 1.5


@dataclass(frozen=True)
class Survey:
    """Counts of clips. Too short ones have files; squeezed, slow and enlarged ones are usable."""

    manifest: str
    data: DataConfig
    rows: int
    looked_at: int
    missing: int
    first_missing: str
    too_short: int
    too_small: int  # for any bucket of theirs
    resplit: int  # of the too short ones, those that a limit of length has cut, not a scene's end
    longest: int  # frames, as `frames_at_rate` counts them
    squeezed: int
    slow: int  # of fewer frames a second than data.fps, or of a source with fewer
    slowest: float  # of them, frames a second
    factors: tuple[float, ...]  # of the enlarged ones, ascending
    short_side: int  # pixels with which none would be enlarged
    rates: tuple[float, ...]  # frames a second of usable videos, the most frequent first; none where single frames do
    images: bool  # all are single pictures
    buckets: tuple[Bucket, ...]
    clips: tuple[float, ...]  # of the usable ones, in an epoch of each bucket, on average
    enlarged: tuple[float, ...]  # of these
    cropped: tuple[float, ...]  # pictures' worth of these that is cut away
    looked: Any  # the rows that were looked at
    lost: Any  # why each of them is: "missing", "too short", "too small"; "" for usable ones, [N]

    @property
    def usable(self) -> int:
        return self.looked_at - self.missing - self.too_short - self.too_small

    @property
    def needed(self) -> int:
        """Frames of a clip that is not too short."""
        lengths = [bucket.num_frames for bucket in self.buckets if bucket.num_frames > 1 or self.images]
        return min(lengths, default=2) * interval_of(self.data) if self.data.buckets else self.data.num_frames

    @property
    def window(self) -> int:
        """Frames that a sample is taken from."""
        return (self.data.num_frames - 1) * interval_of(self.data) + 1

    @property
    def at_rate(self) -> str:
        """What to say after a number of frames."""
        return f" at data.fps = {self.data.fps:g}" if self.data.fps else ""


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
    """Look at what `read_manifest` returned, with the data section's size or buckets, and window."""
    import numpy as np

    looked = keyed_sample(table, ALL_ROWS if len(table) <= ALL_ROWS else SAMPLED_ROWS)
    paths = looked["path"].to_pylist()
    missing = np.array(_missing(paths, len(looked) / len(table)), dtype=bool)
    frames, fps = looked["num_frames"].to_numpy(), looked["fps"].to_numpy()
    heights, widths = looked["height"].to_numpy(), looked["width"].to_numpy()
    target, taken = _targets(data, frames, heights, widths, fps), frames_at_rate(data, frames, fps)
    too_short, too_small = ~missing & (target.lost == "too short"), ~missing & (target.lost == "too small")
    usable = ~missing & ~too_short & ~too_small
    divided = looked["resplit"].to_pylist() if "resplit" in looked.column_names else [False] * len(looked)
    resplit = np.array([value == 1 for value in divided])
    factors = np.maximum(target.height / heights, target.width / widths)
    enlarged = usable & (factors > 1)
    sides = (np.minimum(heights, widths) * factors)[enlarged]
    moving = usable & (frames > 1) & (target.num_frames > 1)
    filmed = np.minimum(fps, filmed_rates(looked))
    slow = moving & (filmed < SLOW * data.fps)
    window = (target.num_frames - 1) * interval_of(data) + 1
    return Survey(
        manifest=str(manifest),
        data=data,
        rows=len(table),
        looked_at=len(looked),
        missing=int(missing.sum()),
        first_missing=shown(paths[int(missing.argmax())]) if missing.any() else "",
        too_short=int(too_short.sum()),
        too_small=int(too_small.sum()),
        resplit=int((too_short & resplit).sum()),
        longest=int(taken.max()),
        squeezed=int((usable & (taken < window)).sum()),
        slow=int(slow.sum()),
        slowest=round(float(filmed[slow].min()), 3) if slow.any() else 0.0,
        factors=tuple(np.sort(factors[enlarged]).tolist()),
        short_side=math.ceil(sides.max()) if len(sides) else 0,
        rates=tuple(rate for rate, _ in Counter(np.round(fps[moving], 3).tolist()).most_common()),
        images=bool((frames == 1).all()),
        buckets=target.buckets,
        **_in_buckets(target, usable, heights, widths),
        looked=looked,
        lost=np.where(missing, "missing", np.where(usable, "", target.lost)),
    )


def _in_buckets(target: _Targets, usable: Any, heights: Any, widths: Any) -> dict[str, tuple[float, ...]]:
    """What a survey tells of each bucket."""
    import numpy as np

    clips, enlarged, cropped = np.zeros((3, len(target.buckets)))
    sides = np.array([(bucket.height, bucket.width) for bucket in target.buckets])
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(target.kind[rows], kind="stable")]
    bounds = np.searchsorted(target.kind[rows], np.arange(len(target.shares) + 1))
    for kind, (first, end) in enumerate(pairwise(bounds)):  # whose clips may all go to the same few
        own, to = rows[first:end], np.flatnonzero(target.shares[kind])
        up, across = sides[to, 0] / heights[own, None], sides[to, 1] / widths[own, None]  # [clips, buckets]
        scale, share = np.maximum(up, across), target.shares[kind, to]
        clips[to] += share * len(own)
        enlarged[to] += share * (scale > 1).sum(axis=0)
        cropped[to] += share * (1 - np.minimum(up, across) / scale).sum(axis=0)  # scaled to cover the bucket
    return {"clips": tuple(clips.tolist()), "enlarged": tuple(enlarged.tolist()), "cropped": tuple(cropped.tolist())}


@dataclass(frozen=True)
class _Targets:
    """What clips are cut to: the largest that each may go to, [N] each."""

    num_frames: Any
    height: Any
    width: Any
    lost: Any  # why no bucket takes it; ""
    buckets: tuple[Bucket, ...]
    kind: Any  # its row of the shares
    shares: Any  # [kinds, buckets]: of the clips of a kind, on average


def _targets(data: DataConfig, frames: Any, heights: Any, widths: Any, fps: Any) -> _Targets:
    import numpy as np

    if not data.buckets:
        lost = np.where(frames_at_rate(data, frames, fps) < data.num_frames, "too short", "")
        kind = np.zeros(len(frames), dtype=int)
        only = (Bucket(data.num_frames, data.height, data.width, 1),)
        return _Targets(data.num_frames, data.height, data.width, lost, only, kind, np.ones((1, 1)))
    rule = Rule(data, 1)
    cells, kind = np.unique(rule.cells(frames, heights, widths, fps), return_inverse=True)
    sizes, reasons, shares = [], [], np.zeros((len(cells), len(rule.buckets)))
    for row, cell in enumerate(map(int, cells)):
        chances = rule.chances(cell)
        before = 0.0
        for bucket, share in chances:
            shares[row, bucket], before = share - before, share
        sizes.append(rule.buckets[chances[0][0]].shape if chances else (1, 1, 1))
        reasons.append("" if chances else rule.why_lost(cell))
    num_frames, height, width = np.array(sizes).reshape(-1, 3)[kind].T
    return _Targets(num_frames, height, width, np.array(reasons)[kind], rule.buckets, kind, shares)


def _missing(paths: Sequence[str], share: float) -> list[bool]:
    """Whether each path is no file that holds something. Threads, because a network's file system takes its time."""
    if any(map(address_of, paths)):
        ready()
        look_up(paths, share=share)  # side by side
    size = max(1, min(1000, -(-len(paths) // THREADS)))
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [found for part in pool.map(lambda part: [_is_missing(path) for path in part], parts) for found in part]


def _is_missing(path: str) -> bool:
    try:
        if address_of(path):
            return facts_of(path).size == 0
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
        folder = place(found.manifest).absolute().parent
        reasons.append(f"{found.missing:,} files are missing or empty, first {found.first_missing!r} (paths are "
                       f"relative to {folder}): mend the column path")  # fmt: skip
    if found.too_short and not found.data.buckets:
        reasons.append(f"{found.too_short:,} clips have fewer than data.num_frames = {found.data.num_frames} frames"
                       f"{found.at_rate}, the longest has {found.longest}: lower data.num_frames, or "
                       f"{_longer(found)}")  # fmt: skip
    elif found.too_short:
        interval = " * data.frame_interval" if interval_of(found.data) > 1 else ""
        reasons.append(f"{found.too_short:,} clips have too few frames{found.at_rate} for all of data.buckets, the "
                       f"longest has {found.longest}: give one num_frames{interval} of at most that")  # fmt: skip
    if found.too_small:
        reasons.append(f"{found.too_small:,} clips are too small for all of data.buckets: give one less resolution")
    sampled = f" that were looked at of {found.rows:,}" if found.looked_at < found.rows else ""
    raise DataError(
        f"{found.manifest}: none of the {found.looked_at:,} clips{sampled} can be used: {'; '.join(reasons)}"
    )


def require_kept(found: Survey) -> None:
    """Raise DataError where no usable clip is ever trained on."""
    if found.buckets and not any(found.clips):
        raise DataError(f"{found.manifest}: no clip goes to any of data.buckets: let one that has clips keep some")


def kinds(found: Survey) -> list[tuple[str, int, str]]:
    """The clips by what becomes of them: a name, how many, a note for people."""
    data, factors = found.data, found.factors
    by = "" if not factors else f"by {statistics.median(factors):.3g} (median), {factors[-1]:.3g} at most"
    size = "their bucket" if data.buckets else f"{data.height}x{data.width}"
    several, interval = bool(data.buckets), interval_of(data)
    rows = [
        ("usable", True, found.usable, ""),
        ("missing", True, found.missing, f"no file, or an empty one; first {found.first_missing!r}"),
        ("too short", True, found.too_short, f"fewer than {found.needed} frames{found.at_rate}"),
        ("too small", several, found.too_small, "less than .8 of the pixels of all buckets for their length"),
        ("squeezed", not several and interval > 1, found.squeezed,
         f"shorter than the window of {found.window} frames, so that motion is faster"),
        ("slow", data.fps > 0, found.slow, f"below data.fps = {data.fps:g}, so that frames repeat"),
        ("enlarged", True, len(factors), f"smaller than {size}: {by}"),
        ("not kept", several, round(found.usable - sum(found.clips)), "an epoch, on average: keep of data.buckets"),
    ]  # fmt: skip
    return [(name, count, note) for name, applies, count, note in rows if applies]


def table(found: Survey, title: str) -> Iterator[str]:
    """Lines for people, a row a kind."""
    sampled = f"; a keyed sample of {found.looked_at:,} is looked at" if found.looked_at < found.rows else ""
    yield f"{title} {found.manifest}: {found.rows:,}{sampled}"
    for name, count, note in kinds(found):
        yield f"  {name:>9} {count:>9,} {count / found.looked_at:>7.1%}{f'  {note}' if count and note else ''}"
    if found.rates:
        low, high = min(found.rates), max(found.rates)
        yield f"  {'fps':>9} {f'{low:g} to {high:g}, mostly {found.rates[0]:g}' if high > low else f'{low:g}'}"


@dataclass(frozen=True)
class BucketRow:
    """What an epoch has of a bucket, on average."""

    bucket: Bucket
    clips: float
    share: float  # of all rows
    enlarged: float  # share of its clips
    cropped: float  # mean share of a picture that is cut away
    samples: float  # of a step; where clips of all buckets share steps, on average
    steps: float
    tokens: int  # of a sample
    time: float  # share of the epoch's, by FLOPs

    @property
    def samples_shown(self) -> str:
        return f"{self.samples:,}" if isinstance(self.samples, int) else f"{self.samples:,.1f}"


def bucket_rows(found: Survey, samples: Sequence[float], costs: Sequence[tuple[int, float]]) -> list[BucketRow]:
    """Of the buckets that get clips.

    `samples`: of a step of each bucket, or of one that has clips of all; `costs`: tokens and FLOPs of a sample of each.
    """
    scale, total = found.rows / found.looked_at, sum(found.clips)
    if len(samples) < len(found.buckets):
        samples = [samples[0] * clips / total if total else 0 for clips in found.clips]
    work = sum(clips * flops for clips, (_, flops) in zip(found.clips, costs, strict=True))
    columns = zip(found.buckets, found.clips, found.enlarged, found.cropped, samples, costs, strict=True)
    return [
        BucketRow(
            bucket, clips * scale, clips / found.looked_at, enlarged / clips, cropped / clips, size,
            clips * scale / size, tokens, clips * flops / work,
        )
        for bucket, clips, enlarged, cropped, size, (tokens, flops) in columns if clips
    ]  # fmt: skip


def facts(found: Survey, title: str, rows: Sequence[BucketRow]) -> dict[str, Any]:
    """What `table` and `bucket_table` tell, as JSON has it."""
    return {
        "title": f"{title} {found.manifest}",
        "rows": found.rows,
        "looked_at": found.looked_at,
        "kinds": [list(kind) for kind in kinds(found)],
        "rates": [min(found.rates), max(found.rates), found.rates[0]] if found.rates else [],
        "buckets": [{**asdict(row), "bucket": str(row.bucket)} for row in rows],
        "empty_buckets": len(found.buckets) - len(rows) if rows else 0,
    }


def bucket_table(found: Survey, rows: Sequence[BucketRow]) -> Iterator[str]:
    """Lines for people."""
    if rows:
        yield (
            f"  {'bucket':>16} {'clips an epoch':>17} {'enlarged':>9} {'cropped':>8} {'samples a step':>15} "
            f"{'steps an epoch':>15} {'tokens a sample':>16} {'a step':>11} {'time':>6}"
        )
    for row in rows:
        clips, step = f"{row.clips:,.0f} {row.share:>6.1%}", round(row.tokens * row.samples)
        yield (
            f"  {row.bucket!s:>16} {clips:>17} {row.enlarged:>9.1%} {row.cropped:>8.1%} {row.samples_shown:>15} "
            f"{row.steps:>15,.1f} {row.tokens:>16,} {step:>11,} {row.time:>6.1%}"
        )
    empty = len(found.buckets) - len(rows)
    if empty:
        yield f"  {empty} of {len(found.buckets)} buckets get no clip"


def warnings(found: Survey) -> Iterator[str]:
    """What to do about it where it concerns more than a tenth of the clips."""
    data, total = found.data, found.looked_at
    bad = found.missing + found.too_short * (not data.buckets)
    lost = found.too_short + found.too_small
    if data.buckets and lost > NOTABLE * total:
        yield f"{lost / total:.0%} of the clips in {found.manifest} are too short or too small for all of data.buckets"
    if bad > NOTABLE * total:
        remedies = []
        if found.missing:
            remedies.append("see that the column path is right for the missing ones")
        if found.too_short and not data.buckets:
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
            f"{remedy}, or lower {'the resolutions of data.buckets' if data.buckets else 'data.height and data.width'}"
        )
    if found.slow > NOTABLE * total:
        rate = FILMED_RATE if set(LINEAGE) <= set(found.looked.column_names) else "fps"
        yield (
            f"{found.slow / total:.0%} of the clips in {found.manifest} have fewer frames a second, themselves or as "
            f"filmed, than data.fps = {data.fps:g}, so that frames repeat and motion halts: lower data.fps "
            f"(the slowest have {found.slowest:g}), or leave them out: data_tools.filter --keep "
            f"'{rate} >= {SLOW * data.fps:g}'"
        )
    by_number = not data.fps and data.frame_sampling == "window"
    if by_number and found.rates and max(found.rates) > MIXED_RATES * min(found.rates):
        yield (
            f"frame rates in {found.manifest} reach from {min(found.rates):g} to {max(found.rates):g}, so the same "
            f"motion is shown at different speeds: data.fps, such as {found.rates[0] / data.frame_interval:g}, takes "
            f"frames by time at one speed (as data_tools.split --fps {found.rates[0]:g} would once for all)"
        )


def _longer(found: Survey) -> str:
    if found.data.fps:
        seconds = (found.data.num_frames - 1) / found.data.fps
        return f"data_tools.filter --keep 'duration > {seconds:.4g}' leaves out what is too short"
    if found.resplit > found.too_short / 2:
        return f"data_tools.split --max-frames divided them: give it at least {found.window}, or leave it out"
    return f"data_tools.split --min-frames {found.window} leaves out what is too short for a whole window"
