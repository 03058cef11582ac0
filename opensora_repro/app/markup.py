"""The parts of the page that are HTML: progress with its preview, results, the time line of given frames."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from opensora_repro.data.report.markup import render

if TYPE_CHECKING:
    from opensora_repro.app.settings import Settings
    from opensora_repro.app.studio import Job, Result

TEMPLATES = Path(__file__).with_name("templates")
# gradio's HTML takes ${...} and {{...}} for templates of its own: nobody's text is to be one
_NO_TEMPLATES = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})
TICKS = 4


def html(name: str, /, **values: Any) -> str:
    return render(TEMPLATES / f"{name}.html", **values).translate(_NO_TEMPLATES)


def address(file: Path) -> str:
    """Where the browser gets a file of the page's folder, relative to the page."""
    return f"gradio_api/file={quote(str(file))}"


def problem(message: str) -> str:
    return html("results", problems=[message])


def waiting_for(jobs: Sequence[Job], before: int) -> str:
    """How far the first of the samples is that are not there yet, and what is foreseen of it."""
    number, job = next(((i, job) for i, job in enumerate(jobs) if not job.ended.is_set()), (0, jobs[0]))
    done, total = job.steps
    which = f"sample {number + 1} of {len(jobs)}: " if len(jobs) > 1 else ""
    share = 100 * done / total if total else 0
    picture = base64.b64encode(job.preview).decode()
    return html("waiting", share=round(share, 1), done=done, words=which + _state(job, before), picture=picture)


def _state(job: Job, before: int) -> str:
    done, total = job.steps
    if job.state == "waiting":
        return f"waiting; {before} before this one" if before else "waiting"
    if not done:
        return "loading the model"
    if done == total:
        return "decoding the frames"
    left = (time.monotonic() - job.began) / done * (total - done)
    return f"step {done} of {total}" + (f", about {left:.0f} s left" if left >= 1 else "")


def shown(results: Sequence[Result], commands: Sequence[str], problems: Sequence[str]) -> str:
    """Finished samples, side by side where there are several."""
    parts = [
        {
            "result": result,
            "file": address(result.file),
            "poster": address(result.poster),
            "still": result.file.suffix == ".png",
            "facts": facts(result),
            "settings": _listed(result.settings),
            "command": command,
        }
        for result, command in zip(results, commands, strict=True)
    ]
    return html("results", problems=problems, parts=parts)


def facts(result: Result) -> str:
    settings = result.settings
    length = f"{settings.seconds:g} s" if settings.seconds or settings.loop else "picture"
    return (
        f"{settings.run}, {settings.checkpoint}; {settings.height}x{settings.width}, {length}; {settings.steps} steps, "
        f"guidance {settings.guidance:g}, seed {settings.seed}; took {result.seconds:.0f} s"
    )


def _listed(settings: Settings) -> list[tuple[str, Any]]:
    given = ", ".join(f"{one.name} ({one.use})" for one in settings.given)
    return [(name, value) for name, value in {**settings.to_json(), "given": given}.items() if value != ""]


def time_line(total: int, rate: float, places: Sequence[tuple[str, range, bool]]) -> str:
    """A video of `total` frames, and which of them are given: name, frames, whether they are changed."""
    marks = [
        {
            "name": name,
            "first": span.start,
            "last": span.stop - 1,
            "left": round(100 * span.start / total, 2),
            "width": round(100 * len(span) / total, 2),
            "changed": changed,
        }
        for name, span, changed in places
    ]
    ticks = [f"{total / rate * i / TICKS:.2g} s" for i in range(TICKS + 1)] if total > 1 else []
    return html("time_line", total=total, marks=marks, ticks=ticks)
