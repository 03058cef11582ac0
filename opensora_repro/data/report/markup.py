"""Pages that are one file each: they fetch nothing, and what others wrote cannot become part of their markup."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opensora_repro.files import one_line

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")
JOINERS = re.compile("([\u200c\u200d])")  # invisible, but scripts and emoji are written with them
SPACES = re.compile(r"\s+")


def render(template: Path, filters: Mapping[str, Callable[..., Any]] = MappingProxyType({}), **values: Any) -> str:
    """Return the page of a Jinja template, which may extend those of TEMPLATES; all `values` are escaped."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {"shown": shown, "number": number, "slug": slug, "sha256": _digest, "thousands": "{:,}".format}
    environment.filters |= {**own, **filters}
    return environment.get_template(template.name).render(values)


def shown(text: object, limit: int = 500) -> str:
    """Return somebody's text on one line, cut at `limit` characters."""
    plain = " ".join(str(text)[: 4 * limit].split())
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def number(value: float, digits: int = 4) -> str:
    """Return a number for people: the digits that count, thousands apart; of what is not finite, its name."""
    if not math.isfinite(value):
        return str(value)
    whole = value == round(value) or abs(value) >= 10**digits
    return f"{value:,.0f}" if whole and abs(value) < 1e12 else f"{value:.{digits}g}"


def _plain(value: object) -> object:
    """Return what a template shows of a value: escaping is Jinja's, this is for what a page's reader would not see.

    Control and direction characters and lone surrogates are spelled out: they could hide or reorder what follows.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(part if JOINERS.match(part) else one_line(part) for part in JOINERS.split(SPACES.sub(" ", value)))


def slug(heading: str) -> str:
    """Return a heading as the name of an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def data_uri(kind: str, content: bytes) -> Markup:
    """Return a file as an address: `kind` is its media type."""
    from markupsafe import Markup

    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
