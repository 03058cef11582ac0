"""One file over HTTP: within limits, tried again where that may help, continued where it was.

What arrives goes to a partial file, with the server's validator (a strong ETag, or Last-Modified) beside it. The next
try, in this run or another, asks for the rest on condition that the file is still the same; a server that knows no
ranges, or has another file by now, sends it from the start.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from opensora_repro.data.download.connect import Forbidden, Line
from opensora_repro.data.download.kinds import HEAD, kind_of, seems
from opensora_repro.data.http_retries import TryAgain, retry_after
from opensora_repro.data.jobs.workers import DISK_TROUBLE
from opensora_repro.files import one_line, write_text

SCHEMES = ("http", "https")
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others next time
BLOCK = 1 << 18
FIRST_WAIT, LONGEST_WAIT = 0.5, 120.0  # seconds between tries; a server that asks for more is left for another run
PROGRESS = 1 << 16  # bytes after which a try counts as the first again
SLOWEST, PATIENCE = 1000.0, 60.0  # bytes a second, looked at after so many seconds
URL_CHARACTERS = "".join(map(chr, range(33, 127)))


class Refused(Exception):
    """The file cannot be had, and would not be the next time."""


class TooLarge(Refused):
    """The file is larger than the limit."""


class Failed(Exception):
    """The file could not be had this time."""


class OverBudget(Failed):
    """There is no room for the file beside the others."""


@dataclass(frozen=True)
class Limits:
    """Bytes of a file, seconds without a byte, tries after the first, seconds of all tries; where files may lie."""

    max_bytes: int
    timeout: float
    retries: int
    max_time: float
    allow_private: bool


class Budget:
    """The bytes that all files together may have."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.total, self.lock = limit, 0, threading.Lock()
        self.held: dict[str, int] = {}

    def hold(self, key: str, size: int) -> None:
        """Say how large a file is, or will be. Raises OverBudget where that is too much."""
        with self.lock:
            total = self.total + size - self.held.get(key, 0)
            if self.limit is not None and total > self.limit and size:
                raise OverBudget(f"--max-total is reached: {self.limit:,} bytes")
            self.total, self.held[key] = total, size

    def count(self, key: str, size: int) -> None:
        """Say how large a file is that is there already, whether there is room or not."""
        with self.lock:
            self.total += size - self.held.get(key, 0)
            self.held[key] = size


def fetch(url: str, part: Path, limits: Limits, hold: Callable[[int], None], stop: threading.Event) -> bool:
    """Download `url` to the file `part`, going on from what it holds; return whether it did. Raises Refused or Failed.

    `hold` is told the file's size, or what there is of it as it grows, and may raise.
    """
    address, tries, resumed = checked_url(url), 0, False
    deadline = time.monotonic() + limits.max_time
    while True:
        before = _size(part)
        resumed |= before > 0
        try:
            with Line(deadline, allow_private=limits.allow_private) as line:
                _attempt(address, part, limits, hold, stop, line)
            return resumed
        except Forbidden as error:
            raise Failed(str(error)) from error
        except (TryAgain, Refused) as error:
            if line.expired:  # whatever was made of the end
                raise _too_slow(limits) from error
            if isinstance(error, Refused):
                raise
            tries = 1 if _size(part) - before >= PROGRESS else tries + 1
            if tries > limits.retries:
                raise Failed(f"{error} ({tries} tries)") from error
            wait = FIRST_WAIT * 2 ** (tries - 1) if error.wait is None else error.wait
            if wait > LONGEST_WAIT:
                raise Failed(f"{error} (the server asks to wait {wait:.0f} seconds)") from error
            if time.monotonic() + wait > deadline:
                raise _too_slow(limits) from error
            stop.wait(wait)
        if stop.is_set():
            raise Failed("interrupted")


def _too_slow(limits: Limits) -> Failed:
    return Failed(f"took longer than --max-time, {limits.max_time:g} seconds; the next run goes on where it was")


