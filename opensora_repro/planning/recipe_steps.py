"""The steps of a recipe: our commands one after the other, which of them are done, and what training takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opensora_repro.config import Config, load_autoencoder_config, load_config
from opensora_repro.errors import DataError
from opensora_repro.files import content_of, digest, here_or_shipped, read_json, sha256_of, write_text
from opensora_repro.planning.recipe import MODULES, Recipe
from opensora_repro.run_folder import STATE_FILE, list_checkpoints

RECORD = "recipe.json"
Check = Callable[[str, Config], None]  # of a stage's name and config


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
    train, held_out = recipe.out / "train.parquet", recipe.out / "held_out.parquet"
    runs = list(_stages(recipe, train, held_out, check_stage))
    return [*_data(recipe, train, held_out), *_preview(recipe, runs[-1], train), *runs, *_pages(recipe, runs, held_out)]


def _data(recipe: Recipe, train: Path, held_out: Path) -> Iterator[Step]:
    out, section = recipe.out, recipe.sections["pipeline"]
    manifest, config = out / "data" / "manifest.parquet", here_or_shipped(section["config"])
    words = (
        "data_tools.pipeline",
        str(config),
        f"input={recipe.input}",
        f"out={out / 'data'}",
        *section.get("set", ()),
    )
    yield Step("pipeline", "footage to clips", manifest, words, (config,), looks=True)
    if recipe.captions is not None:
        found, manifest = manifest, out / "captioned" / manifest.name
        words = ("data_tools.caption", str(found), "--sidecar", str(recipe.captions), "--out", str(manifest.parent))
        yield Step("captions", "captions to clips", manifest, words, (found, recipe.captions))

    def hold() -> None:
        hold_out(manifest, train, held_out, recipe.held_out)

    title = f"{recipe.held_out:.0%} of the videos are held out"
    yield Step("held-out", title, held_out, (str(recipe.held_out),), (manifest,), hold)


def _preview(recipe: Recipe, last: Step, train: Path) -> Iterator[Step]:
    if "preview" in recipe.sections:
        page, changes = recipe.out / "preview" / "preview.html", recipe.sections[last.name].get("set", ())
        text = [word for word in last.command if word.startswith("text.path=")]  # which stage 0 has yet to make
        words = (
            "data_tools.preview",
            str(train),
            *changes,
            *text,
            "--config",
            last.command[1],
            "--out",
            str(page.parent),
        )
        words = (*words, *recipe.options("preview"))
        yield Step("preview", "a page of what training reads", page, words, (train, Path(last.command[1])))


def _stages(recipe: Recipe, train: Path, held_out: Path, check_stage: Check) -> Iterator[Step]:
    """Each stage goes on from the one before, with the autoencoder and text encoder of stage 0, if there is one."""
    out, models, before = recipe.out, list[str](), None
    for name in recipe.stages:
        section = recipe.sections[name]
        config, words = section["config"], [f"run.dir={out / name}", f"data.manifest={train}"]
        words += [f"data.val_manifest={held_out}"]
        if name == "stage0":
            cfg: Any = load_autoencoder_config(config, [*section.get("set", ()), *words])
            models = [f"vae.path={out / name / 'vae'}", f"model.in_channels={cfg.model.latent_channels}"]
            if cfg.text.vocab_size:
                models += [f"text.path={out / name / 'text'}", f"model.caption_channels={cfg.text.hidden_size}"]
        else:
            words += models
            words += [] if before is None else [f"init.weights={out / before}"]
            cfg = load_config(config, [*section.get("set", ()), *words])
            if cfg.data.cache:
                words.append(f"data.cache={out / 'cache' / name}")
            check_stage(name, cfg)
        file = here_or_shipped(config)
        reads = [file, train, held_out]
        reads += [out / earlier for earlier in recipe.stages[: recipe.stages.index(name)]]
        command = (MODULES[name], str(file), *section.get("set", ()), *words)
        output = out / name / "checkpoints" / f"step-{cfg.train.steps:08d}"
        yield Step(name, f"{cfg.train.steps:,} steps", output, command, tuple(reads), config=cfg)
        before = name if name != "stage0" else None


def _pages(recipe: Recipe, runs: Sequence[Step], held_out: Path) -> Iterator[Step]:
    """What is measured and told of the trained runs."""
    trained = [step for step in runs if step.name != "stage0"]
    folders, reads = [str(recipe.out / step.name) for step in trained], [step.output for step in trained]
    if "evaluate" in recipe.sections:
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


def hold_out(manifest: Path, train: Path, held_out: Path, share: float) -> None:
    """Two manifests of one: whole videos are held out, chosen by their names alone. Raises DataError."""
    import pyarrow as pa

    from opensora_repro.data.manifest import read_manifest, write_manifest

    table = read_manifest(manifest)
    ids = table["id"].to_pylist()
    sources = table["source"].to_pylist() if "source" in table.column_names else ids
    names = [Path(source or name).name for source, name in zip(sources, ids, strict=True)]
    if len(set(names)) == 1:  # one video: some of its clips, which resemble the others
        names = ids
    order = sorted(set(names), key=_drawn)
    if len(order) < 2:
        raise DataError(f"{manifest}: a single clip, of which none can be held out")
    # Not so many of them: then new footage would move others to the other side.
    kept_apart = {name for name in order[:-1] if _drawn(name) < share} or set(order[:1])
    mask = [name in kept_apart for name in names]
    write_manifest(table.filter(pa.array(mask)), held_out)
    write_manifest(table.filter(pa.array([not held for held in mask])), train)
    print(f"{len(mask) - sum(mask):,} clips in {train}, {sum(mask):,} in {held_out}")


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
