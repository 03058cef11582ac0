"""Frames that a sample is given: from files and places on its time line to latents and how far each may be changed.

Everything is one form, `PLACE=FILE[SPAN]@STRENGTH` in frames of video; stills, extensions, joins and edits are short
for it. Files are cut, scaled and taken at a rate as training does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from opensora_repro.config import ConfigError, DataConfig, VaeConfig
from opensora_repro.data.dataset import crop, to_tensor
from opensora_repro.data.sample_frames import clip_times, frames_at_rate, interval_of, shown_at
from opensora_repro.data.video import DecodeError, VideoInfo, cover_size, probe, read_frames_at
from opensora_repro.diffusion.frame_masks import GivenFrames
from opensora_repro.files import sha256_of
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.geometry import Geometry
from opensora_repro.frozen.vae import open_vae
from opensora_repro.sampling.conditions import insert_references, parse_strategy
from opensora_repro.sampling.options import Options

FORM = 'PLACE=FILE[SPAN]@STRENGTH, such as "0=first.png", "-8:=clip.mp4[0:8]" or "0:16=clip.mp4@0.6"'
_KEEP = re.compile(r"(?P<place>[-\d:]+)=(?P<file>.+?)(?:\[(?P<span>[-\d:]*)\])?(?:@(?P<strength>[-+.\w]+))?")
_SPAN = re.compile(r"(-?\d+)?(:)?(-?\d+)?")


@dataclass(frozen=True)
class Span:
    """Frames START:STOP of a clip, negative ones from its end; `open` is a lone START, of which FILE has the length."""

    start: int | None = None
    stop: int | None = None
    open: bool = False

    def within(self, total: int, length: int, where: str) -> range:
        """Which of `total` frames; `length` is an open span's. Raises ConfigError."""
        first = self.start or 0
        first += total if first < 0 else 0
        last = total if self.stop is None else self.stop + (total if self.stop < 0 else 0)
        last = first + length if self.open else last
        if not 0 <= first < last <= total:
            part = f"{length} from frame {self} on are no part" if self.open and length > 1 else f"{self} is no part"
            raise ConfigError(f"{where}: there are {total} frames, of which {part}")
        return range(first, last)

    def __str__(self) -> str:
        if self.open:
            return f"{self.start}"
        return ":".join("" if end is None else str(end) for end in (self.start, self.stop))


def parse_span(text: str) -> Span:
    """Raises ValueError."""
    found = _SPAN.fullmatch(text)
    if found is None or not text:
        raise ValueError(text)
    start, stop = (None if end is None else int(end) for end in (found[1], found[3]))
    return Span(start, stop, open=found[2] is None)


@dataclass(frozen=True)
class Keep:
    """Frames of a file that take places of a sample. `strength`: 0 keeps them, 1 would ignore them."""

    place: Span
    file: Path
    span: Span | None = field(default_factory=Span)  # None: from the beginning on as many as the place has
    strength: float = 0.0
    option: str = "--keep"


def parse_keep(text: str) -> Keep:
    """Raises ConfigError."""
    found = _KEEP.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        span = Span() if found["span"] is None else parse_span(found["span"])
        strength = 0.0 if found["strength"] is None else float(found["strength"])
        keep = Keep(parse_span(found["place"]), Path(found["file"]).expanduser(), span, strength, f"--keep {text}")
    except ValueError:
        raise ConfigError(f"--keep {text}: expected {FORM}") from None
    check_strength(strength, keep.option)
    return keep


def check_strength(strength: float, where: str) -> None:
    if not 0 <= strength < 1:
        raise ConfigError(f"{where}: expected a strength from 0 (kept as it is) to below 1 (all new)")


