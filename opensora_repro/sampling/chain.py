"""Long videos: clips one after the other, each given the end of the one before, in the memory of one clip.

OUT/0000.parts/0000.mp4, ...    what each finished clip adds
OUT/0000.parts/state.npz        how many are finished, and the frames that the next one is given

Finished parts are joined without coding them again; a killed run goes on after the last finished one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.write import join_videos, write_video
from opensora_repro.files import remove_folder, writing
from opensora_repro.sampling.conditions import prompt_of_loop, split_prompt
from opensora_repro.sampling.given import Given, GivenClip
from opensora_repro.sampling.options import MOST_FRAMES

if TYPE_CHECKING:
    from opensora_repro.frozen.autoencoder import Autoencoder

_TIMED = re.compile(r"(\d+(?:\.\d+)?):\s+(.*\S)")


@dataclass(frozen=True)
class Round:
    """One clip: the frames of the video that its window covers, and those of them that it adds."""

    number: int
    window: range
    new: range
    closes: bool = False  # its end is given the video's first frames, which follow it


@dataclass(frozen=True)
class Chain:
    """A video of `total` frames in clips of `window`; `head` and `tail`: frames given at a clip's start and end."""

    total: int
    window: int
    head: int
    tail: int
    loop: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.total > MOST_FRAMES:
            raise ConfigError(f"--seconds: {self.total} frames: expected at most {MOST_FRAMES:,}")
        if self.head + (self.tail if self.loop else 0) >= self.window:
            both = f"{self.head} + {self.tail}" if self.loop else f"{self.head}"
            raise ConfigError(
                f"--condition-frames: {both} given frames leave nothing to generate of a clip of {self.window}"
            )
        least = self.last + max(self.head, self.tail if self.loop else 0)
        if self.total < least:
            raise ConfigError(
                f"--loop: {self.total} frames are too few, {least} is the least with clips of {self.window}"
            )

    @property
    def last(self) -> int:
        """Frames that the last clip adds."""
        return self.window - self.head - (self.tail if self.loop else 0)

    def rounds(self) -> list[Round]:
        """The last clip ends with the video: where that does not come out even, less is taken of the one before it."""
        rest, found = (
            self.total - self.last,
            [Round(0, range(self.window), range(min(self.window, self.total - self.last)))],
        )
        while (done := found[-1].new.stop) < self.total:
            window = range(done - self.head, done - self.head + self.window)
            end = min(window.stop, rest) if done < rest else self.total
            found.append(Round(len(found), window, range(done, end), closes=self.loop and end == self.total))
        return found

    def settings(self) -> dict[str, Any]:
        return {
            "frames": self.total, "condition_frames": self.head, **({"loop": self.tail} if self.loop else {}),
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.total} frames in {len(self.rounds())} clips of {self.window}, "
            f"each given the last {self.head} of the one before"
            + (f"; the last one meets the first {self.tail}" if self.loop else "")
        )


def plan_chain(total: int | None, window: int, lengths: tuple[int, int], *, loop: bool) -> Chain | None:
    """How a video of `total` frames (None: a clip, or the shortest loop) is made; None: as one clip. ConfigError."""
    head, tail = lengths
    if loop:
        return Chain(2 * window - head - tail if total is None else total, window, head, tail, loop)
    return Chain(total, window, head, tail) if total is not None and total > window else None


class Progress:
    """What of a long video is finished, in its folder beside the video."""

    def __init__(self, video: Path, chain: Chain) -> None:
        self.video, self.folder, self.chain = video, video.with_suffix(".parts"), chain
        self.done = 0
        self.first = self.end = np.zeros((0, 1, 1, 3), np.uint8)  # the video's first frames; its last ones up to here
        state = self.folder / "state.npz"
        if state.is_file():
            with np.load(state) as saved:
                self.done, self.first, self.end = int(saved["done"]), saved["first"], saved["end"]

    def given(self, part: Round) -> list[tuple[range, torch.Tensor]]:
        """Places in the video, and pixels of them, that the next clip goes on from, and ends with."""
        found = []
        if part.number:
            found.append((range(part.window.start, part.window.start + len(self.end)), torch.from_numpy(self.end)))
        if part.closes:
            found.append((range(part.window.stop - len(self.first), part.window.stop), torch.from_numpy(self.first)))
        return found

    def seen(self, new: np.ndarray) -> None:
        """Remember of a clip's new frames [T, H, W, 3] what later ones need."""
        if not self.done and self.chain.loop:
            self.first = new[: self.chain.tail].copy()
        before = self.end if self.done else new[:0]
        self.end = np.concatenate([before, new[-self.chain.head :]])[-self.chain.head :]
        self.done += 1

    def write(self, new: np.ndarray, fps: float) -> None:
        """Put a clip's new frames beside the others', and then on record. Before `seen`."""
        write_video(self.folder / f"{self.done:04d}.mp4", new, fps)

    def save(self) -> None:
        with writing(self.folder / "state.npz") as file:
            np.savez(file, done=self.done, first=self.first, end=self.end)

    def finish(self) -> None:
        """One video of all parts."""
        join_videos(self.video, [self.folder / f"{number:04d}.mp4" for number in range(self.done)])
        remove_folder(self.folder)


