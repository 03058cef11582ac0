"""Buckets: the shapes that a run's clips are trained in, and which clip goes to which.

Resolutions, tables of ratios and the rule are Open-Sora's (1.1 and 1.2), the tables of plain numbers PixArt's. Two
faults are mended: a clip of exactly the frames that a bucket needs fits, and a bucket with fewer clips than a step
takes does not vanish (see sampler.py).

A clip's bucket follows from its columns and one number in [0, 1). Clips for which the rule comes to the same, whatever
that number, form a cell; so millions of rows are sorted once, and the clips of a bucket are slices of each cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from opensora_repro.config import BucketConfig, Config, ConfigError, DataConfig
from opensora_repro.data.sample_frames import frames_at_rate, interval_of
from opensora_repro.data.sampler import Assignment, Shape, everything, keyed_words

PIXELS = {
    "144p": 36_864, "256": 65_536, "240p": 102_240, "360p": 230_400, "512": 262_144, "480p": 409_920, "720p": 921_600,
    "1024": 1_048_576, "1080p": 2_073_600, "2k": 3_686_400, "2048": 4_194_304, "2880": 8_294_400, "4k": 8_294_400,
}  # fmt: skip

# HEIGHTxWIDTH for each height / width; no formula gives every one.
_RATIOS = "0.38 0.43 0.48 0.50 0.53 0.54 0.56 0.62 0.67 0.75 1.00 1.33 1.50 1.78 1.89 2.00 2.08"
_SIZES = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 "
    "256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 "
    "426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 "
    "640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 "
    "854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
    "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
    "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 "
    "1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 "
    "2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}
_PIXART_512 = (
    "0.25:256x1024 0.26:256x992 0.27:256x960 0.28:256x928 0.32:288x896 0.33:288x864 0.35:288x832 0.4:320x800 "
    "0.42:320x768 0.48:352x736 0.5:352x704 0.52:352x672 0.57:384x672 0.6:384x640 0.68:416x608 0.72:416x576 "
    "0.78:448x576 0.82:448x544 0.88:480x544 0.94:480x512 1.0:512x512 1.07:512x480 1.13:544x480 1.21:544x448 "
    "1.29:576x448 1.38:576x416 1.46:608x416 1.67:640x384 1.75:672x384 2.0:704x352 2.09:736x352 2.4:768x320 "
    "2.5:800x320 2.89:832x288 3.0:864x288 3.11:896x288 3.62:928x256 3.75:960x256 3.88:992x256 4.0:1024x256"
)
_PIXART_2880 = (
    "0.25:1408x5760 0.26:1408x5568 0.27:1408x5376 0.28:1408x5184 0.32:1600x4992 0.33:1600x4800 0.34:1600x4672 "
    "0.4:1792x4480 0.42:1792x4288 0.47:1920x4096 0.49:1920x3904 0.51:1920x3776 0.55:2112x3840 0.59:2112x3584 "
    "0.68:2304x3392 0.72:2304x3200 0.78:2496x3200 0.83:2496x3008 0.89:2688x3008 0.93:2688x2880 1.0:2880x2880 "
    "1.07:2880x2688 1.12:3008x2688 1.21:3008x2496 1.28:3200x2496 1.39:3200x2304 1.47:3392x2304 1.7:3584x2112 "
    "1.82:3840x2112 2.03:3904x1920 2.13:4096x1920 2.39:4288x1792 2.5:4480x1792 2.92:4672x1600 3.0:4800x1600 "
    "3.12:4992x1600 3.68:5184x1408 3.82:5376x1408 3.95:5568x1408 4.0:5760x1408"
)

Row = tuple[float, int, int]  # height / width by which a clip finds it; height, width


def published_table(name: str) -> tuple[Row, ...]:
    """The rows of a published resolution, ratios ascending."""
    if name in _SIZES:
        return tuple(_row(ratio, size) for ratio, size in zip(_RATIOS.split(), _SIZES[name].split(), strict=True))
    text, scale = (_PIXART_2880, 1.0) if name == "2880" else (_PIXART_512, int(name) / 512)
    return tuple(_row(ratio, size, scale) for ratio, size in (pair.split(":") for pair in text.split()))


def _row(ratio: str, size: str, scale: float = 1.0) -> Row:
    height, width = (int(int(side) * scale) for side in size.split("x"))
    return float(ratio), height, width


MULTIPLE = 8  # of the sides that no table has: pixels a latent
TO_FILL = 0.8  # share of a resolution's pixels that a clip needs
COLUMNS = ("num_frames", "height", "width", "fps")


@dataclass(frozen=True)
class Bucket:
    """What a step's samples are cut to."""

    num_frames: int
    height: int
    width: int
    batch_size: int  # samples a process reads at once

    @property
    def shape(self) -> Shape:
        return self.num_frames, self.height, self.width

    def __str__(self) -> str:
        return f"{self.num_frames} x {self.height}x{self.width}"


