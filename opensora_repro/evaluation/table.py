"""DIR/evaluation.json and DIR/evaluation.md: checkpoints side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_repro.config.sections import HIGHER_IS_BETTER, LOWER_IS_BETTER
from opensora_repro.files import write_text

JSON_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"
Metrics = Mapping[str, Any]  # by name: a number, or {"value", "low", "high"}


def write_evaluation(out: Path, manifest: str, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Write both files; return the table."""
    content = {"manifest": manifest, "checkpoints": list(checkpoints)}
    write_text(out / JSON_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    table = as_table(checkpoints)
    write_text(out / TABLE_FILE, table)
    return table


def value_of(found: Any) -> float:
    return float(found["value"] if isinstance(found, Mapping) else found)


def as_table(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row a metric; the best of several in bold, where the metric has a better."""
    names = list(dict.fromkeys(name for of in checkpoints for name in of["metrics"]))
    head = ["metric", *(of["name"] for of in checkpoints)]
    rows = [[name, *_cells(name, [of["metrics"].get(name) for of in checkpoints])] for name in names]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = list(dict.fromkeys(note for of in checkpoints for note in of["notes"]))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _cells(name: str, found: Sequence[Any]) -> list[str]:
    values = [None if cell is None else value_of(cell) for cell in found]
    there = {value for value in values if value is not None}
    best = None
    if len(there) > 1:
        best = min(there) if better_lower(name) else max(there) if better_higher(name) else None
    return [_cell(cell, bold=value is not None and value == best) for cell, value in zip(found, values, strict=True)]


def better_lower(name: str) -> bool:
    return name.split("@")[0] in LOWER_IS_BETTER


def better_higher(name: str) -> bool:
    return name.split("@")[0] in HIGHER_IS_BETTER or name.startswith("vbench/")


def _cell(found: Any, *, bold: bool) -> str:
    if found is None:
        return "-"
    text = f"{value_of(found):.4g}"
    text = f"**{text}**" if bold else text
    if isinstance(found, Mapping):
        text += f" ({found['low']:.3g} to {found['high']:.3g})"
    return text
