"""The folder of a Space: metadata that the hub reads, and code that serves by itself."""

import subprocess

import pytest
from huggingface_hub import RepoCard

from deployments import cli, space
from deployments.space import FILES, PACKAGES
from fvlm_core.errors import UserError
from infra.stack import REPOSITORY


def test_a_space_has_its_metadata_and_complete_code(tmp_path):
    assert cli.app(["space", "someone/fVLM-135M", "-o", str(tmp_path / "space")], result_action="return_value") == 0
    card = RepoCard.load(tmp_path / "space" / "README.md").data.to_dict()
    assert card["sdk"] == "docker"
    assert card["models"] == ["someone/fVLM-135M"]
    dockerfile = (tmp_path / "space" / "Dockerfile").read_text()
    *_, command = dockerfile.splitlines()
    assert command == f'CMD ["fvlm", "serve", "someone/fVLM-135M", "--host", "0.0.0.0", "--port", "{card["app_port"]}"]'
    code = tmp_path / "space" / "code"
    tracked = subprocess.run(["git", "ls-files", *PACKAGES, *FILES], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert set(tracked.splitlines()) <= files
    assert "fvlm_core/serve/page.html" in files
    assert not any("__pycache__" in file for file in files)
    assert "-r code/requirements.lock" in dockerfile


def test_an_installed_package_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=r"LICENSE, .* missing"):
        cli.app(["space", "someone/model", "-o", str(tmp_path / "space")], result_action="return_value")
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize(("model", "message"), [("release/model/", "loads its model from the hub"), ("someone/model", "exists already")])
def test_what_cannot_be_a_space_is_named(tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        cli.app(["space", model, "-o", str(tmp_path)], result_action="return_value")
