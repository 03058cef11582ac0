"""What a sample of the page is made of, as values of JSON; and the options of `stages.sample` that ask for the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.frozen.geometry import Geometry
from opensora_repro.sampling.chain import plan_chain
from opensora_repro.sampling.given import Reference, condition_lengths, parse_span, read_geometry
from opensora_repro.sampling.named_sizes import frames_of_seconds
from opensora_repro.sampling.source import ModelSource

START, END, AT, EXTEND, BEFORE, EDIT = "start", "end", "at", "extend", "before", "edit"
USES = {  # what is done with a given file -> in words
    START: "begin with it",
    END: "end with it",
    AT: "place it at a frame",
    EXTEND: "go on where it ends",
    BEFORE: "lead to its beginning",
    EDIT: "change it by the prompt",
}
OF_CLIPS = (EXTEND, BEFORE)  # which need an end or a beginning
MAX_TEXT, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 4000, 1000, 100.0, 2**31 - 1


@dataclass(frozen=True)
class GivenFile:
    """An upload or a result, and what is done with it. `at` and `part` count frames; `strength` 0 keeps them."""

    file: str  # its name in the browser's own folder
    name: str
    use: str
    at: int = 0
    part: str = ""  # START:STOP of a clip; all that fits
    strength: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Of one sample; sizes in pixels, `seconds` 0 for a picture."""

    run: str
    checkpoint: str
    prompt: str
    height: int
    width: int
    seconds: float
    steps: int
    guidance: float
    seed: int
    negative: str = ""
    average: bool = True  # of the weights, in place of the trained ones
    loop: bool = False
    paste: bool = False
    given: tuple[GivenFile, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        given = tuple(GivenFile(**one) for one in values.get("given", ()))
        return cls(**{**values, "given": given})


def number(value: Any, name: str, least: float, most: float) -> float:
    """A field's number. Raises ConfigError: whatever a browser sends arrives here."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not least <= found <= most:
        raise ConfigError(f"{name}: expected a number from {least:g} to {most:g}")
    return found


def whole(value: Any, name: str, least: int, most: int) -> int:
    return round(number(value, name, least, most))


def text(value: Any, name: str) -> str:
    """A field's text in one line. Raises ConfigError."""
    found = " ".join(value.split()) if isinstance(value, str) else ""
    if len(found) > MAX_TEXT:
        raise ConfigError(f"{name}: {len(found)} characters, at most {MAX_TEXT} are taken")
    return found


def options(settings: Settings, source: ModelSource, path_of: Callable[[str], Path]) -> list[str]:
    """The words that `stages.sample` takes for the settings, but for the source, --out and --device. ConfigError."""
    length, total = _length(settings, source)
    prompt = "label" if source.model.conditioning == "class" else "prompt"
    found = [
        f"--{prompt}={settings.prompt}",
        f"--height={settings.height}",
        f"--width={settings.width}",
        *length,
        f"--steps={settings.steps}",
        f"--guidance={settings.guidance:g}",
        f"--seed={settings.seed}",
    ]
    found += [f"--negative={settings.negative}"] if settings.negative else []
    found += [] if settings.average else ["--no-ema"]
    found += ["--loop"] if settings.loop else []
    found += ["--paste"] if settings.paste else []
    return found + _given(settings.given, source, total, path_of)


def _length(settings: Settings, source: ModelSource) -> tuple[list[str], int]:
    """Options that say how long, and the frames that come of them: the nearest number that the autoencoder takes."""
    if settings.seconds == 0 and not settings.loop:
        return ["--num-frames=1"], 1
    data, geometry = source.config.data, read_geometry(source.config.vae)
    num_frames = frames_of_seconds(source.config, source.model, settings.seconds)
    seconds = [f"--seconds={settings.seconds:g}"]
    if settings.loop:
        least = plan_chain(None, data.num_frames, condition_lengths(geometry, data.num_frames, None), loop=True)
        return (seconds, num_frames) if least is None or num_frames > least.total else ([], least.total)
    if num_frames > source.longest:
        return seconds, num_frames
    exact = nearest_exact(geometry, num_frames)
    return [f"--num-frames={exact}"], exact


def nearest_exact(geometry: Geometry, num_frames: int) -> int:
    distances = range(num_frames + geometry.period)
    candidates = (number for distance in distances for number in (num_frames - distance, num_frames + distance))
    return next(number for number in candidates if number > 0 and geometry.is_exact(number))


def total_frames(settings: Settings, source: ModelSource) -> int:
    """Frames of the whole video."""
    return _length(settings, source)[1]


def frames_of(path: Path, source: ModelSource) -> int:
    """Frames of a given file at the rate that the run is trained at. Raises ConfigError."""
    return len(Reference(path, source.config.data, path.name).frames)


def span_of(one: GivenFile, count: int, total: int) -> range:
    """Which of its `count` frames a clip gives to a video of `total`: the part that is told, or all that fits."""
    room = total - one.at if one.use == AT else total
    if not one.part:
        return range(max(1, min(count, room)))
    try:
        return parse_span(one.part).within(count, 1, one.name)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{one.name}: part {one.part!r}: expected START:STOP in frames, such as 0:8 or -8:") from None


def _given(given: Sequence[GivenFile], source: ModelSource, total: int, path_of: Callable[[str], Path]) -> list[str]:
    found: list[str] = []
    clips: dict[str, Path] = {}
    for one in given:
        path = path_of(one.file)
        if one.use in (START, END, AT):
            found.append(_keep(one, path, frames_of(path, source), total))
        elif one.use in clips:
            raise ConfigError(f"{one.name}: another file is to be used in this way, too; choose one")
        else:
            clips[one.use] = path
            if one.use in OF_CLIPS and frames_of(path, source) == 1:
                raise ConfigError(f"{one.name}: a picture has no end to go on from; let the video begin or end with it")
    strength = next((one.strength for one in given if one.use == EDIT), 0.0)
    if EDIT in clips:
        found += [f"--edit={clips[EDIT]}", f"--strength={strength:g}"]
    if EXTEND in clips and BEFORE in clips:
        return [*found, "--join", str(clips[EXTEND]), str(clips[BEFORE])]
    if EXTEND in clips:
        return [*found, f"--extend={clips[EXTEND]}"]
    return [*found, f"--extend={clips[BEFORE]}", "--before"] if BEFORE in clips else found


def _keep(one: GivenFile, path: Path, count: int, total: int) -> str:
    span = span_of(one, count, total)
    place = {START: "0", AT: str(one.at), END: f"-{len(span)}:" if count > 1 else "-1"}[one.use]
    return f"--keep={place}={path}[{span.start}:{span.stop}]@{one.strength:g}"


def places(settings: Settings, source: ModelSource, path_of: Callable[[str], Path]) -> list[tuple[str, range, bool]]:
    """For a time line: each given file's name, its frames of the video, and whether they are changed. ConfigError."""
    total, data = total_frames(settings, source), source.config.data
    window = data.num_frames if settings.loop or total > source.longest else total
    head, tail = condition_lengths(read_geometry(source.config.vae), window, None)
    found = []
    for one in settings.given:
        count = frames_of(path_of(one.file), source)
        length = len(span_of(one, count, total))
        spans = {
            START: range(length),
            END: range(total - length, total),
            AT: range(one.at, one.at + length),
            EXTEND: range(head),
            BEFORE: range(total - tail, total),
            EDIT: range(total),
        }
        found.append((one.name, spans[one.use], one.strength > 0))
    return found
