"""Batch sizes of all buckets with which every step takes about the same time: measured here, or planned for a GPU."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_repro.config import Config, ConfigError, load_config
from opensora_repro.config.edit import with_batch_sizes
from opensora_repro.errors import check_least, run_command
from opensora_repro.files import here_or_shipped, user_path, write_text
from opensora_repro.planning.gpus import GIB
from opensora_repro.run_folder import check_file
from stages._training import settle_process
from stages.plan import BEST_UTILISATION, PUBLISHED_UTILISATION

if TYPE_CHECKING:
    from opensora_repro.planning.batch_sizes import CostOf, Entry


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.buckets",
        description=__doc__,
        epilog="Batch sizes are a process's, as in the config. Killed, it begins anew: a few steps of each bucket.",
    )
    add = parser.add_argument
    add("config", type=expanduser, metavar="CONFIG.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the config, which are not written")
    add("--out", type=user_path, metavar="FILE",
        help="the config with the batch sizes (default: beside it, CONFIG-buckets.toml)")  # fmt: skip
    add("--seconds", type=float, metavar="S",
        help="that a step should take (default: what the heaviest bucket's takes at its own batch size)")  # fmt: skip
    add("--memory", type=float, metavar="GIB",
        help="that a process may take (default: what is usable of the GPU, or free on this machine)")  # fmt: skip
    add("--max-batch", type=int, metavar="N", help="largest batch size")
    add("--plan", action="store_true", help="by formula for a GPU, instead of steps on this device")
    add("--gpu", metavar="NAME", help="with --plan: kind of GPU (default: H100)")
    add("--gpus", type=int, metavar="N", help="with --plan: how many (default: as many as one sample needs)")
    add("--utilisation", type=float, metavar="SHARE",
        help=f"with --plan: of the GPU's peak, 0 to 1 (default: {BEST_UTILISATION}, the best that is public; "
        f"Open-Sora's published runs reached {PUBLISHED_UTILISATION})")  # fmt: skip
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args), kept="nothing was written")


def run(args: argparse.Namespace) -> int:
    check(args)
    cfg = load_config(args.config, args.overrides)
    text = read(args, cfg)
    settle_process()
    from opensora_repro.planning.batch_sizes import balance, choice_lines

    out = args.out or Path(args.config).with_name(f"{Path(args.config).stem}-buckets.toml")
    check_file("--out", out)
    entries = look(cfg)
    cost_of, limit, data_ranks = (planned if args.plan else measured)(args, cfg)
    choices = balance(entries, cost_of, limit, seconds=args.seconds, most=args.max_batch)
    print("\n".join(choice_lines(cfg, choices, data_ranks)))
    found = {choice.entry.key: choice.batch_size for choice in choices}
    keys = [f"data.buckets[{own}].batch_size" for own in range(len(cfg.data.buckets))] or ["train.batch_size"]
    write_text(out, with_batch_sizes(text, [found.get(key) for key in keys]))
    print(f"written: {out}" + (", without the overrides" if args.overrides else ""))
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UserError."""
    for name in ("seconds", "memory"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} {value:g}: expected more than 0")
    check_least(args, "max_batch", "gpus")
    if args.utilisation is not None and not 0 < args.utilisation <= 1:
        raise ConfigError(f"--utilisation {args.utilisation:g}: expected a share above 0, at most 1")
    for name in ("gpu", "gpus", "utilisation"):
        if getattr(args, name) is not None and not args.plan:
            raise ConfigError(f"--{name} is for --plan: without it, steps are measured on this device")


def read(args: argparse.Namespace, cfg: Config) -> str:
    """The config's text, into which batch sizes can be written. Raises ConfigError."""
    if cfg.data.packing_tokens:
        raise ConfigError(
            f"data.packing_tokens = {cfg.data.packing_tokens}: expected 0, to write a batch size for each bucket: "
            "packed steps have clips of all buckets, train.batch_size of them together"
        )
    if any(override.partition("=")[0].strip() == "data.buckets" for override in args.overrides):
        raise ConfigError("override data.buckets: expected [[data.buckets]] in the config, to write batch sizes there")
    text = here_or_shipped(args.config).read_bytes().decode("utf-8")
    try:
        with_batch_sizes(text, [bucket.batch_size for bucket in cfg.data.buckets] or [cfg.train.batch_size])
    except ConfigError as error:
        raise ConfigError(f"config {args.config}: {error}") from None
    return text


def look(cfg: Config) -> list[Entry]:
    """The buckets, with the clips that a manifest has for them. Raises ConfigError, DataError."""
    from opensora_repro.data.preflight import survey
    from opensora_repro.planning.batch_sizes import entries_of
    from opensora_repro.training.preflight import find_manifest

    table = find_manifest(cfg.data.manifest) if cfg.data.manifest else None
    if table is None:
        print("no manifest yet (data.manifest): clips and shares of time are not known")
        return entries_of(cfg)
    found = survey(table, cfg.data, cfg.data.manifest)
    return entries_of(cfg, [clips * found.rows / found.looked_at for clips in found.clips])


def planned(args: argparse.Namespace, cfg: Config) -> tuple[CostOf, float, int]:
    """Costs by the planner's formulas, a process's memory in bytes, data ranks. Raises ConfigError, EngineError."""
    from opensora_repro.parallel.mesh import Mesh
    from opensora_repro.planning.batch_sizes import Formula
    from opensora_repro.planning.gpus import find_gpu

    gpu, sizes = find_gpu(args.gpu or "H100"), (cfg.parallel.tp_size, cfg.parallel.sp_size)
    mesh = Mesh(0, args.gpus or math.prod(sizes), *sizes)
    utilisation = args.utilisation or BEST_UTILISATION
    print(f"planned for {mesh.world_size} x {gpu.name} at {utilisation:.0%} of the peak; unverified on a GPU")
    limit = args.memory * GIB if args.memory else gpu.usable_bytes
    return lambda entry, *_: Formula(cfg, entry.bucket, mesh, gpu, utilisation), limit, mesh.data_size


def measured(args: argparse.Namespace, cfg: Config) -> tuple[CostOf, float, int]:
    """The same of steps on this device. Raises ConfigError, EngineError, ModelNotFound."""
    from opensora_repro.parallel.device import device_kind
    from opensora_repro.planning.fit import room_on
    from opensora_repro.training.measure import Bench, explore

    bench = Bench(cfg)
    device = bench.engine.device
    limit = args.memory * GIB if args.memory else room_on(device).free
    what = "tensors at most" if device.type == "cuda" else "the process's resident memory at most"
    print(f"measuring on {device_kind(device)}, one process; memory is {what}", flush=True)
    return lambda entry, aim, most: explore(bench, entry, aim=aim, limit=limit, most=most), limit, 1


if __name__ == "__main__":
    sys.exit(main())
