"""The recipes that come along: list them, or copy them into a folder to edit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora_repro.errors import run_command
from opensora_repro.files import shipped, user_path, writing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.configs", description=__doc__)
    parser.add_argument("--copy", type=user_path, metavar="DIR", help="copy them into this folder, such as configs")
    parser.add_argument("--overwrite", action="store_true", help="with --copy: replace files that differ, too")
    args = parser.parse_args(argv)
    if args.overwrite and args.copy is None:
        parser.error("--overwrite says how to copy: give --copy DIR, too")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    home = shipped("configs")
    for recipe in sorted(path for path in home.rglob("*") if path.suffix in (".toml", ".sbatch", ".yaml")):
        name = recipe.relative_to(home)
        if args.copy is None:
            print(f"configs/{name.as_posix()}")
        else:
            print(f"{copy(recipe, args.copy / name, overwrite=args.overwrite)}: {args.copy / name}")
    return 0


def copy(recipe: Path, place: Path, *, overwrite: bool) -> str:
    """Copy one file; return what became of it. Raises OSError."""
    content, state = recipe.read_bytes(), "copied"
    if place.exists():
        if place.read_bytes() == content:
            return "there already"
        if not overwrite:
            return "kept, though it differs (--overwrite replaces it)"
        state = "overwritten"
    with writing(place) as file:
        file.write(content)
    return state


if __name__ == "__main__":
    sys.exit(main())
