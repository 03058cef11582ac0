"""Pictures as a viewer shows them, whatever their mode, and whatever else a file of that name may be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from opensora_repro.data import pictures
from opensora_repro.data.video import DecodeError, probe, read_frames


def read(path: Path) -> np.ndarray:
    return read_frames(path, start=0, count=1)[0].numpy()


def swapped_profile() -> bytes:
    """A profile whose red is sRGB's green, and the other way round."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"~~~~", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"~~~~", b"gXYZ", 1)


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path / "a.png") - values[..., None] / 257).max() <= 0.5
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))  # darker than one level, which is no white
    dark.save(tmp_path / "b.png")
    assert read(tmp_path / "b.png").max() == 1


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str, suffix: str) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)  # black, half of it unseen, a quarter seen by half
    pixels[:, 4:, 3] = 255
    pixels[:4, :4, 3] = 128
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(8)
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    picture = read(tmp_path / f"a.{suffix}")
    assert [int(picture[y, x, 1]) for y, x in ((6, 1), (1, 1), (1, 6))] == [255, 127, 0]


def test_a_transparent_colour_is_white(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.png", transparency=(9, 8, 7))
    Image.new("L", (4, 4), 9).save(tmp_path / "b.png", transparency=9)
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "c.gif", transparency=1)
    (tmp_path / "c.gif").rename(tmp_path / "c.png")  # the content tells, not the name
    assert all(read(tmp_path / f"{name}.png").min() == 255 for name in "abc")


def test_profiles_are_applied_and_broken_ones_ignored(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    red.save(tmp_path / "green.jpg", quality=100, subsampling=0, icc_profile=swapped_profile())
    assert np.abs(read(tmp_path / "green.jpg").astype(int) - (40, 200, 40)).max() <= 3
    red.putalpha(255)
    red.save(tmp_path / "green.png", icc_profile=swapped_profile())
    assert np.abs(read(tmp_path / "green.png").astype(int) - (40, 200, 40)).max() <= 2
    random = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.fromarray(random).convert("L")
    for profile in (same, b"no profile" * 30, swapped_profile()[:300], same[:200]):
        Image.fromarray(random).save(tmp_path / "a.png", icc_profile=profile)
        assert np.array_equal(read(tmp_path / "a.png"), random)
        grey.save(tmp_path / "g.png", icc_profile=profile)  # colours' profile on grey: none that fits
        assert np.array_equal(read(tmp_path / "g.png")[..., 0], np.asarray(grey))
        grey.convert("LA").save(tmp_path / "l.png", icc_profile=profile)
        assert np.array_equal(read(tmp_path / "l.png")[..., 0], np.asarray(grey))


def test_four_inks_and_few_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - (200, 40, 40)).max() <= 3
    Image.new("1", (4, 4), 1).save(tmp_path / "b.bmp")
    assert read(tmp_path / "b.bmp").min() == 255


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"P6 1 1 255 abc", "tiff", "ico", "pcx"]
)
def test_only_common_formats_open(tmp_path: Path, data: bytes | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ghostscript is: no program is started for a file that says it is PostScript."""
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    path = tmp_path / "a.jpg"
    if isinstance(data, str):
        Image.new("RGB", (16, 16)).save(path, format=data)
    else:
        path.write_bytes(data)
    for look in (probe, read):
        with pytest.raises(DecodeError, match="cannot be read as an image: is none of PNG, JPEG, WEBP, BMP, GIF"):
            look(path)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_reduced_size(
    tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, x = np.mgrid[0:1200, 0:1600]
    pixels = np.stack([x * 255 // 1600, y * 255 // 1200, ((x // 20 + y // 20) % 2) * 255], -1)
    pixels = np.clip(pixels + np.random.default_rng(0).normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=92, exif=exif.tobytes())
    shown = (1200, 1600) if orientation == 1 else (1600, 1200)
    info = probe(tmp_path / "a.jpg")
    assert (info.height, info.width) == shown
    sizes = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: (sizes.append(self.size), load(self))[1])
    small = read_frames(tmp_path / "a.jpg", start=0, count=1, size=(96, 128))[0].numpy().astype(int)
    assert (400, 300) in sizes or (800, 600) in sizes
    assert (1600, 1200) not in sizes
    monkeypatch.setattr(pictures, "SPARE", 10**6)
    whole = read_frames(tmp_path / "a.jpg", start=0, count=1, size=(96, 128))[0].numpy().astype(int)
    assert small.shape == whole.shape
    assert np.abs(small - whole).mean() < 1 and np.abs(small - whole).max() <= 8  # at edges


def test_what_cannot_be_read_has_one_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (400, 300), (9, 9, 9)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DecodeError, match=r"cut\.jpg: cannot be read as an image: .*truncated"):
        probe(tmp_path / "cut.jpg")
    broken = io.BytesIO()
    Image.new("RGB", (8, 4)).save(broken, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\xff\xff\xff\xff")
    (tmp_path / "exif.jpg").write_bytes(broken.getvalue())
    assert read(tmp_path / "exif.jpg").shape == (4, 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for look in (probe, read):
        with pytest.raises(DecodeError, match="exceeds limit of") as raised:
            look(tmp_path / "a.jpg")
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # beyond it Pillow only warns
    assert read(tmp_path / "a.jpg").shape == (300, 400, 3)
