"""Values put into a TOML file's text, everything else as it stands: comments, order, blank lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from opensora_repro.config.sections import ConfigError


def find(lines: Sequence[str], header: int, key: str) -> tuple[int, int] | None:
    """First and last line (exclusive) of a key in the section whose header is there; None where it is missing."""
    for start in range(header + 1, len(lines)):
        if lines[start].lstrip().startswith("["):
            return None
        if re.match(rf"\s*{key}\s*=", lines[start]):
            return start, next(end for end in range(start + 1, len(lines) + 1) if _is_toml(lines[start:end]))
    return None


def _is_toml(lines: Sequence[str]) -> bool:
    try:
        tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return False
    return True


def with_batch_sizes(text: str, batch_sizes: Sequence[int | None]) -> str:
    """The config with these batch sizes of its buckets, or without any with the one of `[train]`.

    Buckets are `[[data.buckets]]`, or rows `{ ... }` of `buckets` in `[data]`. None: a bucket's stays as it stands.
    Raises ConfigError where they are written in another way.
    """
    expected = tomllib.loads(text)
    buckets = expected.get("data", {}).get("buckets", [])
    tables: list[dict[str, Any]] = buckets or [expected.setdefault("train", {})]
    for table, batch_size in zip(tables, batch_sizes, strict=False):
        if batch_size is not None:
            table["batch_size"] = batch_size
    lines = text.splitlines(keepends=True)
    pattern = r"\s*\[\[\s*data\s*\.\s*buckets\s*\]\]" if buckets else r"\s*\[\s*train\s*\]"
    headers = [number for number, line in enumerate(lines) if re.match(pattern, line)]
    if buckets and not headers:
        lines = _with_rows(lines, batch_sizes)
    if not buckets and not headers:
        headers, lines = [len(lines) + 1], [*lines, "\n", "[train]\n"]
    for header, batch_size in reversed(list(zip(headers, batch_sizes, strict=False))):
        if batch_size is None:
            continue
        place = find(lines, header, "batch_size")
        if place is None:
            _insert(lines, header, f"batch_size = {batch_size}")
        else:
            lines[place[0]] = re.sub(r"(=\s*)[\w+]+", rf"\g<1>{batch_size}", lines[place[0]], count=1)
    found = "".join(lines)
    if len(tables) != len(batch_sizes) or not _is_toml([found]) or tomllib.loads(found) != expected:
        rows = "[[data.buckets]] with a line for each key, or buckets = [{ ... }, ...] in [data]"
        where = rows if buckets else "[train] with a line batch_size = N"
        raise ConfigError(f"the batch sizes cannot be written into the config: expected {where}")
    return found


def _with_rows(lines: list[str], batch_sizes: Sequence[int | None]) -> list[str]:
    """Lines with the batch sizes in the inline tables of `buckets` in `[data]`."""
    header = next((number for number, line in enumerate(lines) if re.match(r"\s*\[\s*data\s*\]", line)), len(lines))
    place = find(lines, header, "buckets")
    if place is None:
        return lines
    sizes = iter(batch_sizes)

    def put(row: re.Match[str]) -> str:
        size = next(sizes, None)
        if size is None:
            return row[0]
        text, found = re.subn(r"\b(batch_size\s*=\s*)[\w+]+", rf"\g<1>{size}", row[0])
        return text if found else re.sub(r"\s*\}$", f", batch_size = {size} }}", row[0])

    first, end = place
    return [*lines[:first], re.sub(r"\{[^{}]*\}", put, "".join(lines[first:end])), *lines[end:]]


def _insert(lines: list[str], header: int, text: str) -> None:
    """As the last key of a section."""
    later = range(header + 1, len(lines))
    end = next((number for number in later if lines[number].lstrip().startswith("[")), len(lines))
    while not lines[end - 1].split("#")[0].strip():
        end -= 1
    before = lines[end - 1].rstrip("\r\n")
    newline = lines[end - 1][len(before) :] or "\n"  # the file's last line may have none
    lines[end - 1 : end] = [before + newline, before[: len(before) - len(before.lstrip())] + text + newline]
