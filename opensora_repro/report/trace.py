"""What a run has seen, computed from its seed and its manifest through the code that training draws with.

Nothing of it is recorded while training: the samples of a step follow from the schedule, and what a sample shows from
its own generators. So a trace reads a checkpoint's config and state, the manifest, and of the samples in question the
files themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opensora_repro.config import Config, ConfigError, config_dict, load_recorded
from opensora_repro.data.buckets import assigned
from opensora_repro.data.dataset import BadSample, ClipDataset
from opensora_repro.data.ids import TOLD_COLUMNS, column_digest, ids_fingerprint
from opensora_repro.data.manifest import LINEAGE, read_manifest
from opensora_repro.data.origin import read_origin, version_of
from opensora_repro.data.packing import build_sampler, build_schedule
from opensora_repro.errors import DataError
from opensora_repro.files import Sha256Memo, sha256_of, size_and_time
from opensora_repro.run_folder import (
    BAD_STEPS_FILE,
    CONFIG_FILE,
    QUARANTINE_FILE,
    JsonLines,
    TrainState,
    list_checkpoints,
    read_state,
    recorded_weights,
)
from opensora_repro.storage.addresses import place

SHOWN = 5  # of each kind of difference between two manifests


@dataclass
class Trace:
    """A checkpoint, and the manifest that its run was trained with."""

    checkpoint: Path
    cfg: Config
    state: TrainState
    manifest: Path

    @staticmethod
    def of(path: Path, manifest: Path | None = None) -> Trace:
        """`path`: a run (its newest checkpoint) or a checkpoint; `manifest`: where that of its clips lies now.

        Raises ConfigError, CheckpointError.
        """
        found = list_checkpoints(path)
        checkpoint = found[-1] if found else path
        if not (checkpoint / CONFIG_FILE).is_file():
            raise ConfigError(f"{path}: no run with a checkpoint, and no checkpoint")
        state, _ = read_state(checkpoint)
        cfg = load_recorded(checkpoint / CONFIG_FILE)
        return Trace(checkpoint, cfg, state, manifest or place(cfg.data.manifest))

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.parent.parent

    @cached_property
    def table(self) -> Any:
        """The manifest's rows. Raises DataError, ConfigError where they are not those of the run."""
        table = read_manifest(self.manifest)
        found = ids_fingerprint(table["id"])
        if found != self.state.data_fingerprint:
            raise ConfigError(
                f"{self.manifest}: not the manifest of {self.checkpoint} ({self.state.data_fingerprint} there, {found} "
                "here): name it with --manifest"
            )
        return table

    def warnings(self) -> Iterator[str]:
        recorded = self.state.identity.get("data.manifest", {})
        for column, told in TOLD_COLUMNS.items():
            if recorded.get(column, "") != column_digest(self.table[column]):
                yield f"{self.manifest}: other {told} under the same ids than the run was trained with"

    @cached_property
    def _sampler(self) -> Any:
        schedule = build_schedule(self.cfg, assigned(self.table, self.cfg), self.state.global_batch_sizes)
        return build_sampler(self.cfg, schedule)  # of all processes together, a step at once

    @cached_property
    def _dataset(self) -> ClipDataset:
        return ClipDataset(self.table, self.cfg.data, self.cfg.run.seed)

    @cached_property
    def bad_ids(self) -> set[str]:
        """Of clips that could not be read at some time."""
        return {line.get("id", "") for line in JsonLines(self.run_dir / QUARANTINE_FILE).read()}

    @cached_property
    def skipped(self) -> set[int]:
        """Steps that moved no weight: their loss or gradient was not finite."""
        return {line["step"] for line in JsonLines(self.run_dir / BAD_STEPS_FILE).read()}

    def samples_of(self, step: int) -> list[tuple[int, int, Any]]:
        """(epoch, row, shape) of each sample of a step, counted from 1, in order."""
        batch = self._sampler.batch(step - 1)
        shapes = batch.shapes or [batch.shape] * len(batch)
        return [(epoch, row, shape) for (epoch, row), shape in zip(batch, shapes, strict=True)]

    def step(self, number: int) -> Iterator[dict[str, Any]]:
        """What each sample of a step was. Raises ConfigError for one that the checkpoint has not made."""
        if not 1 <= number <= self.state.step:
            raise ConfigError(f"--step {number}: {self.checkpoint} has made steps 1 to {self.state.step}")
        for epoch, row, shape in self.samples_of(number):
            yield self.seen(number, epoch, row, shape)

    def clip(self, identity: str) -> Iterator[dict[str, Any]]:
        """Every time that a clip was seen. Raises ConfigError for one that the manifest has not."""
        row = self.table["id"].index(identity).as_py()
        if row < 0:
            raise ConfigError(f"--clip {identity}: {self.manifest} has no clip of this id")
        for number in range(1, self.state.step + 1):
            for epoch, other, shape in self.samples_of(number):
                if other == row:
                    yield self.seen(number, epoch, row, shape)

    def seen(self, step: int, epoch: int, row: int, shape: Any) -> dict[str, Any]:
        """One sample of a step down to its file: the window, crop and mirroring that training draws, drawn again."""
        told = self.table.slice(row, 1).to_pylist()[0]
        path = Path(told["path"])
        found: dict[str, Any] = {
            "step": step, "epoch": epoch, "draw": self._dataset.draw(epoch), "id": told["id"],
            "caption": told["caption"], "path": str(path), "sha256": self._sha256(path),
            **{name: told[name] for name in LINEAGE if told.get(name) is not None},
            "size": list(shape or self._dataset.shape),
        }  # fmt: skip
        if step in self.skipped:
            found["skipped"] = "the step moved no weight: it was not finite"
        sample = self._dataset.load(epoch, row, shape)
        if isinstance(sample, BadSample):
            return found | {"unread": sample.reason}
        if told["id"] in self.bad_ids:
            found["unread"] = f"it is readable now, but could not be read once (see {QUARANTINE_FILE})"
        first = told.get("start_frame")
        if first is not None:
            found["source_frames"] = [first + index for index in sample.indices]
        return found | {
            "frames": list(sample.indices), "crop": list(sample.corner), "flipped": sample.flipped, "fps": sample.fps
        }  # fmt: skip

    def _sha256(self, path: Path) -> str | None:
        """Of the file as it is now; None: it is not there."""
        if not path.is_file():
            return None
        found = _MEMO.recall(path)
        if found is None:
            before, found = size_and_time(path), sha256_of(path)
            _MEMO.remember(path, before, found)
        return found

    def summary(self) -> dict[str, Any]:
        """What made the checkpoint, counted."""
        counts: Counter[int] = Counter()
        epochs = 0
        for number in range(1, self.state.step + 1):
            if number not in self.skipped:
                for epoch, row, _ in self.samples_of(number):
                    counts[row] += 1
                    epochs = max(epochs, epoch + 1)
        sources: Counter[str] = Counter()
        if "source" in self.table.schema.names:
            names = self.table["source"]
            for row, count in counts.items():
                sources[str(names[row].as_py())] += count
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.state.step,
            "seed": self.cfg.run.seed,
            "manifest": {"path": str(self.manifest), **manifest_facts(self.manifest)},
            "clips": len(self.table),
            "clips seen": len(counts),
            "samples drawn": counts.total(),
            "samples seen": self.state.samples_seen,
            "epochs begun": epochs,
            "seen at least, at most": [min(counts.values()), max(counts.values())] if counts else [0, 0],
            "set aside": sorted(self.bad_ids),
            "steps skipped": sorted(self.skipped),
            "started from": started_from(self.run_dir, self.cfg),
            "frozen models": self._frozen(),
            "sources": dict(sources.most_common()),
        }

    def _frozen(self) -> dict[str, dict[str, str]]:
        models = {key: files for key, files in self.state.identity.items() if key != "data.manifest"}
        return {key: {name: facts["sha256"] for name, facts in files.items()} for key, files in models.items()}


