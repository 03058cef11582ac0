"""The runs that a scaling law is fitted to: every model size at every budget of training FLOPs, the recipe the same."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_repro.config import Config, ConfigError, load_config
from opensora_repro.models.config import SIZES
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.scaling import NUMBERS
from opensora_repro.planning.sizes import latent_shape, token_grid

FEWEST_STEPS = 10  # of a run
CHECKPOINTS = 4  # of a run at least, to go on from
WARMUP_SHARE = 0.1  # of a run's steps that its warm-up takes at most


@dataclass(frozen=True)
class Size:
    name: str
    width: int
    depth: int
    heads: int

    @property
    def overrides(self) -> list[str]:
        return [f"model.hidden_size={self.width}", f"model.depth={self.depth}", f"model.num_heads={self.heads}"]


@dataclass(frozen=True)
class Budget:
    name: str
    flops: float


@dataclass(frozen=True)
class Rung:
    """A run of the ladder. `flops`: forward and backward of the model in all its steps, a little off the budget's."""

    size: Size
    budget: Budget
    cfg: Config
    flops: float
    parameters: int
    overrides: tuple[str, ...]  # to the ladder's config

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run.dir)


def read_sizes(text: str, cfg: Config) -> list[Size]:
    """Of "S,B,96x4", smallest first. Raises ConfigError."""
    sizes = [read_size(word, cfg) for word in map(str.strip, text.split(","))]
    for one, other in itertools.combinations(sizes, 2):
        if (one.width, one.depth) == (other.width, other.depth):
            raise ConfigError(f"--sizes {text}: {one.name} and {other.name} are the same size")
    return sorted(sizes, key=lambda size: _parameters(size, cfg))


def read_size(word: str, cfg: Config) -> Size:
    """A published size by name, or WIDTHxDEPTH with heads as wide as the config's. Raises ConfigError."""
    if word.upper() in SIZES:
        return Size(word.upper(), *SIZES[word.upper()])
    found = re.fullmatch(r"(\d+)x(\d+)", word)
    if not found or not int(found[1]) or not int(found[2]):
        raise ConfigError(f"size {word!r}: expected {', '.join(SIZES)}, or WIDTHxDEPTH such as 96x4")
    return _size(int(found[1]), int(found[2]), cfg)


def _size(width: int, depth: int, cfg: Config) -> Size:
    head = cfg.model.hidden_size // cfg.model.num_heads
    if width % head:
        raise ConfigError(f"size {width}x{depth}: expected a width that is a multiple of {head}, as wide as its heads")
    return Size(f"{width}x{depth}", width, depth, width // head)


def next_size(sizes: Sequence[Size], cfg: Config) -> Size:
    """The published size after the largest one, or one larger than that as it is than the one before."""
    names, last = list(SIZES), sizes[-1]
    if last.name in names[:-1]:
        return read_size(names[names.index(last.name) + 1], cfg)
    before, head = sizes[-2] if len(sizes) > 1 else None, last.width // last.heads
    wider, deeper = (last.width / before.width, last.depth / before.depth) if before else (1.5, 1.5)
    # Of two that differ in one of width and depth alone, the other stays; heads are whole.
    heads = max(last.heads + (wider > 1), round(last.heads * wider))
    depth = max(last.depth + (deeper > 1), round(last.depth * deeper))
    return Size(f"{heads * head}x{depth}", heads * head, depth, heads)


def read_budgets(text: str, base_flops: float) -> list[Budget]:
    """Of "1x,4x,1e15", smallest first: so many times `base_flops`, or FLOPs. Raises ConfigError."""
    budgets = sorted((_budget(word, base_flops) for word in map(str.strip, text.split(","))), key=lambda of: of.flops)
    if len(budgets) < NUMBERS:
        raise ConfigError(
            f"--budgets {text}: {len(budgets)} cannot tell the {NUMBERS} numbers of loss = a + b * C^-c; "
            "give three or more, such as 1x,4x,16x"
        )
    for one, other in itertools.pairwise(budgets):
        if other.flops < 1.2 * one.flops:
            raise ConfigError(
                f"--budgets {text}: {one.name} and {other.name} are too near; let them be some 4 times apart"
            )
    return budgets


def _budget(word: str, base_flops: float) -> Budget:
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)(x?)", word, re.IGNORECASE)
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    flops = value * base_flops if found and found[2] else value
    if not 0 < flops < math.inf:
        raise ConfigError(f"--budgets {word!r}: expected multiples of CONFIG's own FLOPs (1x, 0.25x) or FLOPs (1e15)")
    return Budget(word.lower(), flops)


