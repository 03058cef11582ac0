"""The one rule on empty prompts: a caption to learn from and a prompt to sample must show something.

Training drops captions by itself, for guidance; an empty one in a list is nearly always a lost one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_repro.config.sections import ConfigError


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen: spaces, line breaks, controls, zero-width characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


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
    """One prompt a line, blank lines and # lines left out. Raises ConfigError if none is left."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path}: not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError(f"--prompts {path}: no prompts in this file; write one a line")
    check_prompts(prompts, f"--prompts {path}")
    return prompts
