"""Print the options of all dataset tools as a page of Markdown, for `make configs`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from opensora_repro.data.options import options_table


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m data_tools", description=__doc__).parse_args(argv)
    print(page(), end="")


def page() -> str:
    """Return the page: a table a tool, from the dataclass that its command line and its pipeline section follow."""
    parts = ["<!-- Made by `make configs` from the tools' Arguments. -->", "# Options of the dataset tools"]
    parts += ["A key of a pipeline's section is an option's name with `_` for `-`."]
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tool = importlib.import_module(f"data_tools.{path.stem}")
        parts += [f"## {path.stem}", (tool.__doc__ or "").split("\n")[0], options_table(tool.Arguments)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
