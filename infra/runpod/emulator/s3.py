"""The S3 API of the emulated volumes: moto, limited to the operations that RunPod has, and in sync with the volumes' folders.

Files that pods write appear as objects, and objects that are put appear as files: before a request reads, changes in the folder are copied
to moto; after a request writes, changes in moto are copied to the folder.
"""

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

from infra.s3 import OPERATIONS, local_path

Start = Callable[..., Any]
Environment = dict[str, Any]
READING = ("GetObject", "HeadObject", "CopyObject", "ListObjects", "ListObjectsV2", "UploadPartCopy")
WRITING = ("PutObject", "CopyObject", "CompleteMultipartUpload", "DeleteObject")


class S3Side:
    """The S3 server, in a thread of this process. Use it as a context manager."""

    def __init__(self, folders: Callable[[], Mapping[str, Path]], *, access_key: str, secret_key: str, port: int = 0) -> None:
        """`folders` returns the folder of each volume by its id, which is the bucket's name."""
        self.folders, self.access_key, self.secret_key = folders, access_key, secret_key
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self._known: dict[tuple[str, str], tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", port, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: Environment, start: Start) -> Iterable[bytes]:
        bucket, _, key = unquote(environ["PATH_INFO"]).lstrip("/").partition("/")
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        operation = operation_of(environ["REQUEST_METHOD"], key, query, environ)
        if operation not in OPERATIONS:
            return _refuse(start, 501, "NotImplemented", f"{operation} is not implemented")
        if f"Credential={self.access_key}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return _refuse(start, 403, "SignatureDoesNotMatch", "The request signature we calculated does not match")
        folder = self.folders().get(bucket)
        if bucket and folder is None:
            return _refuse(start, 404, "NoSuchBucket", "The specified bucket does not exist")
        with self._lock:
            if folder is not None:
                if bucket not in self._backend.buckets:
                    self._backend.create_bucket(bucket, "us-east-1")
                self._take_in(operation, bucket, folder, key, query, environ)
            reply = list(self._moto(environ, start))
            if folder is not None and operation in WRITING:
                self._give_out(bucket, folder, key)
        return reply

    def _take_in(self, operation: str, bucket: str, folder: Path, key: str, query: Mapping[str, list[str]], environ: Environment) -> None:
        """Copy changes in the folder to moto, as far as they concern the request."""
        if operation.startswith("List") and not key:
            prefix = query.get("prefix", [""])[0]
            there = {file.relative_to(folder).as_posix() for file in _files(folder, prefix)}
            there |= {known for name, known in self._known if name == bucket and known.startswith(prefix)}
            for one in there:
                self._update(bucket, folder, one)
        elif operation in READING:
            self._update(bucket, folder, key)
            source = unquote(environ.get("HTTP_X_AMZ_COPY_SOURCE", "")).lstrip("/")
            if source.startswith(f"{bucket}/"):
                self._update(bucket, folder, source.removeprefix(f"{bucket}/"))

    def _update(self, bucket: str, folder: Path, key: str) -> None:
        path = local_path(folder, key)
        if not path.is_file():
            if self._known.pop((bucket, key), None):
                self._backend.delete_object(bucket, key)
            return
        stat = path.stat()
        state = (stat.st_mtime_ns, stat.st_size)
        if self._known.get((bucket, key)) != state:
            self._backend.put_object(bucket, key, path.read_bytes())
            self._known[bucket, key] = state

    def _give_out(self, bucket: str, folder: Path, key: str) -> None:
        """Copy what the request has changed to the folder."""
        path = local_path(folder, key)
        found = self._backend.get_object(bucket, key)
        if found is None:
            path.unlink(missing_ok=True)
            self._known.pop((bucket, key), None)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        new.write_bytes(found.value)
        os.replace(new, path)
        stat = path.stat()
        self._known[bucket, key] = (stat.st_mtime_ns, stat.st_size)


def operation_of(method: str, key: str, query: Mapping[str, list[str]], environ: Environment) -> str:
    """Return the S3 operation of a request, by boto3's name."""
    copies = "HTTP_X_AMZ_COPY_SOURCE" in environ
    sub = next((name for name in ("uploads", "delete", "acl", "tagging", "policy", "versioning", "location") if name in query), "")
    if "uploadId" in query:
        part = "UploadPartCopy" if copies else "UploadPart"
        names = {"PUT": part, "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}
    elif sub == "uploads":
        names = {"POST": "CreateMultipartUpload", "GET": "ListMultipartUploads"}
    elif sub == "delete":
        names = {"POST": "DeleteObjects"}
    elif sub or "X-Amz-Signature" in query:
        names = {}
    elif key:
        names = {"PUT": "CopyObject" if copies else "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
        if "HTTP_IF_NONE_MATCH" in environ and method == "PUT":
            names = {}
    else:
        names = {"GET": "ListObjectsV2" if "list-type" in query else "ListObjects", "HEAD": "HeadBucket", "PUT": "CreateBucket"}
    return names.get(method, f"{method} {sub}".strip())


def _files(folder: Path, prefix: str) -> Iterable[Path]:
    """Yield the files of the folder whose key may begin with the prefix. Links are skipped, because S3 has none."""
    start = folder / prefix.rpartition("/")[0]
    for place, folders, names in os.walk(start):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / name for name in names if not name.startswith(".") and not (Path(place) / name).is_symlink())


def _refuse(start: Start, status: int, code: str, message: str) -> Iterable[bytes]:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    start(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]