@dataclass(frozen=True)
class Rung:
    """What one `[[data.buckets]]` does with the clips that get to it."""

    num_frames: int
    considered: float  # share of them that it looks at
    kept: float  # share of those that it takes
    first: int  # number of the bucket of its first ratio
    ratios: np.ndarray  # height / width, ascending


@dataclass(frozen=True)
class Level:
    """A resolution: its rungs, most frames first."""

    pixels: int
    rungs: tuple[Rung, ...]


class Rule:
    """The buckets of a config, largest first, and the rule by which a clip goes to one of them."""

    def __init__(self, data: DataConfig, batch_size: int) -> None:
        """`batch_size` is that of buckets without one. Raises ConfigError."""
        self.buckets: tuple[Bucket, ...] = ()
        self.kept: tuple[Bucket, ...] = ()  # of these, what clips are kept in
        self.levels: list[Level] = []
        entries = [(pixels_of(entry.resolution, f"data.buckets[{i}]"), i) for i, entry in enumerate(data.buckets)]
        entries.sort(key=lambda pair: (-pair[0], data.buckets[pair[1]].resolution, -data.buckets[pair[1]].num_frames))
        for (pixels, _), group in groupby(entries, key=lambda pair: (pair[0], data.buckets[pair[1]].resolution)):
            own = tuple(self._rung(data.buckets[i], f"data.buckets[{i}]", batch_size) for _, i in group)
            self.levels.append(Level(pixels, own))
        self.entries = tuple(i for _, i in entries for _ in sizes(data.buckets[i]))  # of data.buckets, each bucket's
        rungs = [rung for level in self.levels for rung in level.rungs]
        lengths = sorted({rung.num_frames for rung in rungs} - {1})
        self._data = data
        self._needed = np.array([length * interval_of(data) for length in lengths], dtype=np.int64)
        self._kind_of = {length: kind for kind, length in enumerate(lengths, start=2)}
        self._areas = np.array([TO_FILL * level.pixels for level in reversed(self.levels)])
        self._bounds = _ratio_bounds([rung.ratios for rung in rungs])
        self._kinds = len(lengths) + 2  # 0: a picture; 1: too short for all; long enough for the first; the second; ...

    def _rung(self, entry: BucketConfig, where: str, batch_size: int) -> Rung:
        rows, first = sizes(entry, where), len(self.buckets)
        size = entry.batch_size or batch_size
        kept, considered = entry.keep if isinstance(entry.keep, tuple) else (entry.keep, 1.0)
        own = tuple(Bucket(entry.num_frames, height, width, size) for _, height, width in rows)
        self.buckets += own
        self.kept += own if kept * considered else ()
        return Rung(entry.num_frames, considered, kept, first, np.array([ratio for ratio, _, _ in rows]))

    @property
    def is_certain(self) -> bool:
        """Whether no clip's bucket is a matter of chance."""
        return all({rung.kept, rung.considered} <= {0.0, 1.0} for level in self.levels for rung in level.rungs)

    def cells(self, num_frames: np.ndarray, heights: np.ndarray, widths: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """The cell of each clip, uint32 [N], from int64 [N] and rates float64 [N]."""
        level = len(self.levels) - np.searchsorted(self._areas, heights * widths, side="right")
        there = frames_at_rate(self._data, num_frames, fps)
        kind = np.where(num_frames == 1, 0, 1 + np.searchsorted(self._needed, there, side="right"))
        region = np.searchsorted(self._bounds, heights / widths, side="left")
        found: np.ndarray = ((level * self._kinds + kind) * (len(self._bounds) + 1) + region).astype(np.uint32)
        return found

    def ladder(self, cell: int) -> Iterator[list[tuple[int, float, float]]]:
        """For each resolution that a cell's clips fill, largest first: (bucket, considered, kept), most frames first.

        A clip that a bucket does not consider goes to the next one; one that is considered, but not kept, to the next
        resolution.
        """
        cell, region = divmod(cell, len(self._bounds) + 1)
        level, kind = divmod(cell, self._kinds)
        ratio = _inside(self._bounds, region)
        for found in self.levels[level:]:
            rungs = [rung for rung in found.rungs if self._takes(rung, kind)]
            yield [(rung.first + nearest(rung.ratios, ratio), rung.considered, rung.kept) for rung in rungs]

    def _takes(self, rung: Rung, kind: int) -> bool:
        if rung.num_frames == 1:
            return kind == 0 or not self._kind_of  # where no bucket has more frames, a clip gives one of its own
        return kind >= self._kind_of[rung.num_frames]

    def chances(self, cell: int) -> list[tuple[int, float]]:
        """(bucket, share of the cell's clips that go there or to one before it), in the ladder's order."""
        found, arriving = [], 1.0
        for rungs in self.ladder(cell):
            below = 0.0  # goes on to the next resolution
            for bucket, considered, kept in rungs:
                below += arriving * considered * (1 - kept)
                arriving *= 1 - considered
                if considered * kept:
                    found.append((bucket, 1 - (below + arriving)))
            arriving += below
        return found

    def why_lost(self, cell: int) -> str:
        """Why no bucket takes a clip of the cell: "too small", "too short" or "not kept"."""
        level, kind = divmod(cell // (len(self._bounds) + 1), self._kinds)
        filled, larger = self.levels[level:], self.levels[:level]
        if any(self._takes(rung, kind) for found in filled for rung in found.rungs):
            return "not kept"
        return "too small" if any(self._takes(rung, kind) for found in larger for rung in found.rungs) else "too short"


def pixels_of(resolution: str, where: str) -> int:
    """Raises ConfigError for what is neither a published name nor an area."""
    if resolution in PIXELS:
        return PIXELS[resolution]
    width, height = _sides(resolution)
    if not width * height:
        raise ConfigError(
            f"{where}.resolution = {resolution!r}: expected one of {', '.join(PIXELS)}, or an area as WIDTHxHEIGHT"
        )
    return width * height


def _sides(resolution: str) -> tuple[int, int]:
    width, by, height = resolution.partition("x")
    good = by and width.isdecimal() and height.isdecimal() and width.isascii() and height.isascii()
    return (int(width), int(height)) if good else (0, 0)


def sizes(entry: BucketConfig, where: str = "data.buckets") -> tuple[Row, ...]:
    """A bucket's sizes, one a ratio, ratios ascending. Raises ConfigError."""
    pixels, ratios, published = pixels_of(entry.resolution, where), entry.ratios, entry.resolution in PIXELS
    table = published_table(entry.resolution) if published else ()
    if ratios == "":
        width, height = _sides(entry.resolution)
        return table or ((height / width, height, width),)
    if isinstance(ratios, str) and ratios in PIXELS:
        chosen = [ratio for ratio, _, _ in published_table(ratios)]
    elif isinstance(ratios, str):
        if ratios != "square":
            raise ConfigError(
                f'{where}.ratios = {ratios!r}: expected "square", a published table ({", ".join(PIXELS)}), or a list'
            )
        chosen = [1.0]
    else:
        chosen = sorted({_ratio(ratio, where) for ratio in ratios})
        if not chosen:
            raise ConfigError(f'{where}.ratios = []: expected at least one, such as "3:2"')
    return tuple(_row_of(ratio, pixels, table) for ratio in chosen)


def _ratio(ratio: float | str, where: str) -> float:
    """height / width: a number is that itself, text is WIDTH:HEIGHT."""
    width, _, height = ratio.partition(":") if isinstance(ratio, str) else ("1", ":", repr(ratio))
    try:
        found = float(height) / float(width)
    except (ValueError, ZeroDivisionError):
        found = 0.0
    if not 0.01 <= found <= 100:
        raise ConfigError(f'{where}.ratios: {ratio!r}: expected WIDTH:HEIGHT, as "3:2", or a number, height / width')
    return found


def _row_of(ratio: float, pixels: int, table: tuple[Row, ...]) -> Row:
    """The table's row that has the ratio to two digits; else sides of about so many pixels together."""
    close = [row for row in table if abs(row[0] - ratio) < 0.006]
    if close:
        return min(close, key=lambda row: abs(row[0] - ratio))
    height, width = ((pixels * share) ** 0.5 / MULTIPLE for share in (ratio, 1 / ratio))
    return ratio, MULTIPLE * max(1, round(height)), MULTIPLE * max(1, round(width))


def nearest(ratios: np.ndarray, ratio: float) -> int:
    """Index of the nearest; the smaller one's of two."""
    return int(np.abs(ratios - ratio).argmin())


def _ratio_bounds(tables: Iterable[np.ndarray]) -> np.ndarray:
    """Where a clip's nearest ratio changes in some table, each bound belonging to what lies below it."""
    bounds = set()
    for ratios in tables:
        for index, middle in enumerate((ratios[1:] + ratios[:-1]) / 2):
            # Rounding decides whether the middle itself is nearer to the one or the other
            bounds.add(float(middle if nearest(ratios, middle) == index else np.nextafter(middle, 0)))
    return np.array(sorted(bounds))


def _inside(bounds: np.ndarray, region: int) -> float:
    ends = [0.0, *bounds.tolist(), (2 * bounds[-1]) if len(bounds) else 2.0]
    return (ends[region] + ends[region + 1]) / 2


def buckets_of(cfg: Config) -> tuple[Bucket, ...]:
    """A run's buckets, the largest first; without any in the config, the section's size is the one. ConfigError."""
    data = cfg.data
    if data.buckets:
        return Rule(data, cfg.train.batch_size).buckets
    return (Bucket(data.num_frames, data.height, data.width, cfg.train.batch_size),)


def global_batch_sizes(cfg: Config, data_size: int) -> list[int]:
    """Samples a step of each bucket, over all data ranks and micro-batches; with packing, of all buckets together."""
    if cfg.data.packing_tokens:
        return [cfg.train.batch_size * cfg.train.accumulation * data_size]
    return [bucket.batch_size * cfg.train.accumulation * data_size for bucket in buckets_of(cfg)]


def as_one_size(cfg: Config, bucket: Bucket) -> Config:
    """The config of a run that has this bucket's size alone, in whole latents."""
    if not cfg.data.buckets:
        return cfg
    height, width = (side // MULTIPLE * MULTIPLE for side in (bucket.height, bucket.width))
    data = replace(cfg.data, num_frames=bucket.num_frames, height=height, width=width, buckets=())
    return replace(cfg, data=data, train=replace(cfg.train, batch_size=bucket.batch_size))


def as_sampled(cfg: Config) -> Config:
    """The config of samples: of the bucket most like the data section's size."""
    if not cfg.data.buckets:
        return cfg
    target = np.log([cfg.data.num_frames, cfg.data.height, cfg.data.width])
    closest = min(kept_buckets(cfg), key=lambda bucket: float(np.abs(np.log(bucket.shape) - target).sum()))
    return as_one_size(cfg, closest)


def as_heaviest(cfg: Config) -> Config:
    """The config of the bucket whose micro-batch has the most pixels, which decides the work of a step."""
    return as_one_size(cfg, max(kept_buckets(cfg), key=lambda bucket: math.prod(bucket.shape) * bucket.batch_size))


def largest_buckets(cfg: Config) -> list[Bucket]:
    """The largest of each frame count and batch size: one of them decides a run's memory.

    It need not be the heaviest: few frames of many pixels take more to encode. Ratios differ by a few percent.
    """
    largest: dict[tuple[int, int], Bucket] = {}
    for bucket in kept_buckets(cfg):
        key = bucket.num_frames, bucket.batch_size
        largest[key] = max(bucket, largest.get(key, bucket), key=lambda bucket: math.prod(bucket.shape))
    return list(largest.values())


def kept_buckets(cfg: Config) -> tuple[Bucket, ...]:
    """Those of `buckets_of` that keep clips: tables have some that only send them on to fewer pixels."""
    if not cfg.data.buckets:
        return buckets_of(cfg)
    rule = Rule(cfg.data, cfg.train.batch_size)
    return rule.kept or rule.buckets


def assigned(table: Any, cfg: Config) -> Assignment:
    """Which rows of a manifest, as `read_manifest` returns it, are which of `buckets_of`; without buckets, all are.

    Raises ConfigError.
    """
    if not cfg.data.buckets:
        return everything(len(table))
    return assign(table, Rule(cfg.data, cfg.train.batch_size), cfg.run.seed)


def largest(table: Any, cfg: Config) -> np.ndarray:
    """The largest of `buckets_of` that each row may go to, int64 [N]; -1: none."""
    if not cfg.data.buckets:
        return np.zeros(len(table), dtype=np.int64)
    rule = Rule(cfg.data, cfg.train.batch_size)
    cells, of = np.unique(rule.cells(*(table[name].to_numpy() for name in COLUMNS)), return_inverse=True)
    found: np.ndarray = np.array([next((b for b, _ in rule.chances(int(cell))), -1) for cell in cells])[of]
    return found


def assign(table: Any, rule: Rule, seed: int) -> Assignment:
    """For a manifest's table, as `read_manifest` returns it."""
    keys, done = np.empty(len(table), dtype=np.uint64), 0
    for batch in table.select(["id", *COLUMNS]).to_batches(max_chunksize=1 << 18):
        ids, *columns = batch.columns
        part = keys[done : done + len(ids)]
        part[:] = rule.cells(*(column.to_numpy() for column in columns))
        part <<= np.uint64(32)
        if not rule.is_certain:
            part |= keyed_words(ids, seed, "bucket") >> np.uint64(32)
        done += len(ids)
    return Assignment(keys, rule.chances, len(rule.buckets))
