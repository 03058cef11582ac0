"""Videos behind a page rather than an address of their own: yt-dlp fetches them, where the user has installed it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opensora_repro.data.download.fetch import Failed, Limits, TooLarge, checked_url
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

TETHER = Path(__file__).with_name("tethered.py")
HOSTS = ("youtube.com", "youtu.be", "youtube-nocookie.com", "vimeo.com", "dailymotion.com", "bilibili.com")


def is_video_page(url: str) -> bool:
    """Whether the URL is of a site whose videos have no addresses of their own."""
    host = (urllib.parse.urlsplit(url).hostname or "").lower()
    return any(host == known or host.endswith(f".{known}") for known in HOSTS)


def find_yt_dlp() -> str:
    """Return the program's path. Raises DataError where it is not installed."""
    found = shutil.which("yt-dlp")
    if found is None:
        raise DataError("--yt-dlp: yt-dlp is not installed here; install it, and see that it is on PATH")
    return found


def fetch_page(
    url: str, program: str, folder: Path, limits: Limits, hold: Callable[[int], None], stop: threading.Event
) -> Path:
    """Let yt-dlp download a page's video into the empty `folder`; return the file. Raises Refused or Failed.

    `hold` is told what the folder holds as it grows, then the file's size, and may raise. yt-dlp and what it starts are
    a process group, which ends with this function, and with this process.
    """
    folder.mkdir(parents=True)
    template = str(folder.absolute()).replace("%", "%%") + "/video.%(ext)s"
    command = [
        sys.executable, "-I", str(TETHER), str(os.getpid()),
        program, "--ignore-config", "--no-playlist", "--no-progress", "--quiet", "--no-warnings", "--no-mtime",
        "--max-filesize", str(limits.max_bytes), "--output", template, "--", checked_url(url),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        told = _wait(process, folder, limits, hold, stop)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".part"]
    if process.returncode:
        raise Failed(f"yt-dlp: {one_line(told)[-300:] or f'exit status {process.returncode}'}")
    if not files:  # what it does with a file that is too large
        raise TooLarge(f"yt-dlp left no file: none there, or more than --max-bytes {limits.max_bytes:,}")
    path = max(files, key=lambda path: path.stat().st_size)
    _check_size(folder, limits, hold)
    hold(path.stat().st_size)
    return path


def _wait(
    process: subprocess.Popen[bytes], folder: Path, limits: Limits, hold: Callable[[int], None], stop: threading.Event
) -> str:
    """Wait for the end; return the last line of what was said."""
    deadline = time.monotonic() + limits.max_time
    while True:
        try:
            _, errors = process.communicate(timeout=0.25)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                raise Failed("interrupted") from None
            if time.monotonic() > deadline:
                raise Failed(f"yt-dlp took longer than --max-time, {limits.max_time:g} seconds") from None
            _check_size(folder, limits, hold)
            continue
        return (errors.decode("utf-8", "replace").strip().splitlines() or [""])[-1]


def _check_size(folder: Path, limits: Limits, hold: Callable[[int], None]) -> None:
    """Raise TooLarge for more than the limit: yt-dlp knows few sizes beforehand. What it merges is there twice."""
    parts = merged = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # renamed in this moment
            size = path.lstat().st_size
            parts, merged = (parts, merged + size) if ".temp." in path.name else (parts + size, merged)
    if max(parts, merged) > limits.max_bytes:
        raise TooLarge(f"yt-dlp fetched more than --max-bytes {limits.max_bytes:,}")
    hold(max(parts, merged))
