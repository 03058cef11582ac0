from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from opensora_repro.data.color import to_rgb
from opensora_repro.data.video import (
    DecodeError,
    FrameIndex,
    cover_size,
    frame_index,
    probe,
    read_frames,
    read_frames_at,
)

BAD = Path(os.environ.get("OPENSORA_VIDEOS", Path(__file__).parents[3] / "shared/videos")) / "bad/expected.json"
EXPECTED = json.loads(BAD.read_text(encoding="utf-8")) if BAD.exists() else {}
B_PICTURE = 3  # ffmpeg's AV_PICTURE_TYPE_B
# Both files carry a pixel aspect (16:9 and 3856:2889) that the list's display sizes leave out; players apply it.
ANAMORPHIC = {"odd_321x241_yuv444.mp4": (241, 428), "tiny_16x16.mp4": (16, 28)}


def named(outcome: str) -> list[str]:
    return sorted(name for name, entry in EXPECTED.items() if entry["verdict"] == outcome)


def decode_in_order(path: Path, expected: Sequence[int]) -> dict[int, np.ndarray]:
    """The reference: decode from the first frame on and count."""
    found = {}
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i in expected:
                found[i] = to_rgb(VideoReformatter(), frame, frame.height, frame.width)
            if len(found) == len(expected):
                break
    return found


