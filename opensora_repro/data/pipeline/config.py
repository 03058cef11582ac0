"""The TOML file of a whole line of dataset tools, checked against the tools' own options before anything runs.

    input = "videos"
    out = "data/mine"

    [run]
    workers = 4

    [split]
    min_frames = 16

Each section is a tool, or TOOL-NAME where a tool is used twice; they run in the file's order. A key is one of the
tool's long options with _ for -, true or false for those that take no value, a list for those that may be given again.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError, read_toml, toml_value
from opensora_repro.data.jobs.run import RunnerArguments
from opensora_repro.data.options import Option, options_in
from opensora_repro.errors import DataError
from opensora_repro.files import one_line
from opensora_repro.storage.addresses import AddressRefused, is_address, place

RUN, REPORT = "run", "report"  # sections that are no stage: options of all tools that have them; of the page at the end
TOP = ("input", "out")
AS_USUAL = ("--workers=0",)  # each tool's own default
RUNNER = ("workers", "runner", "address", "cpus", "gpus", "memory", "gpu_nodes")
OWN = ("out",)  # options that the line sets itself


@dataclass(frozen=True)
class Step:
    """One tool's turn: its section's name, the tool, and its options as a command line has them."""

    name: str
    tool: str
    options: tuple[str, ...]
    runner: tuple[str, ...]  # options on which the outcome does not depend


@dataclass(frozen=True)
class Line:
    """A whole line: where it begins, where it ends, and its steps in order."""

    input: str
    out: str
    steps: tuple[Step, ...]
    report: Step


def load_line(
    path: str | Path,
    overrides: Sequence[str],
    tools: Mapping[str, type],
    report: type,
    *,
    out: str | None = None,
) -> Line:
    """Read a line's config; `overrides` are `section.key=value`.

    `tools` are the dataclasses of the tools' options by name, `report` that of the page. Raises DataError, in one line
    that names the section and the key, and the nearest that there is.
    """
    try:
        table = read_toml(path)
    except ConfigError as error:
        raise DataError(str(error)) from None
    sections = {name: dict(value) for name, value in table.items() if isinstance(value, dict)}
    plain = {name: value for name, value in table.items() if not isinstance(value, dict)}
    where = one_line(path)
    for name in plain:
        if name not in TOP:
            raise DataError(f"{where}: unknown key {one_line(name)}; did you mean {nearest(name, [*TOP, *tools])}?")
    for text in overrides:
        _override(text, plain, sections)
    if out is not None:
        plain["out"] = out
    for name in TOP:
        if not isinstance(plain.get(name), str) or not plain[name]:
            raise DataError(f"{where}: {name} = {_short(plain.get(name))}: expected a path, such as {name} = 'videos'")
    known = {**tools, RUN: RunnerArguments, REPORT: report}
    tool_of = {name: _tool_of(where, name, known) for name in sections}
    run = options_of(f"{where}: [{RUN}]", sections.get(RUN, {}), known[RUN])
    steps = [
        Step(name, tool_of[name], *_with_run(f"{where}: [{name}]", content, known[tool_of[name]], run))
        for name, content in sections.items()
        if name not in (RUN, REPORT)
    ]
    if not steps:
        raise DataError(f"{where}: no stage; expected sections such as [split], of {', '.join(tools)}")
    here = {
        key: texts for key, texts in run.items() if key == "workers"
    }  # few pictures: no cluster is started for them
    page = _with_run(f"{where}: [{REPORT}]", sections.get(REPORT, {}), report, here)
    source, made = (_place(where, name, plain[name]) for name in TOP)
    return Line(source, made, tuple(steps), Step(REPORT, REPORT, *page))


def _place(where: str, name: str, text: str) -> str:
    try:
        return os.fspath(place(text)) if is_address(text) else os.path.expanduser(text)
    except AddressRefused as error:
        raise DataError(f"{where}: {name} = {error.filename}: {error.strerror}") from None


def options_of(where: str, content: Mapping[str, Any], tool: type) -> dict[str, tuple[str, ...]]:
    """Return the arguments of a section's keys, by key, in the file's order. Raises DataError."""
    options = keys_of(tool)
    found = {}
    for key, value in content.items():
        if key not in options:
            guess = f"; did you mean {nearest(key, options)}?" if options else "; it takes none"
            raise DataError(f"{where}: unknown key {one_line(key)}{guess}")
        found[key] = tuple(_arguments(f"{where}: {key} = {_short(value)}", options[key], value))
    return found


def keys_of(tool: type) -> dict[str, Option]:
    """Return the options of a tool that its section may have, by key."""
    options = {one.flag.removeprefix("--").replace("-", "_"): one for one in options_in(tool) if one.flag[0] == "-"}
    return {key: one for key, one in options.items() if key not in OWN}


def nearest(name: str, known: Collection[str]) -> str:
    """Return the one of the known names that is the most alike."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _arguments(where: str, option: Option, value: Any) -> list[str]:
    """Return a key's value as arguments."""
    if option.kind is bool and not isinstance(value, bool):
        raise DataError(f"{where}: expected true or false")
    if isinstance(value, bool) and (option.kind is bool or option.how.get("nargs") == "?"):
        return [option.flag] if value else []
    several = option.how.get("action") == "append" and isinstance(value, list)
    return [f"{option.flag}={_text(where, item, option)}" for item in (value if several else [value])]


def _text(where: str, value: Any, option: Option) -> str:
    """Return one value as a command line has it, if the option can take it."""
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
    }
    allowed, expected = kinds.get(option.kind, ((str, int, float), "text"))
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise DataError(f"{where}: expected {expected}")
    text, choices = str(value), option.how.get("choices")
    if choices is not None and text not in choices:
        raise DataError(f"{where}: expected one of {', '.join(choices)}; did you mean {nearest(text, choices)}?")
    try:
        option.how.get("type", str)(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise DataError(f"{where}: {one_line(error)}") from None
    return text


def _with_run(
    where: str, content: Mapping[str, Any], tool: type, run: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a section's arguments, and where the work is done: as it says, or else [run], if the tool can be told."""
    own, keys = options_of(where, content, tool), keys_of(tool)
    runner = {key: texts for key, texts in run.items() if key in keys and texts != AS_USUAL}
    runner |= {key: own.pop(key) for key in list(own) if key in RUNNER}
    return tuple(chain(*own.values())), tuple(chain(*runner.values()))


def _tool_of(where: str, section: str, known: Collection[str]) -> str:
    tool = section if section in known else section.partition("-")[0]
    plain = section.replace("-", "").replace("_", "").isalnum() and section.isascii()
    if tool not in known or not plain or (tool in (RUN, REPORT) and tool != section):
        raise DataError(f"{where}: unknown section [{one_line(section)}]; did you mean [{nearest(section, known)}]?")
    return tool


def _override(text: str, plain: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """Apply `section.key=value`, or `input=` and `out=`; keys are checked with all others."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or (not dot and section not in TOP):
        raise DataError(f"override {one_line(text)}: expected section.key=value, such as split.min_frames=16")
    value = toml_value(raw.strip())
    if not dot:
        plain[section] = value if isinstance(value, str) else raw.strip()
        return
    if section not in (*sections, RUN, REPORT):
        guess = nearest(section, [*sections, RUN, REPORT])
        raise DataError(
            f"override {one_line(text)}: the config has no section [{section}]; did you mean {guess}.{key}?"
        )
    sections.setdefault(section, {})[key] = value


def _short(value: object) -> str:
    text = one_line("(none)" if value is None else str(value).lower() if isinstance(value, bool) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
