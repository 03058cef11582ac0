"""A run as others may have it: which files, the config without this machine's places, and a model card that says how
it was made.

Texts of captions, prompts and files are somebody else's: in the card they are shown, not read as Markdown or HTML.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.config import Config, ConfigError, dump_toml, load_recorded
from opensora_repro.config.sections import PATH_KEYS
from opensora_repro.data.origin import read_origin
from opensora_repro.files import is_file, one_line, read_json
from opensora_repro.run_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    EMA_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    MODEL_FILE,
    STATE_FILE,
    VALIDATION_FILE,
    JsonLines,
    list_checkpoints,
    list_steps,
    recorded_weights,
    samples_folder,
)
from opensora_repro.storage.addresses import place

CARD, GRID = "README.md", "samples.png"
NEEDED = ("vae.path", "text.path")  # of a config's places, those that sampling reads
PROMPTS_SHOWN = 24
RECIPE = (
    "data.num_frames", "data.height", "data.width", "diffusion.objective", "diffusion.schedule", "train.dtype",
    "optim.lr", "optim.warmup_steps", "optim.decay_steps", "optim.weight_decay", "ema.decay", "run.seed", "lora.rank",
    "lora.alpha", "sample.sampler", "sample.steps", "sample.guidance",
)  # fmt: skip
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")  # on a hub
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~:-])")


@dataclass(frozen=True)
class Shared:
    """What is shared of a run: files by the names that they have there, and texts."""

    checkpoint: Path
    cfg: Config
    files: dict[str, Path]
    texts: dict[str, str]

    def sizes(self) -> dict[str, int]:
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted((sizes | {name: len(text.encode()) for name, text in self.texts.items()}).items()))


def share(source: Path, *, name: str, licence: str = "", ema: bool = True) -> Shared:
    """Of a run (its newest checkpoint) or a checkpoint. Raises ConfigError for anything else."""
    steps = list_checkpoints(source) or list_steps(source)
    checkpoint = steps[-1] if steps else source
    if not (checkpoint / STATE_FILE).is_file() or not (checkpoint / CONFIG_FILE).is_file():
        raise ConfigError(f"{source}: no run with a checkpoint, and no checkpoint")
    cfg = load_recorded(checkpoint / CONFIG_FILE)
    weights = ADAPTER_FILE if cfg.lora.rank else MODEL_FILE
    files = {weights: checkpoint / (EMA_FILE if ema else weights)}
    grids = sorted(samples_folder(checkpoint.parent.parent).glob("step-*/grid.png"))
    if grids:
        files[GRID] = grids[-1]
    card = Card(checkpoint, cfg, name, licence, ema, has_samples=bool(grids))
    texts = {CONFIG_FILE: dump_toml(placeless(cfg)), CARD: card.text()}
    if cfg.lora.rank:
        content = json.loads((checkpoint / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        content["base_model_name_or_path"] = _last(cfg.init.weights)
        texts[ADAPTER_CONFIG_FILE] = json.dumps(content, indent=2) + "\n"
    return Shared(checkpoint, cfg, files, texts)


def placeless(cfg: Config) -> Config:
    """Without the folders of the machine that trained: of absolute paths the last part is left."""
    for key in PATH_KEYS:
        section, name = key.split(".")
        part = getattr(cfg, section)
        moved = dataclasses.replace(part, **{name: _last(getattr(part, name))})
        cfg = dataclasses.replace(cfg, **{section: moved})
    return cfg


def _last(path: str) -> str:
    return os.path.basename(os.path.normpath(path)) if os.path.isabs(path) else path


def escaped(text: Any) -> str:
    """Text as Markdown shows it, on one line: nothing in it is markup, a link or HTML."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(str(text)), quote=False))


