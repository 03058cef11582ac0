"""What fields of published datasets hold: captions, lists that are written out, times and spans."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from typing import Any

from opensora_repro.data.tables import is_missing

CAPTION_KEYS = ("caption", "text", "description", "captions", "texts", "prompt")  # of others, the first that is there
LONGEST_LIST = 1 << 16  # characters of a list of texts that is written out
LONGEST_LITERAL = 1 << 22  # characters of a list of spans or captions


def texts_in(value: Any) -> Iterator[str]:
    """Yield the captions that a table's field or a JSON value holds: text, bytes, a list of them, or an object.

    A CSV holds a list as Python or JSON writes it. Raises ValueError for what is no text.
    """
    if isinstance(value, bytes):
        value = _decoded(value)
    if isinstance(value, str) and (several := _written_list(value)) is not None:
        value = several
    if isinstance(value, list | tuple):
        for part in value[1:] if isinstance(value, tuple) else value:  # Parquet's maps are lists of (key, value)
            yield from texts_in(part)
    elif isinstance(value, dict):
        key = next((key for key in CAPTION_KEYS if value.get(key)), None)
        if key is None and not any(key in value for key in CAPTION_KEYS):
            raise ValueError(f"an object without {', '.join(CAPTION_KEYS)}")
        yield from texts_in(value[key]) if key else ()
    elif not is_missing(value):
        yield str(value)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("no UTF-8 text") from None


def _written_list(text: str) -> list[str] | None:
    """Return the texts of a list that is written out, None for other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > LONGEST_LIST:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = written_literal(text)
        found = found if repr(found) == text else None  # 'a' 'b' without a comma would become one
    return found if isinstance(found, list) and all(isinstance(part, str) for part in found) else None


def written_literal(value: Any) -> list[Any] | None:
    """Return a list, or the one that a text holds as Python writes it; None for what is none."""
    if isinstance(value, str) and len(value) <= LONGEST_LITERAL:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def span_of(times: Sequence[str | float]) -> tuple[float, float]:
    """Return the seconds of two times such as "0:01:02.5". Raises ValueError or TypeError for what is no span."""
    start, end = (_seconds(time) for time in times)
    if not 0 <= start < end:
        raise ValueError(f"from {start:g} to {end:g} seconds is no span")
    return start, end


def scene_span(clip: tuple[float, float], frames: Sequence[float], fps: float) -> tuple[float, float]:
    """Return the seconds of an HD-VG-130M scene: `frames` count from the start of its clip, -1 is the clip's end."""
    first, last = (float(frame) for frame in frames)
    start, end = clip
    return start + first / fps, end if last < 0 else start + last / fps


def _seconds(time: str | float) -> float:
    total = 0.0
    for part in str(time).split(":"):
        total = 60 * total + float(part)
    return total
