"""What asking a web server again needs to know."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime


class TryAgain(Exception):
    """A request failed in a way that may pass; `wait` is how many seconds the server asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, a number (some APIs send fractions) or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
