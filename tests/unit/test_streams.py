"""Sound files of kinds that look damaged, and damaged ones that look sound: every tool says the same of each.

Each file's frames carry their number, so that the first one shown is known to be the first one read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_repro.data.probe import facts as facts_module
from opensora_repro.data.probe.facts import read_facts
from opensora_repro.data.split.options import Options
from opensora_repro.data.split.scenes import scan_video
from opensora_repro.data.split.source import Source, split_source
from opensora_repro.data.video import DecodeError, probe, read_frames, read_frames_at
from tests.made_fields import write_fields
from tests.made_streams import X265, drop_samples, numbers, set_edits, without_head, write_numbered

TICKS = range(60)
GAPS = [tick for tick in range(90) if tick % 10 != 9 and not 30 <= tick < 48]  # 64 frames
OPEN = {"bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}


def trimmed(path: Path) -> list[int]:
    """A phone's trim: from a frame that is no key frame, on its side."""
    set_edits(write_numbered(path, TICKS, bf="2"), [(35, 5)], turned=True)
    return list(range(5, 40))


def trimmed_at_the_end(path: Path) -> list[int]:
    set_edits(write_numbered(path, TICKS, bf="2"), [(41, 0)])
    return list(range(41))


def late(path: Path) -> list[int]:
    """A second of nothing, then the video from its eighth frame on."""
    set_edits(write_numbered(path, TICKS, bf="2"), [(25, -1), (50, 7)])
    return list(range(7, 57))


def two_parts(path: Path) -> list[int]:
    set_edits(write_numbered(path, TICKS, bf="2"), [(10, 3), (10, 30)])
    return [*range(3, 13), *range(30, 40)]


def parts_swapped(path: Path) -> list[int]:
    set_edits(write_numbered(path, TICKS, bf="0"), [(12, 36), (12, 0)])
    return [*range(36, 48), *range(12)]


def fragments(path: Path) -> list[int]:
    write_numbered(path, range(100, 160), bf="2", container={"movflags": "frag_keyframe+empty_moov"})
    return list(TICKS)


def avi(codec: str, pixels: str = "yuv420p") -> Callable[[Path], list[int]]:
    def make(path: Path) -> list[int]:
        write_numbered(path, GAPS, codec, pixels=pixels)
        return list(range(len(GAPS)))

    return make


def avi_without_index(path: Path) -> list[int]:
    """What a recorder leaves behind that was switched off."""
    write_numbered(path, GAPS, "cinepak", pixels="rgb24")
    content = bytearray(path.read_bytes())
    del content[content.rindex(b"idx1") :]
    content[4:8] = struct.pack("<I", len(content) - 8)
    path.write_bytes(content)
    return list(range(len(GAPS)))


def joined(*begins: int) -> Callable[[Path], list[int]]:
    """Segments of 20 frames, each with counters from 0 and a clock from its own begin."""

    def make(path: Path) -> list[int]:
        content = b""
        for part, begin in enumerate(begins):
            write_numbered(path, range(begin, begin + 20), first=20 * part, bf="2")
            content += path.read_bytes()
        path.write_bytes(content)
        return list(range(20 * len(begins)))

    return make


def begun_late(codec: str, packets: int, first: int, **options: str) -> Callable[[Path], list[int]]:
    def make(path: Path) -> list[int]:
        whole = write_numbered(path.with_stem("whole"), TICKS, codec, **options)
        without_head(whole, path, packets)
        return list(range(first, 60))

    return make


def fields(count: int, **options: Any) -> Callable[[Path], list[int]]:
    """A broadcast's recording: interlaced frames, for which a decoder needs two packets."""

    def make(path: Path) -> list[int]:
        write_fields(path, count, **options)
        return list(range(count))

    return make


