"""One HTML file about runs: how they learned and what they make, what they were made of, what went wrong, what it took.

Self-contained: pictures and videos are inside the file, nothing is fetched. What a run does not have is left out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError, load_recorded
from opensora_repro.data.report.markup import data_uri, number, render
from opensora_repro.files import read_json, write_text
from opensora_repro.planning.gpus import gpu_of_device
from opensora_repro.planning.measured import measured_utilisation
from opensora_repro.report.curves import Chart, Series, chart
from opensora_repro.report.read import Run, points_of, read_runs
from opensora_repro.run_folder import CONFIG_FILE

TEMPLATE = Path(__file__).with_name("templates") / "runs.html"
PICTURE_BYTES, VIDEO_BYTES = 2_200_000, 900_000  # of all runs; in the page they take a third more
MOST_GRIDS = 24  # of a run, evenly spread over its steps
GRID_WIDTH = 960  # pixels
COLOURS = 8  # of lines; then they begin again
SECONDS_AN_HOUR = 3600
ROWS = 12  # of a table over steps: the last ones


@dataclass(frozen=True)
class RunPart:
    """What the page shows of one run alone."""

    run: Run
    colour: int
    facts: list[tuple[str, str]]
    cost: list[tuple[str, str]]
    grids: list[tuple[int, str]]  # step and address
    videos: list[tuple[str, str]]  # of the newest samples: address and prompt
    prompts: Sequence[str]


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    evaluations: Sequence[Path] = (),
    price: float | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the page about the runs at `paths`. Raises ConfigError for what is no run, OSError.

    `evaluations`: files of stages.evaluate besides those within the runs; `price`: of a device-hour; `notes`: more
    sections, lines by heading.
    """
    runs = read_runs(paths)
    parts = [_part(run, number, len(runs), price) for number, run in enumerate(runs)]
    measured = [*(found for run in runs for found in run.measured), *((str(p), read_json(p)) for p in evaluations)]
    values: dict[str, Any] = {
        "title": ", ".join(run.name for run in runs),
        "parts": parts,
        "charts": [drawn for drawn in charts(runs) if drawn is not None],
        "several": len(runs) > 1,
        "checkpoints": measured_table(measured),
        "differing": differing(runs),
        "notes": notes or {},
        "rows": ROWS,
        "plays_files": False,
    }
    write_text(out, render(TEMPLATE, {"metric": metric, "quality": quality, "shown_value": shown_value}, **values))


