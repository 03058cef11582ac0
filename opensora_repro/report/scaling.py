"""What a ladder of runs comes to: its losses, the law, what is next; as one JSON, as lines and as a page.

The page is one HTML file, as those about runs are: it fetches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.report.markup import data_uri, number, render
from opensora_repro.errors import DataError
from opensora_repro.files import write_text
from opensora_repro.planning.ladder import Rung
from opensora_repro.planning.report import duration, operations
from opensora_repro.planning.scaling import LARGEST_POWER, NUMBERS, SHARE, SMALLEST_POWER, Law, fit_law
from opensora_repro.report.curves import Chart, Series, chart
from opensora_repro.report.read import read_run
from opensora_repro.run_folder import METRICS_FILE, VALIDATION_FILE, JsonLines

SECONDS_AN_HOUR = 3600
ROUNDED = 1e-4  # of a loss: as near as the search comes, where clips that do not differ leave an interval no width


def held_out(rung: Rung) -> dict[str, Any]:
    """The line of the validation at its end. Raises DataError where there is none, or none that is finite."""
    lines = JsonLines(rung.run_dir / VALIDATION_FILE).read()
    if not lines or lines[-1].get("step") != rung.cfg.train.steps or not lines[-1].get("of_clips"):
        raise DataError(
            f"{rung.run_dir}: it has not measured held-out clips at its end; delete its folder to train it anew"
        )
    if lines[-1]["loss"] is None or None in lines[-1]["of_clips"]:
        raise DataError(
            f"{rung.run_dir}: its held-out loss is not finite: lower optim.lr, or leave {rung.size.name} out of --sizes"
        )
    return lines[-1]


def result(rungs: Sequence[Rung], following: Rung, price: float | None) -> dict[str, Any]:
    """All that scaling.json has. Raises DataError for runs whose held-out losses cannot be compared."""
    lines = [held_out(rung) for rung in rungs]
    for rung, line in zip(rungs, lines, strict=True):
        if any(line[key] != lines[0][key] for key in ("clips", "timesteps")):
            raise DataError(
                f"{rung.run_dir} was measured on other held-out clips or noise levels than {rungs[0].run_dir}: "
                "take another --out, or delete the runs of before"
            )
    found = [_of_run(rung, line) for rung, line in zip(rungs, lines, strict=True)]
    best = _best(found)
    flops = np.array([found[number]["flops"] for number in best])
    law = fit_law(flops, np.array([lines[number]["of_clips"] for number in best]))
    for place in best:
        found[place] |= {"best": True, "law": law.at(found[place]["flops"]).value}
    clips = len(lines[0]["of_clips"])
    return {
        "law": {name: asdict(value) for name, value in law.numbers().items()},
        "curve": _curve(law, min(flops), following.flops),
        "clips": clips,
        "next": _next(law, following, found, price),
        "notes": [*_missed(law, [found[number] for number in best]), *_notes(law, clips, rungs, best, following)],
        "runs": found,
    }


def _of_run(rung: Rung, line: Mapping[str, Any]) -> dict[str, Any]:
    run = read_run(rung.run_dir)
    if not run.seconds:
        raise DataError(f"{rung.run_dir / METRICS_FILE}: it tells of no step, and so not how long the run took")
    start = run.last_start
    return {
        "size": rung.size.name,
        "budget": rung.budget.name,
        "parameters": rung.parameters,
        "steps": rung.cfg.train.steps,
        "flops": rung.flops,
        "loss": line["loss"],
        "best": False,  # of its budget
        "seconds": run.seconds,
        "device_seconds": run.device_seconds,
        "device": f"{start.get('processes', 1)} x {start.get('device', '?')}",
        "run": str(rung.run_dir),
        "samples": [str(run.samples[-1][1]), list(rung.cfg.sample.prompts)] if run.samples else [],
    }


def _best(found: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of each budget's run with the lowest loss."""
    budgets = dict.fromkeys(run["budget"] for run in found)
    numbers = [[number for number, run in enumerate(found) if run["budget"] == budget] for budget in budgets]
    return [min(own, key=lambda number: found[number]["loss"]) for own in numbers]


