"""What it takes to make clips of footage, from measured rates: core hours and GPU hours, time on a cluster, cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.errors import DataError
from opensora_repro.files import one_line


@dataclass(frozen=True)
class Rates:
    """Of one kind of footage: core seconds of each tool for an hour of it, and the clips that an hour gives."""

    footage: str
    core_seconds: dict[str, float]
    clips: float
    source: str


@dataclass(frozen=True)
class Plan:
    """`hours` are of the cluster's time, with all of its cores, or GPUs, at work; `cost` None without a price.

    `unpriced`: of cores and GPUs what is not in the cost.
    """

    clips: int
    core_hours: dict[str, float]  # by tool
    gpu_hours: float
    hours: float
    cost: float | None
    unpriced: tuple[str, ...] = ()


def read_rates(path: Path, footage: str) -> Rates:
    """Read what `benchmarks.curation` wrote. Raises DataError."""
    try:
        kinds: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["footage"]
        found = kinds.get(footage, {"seconds": 1, "tools": {}, "clips": 0})
        hours = found["seconds"] / 3600
        tools = {name: one["cpu_seconds"] - one["start_cpu_seconds"] for name, one in found["tools"].items()}
        clips = found["clips"] / hours
    except OSError as error:
        raise DataError(
            f"--measured {one_line(path)}: {error.strerror}; python -m benchmarks.curation makes it"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
        raise DataError(f"--measured {one_line(path)}: expected what python -m benchmarks.curation writes") from None
    if footage not in kinds:
        raise DataError(f"--footage {one_line(footage)}: {one_line(path)} has {', '.join(kinds)}")
    return Rates(footage, {name: max(0.0, seconds) / hours for name, seconds in tools.items()}, clips, one_line(path))


def plan_curation(
    rates: Rates,
    hours: float,
    *,
    cores: int,
    gpus: int = 0,
    gpu_seconds: float = 0.0,
    used: float = 1.0,
    core_price: float | None = None,
    gpu_price: float | None = None,
) -> Plan:
    """Plan for `hours` of footage; `gpu_seconds` are those of a clip, `used` is the share of the time that cores work.

    Tools follow each other, so the cores' time and the GPUs' add up; each is paid while it works alone.
    """
    core_hours = {name: hours * seconds / 3600 / used for name, seconds in rates.core_seconds.items()}
    clips = round(hours * rates.clips)
    gpu_hours = clips * gpu_seconds / 3600
    whole = sum(core_hours.values())
    paid = {"cores": (whole, core_price), "GPUs": (gpu_hours, gpu_price)}
    unpriced = tuple(name for name, (taken, price) in paid.items() if taken and price is None)
    priced = [taken * price for taken, price in paid.values() if price is not None]
    hours_in_all = whole / cores + (gpu_hours / gpus if gpu_hours else 0.0)
    return Plan(clips, core_hours, gpu_hours, hours_in_all, sum(priced) if priced else None, unpriced)


def told_plan(rates: Rates, plan: Plan, hours: float, *, cores: int, gpus: int) -> list[str]:
    """Return the plan's lines."""
    lines = [f"{hours:,.0f} hours of {rates.footage} footage: about {plan.clips:,} clips ({rates.source})"]
    lines += [f"  {name:<10} {taken:>12,.1f} core hours" for name, taken in plan.core_hours.items()]
    lines.append(f"  {'in all':<10} {sum(plan.core_hours.values()):>12,.1f} core hours")
    if plan.gpu_hours:
        lines.append(f"  {'models':<10} {plan.gpu_hours:>12,.1f} GPU hours")
    where = f"{cores:,} cores" + (f", then {gpus:,} GPUs" if plan.gpu_hours else "")
    days = f" ({plan.hours / 24:,.1f} days)" if plan.hours >= 48 else ""
    lines.append(f"on {where}: {_hours(plan.hours)}{days}")
    if plan.cost is not None:
        without = f", without {' and '.join(plan.unpriced)}" if plan.unpriced else ""
        lines.append(f"cost{without}: {plan.cost:,.2f}, {1e6 * plan.cost / max(1, plan.clips):,.2f} a million clips")
    return lines


def _hours(hours: float) -> str:
    return f"{math.ceil(60 * hours):,} minutes" if hours < 2 else f"{hours:,.1f} hours"
