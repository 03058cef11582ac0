"""Clips of a manifest as training samples, read ahead by worker processes."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch.utils.data import DataLoader, Dataset, get_worker_info

from opensora_repro.config import DataConfig
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.sample_frames import choose_frames, frames_at_rate, pick, rate_of
from opensora_repro.data.sampler import Shape, keyed_generator
from opensora_repro.data.video import DecodeError, Size, read_frames_at
from opensora_repro.storage.addresses import OBJECTS, address_of, shown
from opensora_repro.storage.scratch import prefetch

IDLE = -1  # instead of a row that is read
LOOKS, LONGEST_PAUSE = 4, 1.0  # looks at a reading within its limit at least; seconds between two of them at most
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # what a terminal or a scheduler sends to every process of a job


@dataclass(frozen=True)
class Clip:
    """A sample ready to encode. Pixels stay uint8 up to there: a quarter of the bytes between processes and devices."""

    id: str
    caption: str
    pixels: torch.Tensor  # uint8 [T, H, W, C], in memory [T, C, H, W]; already cropped and mirrored
    flipped: bool
    fps: float  # frames a second as taken; 0: a picture
    indices: tuple[int, ...] = ()  # of its frames in the file
    corner: Size = (0, 0)  # top and left of the crop, in pictures scaled to cover it

    def pin_memory(self) -> Clip:
        """The loader calls this for what goes to a GPU, in a thread of its own."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read; nothing takes its place."""

    id: str
    path: str
    reason: str


class ClipBatch(list["Clip | BadSample"]):
    """The samples of one batch in the sampler's order; `shape` is (frames, height, width) of its clips."""

    def __init__(self, samples: Iterable[Clip | BadSample], shape: Shape) -> None:
        super().__init__(samples)
        self.shape = shape


class ClipDataset:
    """Random windows, crops and mirrorings of a manifest's clips, all keyed by (seed, draw, sample id).

    The draw is the epoch, or the epoch modulo `cfg.draws` if that is set. `augment=False` takes the middle window and
    the centre of the picture, unmirrored, for evaluation.
    """

    def __init__(self, manifest: Any, cfg: DataConfig, seed: int, *, augment: bool = True) -> None:
        """`manifest` is a file, or a table that `read_manifest` returned. Raises DataError for a faulty file."""
        table = read_manifest(manifest) if isinstance(manifest, str | Path) else manifest
        self.cfg, self.seed, self.augment = cfg, seed, augment
        self.rows = table.select(["id", "path", "caption", "num_frames", "fps"])
        self.stuck: set[str] = set()  # files whose reading had to be ended
        self._file: Any = None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is not forked: it maps a file of the rows rather than being sent millions of texts.

        A forked one shares the columns as they are: no Python object stands for a row whose count of references would
        copy its page.
        """
        import pyarrow as pa

        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(suffix=".arrow")  # noqa: SIM115
            with pa.ipc.new_file(self._file.name, self.rows.schema) as writer:
                writer.write_table(self.rows)
        return {**self.__dict__, "rows": None, "_file": self._file.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import pyarrow as pa

        self.__dict__.update(state, _file=None)
        self.rows = pa.ipc.open_file(pa.memory_map(state["_file"])).read_all()

    @property
    def shape(self) -> Shape:
        """Frames, height and width of a sample."""
        return self.cfg.num_frames, self.cfg.height, self.cfg.width

    def draw(self, epoch: int) -> int:
        """Return which of a sample's draws (window, crop, mirroring) an epoch shows."""
        return epoch % self.cfg.draws if self.cfg.draws else epoch

    def load(self, epoch: int, index: int, shape: Shape | None = None) -> Clip | BadSample:
        """Read one sample in the data section's size (or `shape`); what cannot be read comes back as a BadSample."""
        num_frames, height, width = shape or self.shape
        name, path, caption, clip_frames, fps = (column[index].as_py() for column in self.rows.columns)
        told = (OBJECTS in path and address_of(path)) or path
        available = int(frames_at_rate(self.cfg, clip_frames, fps))
        if available < num_frames:
            rate = f" at data.fps = {self.cfg.fps:g}" if self.cfg.fps else ""
            return BadSample(name, told, f"the clip has {available} frames{rate}, the sample needs {num_frames}")
        if path in self.stuck:
            return BadSample(name, told, f"its reading did not end within {_limit(self.cfg)}")
        try:
            generator = self._generator(epoch, name, "window")
            chosen = choose_frames(self.cfg, path, clip_frames, fps, num_frames, generator)
            read = sorted(set(chosen))
            frames = read_frames_at(path, read, size=(height, width))
        except (DecodeError, OSError) as error:
            return BadSample(name, told, shown(str(error)))
        frames, corner = crop(frames, (height, width), self._generator(epoch, name, "crop"))
        if len(read) < num_frames:  # a slow clip shows some for longer
            frames = frames[[read.index(frame) for frame in chosen]]
        flipped = self._flips(epoch, name, caption)
        frames = mirror(frames) if flipped else frames
        pixels = rearrange(frames, "t h w c -> t c h w").contiguous().permute(0, 2, 3, 1)
        return Clip(name, caption, pixels, flipped, rate_of(self.cfg, chosen, fps), tuple(chosen), corner)

    def _flips(self, epoch: int, name: str, caption: str) -> bool:
        generator = self._generator(epoch, name, "flip")
        if generator is None or not self.cfg.flip:
            return False
        return bool(torch.rand((), generator=generator) < 0.5) and not names_a_side(caption)

    def _generator(self, epoch: int, name: str, stream: str) -> torch.Generator | None:
        return keyed_generator(self.seed, self.draw(epoch), name, stream) if self.augment else None


