"""Why training ends early, without importing what trains."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line meant for the user."""
