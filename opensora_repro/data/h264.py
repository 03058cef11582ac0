"""What the syntax of H.264 tells of a packet without decoding it (ITU-T H.264; ISO/IEC 14496-15)."""

from __future__ import annotations

from collections.abc import Iterator


def length_size_of(setup: bytes | None) -> int:
    """Return the bytes of the length before each unit of H.264 as MP4 stores it, 0 for start codes (14496-15, 5.3)."""
    head = setup or b""
    return (head[4] & 3) + 1 if len(head) > 6 and head[0] == 1 else 0


def is_spare(data: memoryview, length_size: int) -> bool:
    """Whether no other picture refers to this one: nal_ref_idc of all its slices is 0 (ITU-T H.264, 7.4.1)."""
    slices = 0
    for header in _unit_headers(data, length_size):
        if 1 <= header & 0x1F <= 5:
            if header & 0x60:
                return False
            slices += 1
    return slices > 0


def _unit_headers(data: memoryview, length_size: int) -> Iterator[int]:
    """The first byte of each unit of a coded picture."""
    if length_size:
        at = 0
        while at + length_size < len(data):
            yield data[at + length_size]
            at += length_size + int.from_bytes(data[at : at + length_size], "big")
        return
    content = bytes(data)
    at = content.find(b"\0\0\1") + 3
    while 3 <= at < len(content):
        yield content[at]
        at = content.find(b"\0\0\1", at) + 3
