"""What lies in a run's folder, by name: checkpoints, lines of JSON, events, and the lock of who trains there."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from opensora_repro.config import ConfigError
from opensora_repro.config.sections import LOWER_IS_BETTER
from opensora_repro.errors import TrainingError, UserError, cannot_write
from opensora_repro.files import beside, read_json, remove_file, remove_folder, sha256_of, write_text, writing
from opensora_repro.storage.addresses import address_of, place

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG_FILE, WEIGHTS_FILE = "config.toml", "weights.json"
METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
BAD_STEPS_FILE, QUARANTINE_FILE = "bad_steps.jsonl", "quarantine.jsonl"
ALARMS_FILE, STARTS_FILE = "alarms.jsonl", "starts.jsonl"
REPORT_FILE = "report.html"
EVENTS = "tensorboard"
# Of a checkpoint
MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # of [lora], as peft has them
STATE_FILE = "state.json"
SCHEMA_VERSION = 1
BEST = "best"  # a link among the checkpoints
LONGEST_LINE = 1000  # bytes of a step's
_STEP_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def samples_folder(run_dir: Path) -> Path:
    return run_dir / "samples"


def evaluation_folder(run_dir: Path) -> Path:
    """What evaluations of a run keep from one to the next."""
    return run_dir / "evaluation"


def recorded_weights(run_dir: Path) -> dict[str, str]:
    """Each file of `init.weights` with its sha256, as a run has recorded them at its start; none: it has not."""
    files = read_json(run_dir / WEIGHTS_FILE).get("files")
    return {str(name): str(sha256) for name, sha256 in files.items()} if isinstance(files, dict) else {}


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders (not verified), oldest first."""
    return list_steps(checkpoints_folder(run_dir))


def list_steps(folder: Path) -> list[Path]:
    """As `list_checkpoints`, of a run's folder of checkpoints."""
    found = [path for path in folder.glob("step-*") if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def clean_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left half-written or half-deleted, on whatever machine: we have the run's lock."""
    for folder in (checkpoints_folder(run_dir), samples_folder(run_dir)):
        for path in folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def prune(run_dir: Path, newest_step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0: none), and the best one."""
    older = [path for path in list_checkpoints(run_dir) if step_of(path) <= newest_step]
    best = best_checkpoint(run_dir)
    for path in older[:-keep] if keep else []:
        if best is None or path.name != best.name:
            remove_folder(path)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Where `checkpoints/best` leads; None where no checkpoint has been found best."""
    link = checkpoints_folder(run_dir) / BEST
    return link.resolve() if link.is_dir() else None


def values_by_step(run_dir: Path, metric: str) -> dict[int, float]:
    """What evaluations of the run found; where none has the metric, its validations."""
    evaluated = {line["step"]: line["metrics"].get(metric) for line in _of_steps(run_dir / EVALUATION_FILE)}
    validated = {line["step"]: line.get(metric) for line in _of_steps(run_dir / VALIDATION_FILE)}
    found = [{step: of for step, of in lines.items() if of is not None} for lines in (evaluated, validated)]
    return found[0] or found[1]


def mark_best(run_dir: Path, metric: str) -> None:
    """Let `checkpoints/best` lead to the checkpoint with the best value of those that are there, the earlier of two."""
    there = {step_of(path): path for path in list_checkpoints(run_dir)}
    known = {step: value for step, value in values_by_step(run_dir, metric).items() if step in there}
    if not known:
        return
    sign = 1 if metric.split("@")[0] in LOWER_IS_BETTER else -1
    best = there[min(known, key=lambda step: (sign * known[step], step))]
    link = checkpoints_folder(run_dir) / BEST
    if link.is_symlink() and os.readlink(link) == best.name:
        return
    new = beside(link)
    new.symlink_to(best.name)
    os.rename(new, link)


def step_of(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


# How far a checkpoint is, and whether it is whole


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or trusted; the message is one line meant for the user."""


class SchemaError(CheckpointError):
    """The checkpoint is whole, but of another release's layout."""


@dataclass
class TrainState:
    """Where a run stands, besides its tensors."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples_seen: int = 0  # good samples that reached the model
    bad_steps: int = 0  # non-finite steps in a row up to now
    ema_updates: int = 0
    global_batch_sizes: list[int] = field(default_factory=list)  # samples a step of each bucket, over all ranks
    data_fingerprint: str = ""  # of the samples' ids, which the sampler's order depends on
    identity: dict[str, Any] = field(default_factory=dict)  # of manifest and frozen models, see training/identity.py


def verify_checkpoint(folder: Path) -> TrainState:
    """Read `state.json` and compare every file's sha256. Raises CheckpointError that says what is wrong."""
    state, hashes = read_state(folder)
    for name, expected in hashes.items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name}: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written (sha256 differs)")
    return state


def read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    """The state and each file's recorded sha256. Raises CheckpointError."""
    path = folder / STATE_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
            raise ValueError("it is no object with sha256 in it")
        version, hashes = content.pop("schema_version"), content.pop("sha256")
        content.pop("device", None)  # for people, and for plans, see planning/measured.py
        content.pop("position", None)  # of earlier releases, which had one size
        if "global_batch_size" in content:
            content["global_batch_sizes"] = [content.pop("global_batch_size")]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE} cannot be read ({error})") from None
    if version != SCHEMA_VERSION:
        raise SchemaError(f"checkpoint {folder} has schema version {version}; this release reads {SCHEMA_VERSION}")
    try:
        return TrainState(**content), hashes
    except TypeError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE}: {error}") from None


