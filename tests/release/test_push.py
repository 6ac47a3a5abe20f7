"""Pushing to a hub: a local stand-in that speaks the few endpoints an upload needs, and nothing sent without a token."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fvlm_core.errors import UserError
from fvlm_core.release import release as release_module
from fvlm_core.release.push import push
from tests.release.build import full_job

TOKEN = "hf_" + "x" * 34


class FakeHub:
    """Remembers requests and committed files."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.created: dict = {}
        self.files: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append((self.command, self.path, self.headers.get("Authorization", "")))
                status, answer = (403, {"error": "no"}) if refuse else (200, hub.answer(self.path, body))
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _serve  # noqa: N815 -- http.server's names

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict:
        if path.startswith("/api/repos/create"):
            self.created = json.loads(body)
            return {"url": f"{self.url}/owner/tiny"}
        if "/preupload/" in path:
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/owner/tiny/commit/{'0' * 40}", "hookOutput": ""}
        return {"warnings": [], "errors": []}


@pytest.fixture
def hub():
    fake = FakeHub()
    yield fake
    fake.server.shutdown()


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """The suite is offline; the stand-in is reached all the same, through plain HTTP."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def test_a_private_repository_gets_every_file(hub, tmp_path):
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n# x\n", "model.safetensors": b"\x00\x01", "config.json": b"{}"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    url = push(tmp_path, "owner/tiny", token=TOKEN, endpoint=hub.url, message="first")
    assert url == f"{hub.url}/owner/tiny"
    assert hub.created["name"] == "tiny"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.files == files
    assert all(authorization == f"Bearer {TOKEN}" for command, _, authorization in hub.requests if command == "POST")


def test_a_token_without_the_right_is_a_user_error(tmp_path):
    fake = FakeHub(refuse=True)
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="the hub refused"):
        push(tmp_path, "owner/tiny", token=TOKEN, endpoint=fake.url, message="first")
    fake.server.shutdown()


@pytest.mark.parametrize(("push_to", "token"), [(None, TOKEN), ("owner/tiny", None), ("owner/tiny", ""), ("owner/tiny", TOKEN)])
def test_only_a_named_repository_and_a_token_send_anything(hub, prepared, monkeypatch, push_to, token):
    monkeypatch.setattr(release_module, "verify", lambda *_: {"coarse_only": 1})
    manifest = release_module.release(prepared.model_copy(update={"push_to": push_to}), token=token, endpoint=hub.url)
    if push_to and token:
        assert manifest.pushed_to == f"{hub.url}/owner/tiny"
        assert {"README.md", "config.json", "model.safetensors", "modeling_fvlm.py"} <= hub.files.keys()
        assert b"owner/tiny" in hub.files["README.md"]
    else:
        assert manifest.pushed_to is None
        assert hub.requests == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return full_job(tmp_path_factory.mktemp("push"))
