"""A recipe from footage to a model: its file, read and checked, and what of its input can be seen at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError, read_toml, toml_value
from opensora_repro.files import one_line
from opensora_repro.storage.addresses import is_address

TOP = {"input": "", "out": "", "captions": "", "held_out": 0.1}
MODULES = {
    "stage0": "stages.stage0_autoencoder",
    "stage1": "stages.stage1_image",
    "stage2": "stages.stage2_video",
    "stage3": "stages.stage3_hq",
}
WITH_CONFIG = ("pipeline", *MODULES)  # sections with the keys config and set; the others have options
SECTIONS = ("pipeline", "preview", *MODULES, "evaluate", "report", "card")


@dataclass(frozen=True)
class Recipe:
    input: Path
    out: Path
    captions: Path | None
    held_out: float
    sections: dict[str, dict[str, Any]]

    @property
    def stages(self) -> list[str]:
        return [name for name in MODULES if name in self.sections]

    def options(self, section: str) -> tuple[str, ...]:
        return tuple(map(str, self.sections[section].get("options", ())))


def load_recipe(path: str, overrides: Sequence[str]) -> Recipe:
    """Read and check a recipe. Raises ConfigError."""
    table = read_toml(path)
    for override in overrides:
        _override(override, table)
    for name, value in table.items():
        if isinstance(value, dict) != (name in SECTIONS) or name not in (*TOP, *SECTIONS):
            known = f"expected {', '.join(TOP)}, or a section of {', '.join(SECTIONS)}"
            raise ConfigError(f"{path}: {name}: not of a recipe; {known}")
    top = {name: table.get(name, value) for name, value in TOP.items()}
    for name in ("input", "out"):
        if not isinstance(top[name], str) or not top[name]:
            raise ConfigError(f"{path}: {name} is not set: give {name}=FOLDER")
    if not isinstance(top["held_out"], float) or not 0 < top["held_out"] < 1:
        raise ConfigError(f"{path}: held_out = {top['held_out']}: expected a share of the videos, such as 0.1")
    sections = {name: table[name] for name in SECTIONS if name in table}
    for name, content in sections.items():
        keys: dict[str, type] = {"config": str, "set": list} if name in WITH_CONFIG else {"options": list}
        for key, value in content.items():
            if key not in keys or not isinstance(value, keys[key]):
                raise ConfigError(f"{path}: {name}.{key} = {value!r}: expected {' and '.join(keys)}")
        if name in WITH_CONFIG and "config" not in content:
            raise ConfigError(f"{path}: {name}.config is not set: name the TOML file of this step")
    if "pipeline" not in sections or len(sections) == 1 or not {"stage1", "stage2", "stage3"} & sections.keys():
        raise ConfigError(f"{path}: expected [pipeline] and at least one of [stage1], [stage2], [stage3]")
    for name in ("input", "out", "captions"):
        if is_address(str(top[name])):
            raise ConfigError(f"{name} = {one_line(top[name])}: expected a path of this machine, not an address")
    found = {name: Path(expanduser(str(top[name]))) for name in ("input", "out", "captions")}
    if not found["input"].exists() and not set("*?[") & set(top["input"]):
        raise ConfigError(f"input = {top['input']}: no such file or folder")
    if top["captions"] and not found["captions"].is_file():
        raise ConfigError(f"captions = {top['captions']}: no such file")
    if not (top["captions"] or _brings_captions(found["input"], sections["pipeline"]["config"])):
        config = sections["pipeline"]["config"]
        raise ConfigError(f"{path}: no captions: give captions=FILE, or a [caption] section to {config}")
    captions = found["captions"] if top["captions"] else None
    return Recipe(found["input"], found["out"], captions, top["held_out"], sections)


def _override(text: str, table: dict[str, Any]) -> None:
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or (section not in SECTIONS if dot else section not in TOP):
        raise ConfigError(f"override {text!r}: expected input=, captions=, out=, held_out= or SECTION.key=value")
    if not dot:
        table[section] = float(raw) if section == "held_out" and _is_number(raw) else raw.strip()
        return
    content = table.setdefault(section, {})
    if key in ("config", "options"):
        content[key] = raw.strip() if key == "config" else toml_value(raw.strip())
    else:
        content["set"] = [*content.get("set", []), f"{key}={raw}"]


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _brings_captions(source: Path, pipeline: str) -> bool:
    """A table may have them, and a line of tools make them."""
    is_table = source.suffix.lower() in (".csv", ".parquet")
    return is_table or any(name.startswith("caption") for name in read_toml(pipeline))


def look_at_input(recipe: Recipe) -> None:
    """What would end the recipe after hours ends it now: no footage, captions of other videos. Raises UserError."""
    from opensora_repro.data.caption.lists import ClipKeys, read_list
    from opensora_repro.data.inputs import find_inputs
    from opensora_repro.run_folder import check_folder

    check_folder("out", str(recipe.out))
    items = find_inputs(recipe.input, out=recipe.out).items
    if recipe.captions is not None:
        rows = [{"id": item.name, "path": str(item.path), **(item.row or {})} for item in items]
        listed = read_list(recipe.captions, ClipKeys.of(rows))
        if listed.keyed_by != "id" and not listed.whole and not listed.spans:  # clips' ids are not known yet
            names = f"none of the {len(items)} files of {recipe.input}, such as {items[0].name!r}"
            raise ConfigError(f"captions = {recipe.captions}: names {names}")