# (round, what it is given) -> the clip's frames, uint8 [T, H, W, 3]
SampleClip = Callable[[Round, GivenClip | None], np.ndarray]


def sample_long(
    chain: Chain, given: Given, progress: Progress, sample_clip: SampleClip, *, fps: float, writes: bool
) -> None:
    """Sample what is not finished of a long video; of processes that share it one `writes`."""
    for part in chain.rounds()[progress.done :]:
        clip = given.clip(part.window, progress.given(part))
        video = sample_clip(part, clip)
        if given.paste:
            own = given.clip(part.window)
            if own is not None:
                own.paste(video, given.region)
        new = video[part.new.start - part.window.start : part.new.stop - part.window.start]
        if writes:
            progress.write(new, fps)
        progress.seen(new)
        if writes:
            progress.save()
    if writes:
        progress.finish()


def given_videos(
    sample: Callable[..., Iterator[tuple[int, np.ndarray]]],
    vae: Autoencoder,
    cfg: Config,
    texts: Sequence[str],
    *,
    given: Given | None,
    chain: Chain | None,
    out: Path,
    progress: Callable[[int, int], None],
    batch_size: int,
    todo: Sequence[int],
    share: tuple[int, int],
    writes: bool,
) -> Iterator[tuple[int, np.ndarray | None]]:
    """What `generate` yields (`sample` is a call of it) where frames are given; None for a video written by this."""
    given = given or Given()
    size = (cfg.data.num_frames, cfg.data.height, cfg.data.width)
    references = given.strategy.latents(vae) if given.strategy is not None else []
    if chain is None:
        clip = given.clip(range(size[0]))
        frames = given.latents(vae, clip, size, references=references)
        for index, video in sample(
            texts, batch_size=batch_size, progress=progress, share=share, only=todo, given=frames
        ):
            if given.paste and clip is not None:
                clip.paste(video, given.region)
            yield index, video
        return
    mine, rounds, fps = todo[share[0] :: share[1]], chain.rounds(), sample_fps(cfg)
    for number, index in enumerate(mine):

        def sample_clip(part: Round, clip: GivenClip | None, number: int = number, index: int = index) -> np.ndarray:
            def step(done: int, total: int) -> None:
                progress((number * len(rounds) + part.number) * total + done, len(mine) * len(rounds) * total)

            told = [*texts[:index], text_at(texts[index], part, fps), *texts[index + 1 :]]
            frames = given.latents(vae, clip, size, number=part.number, references=references)
            [(_, video)] = sample(told, batch_size=1, progress=step, only=[index], given=frames, clip=part.number)
            return video

        sample_long(chain, given, Progress(out / f"{index:04d}.mp4", chain), sample_clip, fps=fps, writes=writes)
        yield index, None


# ---------------------------------------------------------------------------------------------------------------------
# Scripts: what the prompt says from when on


def read_script(prompts: Sequence[str], where: str) -> str | None:
    """One prompt of lines `SECONDS: TEXT`, of which the first begins at 0; None for other lists. Raises ConfigError."""
    if not re.match(r"0(\.0*)?:\s", prompts[0]):
        return None
    before = -1.0
    for number, line in enumerate(prompts, 1):
        found = _TIMED.fullmatch(line)
        if found is None or float(found[1]) <= before:
            raise ConfigError(f"{where}: line {number} of a script: expected SECONDS: TEXT, later than the line before")
        before = float(found[1])
    return "\n".join(prompts)


def texts_of(prompt: str) -> list[str]:
    """All texts of a script, be it by seconds or `|0|text|2|text` by clips; else the prompt."""
    timed = _timed(prompt)
    return [text for _, text in timed] if timed else split_prompt(prompt)[0]


def with_texts(prompt: str, change: Callable[[str], str]) -> str:
    """The prompt with each of its texts changed."""
    timed = _timed(prompt)
    if timed:
        return "\n".join(f"{second:g}: {change(text)}" for second, text in timed)
    texts, loops = split_prompt(prompt)
    if loops is None:
        return change(prompt)
    return "".join(f"|{loop}|{change(text)}" for loop, text in zip(loops, texts, strict=True))


def text_at(prompt: str, part: Round, fps: float) -> str:
    """What holds when a clip's new frames begin."""
    timed = _timed(prompt)
    if timed:
        return [text for second, text in timed if second <= part.new.start / fps + 1e-6][-1]
    return prompt_of_loop(prompt, part.number)


def _timed(prompt: str) -> list[tuple[float, str]]:
    lines = [_TIMED.fullmatch(line) for line in prompt.split("\n")]
    found = [(float(line[1]), line[2]) for line in lines if line is not None]
    return found if len(found) == len(lines) and found[0][0] == 0 else []
