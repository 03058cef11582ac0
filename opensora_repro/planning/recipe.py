"""A recipe, from footage to a model: its file, read and checked, its steps, which of them are done, what they take."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from os.path import expanduser
from pathlib import Path
from typing import Any

from opensora_repro.config import Config, ConfigError, load_autoencoder_config, load_config, read_toml, toml_value
from opensora_repro.errors import DataError
from opensora_repro.files import content_of, digest, here_or_shipped, one_line, read_json, sha256_of, write_text
from opensora_repro.run_folder import STATE_FILE, check_folder, list_checkpoints
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
TRAIN, HELD_OUT = "train.parquet", "held_out.parquet"
RECORD = "recipe.json"
Check = Callable[[str, Config], None]  # of a stage's name and config


@dataclass(frozen=True)
class Recipe:
    input: Path
    out: Path
    captions: Path | None
    held_out: float | str  # a share of the videos, or a pattern of their names
    sections: dict[str, dict[str, Any]]

    @property
    def stages(self) -> list[str]:
        return [name for name in MODULES if name in self.sections]

    def options(self, section: str) -> tuple[str, ...]:
        return tuple(map(str, self.sections[section].get("options", ())))

    def changes(self, section: str) -> list[str]:
        """Overrides of the section's config."""
        return list(self.sections[section].get("set", ()))


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
    held_out = top["held_out"]
    if not (0 < held_out < 1 if isinstance(held_out, float) else set("*?[") & set(str(held_out))):
        expected = "expected a share of the videos, such as 0.1, or a pattern of their names, such as 'test_*'"
        raise ConfigError(f"{path}: held_out = {held_out}: {expected}")
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
    return Recipe(found["input"], found["out"], captions, held_out, sections)


def _override(text: str, table: dict[str, Any]) -> None:
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or (section not in SECTIONS if dot else section not in TOP):
        raise ConfigError(f"override {text!r}: expected input=, captions=, out=, held_out= or SECTION.key=value")
    if not dot:
        table[section] = raw.strip()
        if section == "held_out":
            with contextlib.suppress(ValueError):
                table[section] = float(raw)
        return
    content = table.setdefault(section, {})
    if key in ("config", "options"):
        content[key] = raw.strip() if key == "config" else toml_value(raw.strip())
    else:
        content["set"] = [*content.get("set", []), f"{key}={raw}"]


def _brings_captions(source: Path, pipeline: str) -> bool:
    """A table may have them, and a line of tools make them."""
    is_table = source.suffix.lower() in (".csv", ".parquet")
    return is_table or any(name.startswith("caption") for name in read_toml(pipeline))


def look_at_input(recipe: Recipe) -> None:
    """What would end the recipe after hours ends it now: no footage, captions of other videos. Raises UserError."""
    from opensora_repro.data.caption.lists import ClipKeys, read_list
    from opensora_repro.data.inputs import find_inputs

    check_folder("out", str(recipe.out))
    items = find_inputs(recipe.input, out=recipe.out).items
    if recipe.captions is not None:
        rows = [{"id": item.name, "path": str(item.path), **(item.row or {})} for item in items]
        listed = read_list(recipe.captions, ClipKeys.of(rows))
        if listed.keyed_by != "id" and not listed.whole and not listed.spans:  # clips' ids are not known yet
            names = f"none of the {len(items)} files of {recipe.input}, such as {items.first().name!r}"
            raise ConfigError(f"captions = {recipe.captions}: names {names}")


@dataclass(frozen=True)
class Step:
    """`output` is there once it is done; `reads` decides whether it still is what it was done from."""

    name: str
    what: str
    output: Path
    command: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    work: Callable[[], None] | None = None  # in place of a command
    looks: bool = False  # it looks by itself, every time, whether there is something new
    config: Any = field(default=None, compare=False)  # of a stage


def steps_of(recipe: Recipe, check_stage: Check) -> list[Step]:
    """All steps, their configs checked. Raises ConfigError."""
    train, held_out = recipe.out / TRAIN, recipe.out / HELD_OUT
    runs = list(_stages(recipe, train, held_out, check_stage))
    return [*_data(recipe, train, held_out), *_preview(recipe, runs[-1]), *runs, *_pages(recipe, runs)]


