"""Behind the page: which runs there are, whose results and uploads lie where, and samples made one after the other.

DIR/results/BROWSER/ID/    0000.mp4 (0000.png), samples.json as `stages.sample` writes them; poster.png and page.json
DIR/uploads/BROWSER/       pictures and clips that were sent
DIR/cache/                 what gradio keeps

BROWSER is a secret that a browser alone has: whoever does not know it finds nothing.
"""

from __future__ import annotations

import gc
import io
import json
import re
import secrets
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opensora_repro.app.settings import GivenFile, Settings, options
from opensora_repro.app.uploads import Upload, keep_upload
from opensora_repro.config import ConfigError, load_recorded
from opensora_repro.data.buckets import MULTIPLE, kept_buckets
from opensora_repro.data.video import probe, read_pictures_at
from opensora_repro.data.write import write_png
from opensora_repro.errors import TrainingError, UserError, is_out_of_memory, out_of_memory
from opensora_repro.files import remove_leftovers, replacing, write_text
from opensora_repro.run_folder import CONFIG_FILE, list_checkpoints, list_steps
from opensora_repro.sampling.generate import NotFinite, decode
from opensora_repro.sampling.named_sizes import named_size
from opensora_repro.sampling.run import SamplingRun, load_models, pick_device
from opensora_repro.sampling.source import ModelSource, find_source

if TYPE_CHECKING:
    from torch import Tensor

# The words of `stages.sample` -> what they ask for, and lines on it
BuildRun = Callable[[list[str]], tuple[SamplingRun, list[str]]]

PREVIEWS = 8  # of a clip
PREVIEW_SIDE, POSTER_SIDE = 512, 320
MAX_WAITING = 16  # samples of all browsers
RESULTS_SHOWN = 60
RELEASED = ("144p", "240p", "360p", "480p", "720p")  # sizes that are proposed for weights which tell none
_BROWSER, _ID = re.compile(r"[0-9a-f]{32}"), re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
RECORD = "page.json"


class Stopped(Exception):
    """A browser wants no more of its sample."""


@dataclass(frozen=True)
class Result:
    """A finished sample on the disk."""

    id: str
    folder: Path
    file: Path
    settings: Settings
    seconds: float  # that it took
    told: tuple[str, ...]

    @property
    def poster(self) -> Path:
        return self.folder / "poster.png"


@dataclass
class Job:
    """A sample that is waited for; the page reads what the sampler's thread writes."""

    settings: Settings
    state: str = "waiting"  # working, done, stopped, failed
    message: str = ""
    steps: tuple[int, int] = (0, 0)
    began: float = 0.0
    preview: bytes = b""  # JPEG
    result: str = ""
    future: Future[None] | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped


