"""What the syntax of H.264 tells of a packet without decoding it (ITU-T H.264; ISO/IEC 14496-15)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SEQUENCE, SLICES = 7, (1, 2, 5)  # kinds of units: parameters; slices, or their first parts
DEEPER = frozenset(
    (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
)  # profiles with more to tell, 7.3.2.1
HEAD = 64  # bytes of a slice that hold what is read of it; its first number may be long
Field = tuple[int, bool]  # the number of its frame, whether it is the bottom one


def length_size_of(setup: bytes | None) -> int:
    """Return the bytes of the length before each unit of H.264 as MP4 stores it, 0 for start codes (14496-15, 5.3)."""
    head = setup or b""
    return (head[4] & 3) + 1 if len(head) > 6 and head[0] == 1 else 0


def is_spare(data: memoryview, length_size: int) -> bool:
    """Whether no other picture refers to this one: nal_ref_idc of all its slices is 0 (ITU-T H.264, 7.4.1)."""
    slices = 0
    for at in _units(data, length_size):
        if 1 <= data[at] & 0x1F <= 5:
            if data[at] & 0x60:
                return False
            slices += 1
    return slices > 0


def _units(data: memoryview, length_size: int) -> Iterator[int]:
    """Where each unit of a coded picture begins."""
    if length_size:
        at = 0
        while at + length_size < len(data):
            yield at + length_size
            at += length_size + int.from_bytes(data[at : at + length_size], "big")
        return
    content = bytes(data)
    at = content.find(b"\0\0\1") + 3
    while 3 <= at < len(content):
        yield at
        at = content.find(b"\0\0\1", at) + 3


# ---- interlaced pictures, coded as two fields


class FieldPairs:
    """Tells which packets hold the second field of a picture: a decoder makes one frame of both.

    `setup`: the stream's extradata.
    """

    def __init__(self, setup: bytes | None) -> None:
        self.length_size = length_size_of(setup)
        self.sequence = _sequence_in(setup or b"", self.length_size)
        self.first: Field | None = None  # that waits for its second

    def is_second(self, data: memoryview) -> bool:
        """Look at the next packet; to be called with each, in decoding order."""
        if self.sequence is None or self.sequence.frames_only:
            return False
        slices = (at for at in _units(data, self.length_size) if data[at] & 0x1F in SLICES)
        fields = list(dict.fromkeys(self.sequence.field_in(bytes(data[at : at + HEAD])) for at in slices))
        field = fields[0] if len(fields) == 1 else None  # else both are here
        second = field is not None and self.first == (field[0], not field[1])
        self.first = None if second else field
        return second


@dataclass(frozen=True)
class _Sequence:
    """Of a sequence's parameters, those that say where a slice tells of fields."""

    number_bits: int
    frames_only: bool
    separate_planes: bool

    def field_in(self, unit: bytes) -> Field | None:
        """Return the field that a slice is of, None for a frame's (7.3.3)."""
        bits = _Bits(unit[1:])
        for _ in range(3):
            bits.number()  # its first block, its kind, its picture's parameters
        bits.take(2 * self.separate_planes)
        number = bits.take(self.number_bits)
        return (number, bool(bits.take(1))) if bits.take(1) else None


def _sequence_in(setup: bytes, length_size: int) -> _Sequence | None:
    """Return the first sequence's parameters of a stream's extradata, None if there are none."""
    units = [8] if length_size else _units(memoryview(setup), 0)  # after the number of them, and its length
    unit = next((setup[at:] for at in units if len(setup) > at and setup[at] & 0x1F == SEQUENCE), b"")
    return _parsed(unit) if unit else None


def _parsed(unit: bytes) -> _Sequence:
    bits = _Bits(unit[1:])
    profile, separate = bits.take(24) >> 16, False
    bits.number()
    if profile in DEEPER:
        chroma = bits.number()
        separate = chroma == 3 and bool(bits.take(1))
        bits.number(), bits.number(), bits.take(1)  # depths
        if bits.take(1):
            for table in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling(bits, 16 if table < 6 else 64)
    number_bits = bits.number() + 4
    order = bits.number()
    if order == 0:
        bits.number()
    elif order == 1:
        bits.take(1), bits.number(), bits.number()
        for _ in range(min(255, bits.number())):
            bits.number()
    bits.number(), bits.take(1), bits.number(), bits.number()  # references, gaps, width, height
    return _Sequence(number_bits, bool(bits.take(1)), separate)


def _skip_scaling(bits: _Bits, size: int) -> None:
    """Pass over a scaling list (7.3.2.1.1.1)."""
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.number()
            following = (last + (code + 1 >> 1 if code % 2 else -(code >> 1))) % 256
        last = following or last


class _Bits:
    """Bits of a unit, without the bytes that keep start codes out of it; behind the end there are ones."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data.replace(b"\0\0\3", b"\0\0"), 0

    def take(self, count: int) -> int:
        return sum(self._bit() << shift for shift in reversed(range(count)))

    def number(self) -> int:
        """Return an unsigned Exp-Golomb code's number (9.1)."""
        zeros = next((n for n in range(32) if self._bit()), 31)
        return (1 << zeros) - 1 + self.take(zeros)

    def _bit(self) -> int:
        byte, shift = divmod(self.at, 8)
        self.at += 1
        return self.data[byte] >> 7 - shift & 1 if byte < len(self.data) else 1
