"""The one rule on empty prompts: a caption to learn from and a prompt to sample must show something.

Training drops captions by itself, for guidance; an empty one in a list is nearly always a lost one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from opensora_repro.config.sections import ConfigError

FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs without ink


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen: spaces, line breaks, controls, zero-width characters, lone accents."""
    seen = (character for character in text if character.isprintable() and not character.isspace())
    return not any(unicodedata.category(character)[0] != "M" and character not in FILLERS for character in seen)


def check_prompts(prompts: Sequence[str], where: str) -> None:
    """Raise ConfigError for an empty prompt or broken text; `where` is the key, option or file that it comes from."""
    for number, prompt in enumerate(prompts, start=1):
        if is_blank(prompt):
            raise ConfigError(f"{where}: prompt {number} is empty; write what should be seen, or leave it out")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: prompt {number} is not valid Unicode text") from None


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, blank lines and # lines left out. Raises ConfigError if none is left.

    Byte order marks are left out wherever files were joined.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path}: not UTF-8 text; save it as that") from None
    lines = [line.replace("\ufeff", "").strip() for line in lines]
    prompts = [line for line in lines if not is_blank(line) and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"--prompts {path}: no prompts in this file; write one a line")
    check_prompts(prompts, f"--prompts {path}")
    return prompts