def _data(recipe: Recipe, train: Path, held_out: Path) -> Iterator[Step]:
    out, config = recipe.out, here_or_shipped(recipe.sections["pipeline"]["config"])
    manifest, where = out / "data" / "manifest.parquet", (f"input={recipe.input}", f"out={out / 'data'}")
    words: tuple[str, ...] = ("data_tools.pipeline", str(config), *where, *recipe.changes("pipeline"))
    yield Step("pipeline", "footage to clips", manifest, words, (config,), looks=True)
    if recipe.captions is not None:
        found, manifest = manifest, out / "captioned" / manifest.name
        words = ("data_tools.caption", str(found), "--sidecar", str(recipe.captions), "--out", str(manifest.parent))
        yield Step("captions", "captions to clips", manifest, words, (found, recipe.captions))

    def hold() -> None:
        hold_out(manifest, train, held_out, recipe.held_out)

    share = recipe.held_out
    title = f"{f'{share:.0%} of the videos' if isinstance(share, float) else f'videos named {share}'} are held out"
    yield Step("held-out", title, held_out, (str(recipe.held_out),), (manifest,), hold)


def _preview(recipe: Recipe, last: Step) -> Iterator[Step]:
    if "preview" in recipe.sections:
        train = Path(last.config.data.manifest)
        page, config = recipe.out / "preview" / "preview.html", last.command[1]
        text = [word for word in last.command if word.startswith("text.path=")]  # which stage 0 has yet to make
        words = ["data_tools.preview", str(train), *recipe.changes(last.name), *text, "--config", config]
        words += ["--out", str(page.parent), *recipe.options("preview")]
        yield Step("preview", "a page of what training reads", page, tuple(words), (train, Path(config)))


def _stages(recipe: Recipe, train: Path, held_out: Path, check_stage: Check) -> Iterator[Step]:
    """Each stage goes on from the one before, with the autoencoder and text encoder of stage 0, if there is one.

    A stage may have clips of its own, as the best ones for the last.
    """
    out, models, before = recipe.out, list[str](), None
    for name in recipe.stages:
        config, changes = recipe.sections[name]["config"], recipe.changes(name)
        own = {change.partition("=")[0].strip() for change in changes}
        clips = {"data.manifest": train, "data.val_manifest": held_out}
        words = [f"run.dir={out / name}", *(f"{key}={path}" for key, path in clips.items() if key not in own)]
        if name == "stage0":
            cfg: Any = load_autoencoder_config(config, [*changes, *words])
            models = [f"vae.path={out / name / 'vae'}", f"model.in_channels={cfg.model.latent_channels}"]
            if cfg.text.vocab_size:
                models += [f"text.path={out / name / 'text'}", f"model.caption_channels={cfg.text.hidden_size}"]
        else:
            words += models
            words += [] if before is None else [f"init.weights={out / before}"]
            cfg = load_config(config, [*changes, *words])
            if cfg.data.cache:
                words.append(f"data.cache={out / 'cache' / name}")
            check_stage(name, cfg)
        file = here_or_shipped(config)
        reads = [file, Path(cfg.data.manifest), *([Path(cfg.data.val_manifest)] if cfg.data.val_manifest else ())]
        reads += [out / earlier for earlier in recipe.stages[: recipe.stages.index(name)]]
        command = (MODULES[name], str(file), *changes, *words)
        output = out / name / "checkpoints" / f"step-{cfg.train.steps:08d}"
        yield Step(name, f"{cfg.train.steps:,} steps", output, command, tuple(reads), config=cfg)
        before = name if name != "stage0" else None


def _pages(recipe: Recipe, runs: Sequence[Step]) -> Iterator[Step]:
    """What is measured and told of the trained runs."""
    trained = [step for step in runs if step.name != "stage0"]
    folders, reads = [str(recipe.out / step.name) for step in trained], [step.output for step in trained]
    if "evaluate" in recipe.sections:
        held_out = Path(trained[-1].config.data.val_manifest or recipe.out / HELD_OUT)
        result = Path(folders[-1]) / "evaluation" / "evaluation.json"  # where the run's own page looks for it
        words = ["stages.evaluate", folders[-1], "--manifest", str(held_out), "--out", str(result.parent)]
        words += recipe.options("evaluate")
        yield Step("evaluate", "measured on what was held out", result, tuple(words), (reads[-1], held_out))
        reads.append(result)
    if "report" in recipe.sections:
        page = recipe.out / "report" / "report.html"
        words = ["stages.report", *folders, "--out", str(page.parent), *recipe.options("report")]
        yield Step("report", "a page on all runs", page, tuple(words), tuple(reads))
    if "card" in recipe.sections:
        card = recipe.out / "card.md"
        words = ["stages.weights", "card", folders[-1], "--out", str(card), *recipe.options("card")]
        yield Step("card", "a model card", card, tuple(words), tuple(reads))