_MEMO = Sha256Memo()


def started_from(run_dir: Path, cfg: Config) -> dict[str, str]:
    """Each file of `init.weights` with its sha256; of an older run, whose record lacks them, without."""
    return recorded_weights(run_dir) or ({cfg.init.weights: "not recorded"} if cfg.init.weights else {})


def manifest_facts(path: Path) -> dict[str, Any]:
    """Version, and what its metadata tells of its making; of CSV nothing is told."""
    return read_origin(path) or {"version": version_of(path) if path.suffix == ".parquet" else "none (CSV)"}


# ---------------------------------------------------------------------------------------------------------------------
# Differences


def diff(first: Path, second: Path) -> Iterator[str]:
    """How two manifests, or two runs or checkpoints, differ; nothing: they do not. Raises ConfigError, DataError."""
    files = [path.is_file() for path in (first, second)]
    if all(files):
        yield from diff_manifests(first, second)
    elif any(files):
        raise ConfigError(f"--diff {first} {second}: expected two manifests or two runs")
    else:
        yield from diff_runs(Trace.of(first), Trace.of(second))


def diff_manifests(first: Path, second: Path) -> Iterator[str]:
    """Rows by their ids; where files lie is no difference."""
    import pyarrow.compute as pc

    told = [read_origin(path) or {} for path in (first, second)]
    for key in sorted(told[0].keys() | told[1].keys()):
        if told[0].get(key) != told[1].get(key):
            yield f"{key}: {_short(told[0].get(key))} there, {_short(told[1].get(key))} here"
    tables = [read_manifest(path, need_captions=False) for path in (first, second)]
    ids = [table["id"] for table in tables]
    for what, here, there in (("only there", *ids), ("only here", *reversed(ids))):
        missing = here.filter(pc.invert(pc.is_in(here, value_set=there.combine_chunks()))).to_pylist()
        if missing:
            yield f"{len(missing)} rows {what}: {_some(missing)}"
    names = [set(table.schema.names) for table in tables]
    for what, only in (("only there", names[0] - names[1]), ("only here", names[1] - names[0])):
        if only:
            yield f"columns {what}: {', '.join(sorted(only))}"
    order = pc.index_in(ids[0], value_set=ids[1].combine_chunks())
    both = pc.is_valid(order)
    left, right = tables[0].filter(both), tables[1].take(order.filter(both))
    for column in sorted((names[0] & names[1]) - {"id", "path"}):
        pairs = zip(left[column].to_pylist(), right[column].to_pylist(), left["id"].to_pylist(), strict=True)
        changed = [f"{name}: {_short(old)} there, {_short(new)} here" for old, new, name in pairs if _differ(old, new)]
        if changed:
            yield f"{column} of {len(changed)} rows: {_some(changed)}"
    if ids[0].to_pylist() != ids[1].to_pylist() and ids[0].sort().equals(ids[1].sort()):
        yield "the rows' order"


