"""Files that appear whole or not at all, and what killed writers leave behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def beside(path: Path) -> Path:
    """Return a hidden name in the same folder, this process's own, to write to before renaming to `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files in `folder` whose writers, processes of this machine, are gone."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.tmp"):
        try:
            os.kill(int(path.name.split(".")[-2]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            pass  # somebody else's process, or not our file: leave it
