"""Print the options of all dataset tools as a page of Markdown: `python -m data_tools > docs/options.md`."""

from __future__ import annotations

import importlib
from pathlib import Path

from opensora_repro.data.options import options_table


def page() -> str:
    """Return the page: a table a tool, from the dataclass that its command line and its pipeline section follow."""
    parts = ["# Options of the dataset tools", "A key of a pipeline's section is an option's name with `_` for `-`."]
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tool = importlib.import_module(f"data_tools.{path.stem}")
        parts += [f"## {path.stem}", (tool.__doc__ or "").split("\n")[0], options_table(tool.Arguments)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
