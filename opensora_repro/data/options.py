"""A tool's options, declared once as a dataclass: for its command line, its section of a pipeline and its page.

    @dataclass(frozen=True, kw_only=True)
    class Arguments(RunnerArguments):
        input: str = argument("a folder", type=any_path)
        batch_size: int = option("clips a batch (%(default)s)", 16, metavar="N")

A field of type bool is a flag; numbers are checked by the field's type. Inherited options come after a class's own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from opensora_repro.files import user_path, user_place
from opensora_repro.storage.addresses import is_address

T = TypeVar("T")


def argument(help: str, **how: Any) -> Any:
    """Return the field of what is given by its place; `how` are further arguments of argparse's add_argument."""
    return field(metadata={"help": help, "by_place": True, **how})


def option(help: str, default: Any = MISSING, *, group: str = "", flag: str = "", **how: Any) -> Any:
    """Return the field of an option, which must be given where it has no default; `flag` if not the field's name."""
    return field(default=default, metadata={"help": help, "group": group, "flag": flag, **how})


def any_path(text: str) -> str:
    """Type of an option that takes a path or an address, such as s3://bucket/folder."""
    return os.fspath(user_place(text)) if is_address(text) else os.path.expanduser(text)


def local_path(text: str) -> str:
    """Type of an option that takes a path of this machine alone."""
    user_path(text)
    return os.path.expanduser(text)


@dataclass(frozen=True)
class Option:
    """An option as it is declared: `how` is what argparse's add_argument takes beside `flag`."""

    flag: str  # or the name of what is given by its place
    kind: type
    group: str
    how: dict[str, Any]


def options_in(arguments: type) -> Iterator[Option]:
    """Yield the options that a dataclass declares, a class's own before those of its bases."""
    kinds = get_type_hints(arguments)
    for item in fields_in(arguments):
        if "help" in item.metadata:
            yield _option(item, kinds[item.name])


def fields_in(arguments: type) -> Iterator[Field[Any]]:
    """Yield the fields of a dataclass, a class's own before those of its bases."""
    declared = {item.name: item for item in fields(arguments)}
    names = dict.fromkeys(name for owner in arguments.__mro__ for name in vars(owner).get("__annotations__", ()))
    yield from map(declared.__getitem__, names)


def _option(item: Field[Any], kind: Any) -> Option:
    how = dict(item.metadata)
    by_place, group, flag = how.pop("by_place", False), how.pop("group", ""), how.pop("flag", "")
    kind = next((part for part in get_args(kind) if part is not type(None)), kind)  # int of int | None
    if by_place:
        return Option(item.name, kind, group, how)
    if kind is bool:
        how["action"] = "store_true"
    elif kind in (int, float):
        how["type"] = kind
    how |= {"required": True} if item.default is MISSING else {"default": item.default}
    return Option(flag or f"--{item.name.replace('_', '-')}", kind, group, {"dest": item.name, **how})


def parser_of(arguments: type, prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the command line of a tool."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups: dict[str, Any] = {"": parser}
    for one in options_in(arguments):
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        groups[one.group].add_argument(one.flag, **one.how)
    return parser


def parse(arguments: type[T], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> T:
    """Return the dataclass filled with a command line's words."""
    return arguments(**vars(parser.parse_args(argv)))


def options_table(arguments: type) -> str:
    """Return the options of a tool as a table of Markdown."""
    rows = ["| option | what it says |", "|---|---|"]
    for one in options_in(arguments):
        value = one.how.get("metavar") or "\\|".join(one.how.get("choices", ())) or one.flag.strip("-").upper()
        shown = f"{one.flag} {value}" if one.flag[0] == "-" and one.kind is not bool else one.flag
        told = str(one.how["help"]) % one.how if "default" in one.how else one.how["help"]
        rows.append(f"| `{shown}` | {told.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)
