"""From raw footage to a trained model in one command: data, preview, stages 0 to 3, evaluation, report, card.

    python -m stages.recipe CONFIG.toml input=FOLDER [captions=FILE] out=DIR [SECTION.key=value ...]

Every step is one of our commands in a process of its own, and a section of CONFIG.toml; a step without its section is
left out. OUT/recipe.json says which steps are done, by the content of what they read: the same command goes on after a
kill, and does again what follows from a change.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from os.path import expanduser

from opensora_repro.config import Config, ConfigError
from opensora_repro.errors import run_command
from opensora_repro.planning.recipe import MODULES, Recipe, Record, Step, estimate, load_recipe, look_at_input, steps_of
from opensora_repro.process import call


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=expanduser, metavar="CONFIG.toml")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="input, captions, out, held_out, or stage1.train.steps=100")
    add("--until", metavar="STEP", help="stop after this step")
    add("--dry-run", action="store_true", help="check all configs, print steps, time and memory, then stop")
    add("--gpu", metavar="NAME", help="with --dry-run: times on such a GPU, as RTX-4090")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.config, args.overrides)
    steps = steps_of(recipe, check_stage)
    if args.until is not None:
        names = [step.name for step in steps]
        if args.until not in names:
            raise ConfigError(f"--until {args.until}: this recipe's steps are {', '.join(names)}")
        steps = steps[: names.index(args.until) + 1]
    if args.gpu is not None and not args.dry_run:
        raise ConfigError("--gpu asks what --dry-run estimates: give both, or neither")
    look_at_input(recipe)
    if args.dry_run:
        return show(recipe, steps, args.gpu)
    from opensora_repro.run_folder import claimed_run_folder

    with claimed_run_folder(recipe.out, key="out"):
        return follow(recipe, steps)


def check_stage(name: str, cfg: Config) -> None:
    """Raise ConfigError for a config that is not that stage's."""
    try:
        import_module(MODULES[name]).check(cfg)
    except ConfigError as error:
        raise ConfigError(f"[{name}]: {error}") from None


def follow(recipe: Recipe, steps: Sequence[Step]) -> int:
    record = Record(recipe.out)
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}: {step.what}"
        if record.is_done(step) and not step.looks:
            print(f"{title}: done before", flush=True)
            continue
        print(f"\n{title}", flush=True)
        began, key = time.monotonic(), record.key(step)
        code = 0
        if step.work is not None:
            step.work()
        else:
            code = call(step.command, step.output.exists)
        if code:
            if code != 2:  # the user's mistake has its own line
                print(f"{step.name} ended with exit code {code}; the same command goes on there", file=sys.stderr)
            return code
        record.put(step, key, time.monotonic() - began)
    print(f"\ndone: {recipe.out}")
    return 0


def show(recipe: Recipe, steps: Sequence[Step], gpu: str | None) -> int:
    """Print each step: whether it is done, its time and memory, and its command."""
    from opensora_repro.planning.report import duration, size
    from opensora_repro.planning.rough import machine_of

    machine = machine_of(gpu)
    record, total = Record(recipe.out), 0.0
    for number, step in enumerate(steps, start=1):
        known = record.done.get(step.name, {})
        state = "to do"
        if step.looks:
            state = "looks for new input"
        elif record.is_done(step):
            state = f"done in {duration(known['seconds'])}"
        seconds, memory = estimate(recipe, steps, step, machine)
        told = [state]
        if state == "to do" and step.config is not None:
            told += ["time unknown" if seconds is None else f"about {duration(seconds)}"]
            told += [] if memory is None else [f"about {size(memory)} of memory"]
            total += seconds or 0.0
        print(f"[{number}/{len(steps)}] {step.name}: {step.what} ({', '.join(told)})")
        if step.command and step.work is None:
            print(f"    python -m {shlex.join(step.command)}")
    print(
        f"training: about {duration(total)} on {machine}, all steps as the heaviest; reading and encoding come on top"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
