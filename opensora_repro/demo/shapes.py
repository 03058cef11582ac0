"""The demo's little world: one coloured shape moving across a dark plain background, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 20, 20),
    "green": (20, 235, 20),
    "blue": (20, 20, 235),
    "yellow": (235, 235, 20),
    "magenta": (235, 20, 235),
    "cyan": (20, 235, 235),
}
# That no stage of the demo trains on, though its tokenizer knows them
OTHER_COLOURS: dict[str, tuple[int, int, int]] = {
    "orange": (235, 130, 20),
    "white": (235, 235, 235),
    "pink": (235, 130, 180),
    "lime": (130, 235, 20),
    "azure": (20, 130, 235),
    "violet": (130, 20, 235),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HELD_OUT_MODULUS = 7
# Width and height of pictures as shares of the longer side, in which all lengths here are measured: a shape is as large
# in pixels in each of them.
FORMATS: dict[str, tuple[float, float]] = {"1:1": (1.0, 1.0), "3:2": (1.0, 2 / 3), "2:3": (2 / 3, 1.0)}


@dataclass(frozen=True)
class Motion:
    """What a caption says: colour, shape and direction by name, and whether the shape comes back."""

    colour: str
    shape: str
    direction: str
    returns: bool = False

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}{' and back' if self.returns else ''}"

    @property
    def held_out(self) -> bool:
        """True for the combinations that no stage ever trains on."""
        indexes = list(COLOURS).index(self.colour), SHAPES.index(self.shape), list(DIRECTIONS).index(self.direction)
        return sum(indexes) % HELD_OUT_MODULUS == 0


@dataclass(frozen=True)
class Scene:
    """One shot: a motion with its numbers. Lengths are shares of the picture's longer side."""

    motion: Motion
    picture: tuple[float, float]  # width and height
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    background: tuple[int, int, int]

    def frames(self, *, count: int, size: int) -> np.ndarray:
        """Return uint8 [count, H, W, 3], the centre travelling evenly to `end`; `size` is the longer side.

        Of a motion that returns, it travels to `end` and back to `start`.
        """
        shares = np.linspace(0.0, 1.0, count)
        if self.motion.returns:
            shares = 1 - np.abs(2 * shares - 1)
        centres = [tuple(np.array(self.start) * (1 - s) + np.array(self.end) * s) for s in shares]
        width, height = pixels(self.picture, size)
        return np.stack(
            [render(self.motion, (x, y), self.radius, self.background, width=width, height=height) for x, y in centres]
        )


def pixels(picture: tuple[float, float], size: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side is `size`."""
    width, height = (round(share * size) for share in picture)
    return width, height


def motions(*, held_out: bool | None = None, returns: bool = False) -> list[Motion]:
    """Every combination in the language's order; only the held-out (or trained) ones if asked."""
    everything = [Motion(c, s, d, returns) for c in COLOURS for s in SHAPES for d in DIRECTIONS]
    return [m for m in everything if held_out is None or m.held_out == held_out]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline of a shape of about the same area for each name, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":  # pointing up, centred on its middle height
        side = (np.abs(x) * 2.0 - y - 1.1 * radius) / np.sqrt(5.0)
        return np.maximum(side, y - 1.1 * radius)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render(
    motion: Motion,
    centre: tuple[float, float],
    radius: float,
    background: tuple[int, int, int],
    *,
    width: int,
    height: int,
    colour: Sequence[int] | None = None,
    size: int | None = None,
) -> np.ndarray:
    """Draw one anti-aliased frame, uint8 [height, width, 3].

    `colour`: another than the motion's; `size`: the pixels that a length of 1 has, if not those of the longer side.
    """
    size = size or max(width, height)
    colour = (COLOURS | OTHER_COLOURS)[motion.colour] if colour is None else colour
    x = (np.arange(width, dtype=np.float32) + 0.5) / size - centre[0]
    y = (np.arange(height, dtype=np.float32) + 0.5) / size - centre[1]
    distance = signed_distance(motion.shape, x[None, :], y[:, None], radius)
    coverage = np.clip(0.5 - distance * size, 0.0, 1.0)[..., None]
    picture = coverage * np.array(colour) + (1.0 - coverage) * np.array(background)
    return np.round(picture).astype(np.uint8)


def draw_scene(motion: Motion, rng: np.random.Generator, picture: tuple[float, float] = FORMATS["1:1"]) -> Scene:
    """Choose position, size, path and background for a motion.

    The centre starts a little behind the picture's middle and travels, about 0.42 of the side in a square picture, on
    until the shape is just short of the border that the caption names. Were the paths centred, neither the word nor the
    moment alone would say anything about the place, and a small model would need many steps to find out that both
    together do.
    """
    step = np.array(DIRECTIONS[motion.direction])
    across = np.array([step[1] != 0, step[0] != 0]) * rng.uniform(-0.04, 0.04)
    middle = np.array(picture) / 2 + across
    border = float(np.abs(step) @ np.array(picture)) / 2  # how far it is from the middle
    start = middle - step * rng.uniform(0.10, 0.12)
    end = middle + step * (border - rng.uniform(0.18, 0.20))
    grey = rng.integers(8, 40)
    tint = rng.integers(-6, 7, size=3)
    r, g, b = (int(v) for v in np.clip(grey + tint, 0, 48))
    return Scene(
        motion=motion,
        picture=picture,
        start=(float(start[0]), float(start[1])),
        end=(float(end[0]), float(end[1])),
        radius=float(rng.uniform(0.155, 0.165)),
        background=(r, g, b),
    )


def training_scenes(
    repeats: int, *, seed: int, picture: tuple[float, float] = FORMATS["1:1"], returns: bool = False
) -> Iterator[Scene]:
    """`repeats` scenes of every trained motion, shuffled so that neighbours differ in shape or colour."""
    rng = np.random.default_rng(seed)
    allowed = motions(held_out=False, returns=returns)
    previous: Motion | None = None
    for _ in range(repeats):
        waiting = [allowed[i] for i in rng.permutation(len(allowed))]
        while waiting:
            index = next((i for i, m in enumerate(waiting) if previous is None or m.colour != previous.colour), 0)
            previous = waiting.pop(index)
            yield draw_scene(previous, rng, picture)