def diff_runs(first: Trace, second: Trace) -> Iterator[str]:
    """Settings, weights, frozen models, steps, clips."""
    old, new = (config_dict(trace.cfg) for trace in (first, second))
    for section in sorted(old.keys() | new.keys()):
        here, there = new.get(section, {}), old.get(section, {})
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                yield f"{section}.{key} = {_short(there.get(key))} there, {_short(here.get(key))} here"
    facts = [
        {
            "step": trace.state.step,
            "samples a step": trace.state.global_batch_sizes,
            "clips": trace.state.data_fingerprint,
            "started from": sorted(started_from(trace.run_dir, trace.cfg).values()),
            **{key: sorted(models.values()) for key, models in trace._frozen().items()},
        }
        for trace in (first, second)
    ]
    for key in facts[0] | facts[1]:
        if facts[0].get(key) != facts[1].get(key):
            yield f"{key}: {_short(facts[0].get(key))} there, {_short(facts[1].get(key))} here"
    if first.manifest.is_file() and second.manifest.is_file():
        try:
            yield from (f"data.manifest: {line}" for line in diff_manifests(first.manifest, second.manifest))
        except DataError as error:
            yield f"data.manifest: {error}"


def _differ(old: Any, new: Any) -> bool:
    nothing = (None, "")
    return bool(old != new) and not (old in nothing and new in nothing) and not (old != old and new != new)


def _some(items: list[str]) -> str:
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 160 else f"{text[:160]}..."
