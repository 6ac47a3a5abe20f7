"""Push a released folder to the hub: `plan` checks and lists the files, `send` uploads them to a private repository.

`plan` sends nothing. It rejects a folder whose `results.json` was measured on other weights. To compare them, it writes the weights again
as training writes them, and takes the sha256 of that file.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from fvlm_core.errors import UserError
from fvlm_core.eval.results import FILE_NAME, Results
from fvlm_core.manifest import sha256_file
from fvlm_core.release.names import WEIGHTS_PREFIX

NO_RIGHT = (401, 403)
"""HTTP statuses for a token without the necessary permission."""

OF_A_RELEASE = ("*.safetensors", "*.safetensors.index.json", "*.py", ".eval_results/*")
"""Files of an earlier release that are deleted if this one lacks them: a leftover single weights file would be preferred to new parts."""


@dataclass(frozen=True)
class Push:
    """A planned push."""

    folder: Path
    repository: str
    """`owner/name`."""
    checkpoint: str
    """sha256 of the weights that the folder's results were measured on."""
    files: dict[str, int]
    """Size in bytes, by path in the repository."""

    @property
    def tag(self) -> str:
        """Tag of the commit; the same weights have the same tag."""
        return f"weights-{self.checkpoint[:12]}"

    @property
    def text(self) -> str:
        """A listing for the person who decides whether to push."""
        lines = [f"{size:>14,} {path}" for path, size in sorted(self.files.items())]
        return "\n".join(
            [
                f"to {self.repository} (created as private if it does not exist), tag {self.tag}:",
                *lines,
                f"{sum(self.files.values()):>14,} bytes in all",
            ]
        )


def plan(folder: Path, repository: str) -> Push:
    """Check a push and list its files.

    Raises UserError if the repository's name is invalid, the folder is not a released model, or its results are of another checkpoint.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError("not a valid repository name", where=repository, fix="give OWNER/NAME") from error
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"no {FILE_NAME}: this is not a released model", where=str(folder), fix="give the folder `model` of a release")
    measured, packaged = Results.read(folder).checkpoint, _checkpoint(folder)
    if measured != packaged:
        raise UserError(
            f"the results are another checkpoint's: they were measured on {measured[:12]}, the weights here are {packaged[:12]}",
            where=str(folder),
            fix="evaluate these weights and release them again; nothing was sent",
        )
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return Push(folder, repository, packaged, files)


def send(push: Push, *, token: str, endpoint: str | None = None, message: str, public: bool = False) -> str:
    """Create the repository (private) if it does not exist, upload the folder in one commit and tag it; returns the repository's URL.

    Raises UserError if the token lacks permission, or the repository is public and `public` is not set. Other HTTP errors are passed on
    and can be retried.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        if not public and _is_public(api, push.repository):
            raise UserError(
                "the repository is public: what is sent can be seen at once",
                where=push.repository,
                fix="name a private one, or say --public",
            )
        url = api.create_repo(push.repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=push.repository, folder_path=push.folder, commit_message=message, delete_patterns=[*OF_A_RELEASE]
        )
        api.create_tag(push.repository, tag=push.tag, revision=commit.oid, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in NO_RIGHT:
            raise UserError(
                f"the hub refused: {error.server_message or error}",
                where=push.repository,
                fix="give a token that may write to this repository",
            ) from error
        raise
    return str(url)


def _is_public(api: HfApi, repository: str) -> bool:
    try:
        return not api.repo_info(repository).private
    except RepositoryNotFoundError:
        return False


def _checkpoint(folder: Path) -> str:
    """sha256 of the folder's weights as training writes them: one file, with the parameter names of training."""
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    weights = {name.removeprefix(WEIGHTS_PREFIX): tensor for file in files for name, tensor in load_file(file).items()}
    with TemporaryDirectory(prefix="fvlm-push-") as temporary:
        again = Path(temporary) / "model.safetensors"
        save_file(weights, again, metadata={"format": "pt"})
        return sha256_file(again)
