"""How alike two frames are, whether they show the same place, whether some are mixtures of others: by thumbnails."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from threading import get_ident

import cv2
import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

WIDTH, HEIGHT = 64, 36  # thumbnail, whatever the picture's shape: a search radius is then a share of the picture
COLOUR_SIZE = (16, 9)  # width and height of either colour plane's thumbnail
SAMPLED = 4  # rows of a picture that a thumbnail's row averages: all of them would take three times as long
BLOCK = 4  # thumbnail pixels a side that move together
RADIUS = 4  # thumbnail pixels that a block may move from frame to frame: a sixteenth of the width
ALIKE = 0.6  # correlation from which a region shows the same
ROWS, COLUMNS = 6, 8  # regions down and across
BOX = (WIDTH // COLUMNS, HEIGHT // ROWS)  # width and height of a region
TEXTURED = 4.0  # variance, in grey levels squared, below which a region is flat
BLACK, WHITE = 22, 235  # a flat region beyond these may hold anything, clipped
BORDER = 6  # grey levels within which a row of a border is even, and the same in both pictures
FEWEST = 16  # regions, a third of all, that must tell something: a shape on plain ground may be anywhere
RELIT = 4.0  # grey levels by which light changes a region at least
ZOOMS = (1.0, 1.15, 1.3, 1.5)
Rows = tuple[np.ndarray, np.ndarray]  # of Y, and of U above those of V: what a thumbnail averages
Picture = tuple[np.ndarray, np.ndarray]  # brightness uint8 [36, 64], colour differences uint8 [18, 16], one below other


def sampled(planes: list[np.ndarray]) -> Rows:
    """Take what a thumbnail averages of a frame's uint8 planes Y [H, W], U and V (of any size, both alike)."""
    return _sampled(planes[:1], WIDTH, HEIGHT), _sampled(planes[1:], *COLOUR_SIZE)


def thumbnails(frames: list[Rows]) -> Iterator[Picture]:
    """Yield the thumbnails of frames: several at a time cost far less than one by one."""
    for _, alike in groupby(frames, lambda rows: (rows[0].shape, rows[1].shape)):
        bright, colours = zip(*alike, strict=True)
        yield from zip(
            _shrink(bright, WIDTH, HEIGHT), _shrink(colours, COLOUR_SIZE[0], 2 * COLOUR_SIZE[1]), strict=True
        )