def charts(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Each with all runs, where these have it; a colour a run, or a colour a line where there is one run."""
    only = len(runs) == 1

    def of_steps(key: str) -> list[Series]:
        return [Series(run.name, run.points(key), colour % COLOURS) for colour, run in enumerate(runs)]

    def of_lines(attribute: str, key: str) -> list[Series]:
        return [
            Series(run.name, points_of(getattr(run, attribute), key), colour % COLOURS)
            for colour, run in enumerate(runs)
        ]

    training, held_out = of_steps("loss"), of_lines("validations", "loss")
    dots = [Series(f"{own.name}, held out", own.points, (own.colour + only) % COLOURS, True) for own in held_out]
    marks = sorted({line["step"] for run in runs for line in run.alarms})
    yield chart("Loss", [*training, *dots], marks=marks)
    yield from _by_noise_level(runs)
    if only:
        ours, trained = (points_of(runs[0].validations, key) for key in ("of_average", "of_trained"))
        lines = [Series("averaged weights", ours, 0), Series("trained weights", trained, 1)]
        yield chart("Held-out loss of the average and without", lines)
    names = dict.fromkeys(name for run in runs for line in run.evaluations for name in line.get("metrics", {}))
    for name in names:
        yield chart(
            f"Evaluation: {name.replace('_', ' ')}",
            [Series(run.name, _metric_points(run, name), colour % COLOURS) for colour, run in enumerate(runs)],
        )
    for key, title in (("psnr", "PSNR of held-out clips"), ("ssim", "SSIM of held-out clips")):
        yield chart(title, of_lines("validations", key))
    yield chart("Gradient norm", of_steps("grad_norm"), log=True)
    yield chart("Learning rate", of_steps("lr"), from_zero=True)
    for key, title in (("samples", "Samples a second"), ("data_seconds", "Share of the time waiting for data")):
        lines = [Series(run.name, _a_second(run, key), colour % COLOURS) for colour, run in enumerate(runs)]
        yield chart(title, lines, from_zero=True)
    yield chart("Largest activation", of_lines("validations", "activation"), log=True)
    for key in ("l1", "kl", "lpips", "adversarial", "discriminator"):  # stage 0's
        lines = [own for own in of_steps(key) if any(y for _, y in own.points)]
        yield chart(f"Loss: {key}", lines)


def _by_noise_level(runs: Sequence[Run]) -> Iterator[Chart | None]:
    levels: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for place, run in enumerate(runs):
        levels |= {(place, level): [] for level in sorted({of for line in run.validations for of, _ in _levels(line)})}
        for line in run.validations:
            for level, loss in _levels(line):
                levels[place, level].append((float(line["step"]), loss))
    if len(runs) == 1:
        lines = [Series(f"{level:g}", points, place) for place, ((_, level), points) in enumerate(levels.items())]
        yield chart("Held-out loss by noise level (of 1000)", lines)
        return
    for level in sorted({level for _, level in levels}):
        own = [(number, points) for (number, of), points in levels.items() if of == level]
        lines = [Series(runs[number].name, points, number % COLOURS) for number, points in own]
        yield chart(f"Held-out loss at noise level {level:g} of 1000", lines)


def _levels(line: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Of a validation: noise levels and their losses, those that were finite."""
    both = zip(line.get("timesteps", ()), line.get("losses", ()), strict=True)
    return [(level, float(loss)) for level, loss in both if loss is not None]


def _metric_points(run: Run, name: str) -> list[tuple[float, float]]:
    found = [(line["step"], value_of(line.get("metrics", {}).get(name))) for line in run.evaluations]
    return [(float(step), value) for step, value in found if value is not None]


def _a_second(run: Run, key: str) -> list[tuple[float, float]]:
    lines = [line for line in run.steps if line["seconds"] and isinstance(line.get(key), int | float)]
    return [(float(line["step"]), line[key] / line["seconds"]) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# One run


def _part(run: Run, place: int, count: int, price: float | None) -> RunPart:
    prompts = run.config.get("sample.prompts", [])
    return RunPart(
        run=run,
        colour=place % COLOURS,
        facts=list(_facts(run)),
        cost=list(_cost(run, price)),
        grids=_grids(run, PICTURE_BYTES // count),
        videos=_videos(run, prompts, VIDEO_BYTES // count),
        prompts=prompts,
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What is asked first of a run."""
    start, config = run.last_start, run.config
    if start.get("stage"):
        yield "stage", start["stage"]
    total = config.get("train.steps")
    yield "steps", f"{run.step:,}" + (f" of {total:,}" if total else "")
    if run.validations and run.validations[-1].get("loss") is not None:
        line = run.validations[-1]
        yield "held-out loss", f"{number(line['loss'])} at step {line['step']:,}"
    model = [str(config[key]) for key in ("model.architecture", "model.kind") if key in config]
    if model:
        size = [f"{config[key]} {what}" for key, what in _SIZES if key in config]
        yield "model", ", ".join([*model, *size])
    if run.checkpoints:
        yield "checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints[-6:])
    yield "alarms", str(len(run.alarms) or "none")


_SIZES = (("model.depth", "layers"), ("model.hidden_size", "wide"))


def _cost(run: Run, price: float | None) -> Iterator[tuple[str, str]]:
    """Where it was trained, and what that took; the times of its steps alone, as its metrics have them."""
    for start in [*run.starts[-3:]]:
        name = start.get("device", "?")
        device = f"{name}, {start.get('cpus', '?')} cores" if name == "cpu" else name
        yield f"from step {start['step']:,}", f"{start.get('processes', 1)} x {device}; torch {start.get('torch', '?')}"
    if not run.steps:
        return
    hours = run.device_seconds / SECONDS_AN_HOUR
    yield "time of all steps", f"{run.seconds / SECONDS_AN_HOUR:.3g} hours"
    yield "device-hours", f"{hours:.3g}"
    if price is not None:
        yield "cost", f"{hours * price:,.2f} at {price:g} a device-hour"
    waited = run.stride * sum(line.get("data_seconds", 0) for line in run.steps)
    yield "waiting for data", f"{waited / max(run.seconds, 1e-9):.1%}"
    for key in ("samples", "tokens"):
        seen = run.stride * sum(line.get(key, 0) for line in run.steps)
        if seen:
            yield key, f"{number(seen)} seen, {number(run.rate(key), 3)} a second"
    yield from _utilisation(run)


def _utilisation(run: Run) -> Iterator[tuple[str, str]]:
    gpu = gpu_of_device(str(run.last_start.get("device", "")))
    if gpu is None:
        return
    try:
        reached, _ = measured_utilisation(run.path, load_recorded(run.path / CONFIG_FILE), gpu)
    except ConfigError:
        return
    yield "of the peak", f"{reached:.1%} of {gpu.name}'s arithmetic"


def _grids(run: Run, room: int) -> list[tuple[int, str]]:
    """As many as there is room for, the first and the last among them."""
    samples = _spread(run.samples, MOST_GRIDS)
    if not samples:
        return []
    samples = _spread(samples, max(1, room // len(_jpeg(samples[-1][1] / "grid.png"))))  # at a guess
    pictures = [(step, _jpeg(folder / "grid.png")) for step, folder in samples]
    while len(pictures) > 1 and sum(len(jpeg) for _, jpeg in pictures) > room:
        pictures = _spread(pictures, len(pictures) - 1)
    return [(step, data_uri("image/jpeg", jpeg)) for step, jpeg in pictures]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly, the last one always."""
    if len(items) <= count:
        return list(items)
    step = (len(items) - 1) / max(1, count - 1)
    return [items[round(len(items) - 1 - place * step)] for place in range(count)][::-1]


def _jpeg(path: Path) -> bytes:
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    if picture.width > GRID_WIDTH:
        picture = picture.resize((GRID_WIDTH, max(1, picture.height * GRID_WIDTH // picture.width)))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=82)
    return data.getvalue()


def _videos(run: Run, prompts: Sequence[str], room: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for place, path in enumerate(sorted(run.samples[-1][1].glob("[0-9]*.mp4")) if run.samples else []):
        room -= path.stat().st_size
        if room < 0:
            break
        prompt = prompts[place] if place < len(prompts) else path.stem
        found.append((data_uri("video/mp4", path.read_bytes()), prompt))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Config keys by name, and each run's value, where not all have the same."""
    keys = sorted({key for run in runs for key in run.config})
    rows = [(key, [shown_value(run.config.get(key)) for run in runs]) for key in keys if key != "run.dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shown_value(value: Any) -> str:
    if value is None:
        return "–"
    return '""' if value == "" else str(value)


def measured_table(found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Of stages.evaluate: a row a checkpoint, a column a metric."""
    rows = [row for _, content in found for row in content.get("checkpoints", ()) if isinstance(row, dict)]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.get("metrics", {})))
    manifests = dict.fromkeys(str(content.get("manifest", "")) for _, content in found if content.get("checkpoints"))
    return {"names": names, "rows": rows, "manifests": list(manifests)}


def value_of(found: Any) -> float | None:
    """A metric's value, with or without its interval."""
    value = found.get("value") if isinstance(found, Mapping) else found
    return float(value) if isinstance(value, int | float) else None


def metric(found: Any) -> str:
    value = value_of(found)
    if value is None:
        return "–"
    if isinstance(found, Mapping) and {"low", "high"} <= found.keys():
        return f"{number(value)} ({number(found['low'], 3)} to {number(found['high'], 3)})"
    return number(value)


def quality(line: Mapping[str, Any]) -> str:
    """Of a validation of stage 0."""
    return f"PSNR {line['psnr']:.2f} dB, SSIM {line['ssim']:.3f}"
