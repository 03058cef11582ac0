"""Pictures and clips that a browser sends: looked at before anything decodes them, and kept under a name of our own."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.download.kinds import kind_of, seems
from opensora_repro.data.video import DecodeError, probe
from opensora_repro.errors import UserError
from opensora_repro.files import one_line, replacing, sha256_of

PICTURES, CLIPS = (".png", ".jpg", ".webp", ".bmp", ".gif"), (".mp4", ".mov", ".webm", ".mkv", ".avi")
MAX_BYTES, MAX_SECONDS, MAX_FRAMES, MAX_PIXELS = 200 << 20, 300, 20_000, 40_000_000
NAME_SHOWN = 60


@dataclass(frozen=True)
class Upload:
    """A file that can be given to a sampler: a picture or a clip."""

    file: str  # its name in the browser's folder of uploads
    name: str  # its name where it came from
    num_frames: int
    fps: float

    @property
    def still(self) -> bool:
        return self.num_frames == 1

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def keep_upload(source: Path, folder: Path) -> Upload:
    """Copy a file to `folder` if it is a picture or a clip within the limits. Raises UserError, a line for the page."""
    name = one_line(source.name)[:NAME_SHOWN]
    size = source.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{name}: {size >> 20} MiB, at most {MAX_BYTES >> 20} are taken")
    suffix = kind_of(source)
    if suffix not in PICTURES + CLIPS:
        raise UserError(f"{name}: this is {f'a {suffix[1:]} file' if suffix else seems(source)}; expected {expected()}")
    kept = folder / f"{sha256_of(source)[:32]}{suffix}"
    with replacing(kept) as part:  # a decoder goes by the ending: it sees ours, never the sender's
        looked_at = part.with_suffix(suffix)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, looked_at)
        try:
            upload = _checked(looked_at, name, kept.name)
            looked_at.rename(part)
        finally:
            looked_at.unlink(missing_ok=True)
    return upload


def expected() -> str:
    return f"a picture ({', '.join(PICTURES)}) or a clip ({', '.join(CLIPS)})"


def _checked(path: Path, name: str, kept: str) -> Upload:
    try:
        info = probe(path)
    except (DecodeError, OSError) as error:
        raise UserError(f"{name}: cannot be read ({str(error).removeprefix(f'{path}: ')})") from None
    if info.height * info.width > MAX_PIXELS:
        raise UserError(
            f"{name}: {info.width}x{info.height} pixels, at most {MAX_PIXELS // 1_000_000} million are taken"
        )
    seconds = info.num_frames / info.fps if info.fps else 0.0
    if info.num_frames > MAX_FRAMES or seconds > MAX_SECONDS:
        raise UserError(f"{name}: {seconds:.0f} s, {info.num_frames} frames; at most {MAX_SECONDS} s are taken")
    return Upload(kept, name, info.num_frames, info.fps)
