"""Field-coded H.264, which no encoder at hand writes: every block as it is (I_PCM), so that a page is all of it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.made_streams import RATE, picture

GOP = 12


def code(number: int) -> str:
    """An unsigned Exp-Golomb code's bits."""
    return f"{number + 1:b}".rjust(2 * (number + 1).bit_length() - 1, "0")


def unit(head: int, bits: str, content: bytes = b"") -> bytes:
    """A unit with its start code; `content` comes after the bits, with its own end."""
    bits += "" if content else "1"
    bits += "0" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big") + content
    return b"\0\0\0\1" + bytes([head]) + data.replace(b"\0\0\1", b"\0\0\3\1")  # content has no zeros but in lengths


def parameters() -> bytes:
    """Main profile, 64 x 64 pixels, interlaced, pictures in the order of output."""
    size = code(3) + code(1)  # blocks; pairs of rows of them
    sequence = (
        f"{77:08b}{0:08b}{30:08b}" + code(0) + code(0) + code(2) + code(1) + "0" + size + "0" + "0" + "1" + "0" + "0"
    )
    return unit(0x67, sequence) + unit(0x68, code(0) * 2 + "00" + code(0) * 3 + "000" + code(0) * 3 + "100")


def coded(luma: np.ndarray, number: int, field: str, *, key: bool) -> bytes:
    """A slice that holds a whole picture; `field`: "1" and its parity for a field, "0" for a frame."""
    bits = code(0) + code(7) + code(0) + f"{number:04b}" + field + code(0) * key + "0" * (1 + key) + code(0) + code(1)
    blocks = luma.reshape(-1, 16, 4, 16).swapaxes(1, 2).reshape(-1, 256)
    data = b""
    for at, block in enumerate(blocks):
        start = code(25)  # I_PCM
        head = (bits if at == 0 else "") + start
        head += "0" * (-len(head) % 8)
        data += int("1" + head, 2).to_bytes(len(head) // 8 + 1, "big")[1:] + block.tobytes() + b"\x80" * 128
    return b"\0\0\0\1" + bytes([0x65 if key else 0x61]) + data + b"\x80"


def write_fields(path: Path, count: int, *, frames: tuple[int, ...] = (), together: bool = False) -> None:
    """Write frames as two packets each, one a field; those of `frames` as one; `together`: all as one."""
    raw = path.with_suffix(".h264")
    raw.write_bytes(parameters() + coded(picture(0)[..., 1], 0, "0", key=True))
    with av.open(str(raw)) as alike, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(alike.streams.video[0])
        for number in range(count):
            luma, key = picture(number)[..., 1].clip(16, 235), number % GOP == 0
            if number in frames:
                parts = [coded(luma, number % GOP, "0", key=key)]
            else:
                parts = [coded(luma[half::2], number % GOP, f"1{half}", key=key and not half) for half in (0, 1)]
            parts[0] = parameters() * key + parts[0]
            for half, part in enumerate([b"".join(parts)] if together else parts):
                packet = av.Packet(part)
                packet.stream, packet.time_base = stream, Fraction(1, 2 * RATE)
                packet.pts = packet.dts = 2 * number + half
                packet.is_keyframe = key and not half
                out.mux(packet)
