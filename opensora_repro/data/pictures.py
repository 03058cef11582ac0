"""Pictures as a viewer shows them: upright, on white where they are transparent, in sRGB, 8 bits a channel."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora_repro.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Whatever a file is called, only these decoders get to see it: others start programs (PostScript) or are seldom tested.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SPARE = 3  # times the wanted size at which a JPEG is decoded at least, so that scaling it down is still well filtered
LARGEST_PROFILE = 1 << 23  # bytes
ROUNDING = 2  # levels that a profile of sRGB may be off
Size = tuple[int, int]  # height, width


class PictureError(UserError):
    """A picture cannot be read; the message is the reason, without the path."""


def read_picture(path: str | Path, fit: Callable[[int, int], Size] | None = None) -> np.ndarray:
    """Return uint8 [H, W, 3]; `fit` says from the picture's height and width which size it is scaled to.

    EXIF's orientation and ICC profiles are applied, a broken one of either is ignored. Of an animation the first frame
    is taken. A large JPEG is decoded at a reduced size that is at least `SPARE` times the wanted one. PictureError.
    """
    from PIL import Image

    image, size, turn = _open(path, fit)
    image = _flat(_eight_bits(image))
    if turn is not None:
        image = image.transpose(turn)
    if fit:
        height, width = fit(*size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).copy()


def picture_size(path: str | Path) -> Size:
    """Return a picture's height and width as displayed, after decoding it: a damaged one is no picture."""
    return _open(path, lambda height, width: (1, 1))[1]


def _open(path: str | Path, fit: Callable[[int, int], Size] | None) -> tuple[Image, Size, Any]:
    """Return the decoded picture, perhaps reduced, its whole size as displayed, and how to turn it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels (twice as many are an error), of a block that is broken
            with Image.open(path, formats=FORMATS) as image:
                turn = _turn(image)
                size = image.size if _swaps(turn) else image.size[::-1]
                if fit:
                    height, width = fit(*size)[::-1] if _swaps(turn) else fit(*size)
                    image.draft(None, (SPARE * width, SPARE * height))
                image.load()
                return image, size, turn
    except UnidentifiedImageError as error:
        raise PictureError(f"is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet the files of strangers with errors of many classes
        raise PictureError((str(error) or type(error).__name__).splitlines()[0]) from error


def _turn(image: Image) -> Any:
    """Return what makes the picture upright, by EXIF's orientation; None for nothing."""
    from PIL.Image import Transpose

    by_orientation = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    with suppress(Exception):  # whatever a broken block leads to, the picture itself may be sound
        return by_orientation.get(image.getexif().get(0x0112, 1))
    return None


def _swaps(turn: Any) -> bool:
    from PIL.Image import Transpose

    return turn in (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)


def _eight_bits(image: Image) -> Image:
    """Scale 16-bit grey, which Pillow would cut off at 255; it reads 16-bit colour as 8 bits itself."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    grey.info |= {name: value for name, value in image.info.items() if name != "transparency"}
    return grey


def _flat(image: Image) -> Image:
    """Return sRGB without transparency: it is laid on white."""
    from PIL import Image

    profile = image.info.get("icc_profile")
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return _srgb(image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB"), profile)
    colours = image.convert("RGBA")
    grey = image.mode in ("L", "LA")
    opaque = _srgb(colours.getchannel("R") if grey else colours.convert("RGB"), profile)
    return Image.composite(opaque, Image.new("RGB", image.size, "white"), colours.getchannel("A"))


def _srgb(image: Image, profile: bytes | None) -> Image:
    """Return the picture in sRGB: by its profile if that can be used, else as if it were in sRGB already."""
    from PIL import ImageCms

    if profile and len(profile) <= LARGEST_PROFILE:
        # LittleCMS's errors are PyCMSError, OSError and ValueError, by what is wrong.
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            if transform := _to_srgb(profile, image.mode):
                return transform.apply(image)
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """Return the transformation from a profile; None where it only rounds, as from one of sRGB's many profiles."""
    from PIL import Image, ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        seen = np.asarray(transform.apply(Image.fromarray(colours)))
        if np.abs(seen.astype(int) - colours).max() <= ROUNDING:
            return None
    return transform