def checked_url(url: str) -> str:
    """Return the URL with other characters than ASCII's escaped. Raises Refused for what is no http or https URL."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        parts.port  # noqa: B018  raises for what is no number
    except ValueError as error:
        raise Refused(f"no URL: {one_line(error)}") from error
    if parts.scheme.lower() not in SCHEMES or not parts.hostname:
        raise Refused(f"expected an http or https URL, got {one_line(url)[:100]}")
    try:
        host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    except UnicodeError as error:
        raise Refused(f"no URL: {one_line(error)}") from error
    rest = urllib.parse.urlunsplit(("", "", parts.path, parts.query, ""))
    return f"{parts.scheme.lower()}://{host}{urllib.parse.quote(rest, safe=URL_CHARACTERS)}"


def drop(part: Path) -> None:
    """Delete a partial file and what is known of it."""
    part.unlink(missing_ok=True)
    _about(part).unlink(missing_ok=True)


def _attempt(
    url: str, part: Path, limits: Limits, hold: Callable[[int], None], stop: threading.Event, line: Line
) -> None:
    headers = {"User-Agent": "opensora-repro", "Accept": "*/*", "Accept-Encoding": "identity"}
    start, validator = _size(part), _validator(part)
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        request = urllib.request.Request(url, headers=headers)
        with line.opener(_Redirects()).open(request, timeout=limits.timeout) as response:
            _receive(response, part, start if "Range" in headers else 0, limits, hold, stop)
        if line.expired:  # without a length, an end looks like any other
            raise _too_slow(limits)
    except urllib.error.HTTPError as error:
        error.close()
        _raise_status(error, part)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Refused(f"its certificate is not valid: {error.reason.verify_message}") from error
        raise TryAgain(one_line(error.reason)) from error
    except http.client.InvalidURL as error:
        raise Refused(f"no URL: {one_line(error)}") from error
    except http.client.IncompleteRead as error:
        raise TryAgain("the connection ended early") from error
    except http.client.HTTPException as error:
        raise TryAgain(one_line(str(error) or type(error).__name__)) from error
    except ValueError as error:  # a server may redirect to what is no address
        raise Refused(f"redirected to no URL: {one_line(error)}") from error
    except OSError as error:
        if error.errno in DISK_TROUBLE or error.filename is not None:  # ours, not the connection's
            raise
        raise TryAgain(one_line(str(error) or type(error).__name__)) from error


def _raise_status(error: urllib.error.HTTPError, part: Path) -> NoReturn:
    reason = f"HTTP {error.code} {one_line(error.reason)}".strip()
    if urllib.request.HTTPRedirectHandler.inf_msg in str(error.reason):
        reason = f"HTTP {error.code}: it redirects in a circle, or too often"
    if error.code == 416:  # our part is longer than the file
        drop(part)
        raise TryAgain(reason, 0.0) from error
    if error.code in AGAIN:
        raise TryAgain(reason, retry_after(error.headers.get("Retry-After"))) from error
    raise Refused(reason) from error


def _receive(
    response: Any, part: Path, asked: int, limits: Limits, hold: Callable[[int], None], stop: threading.Event
) -> None:
    """Write a response's body from where it starts. Raises TryAgain if it ends early."""
    start, expected = _extent(response, part, asked)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(f"answered in an encoding that was not asked for: {response.headers['Content-Encoding']}")
    if expected is not None and expected > limits.max_bytes:
        raise TooLarge(f"has {expected:,} bytes, --max-bytes is {limits.max_bytes:,}")
    hold(max(start, expected or 0))  # all of it at once: two that do not both fit shall not both fail half-way
    _remember(response, part)
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        got = _copy(response, file, start, expected or 0, limits, hold, stop)
    if expected is not None and got < expected:
        raise TryAgain(f"the connection ended after {got:,} of {expected:,} bytes")
    if not got:
        raise Refused("the file is empty")


def _extent(response: Any, part: Path, asked: int) -> tuple[int, int | None]:
    """Return where the body starts and the file ends, None if unknown."""
    length = response.headers.get("Content-Length", "")
    size = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != asked or not asked:
            drop(part)
            raise TryAgain("answered with another range than asked for", 0.0)
        return asked, (asked + size if size is not None else None)
    if response.status != 200:
        raise Refused(f"HTTP {response.status} {one_line(response.reason)}")
    return 0, size


def _copy(
    response: Any,
    file: IO[bytes],
    start: int,
    expected: int,
    limits: Limits,
    hold: Callable[[int], None],
    stop: threading.Event,
) -> int:
    got, began, known = start, time.monotonic(), False
    while data := response.read1(BLOCK):
        got += len(data)
        if got > limits.max_bytes:
            raise TooLarge(f"has more than {limits.max_bytes:,} bytes, the limit of --max-bytes")
        if got > expected:
            hold(got)
        file.write(data)
        if not known and got >= HEAD:
            file.flush()
            known = bool(checked_kind(Path(file.name)))
        passed = time.monotonic() - began
        if passed > PATIENCE and (got - start) / passed < SLOWEST:
            raise TryAgain(f"slower than {SLOWEST:.0f} bytes a second")
        if stop.is_set():
            raise Failed("interrupted")
    return got


def checked_kind(path: Path) -> str:
    """Return the extension that a file's first bytes ask for. Raises Refused for no video and no picture."""
    if kind := kind_of(path):
        return kind
    raise Refused(f"is {seems(path)}; expected a video or picture")


def _about(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _remember(response: Any, part: Path) -> None:
    """Note by what the file can be known again; without that nothing is continued."""
    tag = response.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else response.headers.get("Last-Modified", "")
    write_text(_about(part), json.dumps({"validator": validator}))


def _validator(part: Path) -> str:
    try:
        found = json.loads(_about(part).read_text(encoding="utf-8")).get("validator")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) and found.isprintable() and found.isascii() else ""


def _size(part: Path) -> int:
    try:
        return os.stat(part).st_size
    except OSError:
        return 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urllib.parse.urljoin(req.full_url, headers.get("Location") or "")
        scheme = urllib.parse.urlsplit(target).scheme.lower()
        if scheme not in SCHEMES:
            fp.close()
            raise Refused(f"redirected to {one_line(scheme)}:, which is not followed")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
