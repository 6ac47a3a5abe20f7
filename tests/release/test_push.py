"""Pushing to a hub, a local one: listed first, private, tagged, and never with another checkpoint's results."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from deployments.push import push as command
from fvlm_core.errors import UserError
from fvlm_core.release import release as release_module
from fvlm_core.release.hub.modeling_fvlm import FVLMModel
from fvlm_core.release.push import plan, send
from tests.release.build import full_job
from tests.release.hub_server import HubServer

TOKEN = "hf_" + "x" * 34
REPOSITORY = "owner/tiny"


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.server.shutdown()


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """The suite is offline; the local hub is reached all the same, through plain HTTP."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return full_job(tmp_path_factory.mktemp("push"))


@pytest.fixture(scope="module")
def folder(job):
    """A released folder; that it works in a clean process is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release_module, "verify", lambda *_: {"coarse_only": 1})
        release_module.release(job)
    return job.output / "model"


def test_everything_arrives_private_and_tagged_and_loads_again(hub, folder, tmp_path):
    push = plan(folder, REPOSITORY)
    assert send(push, token=TOKEN, endpoint=hub.url, message="first") == f"{hub.url}/{REPOSITORY}"
    assert hub.private
    assert hub.files == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "results.json", "config.json", "generation_config.json", "model.safetensors", "modeling_fvlm.py"} <= set(hub.files)
    assert hub.tags == {push.tag: "c" * 40}
    assert push.checkpoint.startswith(push.tag.removeprefix("weights-"))
    assert all(authorization == f"Bearer {TOKEN}" for command, path, authorization in hub.requests if command == "POST")
    again = snapshot_download(REPOSITORY, endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "downloaded")
    one, other = (FVLMModel.from_pretrained(path).state_dict() for path in (folder, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weights_and_code_of_an_earlier_release_are_removed(hub, folder):
    """transformers takes weights in one file before those in parts: the new release would be loaded with the old weights."""
    push = plan(folder, REPOSITORY)
    old = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_module.py"}
    hub.exists, hub.private = True, True
    hub.files |= dict.fromkeys([*old, "notes.md", ".gitattributes"], b"old")
    send(push, token=TOKEN, endpoint=hub.url, message="second")
    assert not old & hub.files.keys()
    assert {"notes.md", ".gitattributes", *push.files} <= hub.files.keys()


def test_a_token_without_the_right_is_a_user_error(folder):
    server = HubServer(refuse=True)
    with pytest.raises(UserError, match="the hub refused"):
        send(plan(folder, REPOSITORY), token=TOKEN, endpoint=server.url, message="first")
    server.server.shutdown()


def test_a_public_repository_has_to_be_meant(folder):
    server = HubServer(public=True)
    with pytest.raises(UserError, match="the repository is public"):
        send(plan(folder, REPOSITORY), token=TOKEN, endpoint=server.url, message="first")
    assert server.files == {}
    send(plan(folder, REPOSITORY), token=TOKEN, endpoint=server.url, message="first", public=True)
    assert server.files
    server.server.shutdown()


def test_the_command_sends_nothing_unless_asked_to(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert command(folder, REPOSITORY) == 0
    listed = capsys.readouterr().out
    assert "nothing was sent" in listed
    assert "model.safetensors" in listed
    assert hub.requests == []
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="no token"):
        command(folder, REPOSITORY, really=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command(folder, REPOSITORY, really=True) == 0
    assert "README.md" in hub.files


def test_a_name_that_the_hub_cannot_have_is_refused(folder):
    with pytest.raises(UserError, match="not a valid repository name"):
        plan(folder, "someone/my model")


@pytest.mark.parametrize("damage", ["one weight", "other results", "no results"])
def test_results_of_another_checkpoint_are_refused(folder, tmp_path, damage):
    """Whatever a file says of itself, the weights that are there decide."""
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert plan(tmp_path, REPOSITORY).checkpoint == plan(folder, REPOSITORY).checkpoint
    if damage == "one weight":
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.connector.q_static"][0, 0] += 1e-6
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    elif damage == "other results":
        results = json.loads((tmp_path / "results.json").read_text()) | {"checkpoint": "0" * 64}
        (tmp_path / "results.json").write_text(json.dumps(results))
    else:
        (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match=r"no results\.json" if damage == "no results" else "the results are another checkpoint's"):
        plan(tmp_path, REPOSITORY)


@pytest.mark.parametrize(("fields", "token"), [({}, TOKEN), ({"push": True}, ""), ({"push": True}, TOKEN)])
def test_a_release_sends_only_where_it_is_asked_to_and_has_a_token(hub, job, monkeypatch, tmp_path, fields, token):
    monkeypatch.setattr(release_module, "verify", lambda *_: {"coarse_only": 1})
    changed = job.model_copy(update={"push_to": REPOSITORY, "output": tmp_path / "release", **fields})
    manifest = release_module.release(changed, token=token, endpoint=hub.url)
    assert REPOSITORY in (tmp_path / "release" / "push.txt").read_text()
    if fields and token:
        assert manifest.pushed_to == f"{hub.url}/{REPOSITORY}"
        assert REPOSITORY.encode() in hub.files["README.md"]
    else:
        assert manifest.pushed_to is None
        assert hub.requests == []


def test_the_command_is_listed():
    done = subprocess.run([sys.executable, "-m", "deployments.cli", "push", "--help"], capture_output=True, text=True, env=os.environ)
    assert "--really" in done.stdout + done.stderr