class Reference:
    """A picture or clip, as training would take it: at `data.fps`, or every `data.frame_interval`-th frame."""

    def __init__(self, path: Path, data: DataConfig, option: str) -> None:
        """Raises ConfigError."""
        self.path, self.size = path, (data.height, data.width)
        self.frames = self._frames(data, _probed(path, option))  # in the file

    def _frames(self, data: DataConfig, info: VideoInfo) -> list[int]:
        if info.num_frames == 1 or not data.fps:
            return list(range(0, info.num_frames, interval_of(data)))
        times = clip_times(self.path, info.num_frames, info.fps)
        count = int(frames_at_rate(data, info.num_frames, info.fps))
        return shown_at(times, torch.arange(count, dtype=torch.float64).numpy() / data.fps)

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)

    def read(self, span: range) -> Tensor:
        """uint8 [T, H, W, 3], scaled to cover the sample's size, and cut at the centre. Raises DecodeError."""
        chosen = [self.frames[i] for i in span]
        read = sorted(set(chosen))
        pixels, _ = crop(read_frames_at(self.path, read, size=self.size), self.size)
        return pixels[[read.index(frame) for frame in chosen]]  # a slow clip shows some for longer


@dataclass(frozen=True)
class Placed:
    """Frames `source` of a reference at the frames `place` of the video; a picture stands still in all of them."""

    place: range
    reference: Reference
    source: range
    strength: float

    def read(self, window: range) -> tuple[list[int], Tensor]:
        """The places inside a window of the video, and their pixels [T, H, W, 3]."""
        places = [i for i in self.place if i in window]
        if len(self.reference.frames) == 1:
            return places, self.reference.read(self.source).expand(len(places), -1, -1, -1)
        first = places[0] - self.place.start + self.source.start
        return places, self.reference.read(range(first, first + len(places)))


def place(keeps: Iterable[Keep], data: DataConfig, total: int) -> tuple[Placed, ...]:
    """Where in a video of `total` frames everything goes. Raises ConfigError."""
    references: dict[Path, Reference] = {}
    taken: dict[int, str] = {}
    found = []
    for keep in keeps:
        if keep.file not in references:
            references[keep.file] = Reference(keep.file, data, keep.option)
        reference = references[keep.file]
        there = len(reference.frames)
        span = keep.span or Span(0, min(there, total))
        source = span.within(there, 1, f"{keep.option}: of {keep.file}")
        frames = keep.place.within(total, len(source), f"{keep.option}: of the sample")
        if len(frames) != len(source) and there > 1:
            raise ConfigError(
                f"{keep.option}: {len(source)} frames of {keep.file} do not fill {len(frames)} of the sample"
            )
        for frame in frames:
            if frame in taken:
                raise ConfigError(f"{keep.option}: frame {frame} is given twice, by {taken[frame]}, too")
            taken[frame] = keep.option
        found.append(Placed(frames, reference, source, keep.strength))
    return tuple(found)


@dataclass(frozen=True)
class Strategy:
    """A published mask strategy, and its references, which are encoded whole; see `insert_references`."""

    text: str
    references: tuple[Reference, ...]
    align: int | None = None

    def check(self, geometry: Geometry, num_frames: int, num_clips: int) -> None:
        """Raises ConfigError for what has no place."""
        conditions = parse_strategy(self.text)
        late = next((condition for condition in conditions if condition.loop >= num_clips), None)
        if late is not None:
            raise ConfigError(f"--mask-strategy {late}: of clips there are {num_clips}, and no number {late.loop}")
        empty = torch.zeros(1, geometry.latent_frames(num_frames), 1, 1)
        counts = [geometry.latent_frames(self._count(reference, geometry)) for reference in self.references]
        for number in range(num_clips):
            references = [torch.zeros(1, count, 1, 1) for count in counts]
            insert_references(empty, references, conditions, loop=number, align=self.align)

    def _count(self, reference: Reference, geometry: Geometry) -> int:
        return next(n for n in range(len(reference.frames), 0, -1) if geometry.is_exact(n))

    def latents(self, vae: Autoencoder) -> list[Tensor]:
        """Of each reference, [Cz, T', h, w]; of frames that its autoencoder cannot give back, the last are left out."""
        found = []
        for reference in self.references:
            found.append(_encode(vae, reference.read(range(self._count(reference, vae.geometry)))))
        return found


