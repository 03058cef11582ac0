"""Every stage and dataset tool by its name: `opensora-repro NAME` is `python -m stages.NAME` or `data_tools.NAME`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import data_tools
import stages
from opensora_repro.errors import USER_MISTAKE
from opensora_repro.files import one_line


def main(argv: Sequence[str] | None = None) -> int:
    known = commands()
    parser = argparse.ArgumentParser(
        prog="opensora-repro", description=__doc__, epilog=listed(known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of those below; `NAME --help` tells more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own")
    args = parser.parse_args(argv)
    if args.name is None:
        parser.print_help()
        return 0
    if args.name not in known:
        (closest,) = difflib.get_close_matches(args.name, known, n=1, cutoff=0.0)
        print(f"error: {one_line(args.name)}: no such command; the closest name is {closest}", file=sys.stderr)
        return USER_MISTAKE
    run: int = importlib.import_module(known[args.name]).main(args.arguments)
    return run


def commands() -> dict[str, str]:
    """Return the module of every name, none of them imported; a stage named like a dataset tool keeps its package's."""
    stage_names, tools = (
        [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
        for package in (stages, data_tools)
    )
    return {
        **{f"stages.{name}" if name in tools else name: f"stages.{name}" for name in stage_names},
        **{name: f"data_tools.{name}" for name in tools},
    }


def listed(known: dict[str, str]) -> str:
    width = max(map(len, known))
    return "\n".join(f"  {name:<{width}}  {first_line(module)}" for name, module in known.items())


def first_line(module: str) -> str:
    """Return what a command's docstring begins with, read from its file: importing them all takes long."""
    package, name = module.split(".")
    folder = Path({"stages": stages, "data_tools": data_tools}[package].__path__[0])
    with open(folder / f"{name}.py", encoding="utf-8") as file:
        return file.readline().strip().strip('"')


if __name__ == "__main__":
    sys.exit(main())
