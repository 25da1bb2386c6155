"""An exported folder to the Hugging Face hub. The only module that writes there.

reads: the folder, and the token that `hf auth login` or HF_TOKEN left. writes: a commit in a model repository, which is
private when it is new. Costs: an upload of the folder; what the hub has already is not sent again.
"""

from __future__ import annotations

from pathlib import Path

from cprec.errors import ConfigError, CPRecError
from cprec.log import get_logger

log = get_logger(__name__)


def check_can_push(repository: str) -> None:
    """Raise ConfigError when `repository` is not OWNER/NAME or nobody is logged in: to be said before hours of work."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise ConfigError(f"--push-to {repository}: {e}") from None
    if repository.count("/") != 1:
        raise ConfigError(f"--push-to {repository}: give OWNER/NAME, such as me/shops-1.5b")
    if get_token() is None:
        raise ConfigError(f"--push-to {repository}: nobody is logged in to the hub; run `hf auth login`, or set "
                          f"HF_TOKEN to a token that may write")


def push(folder: Path, repository: str, *, message: str) -> str:
    """Upload `folder` as the repository's next commit; the commit's address. Raises CPRecError when the hub refuses or
    cannot be reached: the folder stays, and the same command goes on."""
    from huggingface_hub import HfApi

    check_can_push(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        is_private = api.repo_info(repository).private
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as e:  # also of the HTTP library that the hub's client stands on, another in every version
        raise CPRecError(f"--push-to {repository}: {type(e).__name__}: {e}; {folder} is whole, and the same command "
                         f"sends it again") from None
    log.info("pushed %s to %s, which is %s; its card names the folders of the run and its parents", folder,
             commit.commit_url, "private" if is_private else "public")
    return str(commit.commit_url)
