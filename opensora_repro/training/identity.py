"""What a run was trained with, by content: resuming asks what manifest and frozen models hold, not where they lie.

The record is part of a checkpoint's `state.json`. Files are told apart by their sha256; one that still lies where it
was, with the same size and time of change, is not read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from opensora_repro.config import Config, ConfigError, load_recorded
from opensora_repro.data.ids import TOLD_COLUMNS, column_digest, ids_fingerprint
from opensora_repro.files import Sha256Memo, sha256_of, size_and_time
from opensora_repro.frozen.encoder import Encoder, open_encoder
from opensora_repro.frozen.pretrained import FrozenModel, HashFile, ModelNotFound
from opensora_repro.run_folder import CONFIG_FILE
from opensora_repro.storage.addresses import place
from opensora_repro.training.fill import FROZEN_HASHES
from opensora_repro.training.start import Start
from opensora_repro.weights.files import open_weights

Say = Callable[[str], None]


def check_manifest(cfg: Config, start: Start, table: Any, say: Say) -> None:
    """Raise ConfigError where the ids are not those that the run began with: the order of samples follows from them.

    Other captions, lengths, rates or sizes under the same ids are told. The state takes up what is there now.
    """
    found = ids_fingerprint(table["id"])
    if start.state.data_fingerprint not in ("", found):
        raise ConfigError(
            f"data.manifest = {cfg.data.manifest} has changed since {cfg.run.dir} began "
            f"({start.state.data_fingerprint} then, {found} now): restore it to resume, "
            f"or set another run.dir and init.weights={cfg.run.dir}"
        )
    start.state.data_fingerprint = found
    columns = {name: column_digest(table[name]) for name in TOLD_COLUMNS}
    recorded = start.state.identity.get("data.manifest", {})
    for name, now in columns.items():
        then = recorded.get(name, now)
        if then != now:
            say(
                f"warning: data.manifest = {cfg.data.manifest}: other {TOLD_COLUMNS[name]} under the same ids than "
                f"{cfg.run.dir} was trained with up to step {start.state.step} (digest {then} then, {now} now); "
                "the run goes on with the new ones"
            )
    start.state.identity["data.manifest"] = columns


def frozen_identity(cfg: Config, start: Start, encoder: Encoder) -> dict[str, dict[str, Any]]:
    """What the autoencoder's and the text encoder's files hold now, by the key that names the model.

    Raises ConfigError where that is not what the run began with.
    """
    hash_file = Sha256Memo.in_file(place(cfg.data.cache) / FROZEN_HASHES) if cfg.data.cache else Sha256Memo()
    recorded = start.state.identity
    found = {
        key: _file_facts(model.files, recorded.get(key, {}), hash_file)
        for key, model in _frozen_models(encoder).items()
    }
    if start.checkpoint is not None:
        before = {key: recorded[key] for key in found if key in recorded}
        if len(before) < len(found):
            before = _facts_of_older(cfg, start.checkpoint, encoder, hash_file) | before
        for key, facts in before.items():
            _check_same(cfg, key, facts, found[key])
    return found


def adapted_identity(cfg: Config, start: Start) -> dict[str, dict[str, Any]]:
    """What the files of `init.weights` hold, which the adapters of [lora] are trained for.

    Raises ConfigError where that is not what the run began with.
    """
    key = "init.weights"
    recorded = start.state.identity.get(key, {})
    found = _file_facts(open_weights(cfg.init.weights).files, recorded, sha256_of)
    if start.resumes:
        _check_same(cfg, key, recorded, found)
    return {key: found}


def _file_facts(files: Iterable[Path], recorded: dict[str, Any], hash_file: HashFile) -> dict[str, Any]:
    """Path, size in bytes, time of change in ns and sha256 of each file, by its name."""
    memo = Sha256Memo({f["path"]: [f["size"], f["mtime_ns"], f["sha256"]] for f in recorded.values()}.get)
    facts = {}
    for file in files:
        size, time = size_and_time(file)
        sha256 = memo.recall(file) or hash_file(file)
        facts[file.name] = {"path": str(file.resolve()), "size": size, "mtime_ns": time, "sha256": sha256}
    return facts


def _frozen_models(encoder: Encoder) -> dict[str, FrozenModel[Any]]:
    return {"vae.path": encoder.vae.frozen, "text.path": encoder.text.frozen}


def _facts_of_older(cfg: Config, checkpoint: Path, encoder: Encoder, hash_file: HashFile) -> dict[str, dict[str, Any]]:
    """For a checkpoint of a release that recorded none: what lies where its config says, unless that is the same place.

    Raises ConfigError where nothing is there any more.
    """
    recorded = load_recorded(checkpoint / CONFIG_FILE)
    if (recorded.vae.path, recorded.text.path) == (cfg.vae.path, cfg.text.path):
        return {}
    try:
        there = open_encoder(replace(cfg, vae=recorded.vae, text=recorded.text), encoder.device)
    except ModelNotFound as error:
        raise ConfigError(
            f"{cfg.run.dir} does not record what its frozen models hold, and they are not where they were to compare: "
            f"{error}. Put them back to resume, or set another run.dir and init.weights={cfg.run.dir}"
        ) from None
    return {key: _file_facts(model.files, {}, hash_file) for key, model in _frozen_models(there).items()}


def _check_same(cfg: Config, key: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [name for name in sorted(then.keys() | now.keys()) if _hash(then, name) != _hash(now, name)]
    if differing:
        name = differing[0]
        more = f"; and {len(differing) - 1} more files" if differing[1:] else ""
        raise ConfigError(
            f"{key} is another model than {cfg.run.dir} began with: {name} is {_shown(then, name)} there, "
            f"{_shown(now, name)} here{more}. Restore it to resume, or set another run.dir and "
            f"init.weights={cfg.run.dir}"
        )


def _hash(facts: dict[str, Any], name: str) -> str | None:
    return facts[name]["sha256"] if name in facts else None


def _shown(facts: dict[str, Any], name: str) -> str:
    if name not in facts:
        return "absent"
    return f"{facts[name]['path']} (sha256 {facts[name]['sha256'][:12]})"
