"""The jobs that measure clips, one each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.course import Job
from opensora_repro.data.jobs.earlier import sampled_digest
from opensora_repro.data.tables import BATCH, Table
from opensora_repro.files import digest

TIMEOUT = 300.0  # seconds for a clip
Record = dict[str, Any]


@dataclass(frozen=True)
class Jobs:
    """The jobs of a manifest's clips, made whenever they are asked for."""

    clips: Table
    names: list[str]
    old: bool  # also as earlier releases named them

    def __iter__(self) -> Iterator[Job]:
        for batch in self.clips.batches():
            shown = batch.select(["id", "path", "num_frames", "fps"])
            for start in range(0, batch.num_rows, BATCH):
                yield from (job_of(row, self.names, old=self.old) for row in shown.slice(start, BATCH).to_pylist())


def job_of(row: Record, names: list[str], *, old: bool = False) -> Job:
    """Return the job that measures a clip; `old`: also as earlier releases named it."""
    from opensora_repro.data.score.measure import methods_of

    facts, methods = {"num_frames": int(row["num_frames"]), "fps": float(row["fps"])}, methods_of(names)
    earlier = digest([sampled_digest(Path(row["path"])), facts, methods]) if old else ""
    args = {"path": row["path"], "names": names, **facts}
    return Job(digest([facts, methods]), str(row["id"]), args, TIMEOUT, (Path(row["path"]),), earlier)


def job_of_row(row: Record, options: Record) -> Job:
    """Return the job of a row that a line's step before gives."""
    job = job_of(row, options["names"])
    return replace(job, args={**job.args, "row": row})


def rows_of(args: Record, result: Record) -> list[Record]:
    """Return a clip's row for the next step of a line, with its columns."""
    from opensora_repro.data.score.measure import CODE

    if "error" in result:
        return []
    return [{**args["row"], **{name: value for name, value in result.items() if name != CODE}}]


def measure(args: Record) -> Record:
    """Job: the columns of one clip, or why there are none."""
    from opensora_repro.data.score.measure import measure_clip
    from opensora_repro.data.video import DecodeError

    try:
        return measure_clip(args["path"], num_frames=args["num_frames"], fps=args["fps"], names=args["names"])
    except DecodeError as error:
        return {"error": reason_of(error, args["path"])}


def reason_of(error: Exception, path: str) -> str:
    return " ".join(str(error).removeprefix(f"{path}: ").split())
