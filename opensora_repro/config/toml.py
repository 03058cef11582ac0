"""TOML and `section.key=value` overrides to a checked Config, and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from opensora_repro.config.autoencoder import AUTOENCODER_PATH_KEYS, AutoencoderConfig, check_autoencoder
from opensora_repro.config.checks import check_config
from opensora_repro.config.sections import ADDRESS_KEYS, PATH_KEYS, Config, ConfigError, section_classes
from opensora_repro.files import here_or_shipped
from opensora_repro.models.config import ARCHITECTURES
from opensora_repro.storage.addresses import AddressRefused, is_address, place

AnyConfig = TypeVar("AnyConfig", Config, AutoencoderConfig)  # of stages 1 to 3, of stage 0


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, check types and ranges. Raises ConfigError (one line)."""
    return parse_config(read_toml(path), overrides, where=str(path))


def load_recorded(path: str | Path) -> Config:
    """Read the config.toml that a run has left, of this release or of an earlier one. Raises ConfigError."""
    table = read_toml(path)
    train = table.get("train", {})
    if isinstance(train.get(_CHECKPOINTING), bool):
        train[_CHECKPOINTING] = _WAS_CHECKPOINTING[train[_CHECKPOINTING]]
    if table.get("parallel", {}).get("plugin") == "gemini":  # what took its place
        table["parallel"] |= {"engine": "torch", "plugin": "fsdp"}
    return parse_config(table, where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return a TOML file's content; one that comes with the product is found from any folder. Raises ConfigError."""
    try:
        text = here_or_shipped(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"config {path}: cannot be read ({reason})") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path}: not valid TOML: {' '.join(str(error).split())}") from None


def parse_config(
    table: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    where: str = "config",
    kind: type[AnyConfig] = Config,  # type: ignore[assignment]
) -> AnyConfig:
    """Build a Config from parsed TOML (`{section: {key: value}}`) and overrides. Raises ConfigError."""
    _check_stage(kind, table, where)
    there, sections = _sections(kind, table, overrides, where)
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for section, content in table.items():
        if section not in sections:
            raise ConfigError(f"{where}: unknown section [{section}]; did you mean {_closest_section(section, there)}?")
        if not isinstance(content, dict):
            raise ConfigError(f"{where}: [{section}] must be a section of keys, found {section} = {content!r}")
        for key, value in content.items():
            hint = _hint(section, key, where, there)
            values[section][key] = _convert(f"{section}.{key}", value, hint, where)
    if sections["model"] is not there["model"]:
        values["model"] = dict(_still_known(values["model"], there["model"], sections["model"], where))
    for override in overrides:
        section, key, value = _parse_override(override, sections)
        values[section][key] = value
    for section, key in (name.split(".") for name in (*PATH_KEYS, *AUTOENCODER_PATH_KEYS)):
        if key in values.get(section, {}):
            values[section][key] = _path(f"{section}.{key}", values[section][key])
    config = kind(**{name: cls(**values[name]) for name, cls in sections.items()})
    if isinstance(config, AutoencoderConfig):
        check_autoencoder(config)
    check_config(config.shared if isinstance(config, AutoencoderConfig) else config)
    return config


def _path(key: str, text: str) -> str:
    """Return a path with the home folder for `~`, or an address as it is, where the key takes one."""
    if not is_address(text):
        return os.path.expanduser(text)
    try:
        place(text)
    except AddressRefused as error:
        raise ConfigError(f"{key} = {error.filename}: {error.strerror}") from None
    if key not in ADDRESS_KEYS:
        raise ConfigError(f"{key} = {text}: expected a path of this machine; {', '.join(ADDRESS_KEYS)} take addresses")
    return text


def load_autoencoder_config(path: str | Path, overrides: Sequence[str] = ()) -> AutoencoderConfig:
    """As `load_config`, the config of stage 0, whose sections are its own. Raises ConfigError."""
    return parse_config(read_toml(path), overrides, where=str(path), kind=AutoencoderConfig)


def dump_toml(config: Config | AutoencoderConfig) -> str:
    """Every key of the resolved config as TOML; `load_config` of it gives an equal config."""
    import tomli_w

    return tomli_w.dumps(written(config))


