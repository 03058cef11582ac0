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

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from opensora_repro.config.autoencoder import AutoencoderConfig
from opensora_repro.config.edit import find
from opensora_repro.config.sections import BucketConfig, Config, section_classes
from opensora_repro.config.toml import config_dict, written
from opensora_repro.files import write_text
from opensora_repro.models.config import ARCHITECTURES, STDiTConfig

PAGE = """<!-- Made by `make configs` from opensora_repro/config/sections.py. -->

# Config reference

Every key, its default, and what it means. `configs/*.toml` write all of them out. `model.architecture` says whose keys
`[model]` has: those of `"stdit"` stand in the first table, the others' below.

"""
TABLE = "| key | default | |\n|---|---|---|\n"
STAGE0_PAGE = """<!-- Made by `make configs` from opensora_repro/config/autoencoder.py. -->

# Config reference of stage 0

The keys of `stages.stage0_autoencoder` that are its own. `[run]`, `[data]`, `[optim]`, `[train]`, `[ema]`,
`[checkpoint]` and `[parallel]` are those of [the other stages](config.md); `init.weights` is a folder as `vae.path`
takes it, or a run of stage 0.

"""


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m opensora_repro.config.renew", description=__doc__).parse_args(argv)
    for path in recipes(Path("configs")):
        write_text(path, complete(path.read_text(encoding="utf-8"), kind_of(path)))
    write_text(Path("docs/config.md"), page())
    write_text(Path("docs/config_stage0.md"), stage0_page())
    return 0


def recipes(folder: Path) -> list[Path]:
    """The configs of stages; those of data_tools.pipeline, in data/, and of stages.recipe have keys of their own."""
    found = (path for path in folder.rglob("*.toml") if path.parent != folder / "data")
    return sorted(path for path in found if not path.name.endswith(".recipe.toml"))


def kind_of(path: Path) -> type[Any]:
    """What a recipe is a config of: those of stage 0 have sections of their own, and its name."""
    return AutoencoderConfig if path.stem.startswith("stage0") else Config


def page() -> str:
    """The reference: a row a key, and a table more for each other kind of model."""
    tables = [PAGE + TABLE + "".join(_rows(config_dict(Config()), section_classes()))]
    for name, model in list(ARCHITECTURES.items())[1:]:
        section = {"model": config_dict(Config(model=model()))["model"]}
        rows = _rows(section, {"model": model})
        tables.append(f'\n## `[model]` with `architecture = "{name}"`\n\n' + TABLE + "".join(rows))
    return "".join(tables)


def _rows(sections: dict[str, dict[str, Any]], classes: dict[str, Any]) -> Iterator[str]:
    helps = helps_of(classes)
    for section, keys in sections.items():
        for key, value in keys.items():
            yield _row(f"{section}.{key}", json.dumps(value), helps[section][key])
        if section == "data":
            of_buckets = dict(comments(BucketConfig))
            for field in dataclasses.fields(BucketConfig):
                default = "" if field.default is dataclasses.MISSING else json.dumps(field.default)
                yield _row(f"data.buckets[].{field.name}", default, of_buckets[field.name])


def stage0_page() -> str:
    """The reference of what stage 0 has its own of."""
    shared, classes = (typing.get_type_hints(kind) for kind in (Config, AutoencoderConfig))
    sections = config_dict(AutoencoderConfig())
    own = {name: keys for name, keys in sections.items() if classes[name] is not shared.get(name)}
    return STAGE0_PAGE + TABLE + "".join(_rows(own, classes))


def _row(key: str, default: str, text: str) -> str:
    return f"| `{key}` | {f'`{default}`' if default else 'needed'} | {text.replace('|', chr(92) + '|')} |\n"


def complete(text: str, kind: type[Any] = Config) -> str:
    """The config with missing keys at their places, each with its default and comment; all else as it stands."""
    architecture = tomllib.loads(text).get("model", {}).get("architecture", STDiTConfig.architecture)
    own = kind is Config
    classes = section_classes(architecture) if own else typing.get_type_hints(kind)
    config = Config(model=ARCHITECTURES[architecture]()) if own else kind()
    helps, lines = helps_of(classes), text.splitlines()
    end = len(lines)  # of the section before
    for section, keys in written(config).items():
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


def helps_of(classes: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{section: {key: help}}: what the comment behind each key says where its class defines it."""
    return {section: dict(comments(cls)) for section, cls in classes.items()}


def comments(section: type[Any]) -> Iterator[tuple[str, str]]:
    source = inspect.getsource(section)
    for key in (field.name for field in dataclasses.fields(section)):
        found = re.search(rf"^    {key}: .*?  # (.+)$", source, flags=re.M)
        if found is None:
            raise LookupError(f"{section.__name__}.{key}: say in a comment behind it what it means")
        yield key, found[1]


if __name__ == "__main__":
    sys.exit(main())
