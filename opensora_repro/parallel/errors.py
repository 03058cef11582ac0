"""Why the processes cannot work together, without importing what makes them."""

from __future__ import annotations


class EngineError(ValueError):
    """The processes cannot run as they were started; the message is one line meant for the user."""