def config_dict(config: Config | AutoencoderConfig) -> dict[str, dict[str, Any]]:
    """`{section: {key: value}}` with lists for tuples, as TOML and JSON have them."""
    return {name: _lists(section) for name, section in dataclasses.asdict(config).items()}


def written(config: Config | AutoencoderConfig) -> dict[str, dict[str, Any]]:
    """What a file has of it: no empty `data.buckets`, or no [[data.buckets]] could be added to the file."""
    sections = config_dict(config)
    if not config.data.buckets:
        del sections["data"]["buckets"]
    return sections


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


_ARCHITECTURE = "model.architecture"
Sections = dict[str, Any]  # the class of each


def _sections(
    kind: type[Any], table: dict[str, Any], overrides: Sequence[str], where: str
) -> tuple[Sections, Sections]:
    """Of a config of that kind: as the file has them, and after the overrides, which may change the architecture."""
    if kind is not Config:
        sections = typing.get_type_hints(kind)
        return sections, sections
    architecture = there = _architecture(table, where)
    for override in overrides:
        if override.partition("=")[0].strip() == _ARCHITECTURE:
            architecture = _known_architecture(toml_value(override.partition("=")[2].strip()), f"override {override!r}")
    return section_classes(there), section_classes(architecture)


def _check_stage(kind: type[Any], table: dict[str, Any], where: str) -> None:
    """Raise ConfigError on a whole file of the other kind, whose keys would be called unknown one by one."""
    model = table.get("model")
    of_stage0 = isinstance(model, dict) and "kind" in model
    if kind is Config and of_stage0:
        raise ConfigError(
            f"{where}: this is of stage 0, which trains an autoencoder; expected a config of stages 1 to 3"
        )
    if kind is not Config and not of_stage0 and {"vae", "diffusion"} & set(table):
        raise ConfigError(
            f"{where}: this is of stages 1 to 3; expected a config of stage 0, such as configs/laptop/stage0.toml"
        )


def _architecture(table: dict[str, Any], where: str) -> str:
    """What the file's [model] is; a file of an earlier release does not say, and has STDiT."""
    model = table.get("model")
    if not isinstance(model, dict) or "architecture" not in model:
        return str(Config().model.architecture)
    return _known_architecture(model["architecture"], where)


def _known_architecture(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: {_ARCHITECTURE} = {json.dumps(value, default=str)}: expected one of {', '.join(ARCHITECTURES)}"
        )
    return value


def _still_known(values: dict[str, Any], old: Any, new: Any, where: str) -> Iterator[tuple[str, Any]]:
    """A file's [model] where an override names another architecture: keys that this lacks may say nothing but
    what is so anyway."""
    fresh, usual = new(), old()
    for key, value in values.items():
        if key == "architecture":
            continue
        if hasattr(fresh, key) and key in typing.get_type_hints(new):
            yield key, value
        elif value != getattr(usual, key):
            raise ConfigError(
                f"{where}: model.{key} = {json.dumps(value)} has no place with {_ARCHITECTURE} = "
                f"{json.dumps(fresh.architecture)}: leave it out"
            )


def _known_keys(sections: Sections) -> Iterator[str]:
    for section, cls in sections.items():
        for item in dataclasses.fields(cls):
            yield f"{section}.{item.name}"


def _hint(section: str, key: str, where: str, sections: Sections) -> Any:
    hints = typing.get_type_hints(sections[section])
    if key in hints:
        return hints[key]
    own = json.dumps(getattr(sections["model"], "architecture", ""))
    having = [name for name, cls in ARCHITECTURES.items() if section == "model" and key in typing.get_type_hints(cls)]
    if having and own in map(json.dumps, ARCHITECTURES):
        raise ConfigError(f"{where}: unknown key model.{key} with {_ARCHITECTURE} = {own} (of {' and '.join(having)})")
    raise ConfigError(f"{where}: unknown key {section}.{key}; did you mean {_closest_key(section, key, sections)}?")


def _closest_section(section: str, sections: Sections) -> str:
    if section in (name.split(".")[1] for name in _known_keys(sections)):
        return _closest_key("", section, sections)
    return "[" + difflib.get_close_matches(section, list(sections), n=1, cutoff=0.0)[0] + "]"


