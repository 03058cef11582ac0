"""A thousand reads at random places, as a training run makes them: the right frames, and no memory kept."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from opensora_repro.data.color import to_rgb
from opensora_repro.data.video import probe, read_frames

COUNT, STEP, TOTAL = 4, 3, 90
READS, FIRST = 1000, 200


def write_noise(path: Path, ticks: list[int]) -> None:
    """Write a 64x48 frame of moving noise, each unlike all others, at each of `ticks` (10 ms units)."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64 + 2 * len(ticks), 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, 2 * i : 2 * i + 64]), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def steady(path: Path) -> None:
    write_noise(path, list(range(0, 4 * TOTAL, 4)))


def variable(path: Path) -> None:
    """Thirds at 25, 10 and 50 frames a second."""
    steps = np.repeat([4, 10, 2], TOTAL // 3)
    write_noise(path, [0, *np.cumsum(steps)[:-1].tolist()])


def rotated(path: Path) -> None:
    """A phone held upright: the track header's matrix (ISO 14496-12, 8.3.2) turns the picture by 90 degrees."""
    steady(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    assert content[at : at + 36] == struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 tells."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def allocated() -> int:
    """Bytes of C's heap that are in use; 0 where the C library is not glibc."""
    gc.collect()
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return 0
    tell.restype = Mallinfo
    return int(tell().uordblks)


def reference(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return np.stack([to_rgb(VideoReformatter(), f, f.height, f.width) for f in frames])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_reads_are_exact_and_memory_is_flat(tmp_path: Path) -> None:
    kinds: list[tuple[Callable[[Path], None], int]] = [(steady, 0), (variable, 0), (rotated, 3)]
    files = []
    for write, quarters in kinds:
        path = tmp_path / f"{write.__name__}.mp4"
        write(path)
        files.append((path, np.rot90(reference(path), quarters, axes=(1, 2))))
    assert probe(tmp_path / "rotated.mp4").height == 64
    draw, before, heap = random.Random(0), 0, 0
    for number in range(READS):
        path, frames = draw.choice(files)
        start = draw.randrange(TOTAL - (COUNT - 1) * STEP)
        read = read_frames(path, start=start, count=COUNT, step=STEP).numpy()
        assert np.array_equal(read, frames[start : start + COUNT * STEP : STEP]), (path.name, start)
        if number == FIRST:
            before, heap = memory(), allocated()
    assert memory() <= 1.05 * before
    assert allocated() - heap < 50 * (READS - FIRST)