@dataclass(frozen=True)
class Card:
    checkpoint: Path
    cfg: Config
    name: str
    licence: str
    ema: bool
    has_samples: bool

    def text(self) -> str:
        parts = [self._head(), f"# {escaped(self.name)}", self._what(), *self._sections()]
        return "\n\n".join(part for part in parts if part) + "\n"

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.parent.parent

    def _head(self) -> str:
        """What hubs read; JSON is YAML."""
        tag = "text-to-video" if self.cfg.data.num_frames > 1 else "text-to-image"
        facts: dict[str, Any] = {"pipeline_tag": tag, "tags": ["opensora-repro", self.cfg.model.architecture]}
        if self.cfg.lora.rank:
            facts["tags"].append("lora")
        if self.licence:
            facts["license"] = self.licence
        return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"])

    def _what(self) -> str:
        model, data = self.cfg.model, self.cfg.data
        kind = f"A LoRA of rank {self.cfg.lora.rank} for" if self.cfg.lora.rank else "Weights of"
        which, size = ("averaged (EMA)" if self.ema else "trained"), f"{data.height}x{data.width} pixels"
        return (
            f"{kind} a {escaped(model.architecture)} of {model.depth} blocks and {model.hidden_size} channels, which "
            f"makes {data.num_frames} frame(s) of {size}. These are the {which} ones of step "
            f"{self._state['step']}."
        )

    def _sections(self) -> Iterator[str]:
        yield f"## Sample it\n\n```bash\n{self._two_lines()}\n```" + self._places()
        yield "## Recipe\n\n" + _table(("setting", "value"), self._recipe())
        yield "## Data\n\n" + _table(("", ""), self._data())
        if told := self._losses():
            yield "## Loss\n\n" + _table(("", "step", "loss"), told)
        if found := self._evaluation():
            yield f"## Evaluation\n\nOf step {found[0]}.\n\n" + _table(("metric", "value", "interval"), found[1])
        if self.has_samples:
            prompts = "\n".join(f"{n}. {escaped(p)}" for n, p in enumerate(self.cfg.sample.prompts[:PROMPTS_SHOWN], 1))
            yield f"## Samples\n\n![samples]({GRID})\n\nPrompts, row by row:\n\n{prompts}"
        if made := self._made_from():
            yield "## Made from\n\n" + _table(("", "file", "sha256"), made)
        yield (
            "## Licence\n\n"
            + (f"{escaped(self.licence)}. " if self.licence else "None is stated. ")
            + "What it was made from comes under its authors' licences."
        )

    def _two_lines(self) -> str:
        text = (self.cfg.sample.prompts or ("your text",))[0]
        prompt = "'" + one_line(text).replace("'", "'\\''").replace("`", "") + "'"
        if self.cfg.lora.rank:
            take = f"BASE --lora FOLDER --prompt {prompt}"
        else:
            take = f"FOLDER --prompt {prompt}"
        repo = self.name if REPO.fullmatch(self.name) else "OWNER/NAME"
        return f"hf download {repo} --local-dir FOLDER\npython -m stages.sample {take} --out samples"

    def _places(self) -> str:
        """What has to be given besides, since it lay where nobody else finds it."""
        required = []
        if self.cfg.lora.rank:
            required.append(f"`BASE` are the weights that it was trained for, {escaped(_last(self.cfg.init.weights))}")
        for key in NEEDED:
            section, name = key.split(".")
            path = getattr(getattr(self.cfg, section), name)
            if os.path.isabs(path):
                required.append(f"`--{section} PATH` says where {escaped(_last(path))} lies (`{key}`)")
        return "\n\n" + "; ".join(required) + "." if required else ""

    def _recipe(self) -> Iterator[tuple[Any, ...]]:
        yield "steps", self._state["step"]
        sizes = self._state.get("global_batch_sizes", [])
        yield "samples a step", ", ".join(map(str, sizes)) + (" (by bucket)" if len(sizes) > 1 else "")
        for key in RECIPE:
            section, name = key.split(".")
            value = getattr(getattr(self.cfg, section), name)
            if (value not in ("", 0) or name == "seed") and (section != "lora" or self.cfg.lora.rank):
                yield key, f"{value:g}" if isinstance(value, float) else value
        for bucket in self.cfg.data.buckets:
            yield "bucket", f"{bucket.num_frames} frames at {bucket.resolution}"
        yield "device", self._state.get("device", "unknown")

    def _data(self) -> Iterator[tuple[Any, ...]]:
        yield "clips", self._state.get("data_fingerprint", "unknown")
        yield "samples seen", f"{self._state.get('samples_seen', 0):,}"
        path = place(self.cfg.data.manifest)
        origin = read_origin(path) if is_file(path) else None
        if origin is not None:
            yield "version", origin.get("version")
            yield "made by", f"data_tools.{origin.get('tool')} {json.dumps(origin.get('options'))}"
            for parent in origin.get("parents", []):
                yield "from", f"{parent.get('file')}, version {parent.get('version')}"

    def _losses(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for title, file in (("training", METRICS_FILE), ("held-out clips", VALIDATION_FILE)):
            lines = [line for line in JsonLines(self.run_dir / file).read() if line.get("loss") is not None]
            lines = [line for line in lines if line["step"] <= self._state["step"]]
            found += [(title, lines[-1]["step"], f"{lines[-1]['loss']:.4g}")] if lines else []
        return found

    def _evaluation(self) -> tuple[int, list[tuple[Any, ...]]] | None:
        """What `stages.evaluate` has left within the run of this checkpoint, else the last one in training up to it."""
        place = (self.run_dir.name, self.checkpoint.name)
        for file in sorted(self.run_dir.glob("*/evaluation.json")):
            for found in read_json(file).get("checkpoints", []):
                path = Path(found.get("path", ""))
                if (path.parent.parent.name, path.name) == place and isinstance(found.get("metrics"), dict):
                    return self._state["step"], [(name, *_measured(value)) for name, value in found["metrics"].items()]
        lines = [
            line for line in JsonLines(self.run_dir / EVALUATION_FILE).read() if isinstance(line.get("metrics"), dict)
        ]
        lines = [line for line in lines if line.get("step", 0) <= self._state["step"]]
        if not lines:
            return None
        return lines[-1]["step"], [(name, *_measured(value)) for name, value in lines[-1]["metrics"].items()]

    def _made_from(self) -> list[tuple[Any, ...]]:
        files = recorded_weights(self.run_dir)  # none of an earlier release, or drawn at random
        found: list[tuple[Any, ...]] = [("first weights", _last(name), sha256) for name, sha256 in files.items()]
        for key in NEEDED:
            facts = self._state.get("identity", {}).get(key, {})
            found += [(key, name, fact.get("sha256")) for name, fact in facts.items()]
        return found

    @property
    def _state(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return content


def _measured(value: Any) -> tuple[str, str]:
    if isinstance(value, Mapping):
        low, high = value.get("low"), value.get("high")
        between = f"{low:.4g} to {high:.4g}" if isinstance(low, int | float) and isinstance(high, int | float) else ""
        return _measured(value.get("value"))[0], between
    return (f"{value:.4g}" if isinstance(value, int | float) else str(value)), ""


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(escaped, row)) + " |" for row in rows)])
