"""How a process that computes on a CPU treats the memory of tensors that it has freed."""

from __future__ import annotations

import ctypes
import os

KEPT_BYTES = 1 << 30  # what the process may hold on to without using it; larger tensors come and go as before
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep up to `KEPT_BYTES` of freed memory for the next tensors; return whether the C library does.

    glibc gives blocks above 32 MB back to the system at once, which then clears every page of the next such block: a
    fifth of a forward pass at 8192 tokens of 384 channels. A user's own settings for malloc stay as they are.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  only glibc knows these numbers
    except (OSError, AttributeError, TypeError):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
