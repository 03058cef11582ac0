"""A scaling law of a recipe: train model sizes at growing budgets of FLOPs, fit loss = a + b * C^-c, look further.

    python -m stages.scaling CONFIG.toml [section.key=value ...] --sizes S,B,L --budgets 1x,4x,16x --out DIR

Every size is trained from noise at every budget, by the stage that CONFIG is for, in a process of its own. The same
command goes on after a kill; runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from opensora_repro.config import Config, ConfigError, load_config
from opensora_repro.errors import check_least, run_command
from opensora_repro.files import user_path, write_text
from opensora_repro.planning.recipe import MODULES
from opensora_repro.process import call

if TYPE_CHECKING:
    from opensora_repro.planning.ladder import Rung, Size


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=expanduser, metavar="CONFIG.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the config, for all runs")
    add("--sizes", required=True, metavar="S,B,...", help="published sizes (S, B, L, XL) or WIDTHxDEPTH, as 96x4")
    budgets = "training FLOPs of each run: multiples of what CONFIG's own run takes (1x,4x,16x), or numbers (1e15)"
    add("--budgets", required=True, metavar="1x,4x,...", help=budgets)
    add("--out", required=True, type=user_path, metavar="DIR", help="where the runs, scaling.json and report.html go")
    add("--next", metavar="SIZE", help="the size to look ahead to (default: the next one up)")
    add("--price-per-gpu-hour", type=float, metavar="PRICE", help="in any currency, to tell costs")
    add("--dry-run", action="store_true", help="check all configs, print steps, FLOPs and time, then stop")
    add("--gpu", metavar="NAME", help="with --dry-run: times on such a GPU, as RTX-4090")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    check_least(args, "price_per_gpu_hour", least=0)
    if args.gpu is not None and not args.dry_run:
        raise ConfigError("--gpu asks what --dry-run estimates: give both, or neither")
    rungs, following = plan(args)
    if args.dry_run:
        return show(rungs, args.gpu)
    from opensora_repro.run_folder import claimed_run_folder

    with claimed_run_folder(args.out):
        return climb(args, rungs) or tell(args, rungs, following)


def plan(args: argparse.Namespace) -> tuple[list[Rung], Rung]:
    """The ladder, and the run that would be next, all configs checked. Raises ConfigError."""
    from opensora_repro.planning import ladder

    base = load_config(args.config, args.overrides)
    ladder.check_base(base)
    sizes = ladder.read_sizes(args.sizes, base)
    budgets = ladder.read_budgets(args.budgets, base.train.steps * ladder.step_flops(base))
    rungs = ladder.make_ladder(args.config, args.overrides, sizes, budgets, args.out)
    for rung in rungs:
        import_module(module_of(rung.cfg)).check(rung.cfg)
    size: Size = ladder.read_size(args.next, base) if args.next else ladder.next_size(sizes, base)
    budget = ladder.next_budget(budgets)
    return rungs, ladder.make_rung(args.config, args.overrides, size, budget, args.out)


def module_of(cfg: Config) -> str:
    """Of the stage that begins with noise: pictures are trained by the first one, clips by the second."""
    picture = cfg.data.num_frames == 1 and not (cfg.model.architecture == "stdit" and cfg.model.temporal_attention)
    return MODULES["stage1" if picture else "stage2"]


def climb(args: argparse.Namespace, rungs: Sequence[Rung]) -> int:
    """Train what is not trained yet; the exit code of what ended early, or 0."""
    from opensora_repro.report.scaling import held_out

    for number, rung in enumerate(rungs, start=1):
        title = f"[{number}/{len(rungs)}] {rung.size.name} at {rung.budget.name}: {rung.cfg.train.steps:,} steps"
        if is_done(rung):
            print(f"{title}: done before, held-out loss {held_out(rung)['loss']:.4f}", flush=True)
            continue
        print(f"\n{title}", flush=True)
        code = call((module_of(rung.cfg), args.config, *args.overrides, *rung.overrides), partial(is_done, rung))
        if code:
            print(f"{rung.run_dir} ended with exit code {code}; the same command goes on there", file=sys.stderr)
            return code
        print(f"held-out loss {held_out(rung)['loss']:.4f}", flush=True)
    return 0


def is_done(rung: Rung) -> bool:
    """Whether all its steps are made. Raises ConfigError where a run of other settings or clips lies there."""
    from opensora_repro.run_folder import list_checkpoints

    if not list_checkpoints(rung.run_dir):
        return False
    from opensora_repro.data.manifest import read_manifest
    from opensora_repro.training.identity import check_manifest
    from opensora_repro.training.start import find_start

    start = find_start(rung.cfg, 1)
    check_manifest(rung.cfg, start, read_manifest(rung.cfg.data.manifest), print)
    return start.state.step == rung.cfg.train.steps


def tell(args: argparse.Namespace, rungs: Sequence[Rung], following: Rung) -> int:
    """Fit the law; write it as JSON, as a table, as a page."""
    from opensora_repro.report.scaling import result, table, write_page

    found: dict[str, Any] = result(rungs, following, args.price_per_gpu_hour)
    write_text(args.out / "scaling.json", json.dumps(found, indent=1) + "\n")
    write_page(found, args.out / "report.html")
    print("\n".join(["", *table(found), "", f"{args.out / 'scaling.json'}; open {args.out / 'report.html'}"]))
    return 0


def show(rungs: Sequence[Rung], gpu: str | None) -> int:
    """Print each run of the ladder: steps, FLOPs, and about how long it takes."""
    from opensora_repro.planning.report import duration, operations
    from opensora_repro.planning.rough import machine_of

    machine = machine_of(gpu)
    times = [machine.seconds(rung.flops, rung.cfg.train.dtype) for rung in rungs]
    print(f"{'size':>10}{'budget':>10}{'parameters':>15}{'steps':>10}{'work':>16}{'time':>12}")
    for rung, seconds in zip(rungs, times, strict=True):
        known = "unknown" if seconds is None else duration(seconds)
        names = f"{rung.size.name:>10}{rung.budget.name:>10}{rung.parameters:>15,}{rung.cfg.train.steps:>10,}"
        print(f"{names}{operations(rung.flops):>16}{known:>12}")
    total = f"{len(rungs)} runs, {operations(sum(rung.flops for rung in rungs))}"
    if None not in times:
        total += f", about {duration(sum(filter(None, times)))} on {machine}; encoding and samples come on top"
    print(total)
    return 0


if __name__ == "__main__":
    sys.exit(main())
