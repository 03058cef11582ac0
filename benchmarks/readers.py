"""The readers that `benchmarks.loader` compares, each as its documentation shows it.

ours         opensora_repro.data.video, as training calls it
OpenCV       VideoCapture, to the first frame by its number (CAP_PROP_POS_FRAMES), the others grabbed and not retrieved
decord       VideoReader of the size wanted, get_batch
torchcodec   VideoDecoder in its exact mode with a Resize in the decoder, get_frames_at

All decode with one thread, which costs the fewest CPU seconds, and keep the files open that they read last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np

COUNT, STEP, SIZE = 16, 3, 256
LONGEST = (COUNT - 1) * STEP + 1
KEPT_OPEN = 8
THUMBNAIL = (64, 36)  # width, height
Size = tuple[int, int]  # height, width: the smallest that covers SIZE x SIZE
Reader = Callable[[str, int, Size], np.ndarray]  # path, first frame -> uint8 [COUNT, H, W, 3]


def frames_of(start: int) -> list[int]:
    return list(range(start, start + COUNT * STEP, STEP))


def ours() -> Reader:
    from opensora_repro.data.video import read_frames

    return lambda path, start, size: read_frames(path, start=start, count=COUNT, step=STEP, size=size).numpy()


def opencv() -> Reader:
    import cv2

    @lru_cache(KEPT_OPEN)
    def opened(path: str) -> Any:
        return cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])

    def read(path: str, start: int, size: Size) -> np.ndarray:
        capture, frames = opened(path), []
        capture.set(cv2.CAP_PROP_POS_FRAMES, start)
        for i in range(LONGEST):
            capture.grab()
            if i % STEP == 0:
                picture = cv2.resize(capture.retrieve()[1], size[::-1], interpolation=cv2.INTER_AREA)
                frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        return np.stack(frames)

    return read


def decord() -> Reader:
    import decord

    @lru_cache(KEPT_OPEN)
    def opened(path: str, size: Size) -> Any:
        return decord.VideoReader(path, height=size[0], width=size[1], num_threads=1)

    def read(path: str, start: int, size: Size) -> np.ndarray:
        pictures: np.ndarray = opened(path, size).get_batch(frames_of(start)).asnumpy()
        return pictures

    return read


def torchcodec() -> Reader:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    @lru_cache(KEPT_OPEN)
    def opened(path: str, size: Size) -> Any:
        return VideoDecoder(
            path, seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=1, transforms=[Resize(size)]
        )

    def read(path: str, start: int, size: Size) -> np.ndarray:
        pictures: np.ndarray = opened(path, size).get_frames_at(frames_of(start)).data.numpy()
        return pictures

    return read


READERS: dict[str, Callable[[], Reader]] = {
    "ours": ours,
    "OpenCV": opencv,
    "decord": decord,
    "torchcodec": torchcodec,
}


def build(name: str) -> Mapping[str, Callable[..., Any]]:
    """What a side's process answers; "missing": why it cannot read at all, "" if it can."""
    import time

    try:
        read = READERS[name]()
    except (ImportError, OSError, RuntimeError) as error:
        return {"missing": partial(str, str(error).strip().splitlines()[0])}
    return {
        "missing": str,
        "read": lambda *window: read(*window) is None,
        "thumbnails": lambda *window: thumbnails(read(*window)),
        "cpu_seconds": time.process_time,  # of all its threads
    }


# ---------------------------------------------------------------------------------------------------------------------
# Whether frames are those asked for


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """Grey float32 [T, h, w] without its mean, for sides differ in how they scale and in the matrix they take."""
    import cv2

    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    small = np.stack([cv2.resize(frame, THUMBNAIL, interpolation=cv2.INTER_AREA) for frame in grey]).astype(np.float32)
    return small - small.mean(axis=(1, 2), keepdims=True)


def reference(path: str) -> np.ndarray:
    """Thumbnails of all frames, decoded from the first to the last, in the order of their presentation times."""
    import av

    width, height = THUMBNAIL
    shown: dict[int, np.ndarray] = {}
    with av.open(path) as container:
        for frame in container.decode(video=0):
            shown[frame.pts] = frame.to_ndarray(width=8 * width, height=8 * height, format="rgb24")
            shown[frame.pts] = thumbnails(shown[frame.pts][None])[0]
    return np.stack([shown[time] for time in sorted(shown)])


def wrong_frames(found: np.ndarray, start: int, whole: np.ndarray, *, radius: int = 30, margin: float = 0.3) -> int:
    """How many of a window's frames look, by more than `margin` levels, more like another one than like theirs."""
    wrong = 0
    for picture, number in zip(found, frames_of(start), strict=True):
        first = max(0, number - radius)
        distances = np.abs(whole[first : number + radius + 1] - picture).mean(axis=(1, 2))
        wrong += bool(distances[number - first] > distances.min() + margin)
    return wrong
