"""Which of a list's names means which video: by file name and folder, and only where no other could be meant.

People name a video as it suits them: with its folder or without, with a folder of another machine, with the file's
ending or without, with / or \\, in composed letters or (as macOS does) in decomposed ones, and, where no name fits
otherwise, in capitals or small letters, between which Windows and macOS do not tell.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opensora_repro.data.inputs import VIDEO_SUFFIXES
from opensora_repro.data.video import IMAGE_SUFFIXES

ENDINGS = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {".gif"}
SHOWN = 3  # names that a message gives
_ENDING = re.compile(r"(?<=.)\.[a-zA-Z][a-zA-Z0-9]{0,4}$")  # of a real file; ".2" of "take.2" is none
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The name that means a video; or several that could; or one that could mean several videos, `rivals`."""

    name: str = ""
    several: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    @property
    def clear(self) -> bool:
        return bool(self.name) and not self.rivals


@dataclass(frozen=True)
class _Claim:
    name: str
    strength: tuple[bool, bool, int, bool]  # in the same letters; the whole; components that agree; none contradicts


def without_ending(name: str) -> str:
    """Return a file's name without the ending of a video or picture."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and dot + ending.lower() in ENDINGS else name


def parts_of(name: str) -> Parts:
    """Return a path's components, a known ending in lower case."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    parts = [part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    if parts:
        bare = without_ending(parts[-1])
        parts[-1] = bare + parts[-1][len(bare) :].lower()
    return tuple(parts)


def forms_of(video: str) -> set[str]:
    """Return the last components under which a list may name a video: with its ending and without."""
    parts = parts_of(video)
    forms = {parts[-1], _bare(parts[-1])} if parts else set()
    return forms | {form.casefold() for form in forms}


def is_named(name: str, forms: frozenset[str]) -> bool:
    """Whether a list's name can mean one of the videos with these `forms_of`."""
    if name in forms:
        return True
    parts = parts_of(name)
    return bool(parts) and not forms.isdisjoint(
        form for last in (parts[-1], parts[-1].casefold()) for form in (last, without_ending(last))
    )


def _folded(parts: Parts) -> Parts:
    return tuple(part.casefold() for part in parts)


def _bare(last: str) -> str:
    known = without_ending(last)
    return known if known != last else _ENDING.sub("", last)


class _Tails:
    """Names by all of their components, and by any number of the last ones."""

    def __init__(self) -> None:
        self.whole: dict[Parts, list[str]] = defaultdict(list)
        self.tails: dict[Parts, list[str]] = defaultdict(list)

    def add(self, parts: Parts, name: str) -> None:
        self.whole[parts].append(name)
        for start in range(len(parts)):
            self.tails[parts[start:]].append(name)


class NameIndex:
    """The names of a list, found by the videos that they mean. Time is linear in both, whatever the names share."""

    def __init__(self, names: Iterable[str]) -> None:
        self.as_given, self.bare, self.folded = _Tails(), _Tails(), _Tails()
        for name in names:
            if parts := parts_of(name):
                self.as_given.add(parts, name)
                self.bare.add((*parts[:-1], without_ending(parts[-1])), name)
                self.folded.add(_folded((*parts[:-1], without_ending(parts[-1]))), name)

    def find(self, videos: Iterable[str]) -> dict[str, Found]:
        """Return what is known of those videos that the list names at all.

        A name goes to the video that has most of its folders. One that could mean several videos means none, and so it
        is with a video that several names could mean.
        """
        found: dict[str, Found] = {}
        claims: dict[str, dict[str, _Claim]] = defaultdict(dict)  # by name, then by video
        for video in dict.fromkeys(videos):
            claim = self._claim(video)
            if isinstance(claim, _Claim):
                claims[claim.name][video] = claim
            elif claim:
                found[video] = Found(several=tuple(claim[:SHOWN]))
        for name, rivals in claims.items():
            best = max(claim.strength for claim in rivals.values())
            meant = tuple(video for video, claim in rivals.items() if claim.strength == best)
            found |= {video: Found(name, rivals=meant if len(meant) > 1 else ()) for video in meant}
        return found

    def _claim(self, video: str) -> _Claim | list[str]:
        """Return the name that fits a video best; several that fit equally; or none."""
        parts = parts_of(video)
        if not parts:
            return []
        bare = _bare(parts[-1])
        # With its ending in the list, too; else without, on either side.
        ways = [(self.as_given, parts[-1]), (self.as_given, bare) if bare != parts[-1] else (self.bare, bare)]
        as_written = self._fitting(parts, ways, True)
        return as_written or self._fitting(_folded(parts), [(self.folded, bare.casefold())], False)

    def _fitting(self, parts: Parts, ways: Sequence[tuple[_Tails, str]], as_written: bool) -> _Claim | list[str]:
        """Return what fits a path's components best, with one of the last ones, each of an index."""
        for index, last in ways:
            if len(same := index.whole.get((*parts[:-1], last), [])) == 1:
                return _Claim(same[0], (as_written, True, len(parts), True))
        longest: Parts = ()
        fits: list[str] = []
        for index, last in ways:
            for length in range(1, len(parts) + 1):  # where a tail is not there, no longer one is
                tail = (*parts[len(parts) - length : -1], last)
                if tail not in index.tails:
                    break
                if length > len(longest):
                    longest, fits = tail, index.tails[tail]
        if len(fits) != 1:
            return fits
        agree = len(longest)
        return _Claim(fits[0], (as_written, False, agree, agree in (len(parts), len(parts_of(fits[0])))))
