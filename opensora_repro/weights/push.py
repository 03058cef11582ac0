"""Send what is shared of a run to a hub, in one commit."""

from __future__ import annotations

import os

from opensora_repro.config import ConfigError
from opensora_repro.errors import TrainingError, UserError
from opensora_repro.weights.card import REPO, Shared
from opensora_repro.weights.files import recorded_sha256


class HubError(TrainingError):
    """The hub could not be reached, or refused."""


def check_repo(repo: str) -> None:
    if not REPO.fullmatch(repo) or ".." in repo:
        raise ConfigError(f"{repo!r}: expected OWNER/NAME, the repository on the hub")


def endpoint() -> str:
    """Of the hub that is meant."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def push(shared: Shared, repo: str, *, public: bool) -> str:
    """Make the repository where it is not there, and commit everything at once; return the address.

    One that is there stays as private or public as it is. Raises HubError, UserError, also for a checkpoint's file that
    is no longer what was written.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise UserError("no token for the hub: set HF_TOKEN, or log in once with `hf auth login`")
    for path in shared.files.values():
        recorded_sha256(path)
    api = HfApi(endpoint=endpoint())
    parts = [CommitOperationAdd(name, str(path)) for name, path in shared.files.items()]
    parts += [CommitOperationAdd(name, text.encode()) for name, text in shared.texts.items()]
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        done = api.create_commit(repo, parts, commit_message=f"Step {shared.checkpoint.name.removeprefix('step-')}")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HubError(f"{endpoint()}/{repo}: nothing was committed: {reason}") from None
    return str(done.commit_url)