def newest_checkpoint(run_dir: Path, report: Callable[[str], None] = print) -> tuple[Path, TrainState] | None:
    """The newest checkpoint whose files are whole; None where there is none at all.

    A damaged one is reported and the one before it taken. Raises CheckpointError where all are damaged.
    """
    reasons: list[str] = []
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            state = verify_checkpoint(folder)
        except SchemaError:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            report(f"{error}; looking for the one before it")
            continue
        return folder, state
    if reasons:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole ({reasons[0]}): restore one, or move the folder away to start again"
        )
    return None


# Whether it can be written, and who trains there


def check_folder(key: str, folder: str) -> None:
    """Raise ConfigError where nothing could be written into the folder, which need not be there; leave no trace."""
    there = place(folder).absolute()
    try:
        if address_of(there):
            with writing(there / f".probe-{os.getpid()}") as file:
                file.write(b"1")
            remove_file(there / f".probe-{os.getpid()}")
            return
        while not _is_there(there):
            there = there.parent
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=there):
            pass  # only trying tells: permissions, read-only mounts and odd file systems have a say
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{key} = {folder}: cannot be used ({reason})") from None


def check_file(key: str, path: Path) -> None:
    """As `check_folder`, of a file that is to be written there at the end of long work."""
    if os.path.isdir(path):
        raise ConfigError(f"{key} = {path}: cannot be used (this is a folder, expected a file's name)")
    check_folder(key, str(path.parent))


def _is_there(path: Path) -> bool:
    """Whether something has the name, be it a link to nowhere. Raises OSError where it cannot be looked at."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


# Open handles of run folders that this process holds.
_claims: set[int] = set()


def _leave_claims_to_parent() -> None:
    """A lock lives as long as any process has its handle: a loader that outlives a killed run must not hold it."""
    for handle in _claims:
        os.close(handle)
    _claims.clear()


os.register_at_fork(after_in_child=_leave_claims_to_parent)


@contextlib.contextmanager
def claimed_run_folder(run_dir: Path, key: str = "run.dir") -> Iterator[None]:
    """Create the folder that `key` names and hold it for the block; remove it again if empty.

    Raises ConfigError if it is held.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{key} = {run_dir}: cannot be used ({error.strerror})") from None
    _claims.add(handle)
    locked = False
    try:
        _lock(handle, f"{key} = {run_dir}")
        locked = True
        yield
    finally:
        if handle in _claims:  # not in a process forked meanwhile
            _claims.remove(handle)
            os.close(handle)
            if locked:
                with contextlib.suppress(OSError):
                    run_dir.rmdir()


