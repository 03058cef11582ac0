"""The parts of `download` that need no server."""

from __future__ import annotations

import email.utils
import threading
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from opensora_repro.data.download.connect import is_public
from opensora_repro.data.download.fetch import Budget, Failed, Refused, checked_url
from opensora_repro.data.download.host_queue import HostQueue, in_threads
from opensora_repro.data.download.kinds import kind_of, seems
from opensora_repro.data.download.video_pages import is_video_page
from opensora_repro.data.http_retries import retry_after
from opensora_repro.files import safe_name


def test_no_host_is_asked_by_more_than_its_share() -> None:
    lock, running, most = threading.Lock(), Counter[str](), Counter[str]()

    def work(item: tuple[str, int]) -> int:
        host, number = item
        with lock:
            running[host] += 1
            most[host] = max(most[host], running[host])
        time.sleep(0.002)
        with lock:
            running[host] -= 1
        return number

    items = [("a", n) for n in range(40)] + [("b", n) for n in range(3)] + [("c", 0)]
    done = [d for d in in_threads(work, HostQueue(((host, (host, n)) for host, n in items), 2), 8) if d is not None]
    assert Counter(item for item, _ in done) == Counter(items)
    assert all(item[1] == number for item, number in done)
    assert most["a"] == 2
    assert most["b"] <= 2


def test_what_work_raises_is_raised_and_no_work_is_no_trouble() -> None:
    def work(item: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(in_threads(work, HostQueue([("a", 1), ("a", 2)], 1), 2))
    assert not [d for d in in_threads(work, HostQueue([], 1), 2) if d is not None]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (" HTTP://Host/a b?q=é#frag", "http://Host/a%20b?q=%C3%A9"),
        ("https://host:8/%2f..", "https://host:8/%2f.."),
        ("http://bücher.example/x", "http://xn--bcher-kva.example/x"),
    ],
)
def test_urls_are_made_fit_to_send(url: str, expected: str) -> None:
    assert checked_url(url) == expected


@pytest.mark.parametrize(
    "url", ["", "x", "file:///etc/passwd", "ftp://h/a", "http:///a", "http://[::1/a", "http://h:x/a"]
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(Refused):
        checked_url(url)


def test_a_line_break_cannot_add_a_header() -> None:
    assert "\n" not in checked_url("http://h/a\r\nX-Evil: 1")


def packets(size: int, offset: int, count: int = 6) -> bytes:
    packet = bytes(offset) + b"\x47" + bytes(range(1, 255))[: size - 1 - offset]
    return (packet.ljust(size, b"\xff")) * count


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x20ftypisom\0\0\2\0", ".mp4"),
        (b"\0\0\0\x14ftypqt  ", ".mov"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", ".mov"),
        (b"\0\0\0\x20ftypavif", ""),
        (b"\0\0\0\x20ftypM4A ", ""),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\x82\x84webm", ".webm"),
        (b"\x1aE\xdf\xa3\xa3B\x86\x81\1B\x82\x88matroska", ".mkv"),
        (b"RIFF\0\0\1\0AVI LIST", ".avi"),
        (b"RIFF\0\0\1\0WAVEfmt ", ""),
        (b"RIFF\0\0\1\0WEBPVP8 ", ".webp"),
        (packets(188, 0), ".ts"),
        (packets(192, 4), ".ts"),
        (packets(204, 0), ".ts"),
        (packets(188, 0, 8)[100:], ".ts"),  # a part of a broadcast
        (packets(188, 0, 2), ""),
        (b"G" * 2000, ""),
        (b"FLV\1\5", ".flv"),
        (b"\0\0\1\xba\x44", ".mpg"),
        (b"OggS\0\2", ".ogv"),
        (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c00"), ".wmv"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (b"\x89PNG\r\n\x1a\n", ".png"),
        (b"BM\x36\0\0\0\0\0\0\0\x36", ".bmp"),
        (b"<!DOCTYPE html><html>", ""),
        (b'\n {"error": "gone"}', ""),
        (b"#EXTM3U\n", ""),
        (b"%!PS-Adobe", ""),
        (b"PK\3\4", ""),
        (b"", ""),
    ],
)
def test_kinds_by_the_first_bytes(head: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(head)
    assert kind_of(tmp_path / "file") == kind


def test_real_files_have_their_kind(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".flv", ".mpg", ".wmv"):
        path = tmp_path / f"a{suffix}"
        codec = {".webm": "libvpx", ".wmv": "wmv2", ".flv": "flv"}.get(suffix, "mpeg4")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg2video" if suffix == ".mpg" else codec, rate=25)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for number in range(6):
                picture = np.full((64, 64, 3), 40 * number, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        assert kind_of(path) == suffix


def test_what_a_refused_file_seems(tmp_path: Path) -> None:
    for head, words in ((b"<p>", "a page"), (b"#EXTM3U", "a playlist"), (b"gone", "text"), (b"\0\1", "neither video")):
        (tmp_path / "file").write_bytes(head)
        assert seems(tmp_path / "file").startswith(words)


def test_public_addresses() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"):
        assert is_public(address), address
    for address in ("127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
                    "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1",
                    "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "::127.0.0.1", "fec0::1", "64:ff9b:1::7f00:1",
                    "192.0.0.8"):  # fmt: skip
        assert not is_public(address), address


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7") == 7.0 and retry_after("0.5") == 0.5
    date = retry_after(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert date is not None
    assert 90 < date < 101
    assert retry_after(email.utils.formatdate(0, usegmt=True)) == 0.0
    assert retry_after("soon") is None
    assert retry_after(None) is None


def test_the_budget_counts_what_each_file_holds() -> None:
    budget = Budget(100)
    budget.hold("a", 60)
    budget.hold("a", 80)
    with pytest.raises(Failed, match="--max-total is reached: 100 bytes"):
        budget.hold("b", 21)
    budget.hold("b", 20)
    budget.hold("a", 0)
    budget.hold("b", 100)
    budget.count("c", 50)  # from a run with more room
    with pytest.raises(Failed):
        budget.hold("b", 60)
    budget.hold("b", 50)


def test_safe_names_hold_no_path_and_stand_for_one_text() -> None:
    texts = ["a", "a_", "a/", "a\\", "a.", ".", "..", "", "/", "ä", "ö", "a" * 100, "a" * 101, "\udcff", "-x", "a\n"]
    names = [safe_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert all(name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for name in names)
    assert names[:2] == ["a", "a_"]
    assert max(map(len, names)) < 120


def test_video_sites_are_known_by_their_host_alone() -> None:
    assert is_video_page("https://www.youtube.com/watch?v=x")
    assert is_video_page("https://youtu.be/x")
    assert not is_video_page("https://notyoutube.com/watch")
    assert not is_video_page("https://example.com/youtube.com")
