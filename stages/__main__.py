"""Every stage and dataset tool by its name: `opensora-repro NAME` is `python -m stages.NAME` or `data_tools.NAME`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import data_tools
import stages
from opensora_repro.files import one_line

USER_MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    known = commands()
    if name in ("-h", "--help"):
        print(usage(known))
        return 0
    if name not in known:
        (closest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        print(f"error: {one_line(name)}: no such command; the closest name is {closest}", file=sys.stderr)
        return USER_MISTAKE
    run: int = importlib.import_module(known[name]).main(rest)
    return run


def commands() -> dict[str, str]:
    """Return the module of every name, none of them imported."""
    return {
        module.name: f"{package.__name__}.{module.name}"
        for package in (stages, data_tools)
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }


def usage(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = ["usage: opensora-repro NAME ...", "", "`opensora-repro NAME --help` tells more of each:", ""]
    return "\n".join([*lines, *(f"  {name:<{width}}  {first_line(module)}" for name, module in known.items())])


def first_line(module: str) -> str:
    """Return what a command's docstring begins with, read from its file: importing them all takes long."""
    package, name = module.split(".")
    folder = Path({"stages": stages, "data_tools": data_tools}[package].__path__[0])
    with open(folder / f"{name}.py", encoding="utf-8") as file:
        return file.readline().strip().strip('"')


if __name__ == "__main__":
    sys.exit(main())
