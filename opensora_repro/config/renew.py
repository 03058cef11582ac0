"""`make configs`: give every recipe the keys that it lacks, and write the page of all keys, from sections.py alone."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora_repro.config.autoencoder import AutoencoderConfig
from opensora_repro.config.edit import find
from opensora_repro.config.sections import BucketConfig, Config
from opensora_repro.config.toml import config_dict, written
from opensora_repro.files import write_text

PAGE = """<!-- Made by `make configs` from opensora_repro/config/sections.py. -->

# Config reference

Every key, its default, and what it means. `configs/*.toml` write all of them out.

| key | default | |
|---|---|---|
"""
STAGE0_PAGE = """<!-- Made by `make configs` from opensora_repro/config/autoencoder.py. -->

# Config reference of stage 0

The keys of `stages.stage0_autoencoder` that are its own. `[run]`, `[data]`, `[optim]`, `[train]`, `[ema]`,
`[checkpoint]` and `[parallel]` are those of [the other stages](config.md); `init.weights` is a folder as `vae.path`
takes it, or a run of stage 0.

| key | default | |
|---|---|---|
"""


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m opensora_repro.config.renew", description=__doc__).parse_args(argv)
    for path in recipes(Path("configs")):
        write_text(path, complete(path.read_text(encoding="utf-8"), kind_of(path)))
    write_text(Path("docs/config.md"), page())
    write_text(Path("docs/config_stage0.md"), stage0_page())
    return 0


def recipes(folder: Path) -> list[Path]:
    """The configs of stages; those of data_tools.pipeline, in data/, have the tools' own options."""
    return sorted(path for path in folder.rglob("*.toml") if path.parent != folder / "data")


def kind_of(path: Path) -> type[Any]:
    """What a recipe is a config of: those of stage 0 have sections of their own, and its name."""
    return AutoencoderConfig if path.stem.startswith("stage0") else Config


def page() -> str:
    """The reference: a row a key."""
    helps, rows = helps_of(Config), []
    for section, keys in config_dict(Config()).items():
        rows += [_row(f"{section}.{key}", json.dumps(value), helps[section][key]) for key, value in keys.items()]
        if section == "data":
            of_buckets = dict(comments(BucketConfig))
            for field in dataclasses.fields(BucketConfig):
                default = "" if field.default is dataclasses.MISSING else json.dumps(field.default)
                rows.append(_row(f"data.buckets[].{field.name}", default, of_buckets[field.name]))
    return PAGE + "".join(rows)


def stage0_page() -> str:
    """The reference of what stage 0 has its own of."""
    shared, hints = (typing.get_type_hints(kind) for kind in (Config, AutoencoderConfig))
    helps, rows = helps_of(AutoencoderConfig), []
    for section, keys in config_dict(AutoencoderConfig()).items():
        if hints[section] is not shared.get(section):
            rows += [_row(f"{section}.{key}", json.dumps(value), helps[section][key]) for key, value in keys.items()]
    return STAGE0_PAGE + "".join(rows)


def _row(key: str, default: str, text: str) -> str:
    return f"| `{key}` | {f'`{default}`' if default else 'needed'} | {text.replace('|', chr(92) + '|')} |\n"


def complete(text: str, kind: type[Any] = Config) -> str:
    """The config with missing keys at their places, each with its default and comment; all else as it stands."""
    helps, lines = helps_of(kind), text.splitlines()
    end = len(lines)  # of the section before
    for section, keys in written(kind()).items():
        header = next((i for i, line in enumerate(lines) if re.match(rf"\[{section}\]\s*(#|$)", line)), None)
        if header is None:
            lines[end:end] = ["", f"[{section}]"]
            header = end + 1
        end = header + 1
        for key, default in keys.items():
            found = find(lines, header, key)
            if found is None:
                lines.insert(end, f"{key} = {json.dumps(default)}  # {helps[section][key]}")
                found = end, end + 1
            end = max(end, found[1])
    return "\n".join(lines) + "\n"


def helps_of(config: type) -> dict[str, dict[str, str]]:
    """{section: {key: help}}: what the comment behind each key says where its class defines it."""
    return {section: dict(comments(cls)) for section, cls in typing.get_type_hints(config).items()}


def comments(section: type[Any]) -> Iterator[tuple[str, str]]:
    source = inspect.getsource(section)
    for key in (field.name for field in dataclasses.fields(section)):
        found = re.search(rf"^    {key}: .*?  # (.+)$", source, flags=re.M)
        if found is None:
            raise LookupError(f"{section.__name__}.{key}: say in a comment behind it what it means")
        yield key, found[1]


if __name__ == "__main__":
    sys.exit(main())
