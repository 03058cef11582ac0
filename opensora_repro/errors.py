"""What went wrong, for whom: a user's mistakes and a machine's failures, without importing what makes them."""

from __future__ import annotations

import re

_LESS_MEMORY = (
    "Lower train.batch_size and raise train.accumulation by as much (the run stays the same), "
    'or set train.activation_checkpointing = "full"; configs/profiles has recipes by a card\'s memory'
)


class UserError(ValueError):
    """What only the user can put right; the message is one line: which key, file or row, what was expected."""


class DataError(UserError):
    """A mistake in the user's data."""


class EngineError(UserError):
    """The processes cannot run as they were started."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line meant for the user."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a GPU or a CPU, had no memory left; torch's errors are known by name and words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("DefaultCPUAllocator", "bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def out_of_memory(error: BaseException) -> str:
    """One line: how much was asked of whose memory, and what needs less."""
    text = next(iter(str(error).splitlines()), "")
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} {_LESS_MEMORY}"
    asked = re.search(r"allocate (\d+) bytes", text)
    size = f" ({int(asked[1]) / 2**30:,.2f} GiB more were asked for)" if asked else ""
    return f"out of memory: this machine has no more{size}. {_LESS_MEMORY}"


def cannot_write(error: OSError, path: object = None) -> str:
    """One line: which file, and why; `path` where the error does not know it."""
    return f"cannot write {path or error.filename or 'a file'}: {error.strerror or error}"
