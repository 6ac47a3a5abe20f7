"""Pushing a released folder to the hub: a private repository, one commit."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from fvlm_core.errors import UserError

NO_RIGHT = (401, 403)
"""HTTP statuses of a token that may not do this."""


def push(folder: Path, repository: str, *, token: str, endpoint: str | None = None, message: str) -> str:
    """Create the repository where it does not exist, upload the folder; returns its URL.

    Raises UserError where the token may not; other failures of the network are raised as they are and can be retried.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in NO_RIGHT:
            raise UserError(
                f"the hub refused: {error.server_message or error}",
                where=repository,
                fix="give a token that may write to this repository",
            ) from error
        raise
    return str(url)