def write_numbered(path: Path, count: int, *, codec: str = "libx264", first: int = 0, **options: str) -> None:
    """Write 64x48 frames of moving noise at 24 fps (so that every frame differs), the clock starting at `first`."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64 + 2 * count, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, 2 * i : 2 * i + 64]), format="rgb24")
            frame.pts, frame.time_base = first + i, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name", named("accept"))
def test_odd_but_sound_files(videos_dir: Path, name: str) -> None:
    path, entry = videos_dir / "bad" / name, EXPECTED[name]
    info = probe(path)
    assert info.num_frames == entry["frames"]
    assert (info.height, info.width) == ANAMORPHIC.get(name, (entry["display_h"], entry["display_w"]))
    last = entry["frames"] - 1
    expected = sorted({max(0, last - 2), last})
    frames = read_frames_at(path, expected)
    assert frames.shape == (len(expected), info.height, info.width, 3)
    with pytest.raises(DecodeError, match=f"1 of 2 frames.*it has {last + 1}"):
        read_frames(path, start=last, count=2)


@pytest.mark.parametrize("name", named("reject"))
def test_files_that_are_no_video(videos_dir: Path, name: str) -> None:
    for read in (probe, lambda path: read_frames(path, start=0, count=1)):
        with pytest.raises(DecodeError) as caught:
            read(videos_dir / "bad" / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", named("reject_or_partial"))
def test_damaged_files_give_their_sound_part_only(videos_dir: Path, name: str) -> None:
    path, entry = videos_dir / "bad" / name, EXPECTED[name]
    assert len(read_frames(path, start=0, count=10, size=(48, 48))) == 10
    with pytest.raises(DecodeError, match=r"damaged|cannot be decoded|ends early"):
        read_frames(path, start=entry["good_prefix_frames"] - 10, count=30, size=(48, 48))


def test_short_stream_says_how_many(videos_dir: Path) -> None:
    with pytest.raises(DecodeError, match=r"9 of 90 frames \(wanted 20 to 109; it has 29\)"):
        read_frames(videos_dir / "bad/trunc_mdat_half.mp4", start=20, count=90)


@pytest.mark.parametrize("name", ["rotated_90.mp4", "rotated_180_phone.mp4"])
def test_rotation_is_applied_as_opencv_does(videos_dir: Path, name: str) -> None:
    import cv2

    path = videos_dir / "bad" / name
    capture = cv2.VideoCapture(str(path))
    _, bgr = capture.read()
    capture.release()
    ours = read_frames(path, start=0, count=1)[0].numpy().astype(float)
    assert np.abs(ours - bgr[..., ::-1]).mean() < 3
    assert np.abs(ours - bgr[::-1, ::-1, ::-1]).mean() > 10


def test_random_reads_of_a_long_video(videos_dir: Path) -> None:
    """Long groups of pictures with B-frames, constant rate: every read equals a sequential decode."""
    path = videos_dir / "long_dev.mp4"
    assert len(frame_index(path).times) == 3646
    starts = [0, 1, 164, 700, *random.Random(0).sample(range(1000), 4)]
    reference = decode_in_order(path, [s + 3 * i for s in starts for i in range(4)])
    for start in starts:
        frames = read_frames(path, start=start, count=4, step=3).numpy()
        assert all(np.array_equal(frame, reference[start + 3 * i]) for i, frame in enumerate(frames)), start


def test_random_reads_at_variable_rate(videos_dir: Path) -> None:
    path = videos_dir / "long_dev_vfr.mp4"
    assert probe(path).num_frames == 1497
    starts = [0, 49, 50, 172, 1000, *random.Random(1).sample(range(1490), 4), 1496 - 2]
    reference = decode_in_order(path, [s + i for s in starts for i in range(3)])
    for start in starts:
        frames = read_frames(path, start=start, count=3).numpy()
        assert all(np.array_equal(frame, reference[start + i]) for i, frame in enumerate(frames)), start


@pytest.mark.parametrize(
    ("name", "first", "options"),
    [
        ("open_gop.mp4", 0, {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}),
        ("late_clock.mkv", 240, {"g": "10", "bf": "2"}),
        ("stream.ts", 50, {"g": "8", "bf": "2"}),
        ("no_times.h264", 0, {"g": "8", "bf": "2"}),
        ("intra.mp4", 7, {"g": "1"}),
        ("one_key.mp4", 0, {"g": "500", "bf": "16"}),
    ],
)
def test_every_start_in_every_kind_of_stream(tmp_path: Path, name: str, first: int, options: dict[str, str]) -> None:
    path = tmp_path / name
    write_numbered(path, 40, first=first, **options)
    reference = decode_in_order(path, range(40))
    assert probe(path).num_frames == len(reference) == 40
    for start in range(37):
        frames = read_frames(path, start=start, count=2, step=3).numpy()
        assert np.array_equal(frames[0], reference[start]), start
        assert np.array_equal(frames[1], reference[start + 3]), start
    apart = [2, 17, 18, 39]  # with key frames between them
    for i, frame in zip(apart, read_frames_at(path, apart).numpy(), strict=True):
        assert np.array_equal(frame, reference[i]), i


@pytest.mark.skipif(not hasattr(av.VideoCodecContext, "field_order"), reason="PyAV before 18 does not tell fields")
def test_only_pictures_that_the_wanted_ones_need_are_decoded(tmp_path: Path) -> None:
    """B-frames that cannot be decoded do no harm to the others."""
    whole, spoiled = tmp_path / "whole.mp4", tmp_path / "spoiled.mp4"
    write_numbered(whole, 40, g="20", bf="2", **{"x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"})
    reference = decode_in_order(whole, range(40))
    with av.open(str(whole)) as container:
        kinds = {frame.pts: int(frame.pict_type) for frame in container.decode(video=0)}
    times = sorted(kinds)
    spare = [i for i, time in enumerate(times) if kinds[time] == B_PICTURE]
    with av.open(str(whole)) as container:
        places = {p.pts: (p.pos, p.size) for p in container.demux(video=0) if p.size}
    content = bytearray(whole.read_bytes())
    for i in spare:
        place, size = places[times[i]]
        content[place + 8 : place + size] = bytes(size - 8)  # the length and the header stay
    spoiled.write_bytes(content)
    needed = [i for i in range(40) if i not in spare]
    assert 10 < len(spare) < 30
    for start in range(len(needed) - 1):
        pair = needed[start : start + 2]
        for i, frame in zip(pair, read_frames_at(spoiled, pair).numpy(), strict=True):
            assert np.array_equal(frame, reference[i]), i


def test_frames_that_are_never_shown_do_not_count(tmp_path: Path) -> None:
    """VP8 files hold reference frames that no player shows: hide one and its successors move up."""
    whole, hidden = tmp_path / "whole.webm", tmp_path / "hidden.webm"
    write_numbered(whole, 20, codec="libvpx", g="100")
    with av.open(str(whole)) as source, av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            data[0] &= ~0x10 if i == 5 else 0xFF  # the "show frame" bit
            copy = av.Packet(bytes(data))
            copy.stream, copy.time_base = stream, packet.time_base
            copy.pts, copy.dts, copy.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
            target.mux(copy)
    before, after = decode_in_order(whole, range(20)), decode_in_order(hidden, range(19))
    assert np.array_equal(before[6], after[5])
    assert probe(hidden).num_frames == 19
    assert np.array_equal(read_frames(hidden, start=5, count=1)[0].numpy(), after[5])


class Counted(int):
    """A time that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) < int(other)

    def __gt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) > int(other)


