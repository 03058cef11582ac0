"""VBench's files: its prompts, the names that it looks for, and the results that it writes (Huang et al. 2024)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError

EACH = 5  # videos of a prompt
FOLDER = "vbench"
RESULTS = "*_eval_results.json"
MOST_NAME = 240  # bytes of a file's name before its ending


def read_prompts(file: Path) -> list[str]:
    """Prompts of VBench_full_info.json: a list of {"prompt_en": TEXT, "dimension": [NAME, ...]}. Raises ConfigError."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        prompts = [entry["prompt_en"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "expected a list of objects with prompt_en"
        raise ConfigError(f"--vbench {file}: cannot be read ({reason})") from None
    for number, prompt in enumerate(prompts):
        named = isinstance(prompt, str) and prompt.strip()
        if not named or "/" in prompt or "\0" in prompt or len(prompt.encode()) > MOST_NAME:
            raise ConfigError(f"--vbench {file}: entry {number}'s prompt_en is no text that could be a file's name")
    return list(dict.fromkeys(prompts))


def repeated(prompts: Sequence[str]) -> list[str]:
    """Each prompt as often as VBench wants videos of it: sample i is then that of its own noise."""
    return [prompt for prompt in prompts for _ in range(EACH)]


def lay_out(samples: Path, out: Path, prompts: Sequence[str]) -> None:
    """`samples`/0000.mp4, ... of the `repeated` prompts, under the names PROMPT-INDEX.mp4 in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(repeated(prompts)):
        target = out / f"{prompt}-{number % EACH}.mp4"
        target.unlink(missing_ok=True)
        try:
            os.link(samples / f"{number:04d}.mp4", target)
        except OSError:  # a file system without hard links
            shutil.copyfile(samples / f"{number:04d}.mp4", target)


def read_results(folder: Path) -> dict[str, float]:
    """`vbench/DIMENSION` of the newest results in the folder; nothing where VBench has not been run.

    VBench writes {DIMENSION: [mean, [one entry a video]]}. Raises ConfigError.
    """
    files = sorted(folder.glob(RESULTS), key=lambda file: file.stat().st_mtime)
    if not files:
        return {}
    try:
        content: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
        return {f"vbench/{name}": float(found[0]) for name, found in content.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ConfigError(f"{files[-1]}: no results of VBench, expected {{DIMENSION: [mean, ...]}}") from None
