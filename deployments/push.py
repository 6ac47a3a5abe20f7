"""`fvlm push`: push a released model to the hub."""

import os
from pathlib import Path

from rich.console import Console

from fvlm_core.errors import UserError


def push(folder: Path, repository: str, *, really: bool = False, public: bool = False, message: str = "") -> int:
    """Check a release and list the files to push to the hub; with --really, push them to a private repository.

    Parameters
    ----------
    folder
        The folder `model/` of a release.
    repository
        `owner/name` on the hub; created as private if it does not exist.
    really
        Push the files. Needs HF_TOKEN; HF_ENDPOINT selects another hub.
    public
        Push even if the repository is public.
    message
        Commit message.
    """
    from fvlm_core.release.push import plan, send

    planned = plan(folder, repository)
    Console().print(planned.text, highlight=False, soft_wrap=True)
    if not really:
        Console().print("nothing was sent; --really sends it", highlight=False)
        return 0
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("no token", where="HF_TOKEN", fix="set it to a token that may write to the repository")
    url = send(planned, token=token, endpoint=os.environ.get("HF_ENDPOINT"), message=message or planned.tag, public=public)
    Console().print(f"sent to {url}", highlight=False)
    return 0
