"""Videos whose frames tell their own number, and what recorders, phones and joiners do to files."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE, BITS, RATE = 64, 6, 25
X265 = "log-level=none:keyint=12:scenecut=0"


def picture(number: int) -> np.ndarray:
    """The number as black and white columns of ten pixels, RGB [H, W, 3]."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    columns = np.repeat(np.array([*bits, 128], np.uint8), 10)[:SIZE]
    return np.broadcast_to(columns[None, :, None], (SIZE, SIZE, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers of frames [T, H, W, 3]."""
    middles = frames[:, SIZE // 2, 5 : 10 * BITS : 10, 1] > 127
    return (middles @ (1 << np.arange(BITS))).tolist()


def write_numbered(
    path: Path,
    ticks: Sequence[int],
    codec: str = "libx264",
    *,
    first: int = 0,
    pixels: str = "yuv420p",
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write frame i at each of `ticks` (1/25 s), numbered from `first` on."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=RATE, options={"g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pixels
        stream.codec_context.time_base = Fraction(1, RATE)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(first + number), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base, frame.pict_type = tick, Fraction(1, RATE), 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def without_head(source: Path, target: Path, packets: int) -> Path:
    """Copy a file from its `packets`-th packet on, as a recording that begins between key frames."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if packet.size and number >= packets:
                packet.stream = stream
                out.mux(packet)
    return target


def set_edits(path: Path, edits: Sequence[tuple[int, int]], *, turned: bool = False) -> Path:
    """Replace the edit list of an mp4 (ISO 14496-12, 8.6.6) whose index comes last.

    An edit is a number of frames and the first of them, -1 for an empty one; `turned` also rotates the picture by 90
    degrees (8.3.2).
    """
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        step = int(Fraction(1, RATE) / container.streams.video[0].time_base)
    at, size = _box(content, b"moov", b"trak", b"edts")
    delay = struct.unpack(">i", content[at + 28 : at + 32])[0]  # of the first frame, where B-frames need one
    entries = [(frames * 1000 // RATE, -1 if start < 0 else delay + start * step) for frames, start in edits]
    body = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", d, m, 1 << 16) for d, m in entries)
    content[at : at + size] = struct.pack(">I4sI4s", 16 + len(body), b"edts", 8 + len(body), b"elst") + body
    for names in ((b"moov",), (b"moov", b"trak")):
        start, old = _box(content, *names)
        content[start : start + 4] = struct.pack(">I", old + 16 + len(body) - size)
    if turned:
        start, _ = _box(content, b"moov", b"trak", b"tkhd")
        content[start + 48 : start + 84] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def drop_samples(path: Path, dropped: Sequence[int]) -> Path:
    """Give samples of an mp4 whose samples lie in one chunk no bytes, as recorders do that miss a frame."""
    content = bytearray(path.read_bytes())
    table = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
    sizes_at = _box(content, *table, b"stsz")[0] + 20
    count = int.from_bytes(content[sizes_at - 4 : sizes_at], "big")
    sizes = struct.unpack(f">{count}I", content[sizes_at : sizes_at + 4 * count])
    offsets_at = _box(content, *table, b"stco")[0] + 12
    assert int.from_bytes(content[offsets_at : offsets_at + 4], "big") == 1
    at = begin = int.from_bytes(content[offsets_at + 4 : offsets_at + 8], "big")
    samples = []
    for number, size in enumerate(sizes):
        samples.append(b"" if number in dropped else bytes(content[at : at + size]))
        at += size
    content[begin : begin + len(b"".join(samples))] = b"".join(samples)
    content[sizes_at : sizes_at + 4 * count] = struct.pack(f">{count}I", *map(len, samples))
    path.write_bytes(content)
    return path


def _box(content: bytes | bytearray, *names: bytes) -> tuple[int, int]:
    """Return where a box of an mp4 is, and its size."""
    start, end = 0, len(content)
    for name in names:
        at, size = next((at, size) for kind, at, size in _boxes(content, start, end) if kind == name)
        start, end = at + 8, at + size
    return at, size


def _boxes(content: bytes | bytearray, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while at < end:
        size = int.from_bytes(content[at : at + 4], "big")
        yield bytes(content[at + 4 : at + 8]), at, size
        at += size