@dataclass(frozen=True)
class GivenClip:
    """Given frames of one clip: their places, ascending, uint8 pixels [N, H, W, 3], and strengths."""

    places: Sequence[int]
    pixels: Tensor
    strengths: Sequence[float]

    def paste(self, video: Any, region: Tensor | None = None) -> None:
        """Put kept frames, and what lies outside of a region [H, W], as they are into a clip's uint8 [T, H, W, 3]."""
        for i, (at, strength) in enumerate(zip(self.places, self.strengths, strict=True)):
            if not strength:
                video[at] = self.pixels[i].numpy()
            elif region is not None:
                outside = ~region.numpy()
                video[at][outside] = self.pixels[i].numpy()[outside]


@dataclass(frozen=True)
class Given:
    """All that a video is given: frames at their places, a published strategy of latents, whether pixels are pasted."""

    placed: tuple[Placed, ...] = ()
    strategy: Strategy | None = None
    paste: bool = False
    region: Tensor | None = None  # of pixels, bool [H, W]: where alone everything is generated

    def __bool__(self) -> bool:
        return bool(self.placed) or self.strategy is not None

    def settings(self) -> dict[str, Any]:
        """What decides samples, files by their content."""
        found: dict[str, Any] = {
            f"{placed.place.start}:{placed.place.stop}": {
                "file": str(placed.reference.path),
                "sha256": placed.reference.sha256,
                "frames": f"{placed.source.start}:{placed.source.stop}",
                "strength": placed.strength,
            }
            for placed in self.placed
        }
        if self.strategy is not None:
            hashes = [reference.sha256 for reference in self.strategy.references]
            found["strategy"] = {"text": self.strategy.text, "sha256": hashes, "align": self.strategy.align}
        if self.region is not None:
            found["region"] = hashlib.sha256(self.region.numpy().tobytes()).hexdigest()
        return found | ({"paste": True} if self.paste else {})

    def clip(self, window: range, more: Iterable[tuple[range, Tensor]] = ()) -> GivenClip | None:
        """What frames `window` of the video are given; `more` are places and pixels that go before."""
        found: dict[int, tuple[Tensor, float]] = {}
        for placed in self.placed:
            if placed.place.start < window.stop and window.start < placed.place.stop:
                places, pixels = placed.read(window)
                found |= {at: (image, placed.strength) for at, image in zip(places, pixels, strict=True)}
        for span, images in more:
            found |= {at: (image, 0.0) for at, image in zip(span, images, strict=True)}
        if not found:
            return None
        order = sorted(found)
        stacked = torch.stack([found[at][0] for at in order])
        return GivenClip([at - window.start for at in order], stacked, [found[at][1] for at in order])

    def latents(
        self,
        vae: Autoencoder,
        clip: GivenClip | None,
        size: tuple[int, int, int],
        *,
        number: int = 0,
        references: Sequence[Tensor] = (),
    ) -> GivenFrames | None:
        """For a sampler: the latents of clip `number`, of `size` frames, height and width, [1, ...]; None: none."""
        latents, ratios = torch.zeros(vae.latent_shape(*size)), torch.ones(vae.latent_frames(size[0]))
        if clip is not None:
            latents, ratios = encode_given(vae, clip, size)
        if self.strategy is not None:
            conditions = parse_strategy(self.strategy.text)
            more, told = insert_references(latents, references, conditions, loop=number, align=self.strategy.align)
            free = ratios == 1  # what was given in pixels goes before
            latents = torch.where(rearrange(free, "t -> 1 t 1 1").to(latents.device), more, latents)
            ratios = torch.where(free, told, ratios)
        if self.region is not None:
            return GivenFrames(latents[None], ratios[None], _of_latents(self.region, vae.spatial_stride))
        return None if (ratios == 1).all() else GivenFrames(latents[None], ratios[None])