def _closest_key(section: str, key: str, sections: Sections) -> str:
    """The key itself in another section, else the most alike here, else the most alike anywhere."""
    known = list(_known_keys(sections))
    same = [name for name in known if name.split(".")[1] == key]
    here = [name.split(".")[1] for name in known if name.split(".")[0] == section]
    alike = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    if alike:
        return f"{section}.{alike[0]}"
    if same:
        return same[0]
    return difflib.get_close_matches(f"{section}.{key}", known, n=1, cutoff=0.0)[0]


def _parse_override(override: str, sections: Sections) -> tuple[str, str, Any]:
    name, equals, raw = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        guess = _closest_key("", section, sections)
        raise ConfigError(f"override {override!r}: expected section.key=value, such as {guess}=...")
    if section not in sections:
        guess = _closest_key(_closest_section(section, sections).strip("[]"), key, sections)
        raise ConfigError(f"override {override!r}: unknown key {section}.{key}; did you mean {guess}?")
    hint = _hint(section, key, f"override {override!r}", sections)
    value = toml_value(raw.strip())
    # A path such as `run.dir=2024` is text whatever TOML would make of it.
    if hint is str and not isinstance(value, str):
        value = raw.strip()
    return section, key, _convert(f"{section}.{key}", value, hint, f"override {override!r}")


def toml_value(raw: str) -> Any:
    """A TOML value, or the text itself where it is none (`init.weights=runs/stage1` needs no quotes)."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except ValueError:  # also of more digits than Python reads
        return raw
    return parsed["value"] if len(parsed) == 1 else raw


# What the key's values were called in earlier releases
_CHECKPOINTING = "activation_checkpointing"
_WAS_CHECKPOINTING = {True: "full", False: "none"}


def _convert(name: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`: bool, int, float, str, section, or tuples or choices of these; strict but for int -> float."""
    if isinstance(hint, types.UnionType):
        return _convert(name, value, _chosen(value, typing.get_args(hint)), where)
    if dataclasses.is_dataclass(hint):
        return _convert_section(name, value, hint, where)
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(name, value, typing.get_args(hint), where)
    if type(value) is int and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{where}: {name}: expected a number of 64 bits, as TOML's are")
    exact = type(value) is hint
    if hint is float and type(value) is int:
        value, exact = float(value), True
    if hint is float and exact and not math.isfinite(value):
        raise ConfigError(f"{where}: {name} = {value}: expected a finite number")
    if not exact:
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[hint]
        if name == f"train.{_CHECKPOINTING}" and isinstance(value, bool):
            expected = f'"{_WAS_CHECKPOINTING[value]}", or "selective"'
        shown = json.dumps(value) if isinstance(value, (str, bool)) else value
        raise ConfigError(f"{where}: {name} = {shown}: expected {expected}")
    return value


def _chosen(value: Any, hints: tuple[Any, ...]) -> Any:
    """Which of them a value is meant as: a list as the one of lists, text as text."""
    if isinstance(value, (list, tuple)):
        return next((hint for hint in hints if typing.get_origin(hint) is tuple), hints[0])
    return next((hint for hint in hints if hint is type(value)), hints[0])


def _convert_section(name: str, value: Any, section: Any, where: str) -> Any:
    """One of a list of sections, as [[data.buckets]] has them."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name} = {json.dumps(value, default=str)}: expected a section of keys")
    hints = typing.get_type_hints(section)
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(key, list(hints), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: unknown key {name}.{key}; did you mean {close}?")
    for field in dataclasses.fields(section):
        if field.default is dataclasses.MISSING and field.name not in value:
            raise ConfigError(f"{where}: {name} lacks {field.name}")
    return section(**{key: _convert(f"{name}.{key}", item, hints[key], where) for key, item in value.items()})


def _convert_tuple(name: str, value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: {name} = {json.dumps(value, default=str)}: expected a list, such as [...]")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise ConfigError(f"{where}: {name} = {list(value)}: expected a list of {len(kinds)} values")
    kinds = kinds if kinds[-1] is not Ellipsis else (kinds[0],) * len(value)
    return tuple(
        _convert(f"{name}[{index}]", item, kind, where)
        for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )
