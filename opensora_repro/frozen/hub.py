"""Names of the Hugging Face hub, and where its cache has what they name. Needs no torch, and asks no server."""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){,2}")  # NAME, OWNER/NAME, or a folder of one: OWNER/NAME/FOLDER


def split_hub_name(name: str) -> tuple[str, str]:
    """The repository, and the folder in it: published pipelines have their autoencoder in one."""
    owner, _, rest = name.partition("/")
    own, _, folder = rest.partition("/")
    return (f"{owner}/{own}" if own else owner), folder


def in_cache(name: str) -> Path | None:
    """The folder in which its config.json lies."""
    from huggingface_hub import try_to_load_from_cache

    repository, folder = split_hub_name(name)
    config = try_to_load_from_cache(repository, f"{folder}/config.json" if folder else "config.json")
    return Path(config).parent if isinstance(config, str) else None
