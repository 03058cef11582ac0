"""What a file is by its first bytes: servers' types and names are often wrong."""

from __future__ import annotations

from pathlib import Path

HEAD = 5 * 204  # bytes that are looked at: five packets of the longest kind of MPEG-TS
_STARTS = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF87a", ".gif"),
    (b"GIF89a", ".gif"),
    (b"FLV\x01", ".flv"),
    (b"\x00\x00\x01\xba", ".mpg"),  # MPEG program stream
    (b"\x00\x00\x01\xb3", ".mpg"),  # MPEG-1 and MPEG-2 video without a container
    (b"OggS", ".ogv"),
    (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), ".wmv"),  # ASF
)
_BOXES = (b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")  # with which old QuickTime files begin
_NO_VIDEO = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"M4A ", b"M4B ")  # brands of pictures and sound
_PAGE = (b"<", b"{", b"[", b"%!", b"%pdf")


def kind_of(path: Path) -> str:
    """Return the usual extension of the kind of video or picture that a file is, "" for anything else."""
    head = _head(path)
    for start, suffix in _STARTS:
        if head.startswith(start):
            return suffix
    if head[:4] == b"RIFF":
        return {b"AVI ": ".avi", b"WEBP": ".webp"}.get(head[8:12], "")
    if head[:4] == b"\x1aE\xdf\xa3":  # EBML
        return ".webm" if b"webm" in head[:64] else ".mkv"
    if head[4:8] == b"ftyp":
        return "" if head[8:12] in _NO_VIDEO else ".mov" if head[8:12] == b"qt  " else ".mp4"
    if head[4:8] in _BOXES:
        return ".mov"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return ".bmp"
    return ".ts" if _is_transport_stream(head) else ""


def _is_transport_stream(head: bytes) -> bool:
    """True where four packets in a row have their mark; one that was cut somewhere need not begin with it.

    They have 188 bytes, 192 with a time stamp, 204 with check bytes.
    """
    marks = ((at, size) for size in (188, 192, 204) for at in range(min(size, len(head) - 3 * size)))
    return not _is_text(head) and any(head[at : at + 3 * size + 1 : size] == b"GGGG" for at, size in marks)


def seems(path: Path) -> str:
    """Return in words what a file is that has no kind, for the reason of its refusal."""
    head = _head(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"#extm3u"):
        return "a playlist, which only names a video's parts"
    if text.startswith(_PAGE):
        return "a page or other text"
    return "text" if _is_text(head) else "neither video nor picture of a known kind"


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)
