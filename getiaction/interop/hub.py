"""Fetch policies from the Hugging Face Hub, and push them there, by `huggingface_hub`'s caches and variables."""

from __future__ import annotations

import re
from pathlib import Path

from getiaction.errors import InputError

FILES = ("*.json", "*.safetensors")


def is_repo_id(source: str) -> bool:
    """Tell whether `source` can be a name on the Hub, `owner/name` or `owner/name@revision`; a local folder is none."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", source):
        return False
    return not Path(source.split("/")[0]).is_dir()  # outputs/mistyped


def fetch_policy(source: str, key: str) -> Path:
    """Return a local copy of a policy on the Hub, from the usual cache if it is there.

    Args:
        source: `owner/name`, or `owner/name@revision` (a branch, tag or commit).
        key: what the user set to `source`, for the message.

    Raises:
        InputError: it is neither in the cache nor can be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    repo_id, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # httpx and huggingface_hub each raise their own
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise InputError(
            f"{key}={source} is no folder here, not in {HF_HUB_CACHE}, and could not be fetched from the Hugging Face "
            f"Hub ({type(error).__name__}: {reason}): give a run folder, or a name that exists there"
        ) from error
