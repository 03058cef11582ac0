"""The folder that samples go to: of which settings those in it are, and which of the wanted ones are done.

OUT/0000.mp4 (0000.png for one frame), ...    by the prompts' numbers
OUT/samples.json                               the settings, all prompts, and the file of each finished one
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.files import remove_folder, write_text

RECORD = "samples.json"
PLACES = ("checkpoint", "file")  # where something lay: what it was, weights_sha256 says
# Settings of samples that were given frames, are chained, were made faster, ...: others have none
SOMETIMES = ("given", "long", "negative", "lora", "guidance_interval", "broadcast", "step_cache")
SHOWN = 4  # differences named
_KINDS = {"samples": list, "prompts": list, "expanded": dict}
_SAMPLE = re.compile(r"\d{4,}\.(mp4|png|gif)")


class SampleFolder:
    """`settings` are what decides the samples besides the prompts, as JSON has it."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        prompts: Sequence[str],
        *,
        gif: bool,
        expanded: Mapping[str, str] | None = None,
    ) -> None:
        """`expanded`: what prompts became that were rewritten, which is remembered here."""
        self.expanded = expanded
        self.path, self.settings, self.prompts = path, json.loads(json.dumps(settings)), list(prompts)
        self.still = settings["num_frames"] == 1
        self.gif = gif and not self.still

    def files(self, index: int) -> list[str]:
        """Names of a sample's files, the first its own."""
        name = f"{index:04d}"
        return [f"{name}.png"] if self.still else [f"{name}.mp4", *([f"{name}.gif"] if self.gif else [])]

    def finished(self) -> list[int]:
        """Numbers of the prompts whose samples are there. Raises ConfigError where samples of others are."""
        record = self._record()
        if record is None or record.keys() == {"expanded"}:  # which was asked for before anything was sampled
            return []
        known = record.get("prompts", [])
        changes = [
            *_changes(self.settings, record),
            *_only_there(self.settings, record),
            *_other_prompts(self.prompts, known),
        ]
        if changes:
            more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            raise ConfigError(
                f"--out {self.path} holds samples of other settings: {'; '.join(changes[:SHOWN])}{more}; take another "
                "folder, or replace them with --overwrite"
            )
        numbers = range(min(len(known), len(self.prompts)))
        return [i for i in numbers if all(map(self._is_there, self.files(i)))]

    def _is_there(self, name: str) -> bool:
        file = self.path / name
        return file.is_file() and file.stat().st_size > 0

    def clear(self) -> None:
        """Delete the samples that the record knows, and the record."""
        try:
            known = json.loads((self.path / RECORD).read_text(encoding="utf-8"))["samples"]
            names = [entry["file"] for entry in known]
        except (OSError, ValueError, KeyError, TypeError):
            names = []
        for name in names:
            if isinstance(name, str) and _SAMPLE.fullmatch(name):
                for file in (self.path / name, (self.path / name).with_suffix(".gif")):
                    file.unlink(missing_ok=True)
        for folder in self.path.glob("[0-9]*.parts"):
            remove_folder(folder)
        (self.path / RECORD).unlink(missing_ok=True)

    def write(self, finished: Iterable[int]) -> None:
        """Write the record: these prompts are done. What it has of further prompts stays."""
        try:
            before = self._record() or {}
        except ConfigError:  # what is there is to be replaced
            before = {}
        kept = [entry for entry in before.get("samples", []) if entry["file"] not in self._names()]
        samples = [{"file": self.files(i)[0], "prompt": self.prompts[i]} for i in sorted(finished)] + kept
        prompts = self.prompts + before.get("prompts", [])[len(self.prompts) :]
        content = {**self.settings, "prompts": prompts, "samples": samples}
        if self.expanded is not None:
            content["expanded"] = {**before.get("expanded", {}), **self.expanded}
        write_text(self.path / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _names(self) -> set[str]:
        return {self.files(i)[0] for i in range(len(self.prompts))}

    def _record(self) -> dict[str, Any] | None:
        """What samples.json says; None where nothing is there that would be replaced. Raises ConfigError."""
        try:
            content = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            there = next((name for name in self._names() if (self.path / name).exists()), None)
            if there is None:
                return None
            reason = f"holds {there}, and no {RECORD} that tells its settings"
        except (OSError, ValueError):
            reason = f"{RECORD} there cannot be read"
        else:
            if isinstance(content, dict) and _is_record(content):
                return content
            reason = f"{RECORD} there is not this command's"
        raise ConfigError(f"--out {self.path}: {reason}; take another folder, or replace it with --overwrite")


def _is_record(content: Mapping[str, Any]) -> bool:
    """Whether the prompts are a list, and the samples one of such as have a file."""
    samples, prompts, expanded = (content.get(key, kind()) for key, kind in _KINDS.items())
    named = isinstance(samples, list) and all(isinstance(e, dict) and isinstance(e.get("file"), str) for e in samples)
    return named and isinstance(prompts, list) and isinstance(expanded, dict)


def _changes(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """`KEY = OLD there, NEW here` for each setting that differs."""
    for key, value in here.items():
        if key in PLACES or there.get(key) == value:
            continue
        if isinstance(value, dict) and isinstance(there.get(key), dict):
            yield from (f"{key}.{change}" for change in _changes(value, there[key]))
        elif key not in there:
            yield f"{key} is not told there, {value!r} here"
        else:
            yield f"{key} = {there[key]!r} there, {value!r} here"


def _only_there(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Likewise for settings that not all samples have, and what is given in more places there."""
    for key in SOMETIMES:
        if key in there and key not in here:
            yield f"{key} = {_short(there[key])} there, none here"
        elif isinstance(there.get(key), dict) and isinstance(here.get(key), dict):
            yield from (f"{key}.{name} is told there alone" for name in there[key] if name not in here[key])


def _other_prompts(here: Sequence[str], there: Sequence[Any]) -> Iterator[str]:
    for number, (new, old) in enumerate(zip(here, there, strict=False)):
        if new != old:
            yield f"prompt {number} = {_short(old)} there, {_short(new)} here"


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
