"""Parts of a page that is one file: it fetches nothing, and what others wrote cannot become part of its markup."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape

from opensora_repro.files import one_line

JOINERS = re.compile("([\u200c\u200d])")  # invisible, but scripts and emoji are written with them


def shown(text: object, limit: int = 500) -> str:
    """Return somebody's text as HTML on one line, cut at `limit` characters.

    Control and direction characters and lone surrogates are spelled out: they could hide or reorder what follows.
    """
    plain = " ".join(str(text)[: 4 * limit].split())
    if len(plain) > limit:
        plain = plain[: limit - 1] + "…"
    return escape("".join(part if JOINERS.match(part) else one_line(part) for part in JOINERS.split(plain)))


def document(title: str, body: str, *, style: str = "", script: str = "", plays_files: bool = False) -> str:
    """Return the page; `title` is text, `body` HTML.

    Its policy forbids every script but `script`, and every fetch; with `plays_files` but those of its videos.
    """
    code = f"<script>{script}</script>\n" if script else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = POLICY + ("; media-src data: 'self' file:" if plays_files else "; media-src data:")
    policy += f"; script-src 'sha256-{digest}'" if script else ""
    return PAGE.format(title=shown(title), policy=policy, style=STYLE + style, body=body, code=code)


def section(heading: str, content: str) -> str:
    """Return a titled part of the page, which #SLUG of its heading links to; `content` is HTML."""
    return f'<section id="{slug(heading)}"><h2>{shown(heading)}</h2>{content}</section>'


def slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def nothing(text: str) -> str:
    """Return a line that says why a part is empty."""
    return f'<p class="none">{shown(text)}</p>'


def data_uri(kind: str, content: bytes) -> str:
    """Return a file as an address: `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
{code}</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --quiet: #667; --page: #fbfbfc; --card: #fff; --edge: #e2e4ea;
  --accent: #2f6fde; --second: #d9822b; --ok: #1b7f4b; --no: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --quiet: #9aa1b0; --page: #14161a; --card: #1c1f25;
  --edge: #31353e; --accent: #7aa7ff; --second: #f0a95c; --ok: #5fc893; --no: #f08b83; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; } h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 1rem; margin-top: 1rem;
  overflow-x: auto; }
p { margin: 0 0 .6rem; } .quiet, .none, small { color: var(--quiet); } .none { font-style: italic; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem .35rem 0; text-align: left; } tr + tr { border-top: 1px solid var(--edge); }
.bar { display: block; min-width: 3.4rem; padding: 0 .4rem; border-radius: 4px; background: linear-gradient(90deg,
  color-mix(in srgb, var(--accent) 35%, transparent) calc(var(--share) * 100%), transparent 0); }
figure { margin: 0; } figcaption { font-size: .85rem; line-height: 1.35; margin-top: .25rem; overflow-wrap: anywhere; }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.tiles.wide { grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); }
.tiles img { width: 100%; border-radius: 6px; display: block; background: #000; image-rendering: auto; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--quiet); }
svg .grid { stroke: var(--edge); fill: none; }
.ok { color: var(--ok); font-weight: 600; } .no { color: var(--no); font-weight: 600; }
"""
