"""Written files, read back: frame count, rate, size, pixel format and colours."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from opensora_repro.data.write import write_gif, write_png, write_video

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}


def moving_square(colour: tuple[int, int, int], *, frames: int = 8, size: int = 64, side: int = 14) -> np.ndarray:
    """A square that travels right over a dark ground, at odd and even places alike."""
    video = np.full((frames, size, size, 3), (18, 20, 26), np.uint8)
    for t in range(frames):
        video[t, 21 : 21 + side, 3 + 5 * t : 3 + 5 * t + side] = colour
    return video


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def top_level_boxes(path: Path) -> list[bytes]:
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        names.append(data[position + 4 : position + 8])
        position += int.from_bytes(data[position : position + 4], "big")
    return names


@pytest.mark.parametrize("colour", COLOURS)
def test_saturated_colours_survive(tmp_path: Path, colour: str) -> None:
    video = moving_square(COLOURS[colour])
    write_video(tmp_path / "a.mp4", video, 8)
    found = decode(tmp_path / "a.mp4").astype(int)
    for t in range(len(video)):  # two pixels of rim are left to chroma subsampling
        inside = found[t, 23:33, 5 + 5 * t : 15 + 5 * t]
        assert np.abs(inside - COLOURS[colour]).max() <= 12, t
    ground = np.abs(found - video)[:, :18]
    assert ground.max() <= 10
    assert np.abs(found - video).mean() <= 4


@pytest.mark.parametrize("fps", [8, 24, 30000 / 1001])
def test_browser_ready(tmp_path: Path, fps: float) -> None:
    video = moving_square((255, 0, 0), frames=9)
    write_video(tmp_path / "a.mp4", torch.from_numpy(video), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 64, 64)
        assert stream.frames == 9
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-6)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([t / fps for t in range(9)], abs=1e-4)
    boxes = top_level_boxes(tmp_path / "a.mp4")
    assert boxes.index(b"moov") < boxes.index(b"mdat")  # plays before it is all there


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    video = np.full((3, 33, 47, 3), (0, 160, 0), np.uint8)
    write_video(tmp_path / "a.mp4", video, 8)
    found = decode(tmp_path / "a.mp4").astype(int)
    assert found.shape == (3, 34, 48, 3)
    assert np.abs(found - (0, 160, 0)).max() <= 6


def test_a_failure_leaves_nothing_half(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.mkdir()  # everything is written, and then cannot be put in place
    with pytest.raises(OSError):
        write_video(path, moving_square((0, 0, 255)), 8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_square((255, 0, 0)), 8)
    write_video(path, moving_square((0, 0, 255), frames=5), 8)
    assert len(decode(path)) == 5


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 8, "got float32"),
        (np.zeros((0, 8, 8, 3), np.uint8), 8, r"got uint8 \[0, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), 8, r"got uint8 \[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, "positive frame rate"),
    ],
)
def test_wrong_input_writes_nothing(tmp_path: Path, frames: np.ndarray, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_png_is_exact(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
    write_png(tmp_path / "new" / "a.png", torch.from_numpy(image))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image)


def test_gif_loops(tmp_path: Path) -> None:
    video = moving_square((255, 0, 255))
    write_gif(tmp_path / "a.gif", video, 8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        found = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]).astype(int)
        assert gif.info["duration"] == 120
    assert found.shape == video.shape
    assert np.abs(found - video).mean() <= 2