def test_frames_of_a_long_video_are_checked_in_one_pass() -> None:
    times = [Counted(time) for time in range(5000)]
    index = FrameIndex(tuple(times), (), (), len(times), len(times))
    Counted.compared = 0
    assert index.damage_of(times) == ""
    assert index.damage_of([*times[:4000], *times[4001:]]) == "damaged: 4999 of 5000 frames decode"
    without_clock = FrameIndex((), (), (), num_packets=0, promised=0)
    assert without_clock.ended_early(27) == "damaged: what follows after 27 frames does not decode"
    assert Counted.compared < 5 * len(times)


def test_files_are_closed(videos_dir: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    probe(videos_dir / "bad/vp9.webm")
    before = open_files()
    for _ in range(10):
        read_frames(videos_dir / "bad/vp9.webm", start=30, count=2, size=(16, 16))
        with pytest.raises(DecodeError):
            read_frames(videos_dir / "bad/corrupt_middle.mp4", start=20, count=40, size=(16, 16))
    assert open_files() == before


def test_size_covers_and_keeps_the_aspect(videos_dir: Path) -> None:
    assert cover_size(720, 1280, (256, 256)) == (256, 455)
    assert cover_size(1280, 720, (256, 256)) == (455, 256)
    assert cover_size(90, 160, (90, 160)) == (90, 160)
    assert cover_size(101, 100, (64, 128)) == (129, 128)
    full = read_frames(videos_dir / "bad/rotated_90.mp4", start=0, count=1)
    small = read_frames(videos_dir / "bad/rotated_90.mp4", start=0, count=1, size=(64, 64))
    assert small.shape == (1, 114, 64, 3)
    blocks = np.asarray(Image.fromarray(full[0].numpy()).resize((64, 114), Image.Resampling.BOX), dtype=float)
    assert np.abs(blocks - small[0].numpy()).mean() < 4  # averaged over the pixels it covers: no aliasing


def save_picture(path: Path, **options: Any) -> np.ndarray:
    picture = np.zeros((40, 60, 3), dtype=np.uint8)
    picture[:20, :30] = (250, 10, 10)  # red at the top left
    Image.fromarray(picture).save(path, **options)
    return picture


@pytest.mark.parametrize("name", ["a.png", "b.JPG", "c.webp", "d%d.bmp"])
def test_a_picture_is_a_video_of_one_frame(tmp_path: Path, name: str) -> None:
    picture = save_picture(tmp_path / name)
    info = probe(tmp_path / name)
    assert (info.num_frames, info.height, info.width) == (1, 40, 60)
    frames = read_frames(tmp_path / name, start=0, count=1).numpy()
    assert np.abs(frames[0].astype(int) - picture).mean() < 4
    assert read_frames(tmp_path / name, start=0, count=1, size=(20, 20)).shape == (1, 20, 30, 3)
    with pytest.raises(DecodeError, match="1 of 2"):
        read_frames(tmp_path / name, start=0, count=2)


def test_picture_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to display
    save_picture(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = read_frames(tmp_path / "a.jpg", start=0, count=1)[0].numpy()
    assert frame.shape == (60, 40, 3)
    assert frame[5, 35, 0] > 200 > frame[5, 5, 0]  # the red quarter is now at the top right


def test_broken_picture(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DecodeError, match=r"a\.png: cannot be read as an image"):
        read_frames(tmp_path / "a.png", start=0, count=1)


def test_indices_must_ascend(videos_dir: Path) -> None:
    for indices in ([], [3, 3], [5, 4], [-1, 0]):
        with pytest.raises(ValueError, match="ascending"):
            read_frames_at(videos_dir / "bad/vp9.webm", indices)