# ---------------------------------------------------------------------------------------------------------------------
# From a clip to a sample. Random choices take a generator, keyed to the sample; without one the middle is taken.


def crop(frames: torch.Tensor, size: Size, generator: torch.Generator | None = None) -> tuple[torch.Tensor, Size]:
    """Cut [T, H, W, C] to [T, height, width, C] at a random place (the centre without a generator).

    Also returns that place, top and left.
    """
    height, width = size
    if frames.shape[1] < height or frames.shape[2] < width:
        raise ValueError(f"frames of {frames.shape[1]}x{frames.shape[2]} are smaller than the crop of {height}x{width}")
    top = pick(frames.shape[1] - height + 1, generator)
    left = pick(frames.shape[2] - width + 1, generator)
    return frames[:, top : top + height, left : left + width], (top, left)


def mirror(frames: torch.Tensor) -> torch.Tensor:
    """Swap left and right of [T, H, W, C]."""
    return frames.flip(2)


def to_tensor(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [T, H, W, C] to float32 [C, T, H, W] in [-1, 1]."""
    return rearrange(frames, "t h w c -> c t h w").contiguous().float().div_(127.5).sub_(1.0)


# What of a caption says that there is no writing
_SEEN = r"(?:visible|legible|readable|discernible|on-?screen|other|written|overlaid)"
_TEXT = r"(?:text|words?|writing|captions?|subtitles?|logos?|watermarks?|letters?|signs?|signage|titles?)"
_LISTED = rf"(?:{_SEEN} )*{_TEXT}"
_NO_TEXT = re.compile(rf"\b(?:no|without(?: any)?) {_LISTED}(?:(?:,|,? or|,? and) {_LISTED})*\b", re.IGNORECASE)


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    """Return one pattern for the lists of sides.txt; "left_hand" has a word that ends where no letter follows."""
    lists: dict[str, list[str]] = {"words": [], "pieces": []}
    for line in Path(__file__).with_name("sides.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            found = lists[line[2:].partition(":")[0]]
        elif line and not line.startswith("#"):
            found.append(line)
    letter = r"[^\W\d_]"
    return re.compile(
        rf"(?<!{letter})(?:{'|'.join(lists['words'])})(?!{letter})|{'|'.join(lists['pieces'])}", re.IGNORECASE
    )


@lru_cache(maxsize=1 << 10)  # for few captions that come again and again; more would only be memory
def names_a_side(caption: str) -> bool:
    """True if the caption tells left from right, or names writing: a mirrored sample would contradict it."""
    caption = unicodedata.normalize("NFC", caption)
    return _pattern().search(_NO_TEXT.sub("", caption)) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Batches, read ahead


class BatchSource(Protocol):
    """What says which samples form a batch: a `BatchSampler`, or any list of (epoch, index) pairs by number."""

    def batch(self, step: int, /) -> list[tuple[int, int]]: ...


class Readings:
    """Which row of the manifest each reader is at, for all processes to see."""

    def __init__(self, num_readers: int) -> None:
        # Row and number of the reading: a reader may come back to the same row.
        self._rows = torch.full((num_readers, 2), IDLE, dtype=torch.int64).share_memory_()

    @contextmanager
    def reading(self, reader: int, row: int) -> Iterator[None]:
        mine = self._rows[reader].numpy()
        mine[1] += 1
        mine[0] = row
        try:
            yield
        finally:
            mine[0] = IDLE

    def now(self) -> list[tuple[int, int]]:
        """Return (row or IDLE, number of the reading) of each reader."""
        return [(int(row), int(number)) for row, number in self._rows.numpy()]


@contextmanager
def _watching(readings: Readings, limit: float, end: Callable[[int, int], None]) -> Iterator[None]:
    """Meanwhile call `end(reader, row)`, in a thread, once for a reading that takes `limit` seconds; 0: never.

    A decoder that hangs cannot be asked. The thread counts its own looks, not the clock, so that a job that was stopped
    as a whole is not taken for a stuck one.
    """
    over = threading.Event()
    pause = min(LONGEST_PAUSE, limit / LOOKS)

    def watch() -> None:
        seen = readings.now()
        looks = [0] * len(seen)
        while not over.wait(pause):
            for reader, now in enumerate(readings.now()):
                looks[reader] = looks[reader] + 1 if now == seen[reader] and now[0] != IDLE else 0
                if looks[reader] == round(limit / pause):
                    end(reader, now[0])
                seen[reader] = now

    thread = threading.Thread(target=watch, daemon=True)
    if limit:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if limit:
            thread.join()


class _Batches(Dataset[ClipBatch]):
    """Map from a micro-batch's (epoch, index) pairs to its samples: what a worker process computes."""

    def __init__(self, dataset: ClipDataset, readings: Readings) -> None:
        self.dataset, self.readings = dataset, readings

    def __getitem__(self, pairs: Any) -> ClipBatch:
        worker = get_worker_info()
        reader = 0 if worker is None else worker.id
        shape = getattr(pairs, "shape", None) or self.dataset.shape
        shapes = getattr(pairs, "shapes", None) or [shape] * len(pairs)

        def load(epoch: int, index: int, shape: Shape) -> Clip | BadSample:
            with self.readings.reading(reader, index):
                return self.dataset.load(epoch, index, shape)

        paths = [self.dataset.rows["path"][index].as_py() for _, index in pairs]
        if any(OBJECTS in path and address_of(path) for path in paths):
            prefetch(paths)
        samples = zip(pairs, shapes, strict=True)
        return ClipBatch((load(epoch, index, shape) for (epoch, index), shape in samples), shape)


class _Steps:
    """The pairs of one micro-batch after the other, drawn here: a worker needs no epoch's order of all samples."""

    def __init__(self, sampler: BatchSource, steps: range) -> None:
        self.sampler, self.steps = sampler, steps
        self.done = 0  # not to be drawn again

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.sampler.batch, self.steps[self.done :])

    def __len__(self) -> int:
        return len(self.steps) - self.done


