"""Videos behind a page rather than an address of their own: yt-dlp fetches them, where the user has installed it."""

from __future__ import annotations

import shutil
import subprocess
import threading
import urllib.parse
from pathlib import Path

from opensora_repro.data.download.fetch import Failed, TooLarge, checked_url
from opensora_repro.data.files import one_line
from opensora_repro.data.manifest import DataError

HOSTS = ("youtube.com", "youtu.be", "youtube-nocookie.com", "vimeo.com", "dailymotion.com", "bilibili.com")
LONGEST = 6 * 3600.0  # seconds


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


def fetch_page(url: str, program: str, folder: Path, max_bytes: int, stop: threading.Event) -> Path:
    """Let yt-dlp download a page's video into the empty `folder`; return the file. Raises Refused or Failed."""
    folder.mkdir(parents=True)
    template = str(folder.absolute()).replace("%", "%%") + "/video.%(ext)s"
    command = [
        program, "--ignore-config", "--no-playlist", "--no-progress", "--quiet", "--no-warnings", "--no-mtime",
        "--max-filesize", str(max_bytes), "--output", template, "--", checked_url(url),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        told = _wait(process, stop)
    finally:
        process.kill()
        process.wait()
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".part"]
    if process.returncode:
        raise Failed(f"yt-dlp: {one_line(told)[-300:] or f'exit status {process.returncode}'}")
    if not files:  # what it does with a file that is too large
        raise TooLarge(f"yt-dlp left no file: none there, or more than --max-bytes {max_bytes:,}")
    return max(files, key=lambda path: path.stat().st_size)


def _wait(process: subprocess.Popen[bytes], stop: threading.Event) -> str:
    """Wait for the end; return the last line of what was said."""
    waited = 0.0
    while True:
        try:
            _, errors = process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            waited += 1.0
            if stop.is_set() or waited > LONGEST:
                raise Failed("interrupted" if stop.is_set() else f"yt-dlp took more than {LONGEST:.0f} s") from None
            continue
        return (errors.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
