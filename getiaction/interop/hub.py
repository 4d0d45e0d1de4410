"""Fetch policies from the Hugging Face Hub, and push them there, by `huggingface_hub`'s caches and variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from getiaction.errors import InputError, first_line

FILES = ("*.json", "*.safetensors")


def is_repo_id(source: str) -> bool:
    """Tell whether `source` can be a name on the Hub, `owner/name` or `owner/name@revision`, and no run."""
    return re.fullmatch(r"(?!outputs/)[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", source) is not None


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
        raise InputError(
            f"{key}={source} is no folder here, not in {HF_HUB_CACHE}, and could not be fetched from the Hugging Face "
            f"Hub ({type(error).__name__}: {first_line(error)}): give a run folder, or a name that exists there"
        ) from error


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a name on the Hub.

    Raises:
        InputError: it has no owner, or characters that names there do not have.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        raise InputError(f"--repo-id {repo_id} must be <owner>/<name>, of letters, digits, '-', '_' and '.'")


def push_files(
    repo_id: str, files: Mapping[str, Path | bytes], *, private: bool = False, revision: str | None = None
) -> str:
    """Push files in one commit, making repository and branch if need be; return the commit's address.

    Args:
        files: name there -> file here, or content.

    Raises:
        InputError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [
        CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
    ]
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message="Push a policy of GetiAction", revision=revision)
    except Exception as error:  # httpx and huggingface_hub each raise their own
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = {401: "log in with `hf auth login`, or set HF_TOKEN", 403: "use a token that may write there"}
        raise InputError(
            f"{repo_id} could not be pushed to the Hugging Face Hub ({type(error).__name__}: {first_line(error)}): "
            f"{fix.get(status or 0, 'nothing was changed there; try again')}"
        ) from error
    return commit.commit_url