def _curve(law: Law, first: float, last: float) -> list[dict[str, float]]:
    return [{"flops": float(flops), **asdict(law.at(flops))} for flops in np.geomspace(first, last, 40)]


def _next(law: Law, following: Rung, found: Sequence[Mapping[str, Any]], price: float | None) -> dict[str, Any]:
    """At the speed of the largest size's runs, all of its steps together."""
    largest = [run for run in found if run["size"] == found[-1]["size"]]
    flops, seconds, of_devices = (sum(run[key] for run in largest) for key in ("flops", "seconds", "device_seconds"))
    hours = following.flops / flops * of_devices / SECONDS_AN_HOUR
    return {
        "size": following.size.name,
        "budget": following.budget.name,
        "parameters": following.parameters,
        "steps": following.cfg.train.steps,
        "flops": following.flops,
        "loss": asdict(law.at(following.flops)),
        "flops_a_second": flops / seconds,
        "seconds": following.flops / flops * seconds,
        "device_hours": hours,
        "cost": None if price is None else price * hours,
        "device": largest[-1]["device"],
    }


def _missed(law: Law, best: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the curve goes past what was measured: a bound holds it, or the losses follow no such law."""
    told = []
    for run in best:
        at, tolerance = law.at(run["flops"]), ROUNDED * abs(run["loss"])
        if not at.low - tolerance <= run["loss"] <= at.high + tolerance:
            told.append(f"{at.value:.3f} in place of {run['loss']:.3f} at {run['budget']}")
    if told:
        yield (
            f"These losses do not follow the curve, which says {', '.join(told)}: further off than clips drawn "
            "anew explain. Its numbers, and what it says of the next size, are rough."
        )


def _notes(law: Law, clips: int, rungs: Sequence[Rung], best: Sequence[int], following: Rung) -> Iterator[str]:
    """What the numbers do not say."""
    chosen, names = [rungs[number] for number in best], list(dict.fromkeys(rung.size.name for rung in rungs))
    budgets = len(chosen)
    yield (
        f"Intervals: {SHARE:.0%} of {len(law.drawn):,} fits to held-out clips drawn anew"
        + (
            ", and to what the curve misses"
            if budgets > NUMBERS
            else "; of three budgets alone, not of the curve's form"
        )
        + ". That other seeds would train other models is not in them."
    )
    if clips == 1:
        yield "Of one held-out clip intervals have no width: they say nothing of how sure these numbers are."
    if not law.b:
        yield "The loss does not fall with compute: there is no law here."
    elif not law.a:
        yield "a came out as 0: these budgets do not show yet where the loss ends; c is that of a curve without an end."
    if not SMALLEST_POWER < law.c < LARGEST_POWER:
        yield f"c is at an end of {SMALLEST_POWER} to {LARGEST_POWER}, the bounds: these losses are no such curve."
    edges = [f"{rung.size.name} at {rung.budget.name}" for rung in chosen if rung.size.name in (names[0], names[-1])]
    if edges and len(names) > 1:
        yield f"Best at the edge of the sizes: {', '.join(edges)}. Smaller or larger ones may do better there."
    if chosen[-1].size.name != names[-1]:
        yield (
            f"At {chosen[-1].budget.name} {names[-1]} is not the best size: the law tells of the best one, "
            f"which {following.size.name} need not be at {following.budget.name}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def table(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'size':>10}{'budget':>8}{'steps':>10}{'work':>16}{'time':>11}{'held-out loss':>15}"]
    for run in found["runs"]:
        mark = "  best" if run["best"] else ""
        names = f"{run['size']:>10}{run['budget']:>8}{run['steps']:>10,}"
        lines.append(f"{names}{operations(run['flops']):>16}{duration(run['seconds']):>11}{run['loss']:>15.4f}{mark}")
    lines += ["", "loss = a + b * C^-c, C in FLOPs, of the best size at each budget"]
    lines += [f"  {name} = {interval(value)}" for name, value in found["law"].items()]
    return [*lines, f"next: {next_in_words(found['next'])}", *(f"note: {note}" for note in found["notes"])]


def interval(value: Mapping[str, float]) -> str:
    return f"{number(value['value'])} ({number(value['low'], 3)} to {number(value['high'], 3)})"


def next_in_words(following: Mapping[str, Any]) -> str:
    """What the next size up would reach and take, in a sentence."""
    cost = "" if following["cost"] is None else f", costs {following['cost']:,.2f}"
    return (
        f"{following['size']} ({following['parameters']:,} parameters) at {following['budget']}: loss "
        f"{interval(following['loss'])}; {following['steps']:,} steps, {operations(following['flops'])}, "
        f"{duration(following['seconds'])} on {following['device']} at {operations(following['flops_a_second'])}/s"
        f"{cost}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page

TEMPLATE = Path(__file__).with_name("templates") / "scaling.html"
COLOURS = 8
SIDES = 4  # budgets whose samples stand side by side, the first and the last among them
KINDS = {".png": "image/png", ".mp4": "video/mp4"}
SAMPLE_BYTES = 3_000_000  # of all of them; in the page they take a third more


def write_page(found: Mapping[str, Any], out: Path) -> None:
    best = [run for run in found["runs"] if run["best"]]
    shown = [best[round(place * (len(best) - 1) / (SIDES - 1))] for place in range(SIDES)] if best[SIDES:] else best
    sizes = list(dict.fromkeys(run["size"] for run in found["runs"]))
    filters: dict[str, Callable[..., Any]] = {"operations": operations, "duration": duration}
    values = {
        "title": f"Scaling: {', '.join(sizes)}",
        "found": found,
        "best": best,
        "next_in_words": next_in_words(found["next"]),
        "charts": [_by_flops(found, sizes), _by_size(found)],
        "shown": shown,
        "samples": list(_samples(shown)),
        "plays_files": False,
    }
    write_text(out, render(TEMPLATE, filters, **values))


def _by_flops(found: Mapping[str, Any], sizes: Sequence[str]) -> Chart | None:
    """A colour a size, dots and a line; the law and its interval up to the next budget."""
    lines = []
    for colour, size in enumerate(sizes):
        points = [(run["flops"], run["loss"]) for run in found["runs"] if run["size"] == size]
        lines += [Series(size, points, colour % COLOURS, dots=True)]
    curve = found["curve"]
    for place, (key, name) in enumerate({"value": "law", "low": "95 % from", "high": "95 % to"}.items()):
        colour = (len(sizes) + (place > 0)) % COLOURS
        lines.append(Series(name, [(at["flops"], at[key]) for at in curve], colour))
    return chart("Held-out loss by training FLOPs", lines, over="training FLOPs", log_x=True)


def _by_size(found: Mapping[str, Any]) -> Chart | None:
    """A line a budget."""
    lines = []
    for colour, budget in enumerate(dict.fromkeys(run["budget"] for run in found["runs"])):
        own = [run for run in found["runs"] if run["budget"] == budget]
        lines.append(Series(budget, [(run["parameters"], run["loss"]) for run in own], colour % COLOURS))
    return chart("Held-out loss by parameters", lines, over="parameters", log_x=True)


def _samples(shown: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Of each prompt an address for each of `shown`, and whether it is a picture, while there is room."""
    if not shown or not all(run["samples"] for run in shown):
        return
    room = SAMPLE_BYTES
    for place, prompt in enumerate(shown[0]["samples"][1]):
        places = [Path(run["samples"][0]) / f"{place:04d}" for run in shown]
        files = [next((file for kind in KINDS if (file := at.with_suffix(kind)).is_file()), None) for at in places]
        contents = [(file, file.read_bytes()) for file in files if file is not None]
        room -= sum(len(content) for _, content in contents)
        if room < 0 or len(contents) < len(shown):
            return
        yield prompt, [(data_uri(KINDS[file.suffix], content), file.suffix == ".png") for file, content in contents]
