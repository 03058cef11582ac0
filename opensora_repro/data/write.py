"""Write videos and pictures that any browser shows. Files appear whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from opensora_repro.data.color import AREA, BT709, CENTRED_CHROMA, LIMITED_RANGE
from opensora_repro.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

CRF = 14  # visually lossless: small saturated shapes keep their colour through 4:2:0
GOP_SIZE = 16  # a key frame at least this often, so that a random read decodes little

Frames = Union[np.ndarray, "Tensor"]


def write_sample(path: Path, video: Frames, fps: float) -> None:
    """Write uint8 RGB frames [T, H, W, 3] as the name's ending says: a png of the first, a gif, or an mp4."""
    if path.suffix == ".png":
        write_png(path, video[0])
    elif path.suffix == ".gif":
        write_gif(path, video, fps)
    else:
        write_video(path, video, fps)


def write_video(path: str | Path, frames: Frames, fps: float) -> None:
    """Write uint8 RGB frames [T, H, W, 3] as an H.264 mp4 that plays while it loads.

    yuv420p needs even sizes: an odd one is padded by repeating its last row or column. Raises ValueError.
    """
    import av
    from av.video.reformatter import VideoReformatter

    images = _checked(frames, "frames [T, H, W, 3]", ndim=4)
    if not fps > 0:
        raise ValueError(f"a video needs a positive frame rate, got {fps}")
    images = np.pad(images, ((0, 0), (0, images.shape[1] % 2), (0, images.shape[2] % 2), (0, 0)), mode="edge")
    with (
        replacing(Path(path)) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        # No B-frames: times start at zero without an edit list, which simple readers overlook.
        options = {"crf": str(CRF), "preset": "medium", "bf": "0", "g": str(GOP_SIZE), **steady_options(CENTRED_CHROMA)}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709
        codec.color_range = LIMITED_RANGE
        reformatter = VideoReformatter()
        for image in images:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(rgb_to_yuv(reformatter, rgb, rgb.height, rgb.width)))
        container.mux(stream.encode(None))


def join_videos(path: Path, parts: Sequence[Path]) -> None:
    """Write one mp4 of several that `write_video` made at one size and rate, without coding them again."""
    import av

    with replacing(path) as whole, av.open(str(whole), "w", format="mp4", options={"movflags": "+faststart"}) as out:
        stream: Any = None
        offset = 0
        for part in parts:
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                stream = stream or out.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is not None and packet.pts is not None:  # the last one is empty
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                        out.mux(packet)
                offset += source.duration or 0


def rgb_to_yuv(reformatter: Any, frame: Any, height: int, width: int) -> Any:
    """Return an RGB frame as yuv420p in BT.709, limited range, tagged so; chroma is the mean of each 2x2 square."""
    yuv = reformatter.reformat(
        frame, width=width, height=height, format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE,
        interpolation=AREA, threads=1,
    )  # fmt: skip
    yuv.colorspace = yuv.color_primaries = yuv.color_trc = BT709
    yuv.color_range = LIMITED_RANGE
    return yuv


def write_png(path: str | Path, image: Frames) -> None:
    """Write a uint8 RGB image [H, W, 3]. Raises ValueError."""
    from PIL import Image

    picture = Image.fromarray(_checked(image, "an image [H, W, 3]", ndim=3))
    with replacing(Path(path)) as part:
        picture.save(part, format="PNG")


def write_gif(path: str | Path, frames: Frames, fps: float) -> None:
    """Write uint8 RGB frames [T, H, W, 3] as a GIF that loops; its clock ticks in hundredths of a second."""
    with replacing(Path(path)) as part:
        encode_gif(part, frames, fps)


def encode_gif(file: Any, frames: Frames, fps: float) -> None:
    """As `write_gif`, into an open file or a path."""
    from PIL import Image

    images = [Image.fromarray(image) for image in _checked(frames, "frames [T, H, W, 3]", ndim=4)]
    duration = max(20, 10 * round(100 / fps))  # ms; browsers slow anything faster than 50 frames a second down
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)


def _checked(array: Frames, expected: str, *, ndim: int) -> np.ndarray:
    images = np.asarray(array)
    if images.dtype != np.uint8 or images.ndim != ndim or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"expected {expected} of uint8, got {images.dtype} {list(images.shape)}")
    return images


AVX512 = 256  # OpenCV's CPU_AVX512_SKX: the extensions that x264, too, wants all of


def steady_options(*params: str) -> dict[str, str]:
    """Return libx264's options: `params`, and those under which the same frames always give the same bytes.

    With AVX-512, x264 (seen in core 165) now and then gives the bottom right macroblock another quantiser: its
    macroblock tree is not steady there. With AVX2 it is: the bytes are those that AVX-512 mostly gives, as fast.
    """
    import cv2

    settings = [*params, "asm=avx2"] if cv2.checkHardwareSupport(AVX512) else params
    return {"x264-params": ":".join(settings)} if settings else {}
