"""Files from the web, each once and with a record: what is there is checked, what is lost is fetched again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import urllib.parse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opensora_repro.data.download.fetch import (
    Budget,
    Failed,
    Limits,
    OverBudget,
    Refused,
    TooLarge,
    checked_kind,
    drop,
    fetch,
)
from opensora_repro.data.download.host_queue import HostQueue, in_threads
from opensora_repro.data.download.kinds import kind_of
from opensora_repro.data.download.video_pages import fetch_page, is_video_page
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import Row
from opensora_repro.files import size_and_time

KIND = "records"  # of records: what became of a download


@dataclass(frozen=True)
class Download:
    """A planned download: `name` is its name without the extension, `digests` what its content must have."""

    key: str
    name: str
    url: str
    digests: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a run works, and its limits."""

    out: Path
    limits: Limits
    budget: Budget
    stop: threading.Event
    yt_dlp: str | None


def fetch_all(
    downloads: dict[str, Download], place: Place, records: Records, workers: int, per_host: int
) -> dict[str, Row]:
    """Fetch what has no record; return all results by key, {"error": reason} among them."""
    results = {key: result for key, result in records.get(KIND, downloads).items() if holds(result, place)}
    for key, record in results.items():
        place.budget.count(key, record.get("bytes", 0))
    todo = [file for file in downloads.values() if file.key not in results]
    shutil.rmtree(place.out / "pages", ignore_errors=True)
    waiting = HostQueue(((host_of(file.url), file) for file in todo), per_host)
    try:
        with progress("downloading", len(todo), "file") as bar:
            for done in in_threads(lambda file: fetch_one(file, place, records), waiting, workers):
                if done is not None:
                    results[done[0].key] = done[1]
                bar(done is not None)
    finally:
        place.stop.set()
    return results


def host_of(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def holds(result: Row, place: Place) -> bool:
    """Whether a file is there, or cannot be had; what was too large is looked at anew by a new limit."""
    if "file" in result:
        return size_and_time(place.out / "files" / result["file"])[:1] == [result["bytes"]]
    return bool(result.get("max_bytes", place.limits.max_bytes) == place.limits.max_bytes)


def fetch_one(file: Download, place: Place, records: Records) -> Row:
    """Download one file and write its record; return it. A failure that may pass leaves none."""
    part = place.out / "parts" / file.key
    try:
        result = fetch_page_of(file, place) if place.yt_dlp and is_page(file) else fetch_file(file, part, place)
    except Failed as error:
        if isinstance(error, OverBudget):
            drop(part)
        place.budget.count(file.key, part.stat().st_size if part.exists() else 0)
        return {"error": str(error)}
    except Refused as error:
        drop(part)
        place.budget.count(file.key, 0)
        limit = {"max_bytes": place.limits.max_bytes} if isinstance(error, TooLarge) else {}
        result = {"error": str(error), **limit}
    records.put(KIND, {file.key: json.dumps(result)})
    drop(part)
    return result


def is_page(file: Download) -> bool:
    try:
        return is_video_page(file.url)
    except ValueError:
        return False


def fetch_file(file: Download, part: Path, place: Place) -> Row:
    """Download to `part`, check and rename. What was continued and has a wrong checksum is fetched once more, whole."""
    if is_page(file):
        raise Failed(f"a page of {host_of(file.url)}: --yt-dlp fetches it, where yt-dlp is installed")
    resumed = fetch_part(file, part, place)
    if resumed and wrong_digests(file, checksums(part)):
        drop(part)
        fetch_part(file, part, place)
    return keep(file, part, checked_kind(part), place)


def fetch_part(file: Download, part: Path, place: Place) -> bool:
    return fetch(file.url, part, place.limits, partial(place.budget.hold, file.key), place.stop)


def fetch_page_of(file: Download, place: Place) -> Row:
    folder = place.out / "pages" / file.key
    try:
        hold = partial(place.budget.hold, file.key)
        path = fetch_page(file.url, place.yt_dlp or "", folder, place.limits, hold, place.stop)
        return keep(file, path, kind_of(path) or path.suffix, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(file: Download, path: Path, suffix: str, place: Place) -> Row:
    """Check a whole file's content and give it its name. Raises Refused for a wrong checksum."""
    found = checksums(path)
    if wrong := wrong_digests(file, found):
        raise Refused(wrong)
    target = place.out / "files" / f"{file.name}{suffix}"
    result = {"file": target.name, "bytes": path.stat().st_size, "sha256": found["sha256"]}
    os.replace(path, target)
    return result


def wrong_digests(file: Download, found: dict[str, str]) -> str:
    """Return which checksum of a file's is not as expected, "" if all are."""
    return "; ".join(
        f"{kind} is {found[kind]}, expected {digest}" for kind, digest in file.digests if found[kind] != digest
    )


def checksums(path: Path) -> dict[str, str]:
    """Return a file's digests, and see to it that its content is on the disk."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(path, "r+b") as file:
        while block := file.read(1 << 20):
            for digest in digests.values():
                digest.update(block)
        os.fsync(file.fileno())
    return {kind: digest.hexdigest() for kind, digest in digests.items()}