def _of_latents(region: Tensor, stride: int) -> Tensor:
    """[H, W] of pixels -> [1, 1, 1, h, w] of latents: those in whose square any pixel is."""
    height, width = (side // stride * stride for side in region.shape)
    squares = region[:height, :width].float()
    return reduce(squares, "(h p) (w q) -> 1 1 1 h w", "max", p=stride, q=stride) > 0


def covering(geometry: Geometry, places: Iterable[int], num_frames: int) -> dict[int, range]:
    """The latents that cover any of the frames `places`, and all frames that each covers."""
    asked = set(places)
    spans = geometry.latent_spans(num_frames)
    return {number: span for number, span in enumerate(spans) if asked.intersection(span)}


def encode_given(vae: Autoencoder, clip: GivenClip, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Latents [Cz, T', h, w] and ratios [T']; a latent that covers a given frame is given, at its least strength.

    In between, where a latent covers free frames or an encoder looks back at them, the nearest given frame stands.
    """
    num_frames = size[0]
    strength = dict(zip(clip.places, clip.strengths, strict=True))
    ratios = torch.ones(vae.latent_frames(num_frames))
    covered = covering(vae.geometry, clip.places, num_frames)
    for number, span in covered.items():
        ratios[number] = min(strength[frame] for frame in span if frame in strength)
    if vae.temporal_stride == 1 and vae.geometry.chunk is None:  # frame by frame: the others need not be encoded
        some = _encode(vae, clip.pixels)
        latents = some.new_zeros(vae.latent_shape(*size))
        latents[:, list(clip.places)] = some
        return latents, ratios
    distances = (torch.arange(num_frames)[:, None] - torch.tensor(clip.places)).abs()
    return _encode(vae, clip.pixels[distances.argmin(dim=1)]), ratios


def _encode(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """The posterior's mode of uint8 [T, H, W, 3], [Cz, T', h, w]."""
    return vae.sample_latents(vae.encode_moments(to_tensor(pixels)), None)


def told(given: Given, geometry: Geometry, windows: Sequence[range]) -> list[str]:
    """What the autoencoder's stride makes of given frames in the first clip that has them, of those of a video."""
    lines = []
    for one in given.placed:
        clip = next(window for window in windows if one.place.start < window.stop and window.start < one.place.stop)
        inside = [frame - clip.start for frame in one.place if frame in clip]
        latents = covering(geometry, inside, len(clip))
        held = sum(map(len, latents.values())) - len(inside)
        how = f"changed from noise level {one.strength:g} on" if one.strength else "kept"
        how = "kept outside of the region" if one.strength == 1 else how
        more = f"; {held} free frames that share them start from the nearest given one" if held else ""
        lines.append(
            f"frames {one.place.start} to {one.place.stop - 1} from {one.reference.path.name}: latents {min(latents)} "
            f"to {max(latents)} of {geometry.latent_frames(len(clip))} {how}{more}"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# What is short for it


def condition_lengths(geometry: Geometry, num_frames: int, condition_frames: int | None) -> tuple[int, int]:
    """Frames that stand at a clip's start and end as a condition: whole latents, one at least.

    Within `condition_frames`; by default a quarter of the latents, as most that training gives at either end. Of an
    autoencoder that encodes chunks alone whole chunks, where the clip has several.
    """
    spans = geometry.latent_spans(num_frames)
    if condition_frames is None:
        count = max(1, len(spans) // 4)
        if geometry.chunk is not None and num_frames >= 2 * geometry.chunk:
            return geometry.chunk, geometry.chunk
        return spans[count - 1].stop, num_frames - spans[-count].start
    starts = [span.stop for span in spans if span.stop <= condition_frames] or [spans[0].stop]
    from_end = [num_frames - span.start for span in spans]
    ends = [count for count in from_end if count <= condition_frames] or from_end[-1:]
    return starts[-1], ends[0]


def shorthands(o: Options, lengths: tuple[int, int]) -> list[Keep]:
    """The general form of `--first`, `--last`, `--extend`, `--join`, `--edit` and `--inpaint`.

    `lengths` as `condition_lengths`.
    """
    found = []
    head, tail = lengths
    begin, end = Span(0, head), Span(-tail, None)
    if o.first is not None:
        found.append(Keep(Span(0, open=True), o.first, Span(0, 1), option=f"--first {o.first}"))
    if o.extend is not None:
        place, span = (end, Span(0, tail)) if o.before else (begin, Span(-head, None))
        found.append(Keep(place, o.extend, span, option=f"--extend {o.extend}"))
    if o.join is not None:
        one, other = o.join
        found.append(Keep(begin, one, Span(-head, None), option=f"--join {one}"))
        found.append(Keep(end, other, Span(0, tail), option=f"--join {other}"))
    if o.last is not None:
        found.append(Keep(Span(-1, open=True), o.last, Span(-1, None), option=f"--last {o.last}"))
    if o.edit is not None:
        option, strength = f"--edit {o.edit}", o.strength or 0.0
        check_strength(strength, f"{option} --strength {strength:g}")
        found.append(Keep(Span(0, None), o.edit, None, strength, option))
    if o.inpaint is not None:
        found.append(Keep(Span(0, None), o.inpaint, None, 1.0, f"--inpaint {o.inpaint}"))
    return found


def open_region(text: str, clip: Path, data: DataConfig) -> Tensor:
    """Where `--inpaint` generates, bool [H, W] of the sample's pixels: a picture's bright places, or X,Y,WIDTH,HEIGHT.

    Both are told as the clip's own pixels, and scaled and cut with it. Raises ConfigError.
    """
    where, size = f"--region {text}", (data.height, data.width)
    box = re.fullmatch(r"(\d+),(\d+),([1-9]\d*),([1-9]\d*)", text)
    if box is None:
        mask = Reference(Path(text).expanduser(), data, "--region")
        region = mask.read(range(1))[0].float().mean(dim=-1) > 127.5
    else:
        left, top, width, height = map(int, box.groups())
        info = _probed(clip, "--inpaint")
        if left + width > info.width or top + height > info.height:
            raise ConfigError(f"{where}: {clip} has {info.width}x{info.height} pixels")
        covered = cover_size(info.height, info.width, size)
        rows = (torch.arange(covered[0]) + 0.5) * info.height / covered[0]
        columns = (torch.arange(covered[1]) + 0.5) * info.width / covered[1]
        inside = ((rows >= top) & (rows < top + height))[:, None] & ((columns >= left) & (columns < left + width))
        region = crop(inside[None, :, :, None], size)[0][0, :, :, 0]
    if not region.any():
        raise ConfigError(f"{where}: nothing of it is in the sample, which shows the middle of {clip}")
    return region.contiguous()


def _probed(path: Path, option: str) -> VideoInfo:
    """Raises ConfigError."""
    try:
        return probe(path)
    except (DecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{option}: {path} cannot be read ({reason})") from None


def open_given(
    o: Options, data: DataConfig, lengths: tuple[int, int], *, total: int, geometry: Geometry, num_clips: int
) -> Given | None:
    """All files looked at, and everything at its place in a video of `total` frames; None: no frame is given.

    `lengths` as `condition_lengths`. Raises ConfigError.
    """
    region = None if o.inpaint is None or o.region is None else open_region(o.region, o.inpaint, data)
    keeps = [*map(parse_keep, o.keep), *shorthands(o, lengths)]
    found = None
    if o.mask_strategy is not None and o.reference is not None:
        opened = [Reference(Path(path).expanduser(), data, "--reference") for path in o.reference.split(";")]
        found = Strategy(o.mask_strategy, tuple(opened), o.mask_align)
        found.check(geometry, data.num_frames, num_clips)
    given = Given(place(keeps, data, total), found, o.paste, region)
    if o.paste and not given.placed:
        raise ConfigError("--paste: no frames are given whose pixels could be put back")
    return given if given else None


def read_geometry(cfg: VaeConfig) -> Geometry:
    """Of the autoencoder that a config names. Raises ModelNotFound."""
    return open_vae(cfg, "cpu", torch.float32).geometry