class KeptModels:
    """The models of the last sample. Those of others take their place: two are never held at once."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.models: Any = None

    def __call__(self, source: ModelSource, device: torch.device, shards: Any = None) -> Any:
        cfg = source.config
        files = tuple((str(file), file.stat().st_mtime_ns) for file in source.weights.files)
        key = (files, source.model, cfg.vae, cfg.text, cfg.train.dtype, str(device))
        if key != self.key:
            self.key, self.models = (), None
            gc.collect()
            self.models = load_models(source, device, shards)
            self.key = key
        return self.models


class Studio:
    """`runs`: what may be sampled, by the name that the page shows."""

    def __init__(
        self, runs: dict[str, Path], folder: Path, build_run: BuildRun, *, device: str | None, max_seconds: float
    ) -> None:
        """Raises ConfigError, WeightsError for what cannot be sampled."""
        self.runs, self.folder, self.build_run = runs, folder.resolve(), build_run
        self.device, self.max_seconds = device, max_seconds
        self.models = KeptModels()
        self.jobs: list[Job] = []  # waiting, and the one that is worked at
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        for name in runs:
            self.source(name, self.checkpoints(name)[0])
        pick_device(device, 1, 0)
        for results in (self.folder / "results").glob("*"):
            remove_leftovers(results)

    # Runs

    def checkpoints(self, run: str) -> list[str]:
        """Names of a run's checkpoints, the newest first; of weights that lie alone their file's. ConfigError."""
        if run not in self.runs:
            raise ConfigError(f"model: {run!r} is none of {', '.join(self.runs)}")
        path = self.runs[run]
        found = list_checkpoints(path) or list_steps(path) if path.is_dir() else []
        return [step.name for step in reversed(found)] or [path.name]

    def path(self, run: str, checkpoint: str) -> Path:
        """Of one of the names above. Raises ConfigError."""
        if checkpoint not in self.checkpoints(run):
            raise ConfigError(f"checkpoint: {run} has no {checkpoint!r} (any more); choose another one")
        path = self.runs[run]
        found = list_checkpoints(path) or list_steps(path) if path.is_dir() else []
        return next((step for step in found if step.name == checkpoint), path)

    def source(self, run: str, checkpoint: str, *, average: bool = True) -> ModelSource:
        return _find_source(self.path(run, checkpoint), average)

    def shapes(self, source: ModelSource) -> list[tuple[int, int]]:
        """Heights and widths of the run's buckets, the default first; of a release's weights those it is known for."""
        data = source.config.data
        found = [(data.height, data.width)]
        recorded = source.path / CONFIG_FILE
        if recorded.is_file():
            buckets = kept_buckets(load_recorded(recorded))
            found += [(b.height // MULTIPLE * MULTIPLE, b.width // MULTIPLE * MULTIPLE) for b in buckets]
        elif source.model.conditions:
            ratios = ("9:16", "16:9", "1:1")
            found += [named_size(name, ratio, whole=False) for name in RELEASED for ratio in ratios]
        return list(dict.fromkeys(found))

    # Files of a browser

    def browser(self, token: object) -> str:
        """The secret that a browser has, or a new one where it has none of ours."""
        return token if isinstance(token, str) and _BROWSER.fullmatch(token) else secrets.token_hex(16)

    def results_folder(self, browser: str) -> Path:
        return self._own("results", browser)

    def _own(self, kind: str, browser: str) -> Path:
        if not _BROWSER.fullmatch(browser):
            raise ConfigError("this page was not opened as a whole; load it again")
        return self.folder / kind / browser

    def upload(self, browser: str, sent: str) -> Upload:
        """Keep what gradio has received, and nothing else that a browser may name. Raises UserError."""
        path = Path(sent).resolve()
        if not path.is_relative_to(self.folder / "cache") or not path.is_file():
            raise UserError("this file was not sent to this page")
        try:
            return keep_upload(path, self._own("uploads", browser))
        finally:
            path.unlink(missing_ok=True)

    def given_path(self, browser: str, file: str) -> Path:
        """Of an upload's or a result's name, in this browser's folders alone. Raises ConfigError."""
        if re.fullmatch(r"[0-9a-f]{32}\.\w{3,4}", file):
            path = self._own("uploads", browser) / file
            if path.is_file():
                return path
        found = self.result(browser, file)
        if found is None:
            raise ConfigError("given frames: a file is not there any more; send it again")
        return found.file

    def facts(self, browser: str, one: GivenFile) -> Upload:
        """Of an upload or a result that is given again. Raises ConfigError."""
        info = probe(self.given_path(browser, one.file))
        return Upload(one.file, one.name, info.num_frames, info.fps)

    def results(self, browser: str) -> Iterator[Result]:
        """Of a browser, the latest first."""
        folder = self.results_folder(browser)
        names = sorted((path.name for path in folder.glob("*") if _ID.fullmatch(path.name)), reverse=True)
        yield from filter(None, (self.result(browser, name) for name in names[:RESULTS_SHOWN]))

    def result(self, browser: str, id: object) -> Result | None:
        if not isinstance(id, str) or not _ID.fullmatch(id):
            return None
        folder = self.results_folder(browser) / id
        with suppress(OSError, ValueError, TypeError, KeyError):  # half deleted, or of another version
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            settings = Settings.from_json(record["settings"])
            file = folder / ("0000.png" if (folder / "0000.png").is_file() else "0000.mp4")
            return Result(id, folder, file, settings, record["seconds"], tuple(record["told"]))
        return None

    def command(self, browser: str, result: Result) -> str:
        """What makes the same from a terminal. Raises ConfigError."""
        words = self._words(browser, result.settings)
        return shlex.join(["python", "-m", "stages.sample", *words, "--out=DIR"])

    def _words(self, browser: str, settings: Settings) -> list[str]:
        source = self.source(settings.run, settings.checkpoint, average=settings.average)
        more = options(settings, source, lambda file: self.given_path(browser, file))
        return [str(source.path), *more, *([f"--device={self.device}"] if self.device else [])]

    # Samples

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for what the page does not offer."""
        source = self.source(settings.run, settings.checkpoint, average=settings.average)
        if (settings.height, settings.width) not in self.shapes(source):
            raise ConfigError(f"shape: {settings.run} has no {settings.height}x{settings.width}")
        if not 0 <= settings.seconds <= self.max_seconds:
            raise ConfigError(f"seconds: at most {self.max_seconds:g} here")

    def submit(self, browser: str, samples: Sequence[Settings]) -> list[Job]:
        """Samples that are made one after the other, once those before them are. Raises ConfigError."""
        self.results_folder(browser)
        for settings in samples:
            self.check(settings)
        jobs = [Job(settings) for settings in samples]
        with self._lock:
            if len(self.jobs) + len(jobs) > MAX_WAITING:
                raise ConfigError(f"{len(self.jobs)} samples are waiting already; try again later")
            self.jobs += jobs
        for job in jobs:
            job.future = self._worker.submit(self._work, browser, job)
        return jobs

    def stop(self, job: Job) -> None:
        """Within a step, or at once where it has not begun."""
        job.stop.set()
        if job.future is not None and job.future.cancel() and not job.ended.is_set():
            job.state = "stopped"
            self._end(job)

    def before(self, job: Job) -> int:
        """How many samples are made first."""
        with self._lock:
            return self.jobs.index(job) if job in self.jobs else 0

    def close(self) -> None:
        for job in list(self.jobs):
            self.stop(job)
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _work(self, browser: str, job: Job) -> None:
        try:
            job.check()
            job.state, job.began = "working", time.monotonic()
            job.result = self._sample(browser, job)
            job.state = "done"
        except Stopped:
            job.state = "stopped"
        except (UserError, TrainingError) as error:
            job.state, job.message = "failed", self._without_paths(browser, str(error))
        except OSError as error:
            job.state, job.message = "failed", error.strerror or "a file cannot be read or written"
            print(f"error: {error}", file=sys.stderr)
        except Exception as error:
            job.state = "failed"
            if is_out_of_memory(error):
                job.message = out_of_memory(error, "Choose a smaller shape or fewer seconds")
            else:
                traceback.print_exc()
                job.message = "this failed for a reason that is the program's; its terminal has more"
        finally:
            self._end(job)

    def _end(self, job: Job) -> None:
        with self._lock:
            self.jobs.remove(job)
        job.ended.set()

    def _sample(self, browser: str, job: Job) -> str:
        """Make one sample; its folder appears whole or not at all. Raises Stopped, UserError, TrainingError."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        with replacing(self.results_folder(browser) / name) as part:
            part.mkdir()
            run, told = self.build_run([*self._words(browser, job.settings), f"--out={part}"])
            device = pick_device(self.device, 1, 0)
            run = replace(run, load=self.models, progress=self._progress(job), watch=self._watch(job))
            check = run.check(device, alone=False)
            job.check()
            run.sample(check.folder, device)
            file = part / check.folder.files(0)[0]
            write_png(part / "poster.png", poster(file))
            seconds = time.monotonic() - job.began
            record = {"settings": job.settings.to_json(), "seconds": seconds, "told": [*told, *check.warnings]}
            write_text(part / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return name

    def _progress(self, job: Job) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            job.steps = (done, total)
            job.check()

        return progress

    def _watch(self, job: Job) -> Callable[[int, Tensor], None]:
        every = max(1, job.settings.steps // PREVIEWS)

        def watch(done: int, estimate: Tensor) -> None:
            job.check()
            if done % every == 0 and done < job.settings.steps:
                with suppress(NotFinite):
                    job.preview = preview(self.models.models[1], estimate[0])

        return watch

    def _without_paths(self, browser: str, message: str) -> str:
        """Names of folders are nobody's business, be they long and secret or not."""
        for folder in (self._own("uploads", browser), self.results_folder(browser), *self.runs.values()):
            message = message.replace(f"{folder}/", "").replace(str(folder), folder.name)
        return message


@lru_cache(maxsize=64)
def _find_source(path: Path, average: bool) -> ModelSource:
    return find_source(path, ema=average)


def preview(vae: Any, latents: Tensor) -> bytes:
    """JPEG of the middle frame of an estimate [C, T', h, w], decoded alone. Raises NotFinite."""
    from PIL import Image

    middle = latents.shape[1] // 2
    picture = Image.fromarray(decode(vae, latents[:, middle : middle + 1], num_frames=1)[0])
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=80)
    return file.getvalue()


def poster(file: Path) -> Any:
    """The middle frame of a video, or a picture, uint8 [H, W, 3], small."""
    info = probe(file)
    scale = min(1.0, POSTER_SIDE / max(info.height, info.width))
    size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
    return read_pictures_at(file, [info.num_frames // 2], size=size)[0]
