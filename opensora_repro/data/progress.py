"""How far work has come: on a terminal a bar, in a file a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
