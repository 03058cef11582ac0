"""How far work has come: on a terminal a bar, in a file a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

LOG_EVERY = 30.0  # seconds between lines where the progress goes to a file


@contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show rate and time left: a bar on a terminal, elsewhere a line every half minute; nothing for short work."""
    from tqdm import tqdm

    last = time.monotonic()
    terminal = sys.stderr.isatty()
    with tqdm(total=total, desc=label, unit=unit, delay=2, mininterval=0.5, disable=not terminal) as bar:
        began, count = last, 0

        def advance(steps: int) -> None:
            nonlocal last, count
            count += steps
            if steps:
                bar.update(steps)
            elif time.monotonic() - began > 2:
                bar.refresh()
            if not terminal and time.monotonic() - last >= LOG_EVERY:
                last = time.monotonic()
                line = tqdm.format_meter(count, total or 0, last - began, prefix=label, unit=unit, ascii=True, ncols=0)
                print(line, file=sys.stderr, flush=True)

        yield advance


@contextmanager
def progress_of_line(steps: Sequence[str], total: int) -> Iterator[Callable[[Sequence[Sequence[int]]], None]]:
    """Show a line a step: rows done, of the first step's `total` how many, and rejects; elsewhere one line for all.

    What is yielded takes for each step how many rows more were done, and how many of these are rejects.
    """
    from tqdm import tqdm

    terminal, last = sys.stderr.isatty(), time.monotonic()
    done = [[0, 0] for _ in steps]
    with ExitStack() as opened:
        bars = [
            opened.enter_context(
                tqdm(total=None if at else total, desc=f"{name:>{max(map(len, steps))}}", unit="row", position=at,
                     disable=not terminal)
            )
            for at, name in enumerate(steps)
        ]  # fmt: skip

        def tell(counts: Sequence[Sequence[int]]) -> None:
            nonlocal last
            for bar, sums, (rows, rejected) in zip(bars, done, counts, strict=True):
                sums[:] = sums[0] + rows, sums[1] + rejected
                bar.set_postfix_str(f"{sums[1]:,} rejected", refresh=False)
                bar.update(rows)
            if not terminal and time.monotonic() - last >= LOG_EVERY:
                last = time.monotonic()
                told = (f"{name} {rows:,} done, {no:,} rejected" for name, (rows, no) in zip(steps, done, strict=True))
                print(f"{'; '.join(told)} ({total:,} to do in {steps[0]})", file=sys.stderr, flush=True)

        yield tell
