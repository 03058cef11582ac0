"""What went wrong, for whom: a user's mistakes and a machine's failures, as one line and an exit code.

Nothing is imported here that makes such errors: whoever raises one derives it from these.
"""

from __future__ import annotations

import errno
import math
import os
import re
import select
import sys
from collections.abc import Callable

from opensora_repro.files import one_line

USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes
GOES_ON = "the same command goes on from here"
TRAIN_WITH_LESS = (
    "Lower train.batch_size and raise train.accumulation by as much (the run stays the same), or data.packing_tokens, "
    'or set train.activation_checkpointing = "full"; configs/profiles has recipes by a card\'s memory'
)
_WRONG_NAME = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_CANNOT_GROW = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(ValueError):
    """What only the user can put right; the message is one line: which key, file or row, what was expected."""


class DataError(UserError):
    """A mistake in the user's data."""


class EngineError(UserError):
    """The processes cannot run as they were started."""


class TrainingError(RuntimeError):
    """Training, or sampling, cannot go on; the message is one line meant for the user."""


def check_least(options: object, *names: str, least: int = 1) -> None:
    """Raise UserError for an option, by its field's name, that is given and under `least` (1 or 0), or no number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            expected = "at least 1" if least else "0 or more"
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def run_command(run: Callable[[], int], *, kept: str = GOES_ON, less_memory: str = "") -> int:
    """Run a stage or a dataset tool; return its exit code, having told in one line what ended it.

    2: a user's mistake, or a path that is not there, is in the way or may not be used. 1: the machine failed, or
    training did. 130: Ctrl-C. Anything else is a fault of ours, and raised. `kept` says what of the work remains where
    it was not the user's mistake, `less_memory` how to need less.
    """
    try:
        code = run()
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        # Of one that came through code in text, as imports run it, Python would end by the signal, whatever our code.
        eval("0")
        print("; ".join(filter(None, ("interrupted", kept))), file=sys.stderr, flush=True)
        return INTERRUPTED
    except TrainingError as error:  # first: a checkpoint that cannot be written is both
        return _tell(str(error), FAILURE)
    except UserError as error:
        return _tell(str(error), USER_MISTAKE)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _tell("; ".join(filter(None, ("what read the output has ended", kept))), FAILURE)
        if isinstance(error, _WRONG_NAME) or error.errno in _NO_NAME:
            return _tell(_told(error), USER_MISTAKE)
        return _tell("; ".join(filter(None, (_told(error), kept))), FAILURE)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _tell("; ".join(filter(None, (out_of_memory(error, less_memory), kept))), FAILURE)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed, as `| head` does; what is left to print is dropped.

    Python would else complain once more when it ends.
    """
    stdout = 1  # the process's own, whatever stands for it in Python
    output = select.poll()
    output.register(stdout, 0)  # errors are told unasked
    if broken := any(event & select.POLLERR for _, event in output.poll(0)):
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stdout)
    return broken


def _tell(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = f" (process {rank})" if rank.isdecimal() and int(rank) else ""
    print(f"error{where}: {one_line(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return code


def _told(error: OSError) -> str:
    if error.errno in _CANNOT_GROW:
        return cannot_write(error)
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a GPU or a CPU, had no memory left; torch's errors are known by name and words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("DefaultCPUAllocator", "bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def out_of_memory(error: BaseException, less_memory: str = TRAIN_WITH_LESS) -> str:
    """One line: how much was asked of whose memory, and what needs less."""
    text = next(iter(str(error).splitlines()), "")
    if type(error).__name__ != "OutOfMemoryError":
        asked = re.search(r"allocate (\d+) bytes", text)
        size = f" ({int(asked[1]) / 2**30:,.2f} GiB more were asked for)" if asked else ""
        text = f"out of memory: this machine has no more{size}."
    return f"{text} {less_memory}".rstrip(" .")


def cannot_write(error: OSError, path: object = None) -> str:
    """One line: which file, and why; `path` where the error does not know it."""
    return f"cannot write {path or error.filename or 'a file'}: {error.strerror or error}"