def hold_out(manifest: Path, train: Path, held_out: Path, share: float | str) -> None:
    """Two manifests of one: whole videos are held out, chosen by their names alone: a share, or those of a pattern.

    Raises DataError.
    """
    import pyarrow as pa

    from opensora_repro.data.manifest import read_manifest, write_manifest

    table = read_manifest(manifest)
    ids = table["id"].to_pylist()
    sources = table["source"].to_pylist() if "source" in table.column_names else ids
    names = [Path(source or name).name for source, name in zip(sources, ids, strict=True)]
    if isinstance(share, str):
        kept_apart = {name for name in names if fnmatchcase(name, share)}
        if not kept_apart or kept_apart == set(names):
            found = "all" if kept_apart else f"none, such as {names[0]!r}"
            raise DataError(f"held_out = {share}: of the {len(set(names))} videos of {manifest} it names {found}")
    else:
        kept_apart, names = _drawn_apart(manifest, names, ids, share)
    mask = [name in kept_apart for name in names]
    write_manifest(table.filter(pa.array(mask)), held_out)
    write_manifest(table.filter(pa.array([not held for held in mask])), train)
    print(f"{len(mask) - sum(mask):,} clips in {train}, {sum(mask):,} in {held_out}")


def _drawn_apart(manifest: Path, names: list[str], ids: list[str], share: float) -> tuple[set[str], list[str]]:
    """Return the names that are held out, and of which names they are: of the videos, or of the clips."""
    if len(set(names)) == 1:  # one video: some of its clips, which resemble the others
        names = ids
    order = sorted(set(names), key=_drawn)
    if len(order) < 2:
        raise DataError(f"{manifest}: a single clip, of which none can be held out")
    # Not so many of them: then new footage would move others to the other side.
    return {name for name in order[:-1] if _drawn(name) < share} or set(order[:1]), names


def _drawn(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int(digest([name]), 16) / 2**128


class Record:
    """OUT/recipe.json: of each finished step what it was done from, and how long it took."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / RECORD
        self.done: dict[str, Any] = read_json(self.file)

    def key(self, step: Step) -> str:
        """Of what it reads and how: files by content, runs by their newest checkpoint, OUT wherever it lies."""
        words = [word.replace(str(self.out), "OUT") for word in step.command]
        return digest([words, [contents(path) for path in step.reads]])

    def is_done(self, step: Step) -> bool:
        known = self.done.get(step.name, {})
        return step.output.exists() and known.get("key") == self.key(step)

    def put(self, step: Step, key: str, seconds: float) -> None:
        self.done[step.name] = {"key": key, "seconds": round(seconds, 1)}
        write_text(self.file, json.dumps(self.done, indent=1) + "\n")


def contents(path: Path) -> str:
    """What decides what is read there: a file's sha256; of a run, its newest checkpoint's, which knows its weights'."""
    if path.is_dir():
        newest = path if (path / STATE_FILE).is_file() else next(iter(list_checkpoints(path)[::-1]), None)
        return "nothing" if newest is None else sha256_of(newest / STATE_FILE)
    return content_of(path) if path.is_file() else "nothing"


def estimate(recipe: Recipe, steps: Sequence[Step], step: Step, machine: Any) -> tuple[float | None, float | None]:
    """Seconds and bytes of a training step; None for what nothing here can tell."""
    from opensora_repro.planning import rough

    if step.config is None:
        return None, None
    if step.name == "stage0":
        return rough.of_autoencoder(step.config, machine), None
    cfg, made = step.config, next((other.config for other in steps if other.name == "stage0"), None)
    if made is None or made.model.kind != "image":
        return rough.of_stage(cfg, machine)
    with rough.planned(made) as (vae, text):
        cfg = replace(cfg, vae=replace(cfg.vae, path=vae))
        return rough.of_stage(replace(cfg, text=replace(cfg.text, path=text)) if made.text.vocab_size else cfg, machine)
