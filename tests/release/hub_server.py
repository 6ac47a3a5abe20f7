"""A local hub: the endpoints that huggingface_hub uses to create, fill, tag and download a repository, with large files by LFS."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class HubServer:
    """One repository, `owner/tiny`; remembers requests, files and tags."""

    def __init__(self, *, refuse: bool = False, public: bool = False) -> None:
        """`refuse`: any request to write. `public`: the repository is there and can be seen by all."""
        self.refuse, self.exists, self.private = refuse, public, not public
        self.requests: list[tuple[str, str, str]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by sha256."""
        self.tags: dict[str, str] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append((self.command, self.path, self.headers.get("Authorization", "")))
                status, content, headers = hub.answer(self.command, self.path.partition("?")[0], body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 -- http.server's names

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers."""
        if "/resolve/" in path:
            content = self.files[path.split("/resolve/")[1].split("/", 1)[1]]
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if path.startswith("/lfs/"):
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, b"", {}
        status, answer = self._api(method, path, body)
        kind = "application/vnd.git-lfs+json" if "/info/lfs/" in path else "application/json"
        return status, json.dumps(answer).encode(), {"Content-Type": kind} | ({} if status < 400 else self._code(status))

    def _code(self, status: int) -> dict[str, str]:
        return {"X-Error-Code": "RepoNotFound"} if status == 404 else {}

    def _api(self, method: str, path: str, body: bytes) -> tuple[int, dict | list]:
        if method == "POST" and self.refuse:
            return 403, {"error": "no"}
        if path.startswith("/api/repos/create"):
            asked = json.loads(body)
            if not self.exists:
                self.exists, self.private = True, asked.get("private") is True or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/owner/tiny"}
        if path.startswith("/api/models/owner/tiny/preupload/"):
            return 200, {"files": [{**self._mode(one), "path": one["path"]} for one in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}}} for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/api/models/owner/tiny/commit/"):
            self._commit(body)
            return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/owner/tiny/commit/{COMMIT}", "hookOutput": ""}
        if path.startswith("/api/models/owner/tiny/tag/"):
            self.tags[json.loads(body)["tag"]] = path.rsplit("/", 1)[1]
            return 200, {}
        if path.startswith("/api/models/owner/tiny/tree/"):
            return 200, [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in self.files.items()]
        if path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            known = {"id": "owner/tiny", "private": self.private, "sha": COMMIT, "siblings": siblings}
            return (200, known) if self.exists else (404, {"error": "Repository not found"})
        return 200, {"warnings": [], "errors": []}  # of the card's metadata

    @staticmethod
    def _mode(file: dict) -> dict:
        return {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[line["value"]["oid"]]
                assert hashlib.sha256(content).hexdigest() == line["value"]["oid"]
                self.files[line["value"]["path"]] = content
            elif line["key"] == "deletedFile":
                del self.files[line["value"]["path"]]
