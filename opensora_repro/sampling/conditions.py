"""Which frames a sampler is given, in the strings of Open-Sora 1.1 and 1.2; and what else their prompts can hold.

A mask strategy is `loop,ref,ref_start,target,length,edit_ratio`, several joined by `;`: in round `loop`, latent frames
of reference number `ref` from its frame `ref_start` on take the places from `target` on, `length` of them; `edit_ratio`
0 keeps them, 1 ignores them, and between these sampling starts from them at the noise level of that ratio. Fields that
the end lacks are 0, 0, 0, 0, 1, 0; a negative start counts from the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_repro.config import ConfigError

ALIGN = 5  # latent frames that 1.2's autoencoder makes of a chunk of CHUNK frames; 1.2 moves conditions to whole ones
CHUNK = 17


class Condition(NamedTuple):
    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target: int = 0
    length: int = 1
    edit_ratio: float = 0.0

    def __str__(self) -> str:
        return ",".join(map(str, self))


def parse_strategy(text: str | None) -> list[Condition]:
    """The conditions of a mask strategy; none of an empty one. Raises ConfigError."""
    return [_parse_condition(part, text) for part in text.split(";")] if text else []


def _parse_condition(part: str, text: str | None) -> Condition:
    fields = part.split(",")
    try:
        loop, reference, start, target, length, ratio = [*fields, *map(str, Condition()[len(fields) :])]
        found = Condition(int(loop), int(reference), int(start), int(target), int(length), float(ratio))
    except ValueError:
        expected = (
            "loop,ref,ref_start,target,length,edit_ratio (whole numbers but for the last; the end may be left out)"
        )
        raise ConfigError(f"mask strategy {text!r}: {part!r}: expected {expected}") from None
    if found.length < 1 or not 0 <= found.edit_ratio <= 1 or min(found.loop, found.reference) < 0:
        expected = "a length of at least 1, an edit ratio from 0 to 1, and no negative loop or reference"
        raise ConfigError(f"mask strategy {text!r}: {part!r}: expected {expected}")
    return found


def aligned(start: int, align: int, total: int) -> int:
    """The start of a chunk of `align` frames next to `start`, of `total`: the later one if a whole one follows."""
    first = start // align * align
    later = start % align > align / 2 and first + 2 * align <= total
    return first + align if later else first


def insert_references(
    latents: Tensor,
    references: Sequence[Tensor],
    conditions: Sequence[Condition],
    *,
    loop: int,
    align: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents [C, T, h, w] with what round `loop` gives of references [C, T', h, w], and edit ratios [T], 1 elsewhere.

    What does not fit is cut. `align`: move starts to whole chunks of so many latent frames, as 1.2 does (which puts
    "the last frame" at the start of the last chunk); None: as they are told. Raises ConfigError.
    """
    latents, total = latents.clone(), latents.shape[1]
    ratios = torch.ones(total)
    for condition in conditions:
        if condition.loop != loop:
            continue
        if condition.reference >= len(references):
            given = f"{len(references)} references" if len(references) != 1 else "1 reference"
            raise ConfigError(
                f"mask strategy {condition}: there is no reference {condition.reference} ({given}, from 0)"
            )
        reference = references[condition.reference]
        start = _place(condition.reference_start, reference.shape[1], align, f"{condition}: reference")
        target = _place(condition.target, total, align, f"{condition}: clip")
        length = min(condition.length, total - target, reference.shape[1] - start)
        latents[:, target : target + length] = reference[:, start : start + length]
        ratios[target : target + length] = condition.edit_ratio
    return latents, ratios


def _place(start: int, total: int, align: int | None, where: str) -> int:
    place = start + total if start < 0 else start
    if not 0 <= place < total:
        raise ConfigError(f"mask strategy {where} has {total} latent frames, and none at {start}")
    return place if align is None else aligned(place, align, total)


def append_generated(strategy: str | None, num_references: int, *, loop: int, length: int, edit_ratio: float) -> str:
    """The strategy by which round `loop` is given the last `length` latent frames of the clip before.

    That clip is a new reference, after the `num_references` that there were.
    """
    added = Condition(loop, num_references, -length, 0, length, edit_ratio)
    return f"{strategy};{added}" if strategy else str(added)


def frames_of_chunks(latent_frames: int) -> int:
    """Frames that 1.2's autoencoder makes of whole chunks of latent frames: 17 of each 5. Raises ConfigError."""
    if latent_frames % ALIGN:
        raise ConfigError(f"{latent_frames} latent frames are no whole chunks of {ALIGN}")
    return latent_frames // ALIGN * CHUNK


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """The texts of `|0|text|2|text|...` and the rounds from which they hold; None for a plain prompt."""
    pieces = re.split(r"\|(\d+)\|", prompt)
    if len(pieces) == 1 or pieces[0].strip():
        return [prompt], None
    return [text.strip() for text in pieces[2::2]], [int(number) for number in pieces[1::2]]


def merge_prompt(texts: Sequence[str], loops: Sequence[int] | None) -> str:
    """The prompt that `split_prompt` takes apart."""
    if loops is None:
        return texts[0]
    return "".join(f"|{loop}|{text}" for loop, text in zip(loops, texts, strict=True))


def prompt_of_loop(prompt: str, loop: int) -> str:
    """The text that holds in a round: the last one that has begun, or the first."""
    texts, loops = split_prompt(prompt)
    begun = [text for text, first in zip(texts, loops or [0], strict=True) if first <= loop]
    return begun[-1] if begun else texts[0]


@dataclass(frozen=True)
class PromptParts:
    text: str
    reference_path: str = ""  # files, joined by ";"
    mask_strategy: str = ""


def read_json(prompt: str) -> PromptParts:
    """A prompt apart from `{"reference_path": ..., "mask_strategy": ...}` at its end. Raises ConfigError.

    Other braces are text.
    """
    found = re.search(r"\{[^{}]*\}\s*$", prompt)
    if found is None or not any(f'"{key}"' in found[0] for key in ("reference_path", "mask_strategy")):
        return PromptParts(prompt)
    try:
        return PromptParts(prompt[: found.start()], **json.loads(found[0]))
    except (json.JSONDecodeError, TypeError):
        expected = '{"reference_path": "...", "mask_strategy": "..."}, either or both'
        raise ConfigError(f"prompt {prompt!r}: cannot read {found[0].strip()!r}: expected {expected}") from None


def with_scores(
    text: str, *, aesthetic: float | None = None, motion: float | None = None, camera: str | None = None
) -> str:
    """The prompt and the score words that 1.2's captions end with, but for those that it has already."""
    shown = {
        "aesthetic score": None if aesthetic is None else f"{aesthetic:.1f}",
        "motion score": None if motion is None else f"{motion:.1f}",
        "camera motion": camera,
    }
    for name, value in shown.items():
        if value is not None and f"{name}:" not in text:
            text += f" {name}: {value}."
    return text