KINDS: dict[str, Callable[[Path], list[int]]] = {
    "trimmed.mp4": trimmed,
    "trimmed_at_the_end.mp4": trimmed_at_the_end,
    "late.mp4": late,
    "two_parts.mp4": two_parts,
    "parts_swapped.mp4": parts_swapped,
    "fragments.mp4": fragments,
    "mpeg4.avi": avi("mpeg4"),
    "cinepak.avi": avi("cinepak", "rgb24"),
    "no_index.avi": avi_without_index,
    "joined.ts": joined(0, 0, 0),
    "joined_backwards.ts": joined(500, 0),
    "joined_far.ts": joined(0, 500_000),
    "joined_near.ts": joined(0, 60),
    "begun_late.ts": begun_late("libx264", 5, 12, bf="2", sc_threshold="0"),
    "begun_late_open.ts": begun_late("libx264", 1, 12, **OPEN),
    "begun_late.mkv": begun_late("libx264", 14, 24, **OPEN),
    "begun_late_hevc.ts": begun_late("libx265", 3, 12, **{"x265-params": X265 + ":open-gop=0"}),
    "begun_late_hevc_open.ts": begun_late(
        "libx265", 3, 12, **{"x265-params": X265 + ":open-gop=1:bframes=3:b-adapt=0"}
    ),
    "fields.mp4": fields(40),
    "fields.ts": fields(40),
    "fields_and_frames.mkv": fields(40, frames=(0, 3, 4, 5, 17, 24, 31)),
    "fields_together.ts": fields(40, together=True),
    "begun_late_mpeg2.ts": begun_late("mpeg2video", 5, 12, bf="2"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_tool_sees_the_same_frames(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shown = KINDS[name](path)
    count = len(shown)
    facts = read_facts(path)
    assert facts.num_frames == count
    assert read_facts(path, decode=True) == facts
    assert probe(path).num_frames == len(scan_video(path).times) == count

    def as_stored(frames: torch.Tensor) -> np.ndarray:
        return np.rot90(frames.numpy(), -facts.rotation // 90, axes=(1, 2))

    def read(indices: list[int]) -> list[int]:
        return numbers(as_stored(read_frames_at(path, indices)))

    assert read(list(range(count))) == shown
    for start in range(0, count - 4, 3):  # as training reads: from anywhere, with a step
        assert read([start, start + 3]) == [shown[start], shown[start + 3]], start
    with pytest.raises(DecodeError, match="ends early"):
        read_frames(path, start=count - 1, count=2)
    (tmp_path / "clips").mkdir()
    options = Options("shots", None, min_frames=1, max_frames=0, crf=10)
    cut: list[int] = []
    for clip in split_source(Source(path, name, "0-0"), tmp_path, options)["clips"]:
        frames = read_frames(tmp_path / "clips" / clip["path"], start=0, count=clip["num_frames"])
        cut += numbers(as_stored(frames))
    assert cut == shown


def test_the_rate_of_joined_segments_is_theirs(tmp_path: Path) -> None:
    for name in ("joined.ts", "joined_far.ts", "joined_near.ts"):
        KINDS[name](tmp_path / name)
        facts = read_facts(tmp_path / name)
        assert (facts.fps, facts.constant_fps) == (pytest.approx(25.0), True), name


def test_samples_of_no_bytes_are_no_frames(tmp_path: Path) -> None:
    path = drop_samples(write_numbered(tmp_path / "a.mp4", TICKS, "mjpeg", pixels="yuvj420p"), [7, 8, 20])
    kept = [number for number in TICKS if number not in (7, 8, 20)]
    assert read_facts(path).num_frames == read_facts(path, decode=True).num_frames == probe(path).num_frames == 57
    assert numbers(read_frames(path, start=0, count=57).numpy()) == kept


def test_what_has_lost_bytes_is_damaged(tmp_path: Path) -> None:
    """A gap within a segment is no joint, whatever the decoder makes of it; nor is an AVI's end that is not there."""
    lost, short = tmp_path / "lost.ts", tmp_path / "short.avi"
    content = write_numbered(lost, TICKS, bf="2").read_bytes()
    place = 188 * (len(content) // 188 // 2)
    lost.write_bytes(content[:place] + content[place + 188 * 5 :])
    content = write_numbered(short, GAPS, "mpeg4").read_bytes()
    short.write_bytes(content[: len(content) // 2])
    (tmp_path / "clips").mkdir()
    for path in (lost, short):
        with pytest.raises(DecodeError, match="damaged"):
            read_facts(path)
        options = Options("shots", None, min_frames=1, max_frames=0, crf=18)
        record = split_source(Source(path, path.name, "0-0"), tmp_path, options)
        assert not record["clips"]
        assert "damaged" in record["rejects"][0]["reason"]
    assert not list((tmp_path / "clips").iterdir())


def test_a_list_of_videos_is_none(tmp_path: Path) -> None:
    write_numbered(tmp_path / "other.mp4", TICKS)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\nfile other.mp4\n")
    with pytest.raises(DecodeError, match="list of other files"):
        read_facts(tmp_path / "list.mp4")


def test_only_doubtful_files_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(facts_module, "_count_decoded", lambda path, *_: decoded.append(Path(path).name) or 40)
    for name in ("trimmed.mp4", "late.mp4", "cinepak.avi", "begun_late.ts", "joined_near.ts"):
        KINDS[name](tmp_path / name)
        read_facts(tmp_path / name)
    assert decoded == ["joined_near.ts"]


CASES = {
    "trim_end.mp4": (75, 128, 192),
    "negts.mp4": (97, 128, 192),
    "avidrop.avi": (117, 128, 192),
    "cat.ts": (120, 128, 192),
    "midgop.ts": (80, 128, 192),
    "twovid_mjpeg.mp4": (130, 128, 192),
}


@pytest.mark.parametrize("name", CASES)
def test_reported_cases(cases_dir: Path, tmp_path: Path, name: str) -> None:
    path, (count, height, width) = cases_dir / name, CASES[name]
    facts = read_facts(path)
    assert (facts.num_frames, facts.height, facts.width) == (count, height, width)
    assert read_facts(path, decode=True) == facts
    frames = read_frames(path, start=0, count=count).numpy()
    for start in (1, count // 2, count - 2):
        assert np.array_equal(read_frames(path, start=start, count=2).numpy(), frames[start : start + 2])
    (tmp_path / "clips").mkdir()
    options = Options("shots", None, min_frames=1, max_frames=0, crf=10)
    clips = split_source(Source(path, name, "0-0"), tmp_path, options)["clips"]
    assert sum(clip["num_frames"] for clip in clips) == count
    first = read_frames(tmp_path / "clips" / clips[0]["path"], start=0, count=1)[0].numpy()
    assert np.abs(first.astype(int) - frames[0]).mean() < 2
