"""A table's columns as typed values, computed on record batches: numbers, text and truth values.

A missing value is null, whichever way the table spells it; where it follows from other columns, `duration` is one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opensora_repro.errors import DataError

NUMBER, TEXT, TRUTH, NULL = "a number", "text", "a truth value", "always missing"


@dataclass(frozen=True)
class Value:
    """A column, or what an expression makes of some; `of` computes it from a batch: an array, or one scalar."""

    kind: str
    of: Callable[[Any], Any]
    columns: frozenset[str] = field(default_factory=frozenset)  # of the file, that it reads
    constant: Any = None  # of a literal


def column_of(name: str, schema: Any) -> Value:
    """Return a column by name; `duration` (seconds) follows from others where there is no such column."""
    if name in schema.names:
        kind = _kind(schema.field(name).type)
        if kind is None:
            raise DataError(f"column {name} holds {schema.field(name).type}, which rules cannot use")
        return Value(kind, lambda batch: _cleaned(batch.column(name), kind), frozenset((name,)))
    if name == "duration" and (derived := _duration(schema)):
        return derived
    close = difflib.get_close_matches(name, [*schema.names, "duration"], n=1, cutoff=0.5)
    hint = f", did you mean {close[0]}?" if close else ""
    raise DataError(f"no column {name}{hint or ' (has ' + ', '.join(schema.names) + ')'}")


def _duration(schema: Any) -> Value | None:
    """Seconds: num_frames / fps, or else end_time - start_time; 0 for an image."""
    import pyarrow.compute as pc

    names = set(schema.names)
    parts: list[Value] = []
    if {"num_frames", "fps"} <= names:
        frames, fps = column_of("num_frames", schema), column_of("fps", schema)

        def played(batch: Any) -> Any:
            rate = fps.of(batch)
            return pc.if_else(pc.greater(rate, 0.0), pc.divide(frames.of(batch), rate), None)

        parts.append(Value(NUMBER, played, frames.columns | fps.columns))
    if {"start_time", "end_time"} <= names:
        start, end = column_of("start_time", schema), column_of("end_time", schema)
        parts.append(
            Value(NUMBER, lambda batch: pc.subtract(end.of(batch), start.of(batch)), start.columns | end.columns)
        )
    if "num_frames" in names:
        count = column_of("num_frames", schema)
        still = Value(NUMBER, lambda batch: pc.if_else(pc.equal(count.of(batch), 1.0), 0.0, None), count.columns)
        parts.append(still)
    if not names >= {"start_time", "end_time"} and not names >= {"num_frames", "fps"}:
        return None
    columns = frozenset[str]().union(*(part.columns for part in parts))
    return Value(NUMBER, lambda batch: pc.coalesce(*(part.of(batch) for part in parts)), columns)


def _kind(kind: Any) -> str | None:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_boolean(kind):
        return TRUTH
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return NUMBER
    if types.is_string(kind) or types.is_large_string(kind):
        return TEXT
    return NULL if types.is_null(kind) else None


def _cleaned(array: Any, kind: str) -> Any:
    """Numbers as float64 with NaN as null (it is how tables made of floats spell a missing value); text as string."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kind == NUMBER:
        array = array.cast(pa.float64())
        return pc.if_else(pc.is_nan(array), None, array)
    return array.cast(pa.string()) if kind == TEXT else array


def whole(value: Any, batch: Any) -> Any:
    """An array of the batch's length, also where the value is one scalar."""
    import pyarrow as pa

    return pa.repeat(value, batch.num_rows) if isinstance(value, pa.Scalar) else value


def truths(rule: Value, batch: Any) -> Any:
    """Return the rule's truth values as a boolean array of the batch's length, with nulls where it cannot tell."""
    return whole(rule.of(batch), batch)


def numbers(value: Value, batch: Any) -> Any:
    """Return a numeric value as a float64 array of the batch's length, with nulls where it is missing."""
    return whole(value.of(batch), batch)