def _sampled(planes: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """Return evenly spaced rows of planes of one size, one below the other; small planes at the thumbnail's size."""
    rows, columns = planes[0].shape
    if rows < SAMPLED * height or columns < SAMPLED * width:
        return np.concatenate([cv2.resize(p, (width, height), interpolation=cv2.INTER_AREA) for p in planes])
    spaced = _spaced(rows, SAMPLED * height)
    return planes[0][spaced] if len(planes) == 1 else np.concatenate([plane[spaced] for plane in planes])


def _shrink(frames: tuple[np.ndarray, ...], width: int, height: int) -> np.ndarray:
    """Average rows of frames, all of one size, over areas [n, height, width]; by halving, which OpenCV does fastest."""
    tall = np.concatenate(frames)
    if tall.shape[1] > width:
        for _ in range(SAMPLED.bit_length() - 1):
            tall = cv2.resize(tall, (tall.shape[1] // 2, tall.shape[0] // 2), interpolation=cv2.INTER_AREA)
        tall = cv2.resize(tall, (width, len(frames) * height), interpolation=cv2.INTER_AREA)
    return tall.reshape(len(frames), height, width)


@lru_cache(maxsize=16)
def _spaced(total: int, count: int) -> np.ndarray:
    """Return `count` of `total` rows, each in the middle of its share."""
    return ((np.arange(count) + 0.5) * total / count).astype(np.intp)


class Recent:
    """The last thumbnails, by frame number."""

    def __init__(self) -> None:
        self.first = self.count = 0
        self.pictures: deque[Picture] = deque()
        # Any stretch of frames is a slice: when there is no room left, the rows still needed move to the front.
        self.origin = 0  # frame in the first row
        self.rows = np.empty((256, (HEIGHT // 2) * (WIDTH // 2)), np.float32)
        self.squares = np.empty(256, np.float32)

    def add(self, picture: Picture) -> None:
        if self.count - self.origin == len(self.rows):
            needed = slice(self.first - self.origin, None)
            grown = 2 * max(128, self.count - self.first)
            rows, squares = self.rows[needed], self.squares[needed]
            self.rows, self.squares = np.empty((grown, rows.shape[1]), np.float32), np.empty(grown, np.float32)
            self.rows[: len(rows)], self.squares[: len(rows)] = rows, squares
            self.origin = self.first
        row = picture[0][::2, ::2].reshape(-1).astype(np.float32) - 128
        self.rows[self.count - self.origin] = row
        self.squares[self.count - self.origin] = row @ row
        self.pictures.append(picture)
        self.count += 1

    def forget(self, frame: int) -> None:
        """Drop what is before a frame."""
        while self.first < frame:
            self.pictures.popleft()
            self.first += 1

    def __getitem__(self, frame: int) -> Picture:
        return self.pictures[frame - self.first]

    def mixture(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 [T]: how far frames start to end (both included) lie from the line between the two, and where.

        Distances are shares of that between the ends; the places on the line go from 0 to 1.
        """
        rows, squares = (a[start - self.origin : end - self.origin + 1] for a in (self.rows, self.squares))
        way = rows[-1] - rows[0]
        length = max(1.0, float(way @ way))  # no frame lies near the line between two that are the same
        # einsum instead of @, which would start threads for this little
        along, from_start = np.einsum("tn,n->t", rows, way), np.einsum("tn,n->t", rows, rows[0])
        shares = (along - along[0]) / length
        moved = (squares - 2 * from_start + squares[0]) / length
        return np.sqrt(np.maximum(0, moved - shares * shares)), shares


def residual(before: Picture, after: Picture) -> float:
    """Return how badly motion explains `after` from `before`, in grey levels; colour adds a quarter at most.

    The limit is for encoders that let the colours of a picture drift and put them right at a key frame.
    """
    bright = unexplained(before[0], after[0], RADIUS, BLOCK)
    return bright + 0.5 * min(unexplained(before[1], after[1], 1, 1), 0.5 * bright)


def distance(one: Picture, other: Picture) -> float:
    """Return the smaller of both residuals: what comes into view or goes out of it is explained one way only."""
    return min(residual(one, other), residual(other, one))


def unexplained(before: np.ndarray, after: np.ndarray, radius: int, block: int) -> float:
    """Return the mean difference that is left of `after` when each block takes its best match within `radius`."""
    room = _matching(radius, after.shape, get_ident())
    cv2.copyMakeBorder(before, radius, radius, radius, radius, cv2.BORDER_REPLICATE, dst=room.padded)
    np.copyto(room.across, room.windows)
    np.copyto(room.shifted, room.down)
    np.copyto(room.copies, after)
    left = cv2.absdiff(room.all_shifted, room.all_copies, dst=room.apart)
    for _ in range(block.bit_length() - 1):  # halving is many times faster than a quarter at once
        left = cv2.resize(left, (left.shape[1] // 2, left.shape[0] // 2), interpolation=cv2.INTER_AREA)
    best = left.reshape((2 * radius + 1) ** 2, -1).min(axis=0)
    return float(cv2.norm(best, cv2.NORM_L1) / best.size)  # the mean, which NumPy takes longer for


class _Matching:
    """Room for block matching, and views of it: getting them anew costs more than the matching itself."""

    def __init__(self, radius: int, shape: tuple[int, int]) -> None:
        (height, width), side = shape, 2 * radius + 1
        tall = height + 2 * radius
        self.padded = np.empty((tall, width + 2 * radius), np.uint8)
        self.across = np.empty((side, tall, width), np.uint8)  # shifts across, whose shifts down lie in one piece
        self.windows = as_strided(self.padded, self.across.shape, (1, self.padded.shape[1], 1))
        self.down = as_strided(self.across, (side, side, height * width), (tall * width, width, 1))
        self.all_shifted, self.all_copies, self.apart = np.empty((3, side * side * height, width), np.uint8)
        self.shifted, self.copies = self.all_shifted.reshape(self.down.shape), self.all_copies.reshape(-1, *shape)


@lru_cache(maxsize=16)
def _matching(radius: int, shape: tuple[int, int], _thread: int) -> _Matching:
    return _Matching(radius, shape)


def changed(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of the picture, in regions, that shows something else: neither the same nor brighter or darker.

    A title that fades in changes some regions, a dissolve all of them.
    """
    a, b = (np.float32(p).reshape(4, HEIGHT // 4, 4, WIDTH // 4).swapaxes(1, 2).reshape(16, -1) for p in (one, other))
    differ = np.abs(a - b).mean(axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    noise = 1.0  # grey levels squared: so flat regions do not correlate
    likeness = (a * b).mean(axis=1) / (np.sqrt((a * a).mean(axis=1) * (b * b).mean(axis=1)) + noise)
    return float(((likeness < ALIKE) & (differ > 4)).mean())


# ---- region by region: whether two pictures show the same place
#
# A region keeps its structure where pixels, each less the region's mean, still correlate. Lamps, explosions, exposure
# and white balance change how bright a region is and how strong its contrast, never what lies beside what in it.
# Regions that tell nothing are left out: flat in both pictures, clipped to black or white in one, or part of borders
# that both share.


def kept(one: np.ndarray, other: np.ndarray, radius: int = 4) -> float:
    """Return the share of regions that keep their structure from one brightness thumbnail to the other.

    The picture as a whole may have moved by `radius` thumbnail pixels, and each region by one more. Unlike pictures
    reach a half by chance at most.
    """
    alike, known = _compare(one, other, radius)
    side = 2 * radius + 1
    dilated = cv2.dilate(alike.reshape(side, side, -1).view(np.uint8), np.ones((3, 3), np.uint8)).reshape(known.shape)
    hits = (dilated.view(bool) & known).sum(axis=1)
    count = known.sum(axis=1)
    enough = count >= max(FEWEST, count.max() / 2)
    return float((hits / np.maximum(1, count))[enough].max(initial=0.0))


def is_kept_by_camera(one: np.ndarray, other: np.ndarray, share: float) -> bool:
    """Whether `kept` reaches a share for a camera that had time to move, with either picture enlarged as by a zoom."""
    pairs = [(_enlarged(one, zoom), other) for zoom in ZOOMS] + [(one, _enlarged(other, zoom)) for zoom in ZOOMS[1:]]
    return any(kept(a, b, radius=8) >= share for a, b in pairs)


def relit(one: Picture, other: Picture) -> float:
    """Return the share of regions that keep their structure and whose brightness or colour changes more than that."""
    correlation, known, variance = _correlate(one[0], other[0], 1)
    centre = known[len(known) // 2]
    if centre.sum() < FEWEST:
        return 0.0
    best = correlation.max(axis=0)
    left = np.sqrt(variance * (1 - best.clip(0, 1) ** 2))  # grey levels (standard deviation) that shifts leave
    change = np.abs(_levels(one) - _levels(other)).max(axis=0)
    return float(((best >= ALIKE) & centre & (change > left) & (change > RELIT)).sum() / centre.sum())


def is_detailed(*pictures: np.ndarray) -> bool:
    """Whether enough regions of each hold something: a shape that moves on plain ground is as if scrolled."""
    for picture in pictures:
        values = picture.astype(np.float32)
        mean = _means(values)
        if ((_means(values * values) - mean * mean) >= TEXTURED).sum() < FEWEST:
            return False
    return True


def scrolled(one: np.ndarray, other: np.ndarray) -> float:
    """Return how much of the change is left where one picture goes on above or below the other, as a page does.

    A share of the change, of the best of all steps by which no more than two thirds leave the picture; 1 where what
    both hold shows nothing.
    """
    one, other = cv2.blur(one, (1, 3)), cv2.blur(other, (1, 3))  # a step need not be of whole thumbnail pixels
    change, least = max(1.0, cv2.norm(one, other, cv2.NORM_L1) / one.size), 1.0
    for step in range(RADIUS, 2 * HEIGHT // 3 + 1):
        for above, below in ((one, other), (other, one)):
            left = cv2.norm(above[step:], below[:-step], cv2.NORM_L1) / below[:-step].size / change
            if left < least and cv2.meanStdDev(below[:-step])[1][0, 0] ** 2 > TEXTURED:
                least = left
    return least


def inset(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return how much of the change lies in one upright rectangle, and how much of what is around that is kept.

    Captions, logos, windows and pictures in pictures change rectangles, and nothing around; what a camera sees does
    not. Both are shares; 0 where the rectangle is more than half of the picture, has no corners, as things that move
    have none, or shows all that there is.
    """
    change = np.maximum(_least_change(one, other), _least_change(other, one))
    marked = change > max(RELIT, float(change.mean()))
    top, bottom, left, right = _densest(marked)
    corners = marked[[top, top, bottom - 1, bottom - 1], [left, right - 1, left, right - 1]].sum()
    if (bottom - top) * (right - left) > change.size / 2 or corners < 2:
        return 0.0, 0.0
    inside = np.zeros_like(one)
    inside[top:bottom, left:right] = 255
    if cv2.meanStdDev(one, mask=~inside)[1][0, 0] ** 2 < TEXTURED:
        return 0.0, 0.0
    alike, known = _compare(one, other, 1)
    around = known[len(known) // 2] & (_means(inside).ravel() == 0)
    share = change[top:bottom, left:right].sum() / max(1, change.sum())
    return float(share), float(np.asarray(alike.any(axis=0))[around].mean()) if around.any() else 0.0


def _compare(one: np.ndarray, other: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bool [shifts, regions]: where `other` is as `one` shifted, and where that tells something."""
    correlation, known, _ = _correlate(one, other, radius)
    return correlation >= ALIKE, known


def _correlate(one: np.ndarray, other: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how the regions of `other` correlate with `one` shifted, float32 [shifts, regions].

    Also bool, where that tells something, and float32 [regions], the variances of `other`.
    """
    side = 2 * radius + 1
    padded = cv2.copyMakeBorder(one.astype(np.float32), radius, radius, radius, radius, cv2.BORDER_REPLICATE)
    fixed = other.astype(np.float32)
    boxes = (cv2.boxFilter(values, -1, BOX, anchor=(0, 0)) for values in (padded, padded * padded))
    down, right = padded.strides
    steps = (down, right, BOX[1] * down, BOX[0] * right)
    mean, square = (as_strided(box, (side, side, ROWS, COLUMNS), steps).reshape(-1, ROWS, COLUMNS) for box in boxes)
    fixed_mean = _means(fixed)
    variance = np.maximum(0, square - mean * mean)
    fixed_variance = np.maximum(0, _means(fixed * fixed) - fixed_mean * fixed_mean)
    room = _shifts(radius, get_ident())
    np.copyto(room.across, as_strided(padded, room.across.shape, (right, down, right)))
    np.multiply(room.down, fixed.reshape(-1), out=room.products)
    halved = cv2.resize(room.tall, (WIDTH // 2, len(room.tall) // 2), interpolation=cv2.INTER_AREA)  # the fastest first
    together = _means(halved) - mean * fixed_mean
    correlation = together / (np.sqrt(variance * fixed_variance) + 1)  # plus a grey level's noise
    flat, fixed_flat = variance < TEXTURED, fixed_variance < TEXTURED
    clipped = flat & ((mean < BLACK) | (mean > WHITE)) | fixed_flat & ((fixed_mean < BLACK) | (fixed_mean > WHITE))
    known = ~(flat & fixed_flat) & ~clipped & (_inner(one, other) & _visible(radius))
    return correlation.reshape(side * side, -1), known.reshape(side * side, -1), fixed_variance.ravel()


class _Shifts:
    """Room for a picture times all shifts of another, kept because getting it anew takes longer than the rest."""

    def __init__(self, radius: int) -> None:
        side, tall = 2 * radius + 1, HEIGHT + 2 * radius
        self.across = np.empty((side, tall, WIDTH), np.float32)  # shifts across, whose shifts down lie in one piece
        column, row, pixel = self.across.strides
        self.down = as_strided(self.across, (side, side, HEIGHT * WIDTH), (row, column, pixel))
        self.products = np.empty(self.down.shape, np.float32)
        self.tall = self.products.reshape(-1, WIDTH)


@lru_cache(maxsize=16)
def _shifts(radius: int, _thread: int) -> _Shifts:
    return _Shifts(radius)


def _means(tall: np.ndarray) -> np.ndarray:
    """Return the regions' means [n, ROWS, COLUMNS] of n pictures of any size, one below the other."""
    height = ROWS * len(tall) * WIDTH // (HEIGHT * tall.shape[1])
    return cv2.resize(tall, (COLUMNS, height), interpolation=cv2.INTER_AREA).reshape(-1, ROWS, COLUMNS)


def _levels(picture: Picture) -> np.ndarray:
    """Return the regions' mean brightness and colour differences, float32 [3, regions]."""
    blue, red = np.split(np.float32(picture[1]), 2)
    planes = (np.float32(picture[0]), blue, red)
    return np.stack([cv2.resize(p, (COLUMNS, ROWS), interpolation=cv2.INTER_AREA).ravel() for p in planes])


@lru_cache(maxsize=4)
def _visible(radius: int) -> np.ndarray:
    """Return bool [shifts, ROWS, COLUMNS]: the regions that are in the picture before the shift, by four fifths."""
    side = 2 * radius + 1
    padded = np.pad(np.ones((HEIGHT, WIDTH), np.float32), radius)
    views = sliding_window_view(padded, (HEIGHT, WIDTH)).reshape(-1, WIDTH)
    return (_means(views) > 0.8).reshape(side * side, ROWS, COLUMNS)


def _inner(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return bool [ROWS, COLUMNS]: the regions without letterbox or pillarbox."""
    inner, whole = np.ones((HEIGHT, WIDTH), np.float32), True
    low, high = cv2.min(one, other), cv2.max(one, other)
    for axis, part in ((1, inner), (0, inner.T)):
        spread = cv2.subtract(cv2.reduce(high, axis, cv2.REDUCE_MAX), cv2.reduce(low, axis, cv2.REDUCE_MIN)).ravel()
        if spread[0] > BORDER and spread[-1] > BORDER:
            continue
        whole, uneven = False, np.flatnonzero(spread > BORDER)
        part[: uneven[0] if len(uneven) else None] = 0
        part[uneven[-1] + 1 if len(uneven) else 0 :] = 0
    return np.ones((ROWS, COLUMNS), bool) if whole else _means(inner)[0] > 0.99


def _enlarged(picture: np.ndarray, zoom: float) -> np.ndarray:
    if zoom == 1:
        return picture
    top, left = (round(size * (1 - 1 / zoom) / 2) for size in picture.shape)
    return cv2.resize(picture[top : HEIGHT - top, left : WIDTH - left], (WIDTH, HEIGHT))


def _least_change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the difference of each pixel of `other` from the pixel of `one` there, or beside it, that is most like."""
    padded = cv2.copyMakeBorder(one, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    views = sliding_window_view(padded, (HEIGHT, WIDTH)).reshape(-1, HEIGHT, WIDTH)
    return np.min([cv2.absdiff(np.ascontiguousarray(view), other) for view in views], axis=0)


def _densest(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of the rectangle with the most marked pixels above those not marked.

    For all pairs of rows at once: the sums of columns so far, each above the least of those before it.
    """
    sums = np.vstack([np.zeros((1, WIDTH), np.int32), np.where(mask, 1, -1).cumsum(axis=0, dtype=np.int32)])
    top, bottom = _rows_between()
    before = np.zeros((len(top), WIDTH + 1), np.int32)  # each column's sum with all before it
    np.cumsum(sums[bottom] - sums[top], axis=1, out=before[:, 1:])
    pair, column = divmod(int((before[:, 1:] - np.minimum.accumulate(before, axis=1)[:, :-1]).argmax()), WIDTH)
    left = column - int(before[pair, column::-1].argmin())
    return int(top[pair]), int(bottom[pair]), left, column + 1


@lru_cache(maxsize=1)
def _rows_between() -> tuple[np.ndarray, np.ndarray]:
    """Return top and bottom of all pairs of rows."""
    top, bottom = np.triu_indices(HEIGHT + 1, 1)
    return top, bottom
