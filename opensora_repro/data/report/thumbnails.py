"""Small pictures of clips for a page: three moments of each side by side, made in worker processes and kept."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.earlier import file_key
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.files import digest
from opensora_repro.storage.addresses import within

METHOD = 1  # raise when the same clip would give another picture
HEIGHT = 84  # pixels of a frame's short side
QUALITY = 74
PATIENCE = 60.0  # seconds for a clip
Strip = dict[str, Any]  # {"jpeg": base64} or {"error": reason}


def read_strips(rows: Iterable[Mapping[str, Any]], folder: Path, out: Path, runner: Runner) -> dict[str, Strip]:
    """Return the pictures by the `path` of the rows, which are relative to `folder`; kept in `out`."""
    jobs: dict[str, Job] = {}
    for row in rows:
        if isinstance(row.get("path"), str) and row["path"] not in jobs:
            jobs[row["path"]] = _job(within(folder, row["path"]), row.get("num_frames"))
    if not jobs:
        return {}
    with Records(out) as records:
        keeping = Keeping(records, "pictures")
        found = run_jobs(make_strip, list(jobs.values()), keeping, runner=runner, label="pictures", unit="clip")
    return dict(zip(jobs, found, strict=True))


def _job(path: Path, num_frames: object) -> Job:
    frames = int(num_frames) if isinstance(num_frames, int | float) and 1 <= num_frames < 1 << 40 else 1
    args = {"path": os.path.abspath(path), "num_frames": frames}
    return Job(digest([METHOD, frames]), path.name, args, PATIENCE, (path,), file_key(path, METHOD, frames))


def make_strip(args: dict[str, Any]) -> Strip:
    """Job: the picture of one clip, or why there is none."""
    import numpy as np
    from PIL import Image

    from opensora_repro.data.clip_frames import middles_of
    from opensora_repro.data.video import DecodeError, read_pictures_at

    path, size = args["path"], (HEIGHT, HEIGHT)
    try:
        moments = middles_of(args["num_frames"])
        frames = [read_pictures_at(path, [moment], size=size)[0] for moment in moments]
    except (DecodeError, OSError) as error:
        return {"error": str(error).removeprefix(f"{path}: ")}
    data = io.BytesIO()
    Image.fromarray(np.concatenate(frames, axis=1)).save(data, "JPEG", quality=QUALITY)
    return {"jpeg": base64.b64encode(data.getvalue()).decode("ascii")}