class LoaderDied(RuntimeError):
    """A worker process has ended before its time; the message is one line meant for the user."""


class _Loader(DataLoader[ClipBatch]):
    def __iter__(self) -> Any:
        """The batches. A worker that is stuck in a file is ended, and all begin anew without that file.

        Raises LoaderDied for a worker that was killed by others or has no memory.
        """
        clips: _Batches = self.dataset  # type: ignore[assignment]
        steps: _Steps = self.sampler  # type: ignore[assignment]
        steps.done = 0
        with _shared_with_workers() if self.num_workers else nullcontext():
            while True:
                batches = self._started()
                workers = list(batches._workers) if self.num_workers else []
                ended: set[int] = set()
                end = partial(_end_stuck, clips.dataset, workers, ended)
                with _watching(clips.readings, clips.dataset.cfg.decode_timeout, end):
                    try:
                        for batch in batches:
                            steps.done += 1
                            yield batch
                        return
                    except (RuntimeError, MemoryError, OSError, EOFError) as error:
                        _tell(error, workers, ended)
                batches._shutdown_workers()

    def _started(self) -> Any:
        """Start the workers with the job's signals blocked: one that comes before they are set up waits."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        main = threading.current_thread() is threading.main_thread()
        on_child = signal.getsignal(signal.SIGCHLD)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if main and self.num_workers:
                # torch's handler would raise a worker's death wherever the program is, be it between two weights'
                # steps; waiting for the next batch finds it as well, some seconds later.
                signal.signal(signal.SIGCHLD, on_child)
        return batches


@contextmanager
def _shared_with_workers() -> Iterator[None]:
    """Meanwhile leave what there is to no collection: it writes to every object, and a forked worker's pages part."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _end_stuck(dataset: ClipDataset, workers: Sequence[Any], ended: set[int], reader: int, row: int) -> None:
    """End the process that reads the row; where that is this one, the run ends with it."""
    path = dataset.rows["path"][row].as_py()
    dataset.stuck.add(path)
    if workers:
        ended.add(workers[reader].pid)
        workers[reader].kill()
        return
    print(
        f"error: reading {shown(path)} has not ended within {_limit(dataset.cfg)}; remove it from the manifest, or set "
        "data.num_workers = 1: a run goes on without what a process of its own is stuck in",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread is where no exception gets


def _limit(cfg: DataConfig) -> str:
    return f"data.decode_timeout = {cfg.decode_timeout:g} seconds"


def _tell(error: Exception, workers: Sequence[Any], ended: Collection[int]) -> None:
    """Raise what has happened to the workers; returns where they did not end but in `ended`, on purpose."""
    if isinstance(error, OSError | EOFError) and workers:
        # A dead worker's pipes close before it can be told how it ended.
        connection.wait([worker.sentinel for worker in workers], timeout=5)
    ends = {worker.pid: worker.exitcode for worker in workers if worker.exitcode and worker.pid not in ended}
    if ends or isinstance(error, MemoryError):
        raise LoaderDied(_end_of_loader(ends, len(workers))) from error
    if not ended:
        raise error


def _end_of_loader(ends: dict[int, int], num_workers: int) -> str:
    """One line: who has ended, how, and what may help."""
    how = ", ".join(f"pid {pid}: {_signal_name(code)}" for pid, code in sorted(ends.items())) or "no memory left"
    if -signal.SIGBUS in ends.values():
        return (
            f"a loader process died ({how}): shared memory is used up; enlarge /dev/shm (docker: --shm-size), or lower "
            f"data.num_workers = {num_workers} (0 needs none)"
        )
    return (
        f"a loader process died ({how}): most often the machine's memory is used up; lower "
        f"data.num_workers = {num_workers}, or leave more memory free"
    )


def _signal_name(code: int) -> str:
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"


def build_loader(
    dataset: ClipDataset,
    sampler: BatchSource,
    first_batch: int,
    num_batches: int,
    num_workers: int,
    *,
    pinned: bool = False,
) -> DataLoader[ClipBatch]:
    """Return an iterable of the batches first_batch, first_batch + 1, ..., in order.

    Each worker reads whole batches, two ahead at most; with `num_workers` 0 they are read when asked for. Randomness
    is keyed to samples, so the number of workers changes nothing but the speed; they live as long as the iteration, a
    whole run. `pinned`: pixels come in memory that a GPU copies from by itself.
    """
    return _Loader(
        _Batches(dataset, Readings(max(1, num_workers))),
        batch_size=None,
        sampler=_Steps(sampler, range(first_batch, first_batch + num_batches)),
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pinned,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=_outlive_stray_signals,
        generator=torch.Generator(),  # or the loader would draw from the global stream
    )


def _as_is(batch: Any) -> Any:
    return batch


def _outlive_stray_signals(_worker: int) -> None:
    """Let only the parent end a worker.

    A scheduler, or Ctrl-C, signals every process of a job. The parent then finishes its step and saves, for which its
    workers must live on; it stops them itself, and they notice within seconds when it is gone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: they end when the parent closes their queue
        return
    parent = os.getppid()

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