def next_budget(budgets: Sequence[Budget]) -> Budget:
    """As far above the largest one as that is above the one before."""
    before, last = budgets[-2:]
    flops = last.flops * last.flops / before.flops
    name = f"{float(last.name[:-1]) * flops / last.flops:.4g}x" if last.name.endswith("x") else f"{flops:.3g}"
    return Budget(name, flops)


def step_flops(cfg: Config) -> float:
    """Forward and backward of the model for the samples of a step of one process, nothing twice, encoders apart."""
    products = forward_products(cfg.model, token_grid(cfg.model, latent_shape(cfg)))
    return float(cfg.train.batch_size * cfg.train.accumulation * products.training_flops)


def check_base(cfg: Config) -> None:
    """Raises ConfigError for a config that no ladder can be made of."""
    if cfg.data.buckets:
        raise ConfigError(
            "data.buckets: a ladder's budgets count steps of one size; set data.num_frames, height, width"
        )
    if cfg.lora.rank:
        raise ConfigError(f"lora.rank = {cfg.lora.rank}: a ladder's models begin from noise, set it to 0")
    if not cfg.data.val_manifest:
        raise ConfigError(
            "data.val_manifest is not set: a ladder compares losses of held-out clips, name their manifest"
        )


def make_ladder(
    config: str, overrides: Sequence[str], sizes: Sequence[Size], budgets: Sequence[Budget], out: Path
) -> list[Rung]:
    """All runs, those of the smallest budget first. Raises ConfigError."""
    return [make_rung(config, overrides, size, budget, out) for budget in budgets for size in sizes]


def make_rung(config: str, overrides: Sequence[str], size: Size, budget: Budget, out: Path) -> Rung:
    """A run from noise, with a schedule of its own that ends with it. Raises ConfigError."""
    base = load_config(config, overrides)
    own = ["init.weights=", "checkpoint.keep=1", "checkpoint.keep_best=", "evaluate.every=0", *size.overrides]
    flops = step_flops(load_config(config, [*overrides, *own]))
    steps = round(budget.flops / flops)
    if steps < FEWEST_STEPS:
        raise ConfigError(
            f"--budgets {budget.name}: {size.name} would make {steps} steps, expected {FEWEST_STEPS} or more: "
            "give larger budgets, or leave that size out"
        )
    warmup = min(base.optim.warmup_steps, math.ceil(WARMUP_SHARE * steps))
    decay = round(base.optim.decay_steps / base.train.steps * steps)
    own += [
        f"run.dir={out / f'{size.name}-{budget.name}'}",
        f"train.steps={steps}",
        f"optim.warmup_steps={warmup}",
        f"optim.decay_steps={decay}",
        f"checkpoint.every={min(base.checkpoint.every, math.ceil(steps / CHECKPOINTS))}",
        f"validation.every={steps}",
        f"sample.every={steps if base.sample.prompts else 0}",
    ]
    cfg = load_config(config, [*overrides, *own])
    return Rung(size, budget, cfg, steps * flops, count_parameters(cfg.model), tuple(own))


def _parameters(size: Size, cfg: Config) -> int:
    model = replace(cfg.model, hidden_size=size.width, depth=size.depth, num_heads=size.heads)
    return count_parameters(model)