def _lock(handle: int, place: str) -> None:
    try:
        # The kernel drops the lock with the process, however it dies.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{place}: another process is training there; wait for it or stop it") from None
    except OSError:
        pass  # a network file system without locks


def write_config(run_dir: Path, config_toml: str) -> None:
    """RUN/config.toml, whole or not at all."""
    write_text(run_dir / CONFIG_FILE, config_toml)


# Lines of JSON


class JsonLines:
    """An append-only file of JSON objects, created by its first line.

    Every line goes to the operating system at once, so that a killed process loses none. Where the file cannot be
    written, `error` says so from then on, and nothing more is written: whoever trains saves first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: TrainingError | None = None
        self._file: IO[bytes] | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        if self.error is not None:
            return
        text = (json.dumps({key: _finite(value) for key, value in line.items()}) + "\n").encode()
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
            while text:  # a disk that fills up takes a part first
                text = text[self._file.write(text) :]
        except OSError as error:
            self.error = TrainingError(cannot_write(error, self.path))

    def read(self) -> list[dict[str, Any]]:
        return list(_lines(self.path))

    def read_last(self, count: int) -> list[dict[str, Any]]:
        """As many of the last lines, without reading those before: of a long run these are many."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - count * LONGEST_LINE))
            lines = file.read().splitlines()[-count:]
        return list(_parsed(line.decode("utf-8", "replace") for line in lines))

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run writes again, and what is none: a last one cut short."""
        if not self.path.exists():
            return
        kept = [line for line in _of_steps(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # every line has been written
                self._file.close()
            self._file = None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    yield from _parsed(path.read_text(encoding="utf-8", errors="replace").splitlines())


def _of_steps(path: Path) -> Iterator[dict[str, Any]]:
    return (line for line in _lines(path) if type(line.get("step")) is int)


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill, or damaged
            continue
        if isinstance(value, dict):
            yield value


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Events:
    """TensorBoard events, created by the first of them. `error` as in JsonLines."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self.folder, self.resumed_step = folder, resumed_step
        self.error: TrainingError | None = None
        self._file: SummaryWriter | None = None
        self._hook_before = threading.excepthook

    def add(self, values: Mapping[str, float | None], step: int) -> None:
        """Curves' points by name; None leaves a gap."""
        with self._writing() as file:
            for name, value in values.items():
                if file is not None and value is not None:
                    file.add_scalar(name, value, step)

    def add_image(self, name: str, picture: Any, step: int) -> None:
        with self._writing() as file:
            if file is not None:
                file.add_image(name, picture, step, dataformats="HWC")

    def add_video(self, name: str, frames: Any, fps: float, step: int) -> None:
        """Frames uint8 [T, H, W, 3], as a GIF: TensorBoard's own writer asks for moviepy to make the same."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        from opensora_repro.data.write import encode_gif

        file = io.BytesIO()
        encode_gif(file, frames, fps)
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
        with self._writing() as events:
            if events is not None:
                summary = Summary(value=[Summary.Value(tag=name, image=image)])
                events._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]

    def add_text(self, name: str, text: str, step: int) -> None:
        with self._writing() as file:
            if file is not None:
                file.add_text(name, text, step)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._failed(error)
            self._file = None
            threading.excepthook = self._hook_before

    @contextlib.contextmanager
    def _writing(self) -> Iterator[SummaryWriter | None]:
        """The open file; None once it could not be written."""
        if self._file is None and self.error is None:
            try:
                self._file = self._open()
            except OSError as error:
                self._failed(error)
        try:
            yield self._file if self.error is None else None
        except OSError as error:  # of its thread as well, which writes now and then
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.error = self.error or TrainingError(cannot_write(error, error.filename or self.folder))

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = self._on_thread_error  # its thread writes at once
        try:
            # Events of steps that a killed process had gone beyond the checkpoint are hidden.
            return SummaryWriter(str(self.folder), purge_step=self.resumed_step + 1, max_queue=1000, flush_secs=20)
        except OSError:
            threading.excepthook = self._hook_before
            raise

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """The events' thread hands what stopped it to whoever writes next: no need for a traceback beside."""
        if type(args.thread).__name__ != "_AsyncWriterThread":
            self._hook_before(args)
