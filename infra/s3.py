"""Access to a network volume through RunPod's S3-compatible API: only the operations that it implements, with client settings that work.

The API has no DeleteObjects, no presigned URLs and no conditional writes, and its first listing of files that pods wrote can take minutes.
Small files are therefore read by their exact key, and large files are transferred in parts, so that a transfer can be resumed.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import boto3
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.errors import InfraError

DATA_CENTERS = frozenset(
    (
        *("EU-CZ-1", "EU-RO-1", "EUR-IS-1", "EUR-NO-1", "US-CA-2", "US-GA-2", "US-IL-1", "US-KS-2"),
        *("US-MD-1", "US-MO-1", "US-MO-2", "US-NC-1", "US-NC-2", "US-NE-1", "US-WA-1"),
    )
)
"""Data centres with an S3 API (docs.runpod.io, August 2026). Volumes elsewhere can only be reached from pods."""
OPERATIONS = frozenset(
    (
        *(
            "PutObject",
            "GetObject",
            "HeadObject",
            "CopyObject",
            "DeleteObject",
            "ListObjects",
            "ListObjectsV2",
            "HeadBucket",
            "ListBuckets",
        ),
        *("CreateMultipartUpload", "UploadPart", "UploadPartCopy", "CompleteMultipartUpload", "AbortMultipartUpload"),
        *("ListParts", "ListMultipartUploads"),
    )
)
PART_BYTES = 64 * 2**20
READ_TIMEOUT_S = 600
"""Completing the multipart upload of a large file takes minutes."""
MISSING = ("404", "NoSuchKey", "NotFound")

Progress = Callable[[int, int], None]
"""Called with the number of bytes transferred so far and in total."""


class VolumeError(InfraError):
    """The volume's S3 API refused a request or did not answer."""


class UnsupportedOperationError(RuntimeError):
    """RunPod does not implement this operation; code that calls it would fail there."""


def connect(data_center: str, access_key: str, secret_key: str, *, url: str | None = None) -> Any:
    """Return a boto3 client for the volumes of a data centre. Raises VolumeError if it has no S3 API."""
    if url is None and data_center not in DATA_CENTERS:
        raise VolumeError(
            f"volumes in {data_center} have no S3 API",
            where="the volume",
            fix=f"make a volume in one of {', '.join(sorted(DATA_CENTERS))}",
        )
    config = Config(
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "max_attempts": 10},
        read_timeout=READ_TIMEOUT_S,
        # RunPod does not document support for the newer checksums
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.client(
        "s3",
        endpoint_url=url or f"https://s3api-{data_center.lower()}.runpod.io/",
        region_name=data_center,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=config,
    )
    client.meta.events.register("before-call.s3", _check_supported)
    return client


@dataclass(frozen=True)
class Object:
    """A file on the volume, as S3 sees it."""

    bytes: int
    written: float
    """Seconds since the epoch."""
    tag: str
    """Its ETag."""


class S3Store:
    """An `infra.store.Store` in a volume's bucket, which can also transfer large files."""

    def __init__(self, client: Any, bucket: str) -> None:
        self.client, self.bucket = client, bucket

    def read(self, key: str) -> bytes | None:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except ClientError as error:
            if _code(error) in MISSING:
                return None
            self._fail(error, key)
        except BotoCoreError as error:
            self._fail(error, key)

    def write(self, key: str, content: bytes) -> None:
        try:
            self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        except (ClientError, BotoCoreError) as error:
            self._fail(error, key)

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key, _ in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield each key that begins with `prefix`, with its size in bytes."""
        yield from ((key, size) for key, size, _ in self.objects(prefix))

    def objects(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yield each key that begins with `prefix`, its size in bytes and its time (seconds since the epoch). Empty folders are skipped."""
        asked: dict[str, Any] = {"Bucket": self.bucket, "Prefix": prefix}
        try:
            while True:
                reply = self.client.list_objects_v2(**asked)
                there = (one for one in reply.get("Contents", []) if not one["Key"].endswith("/"))
                yield from ((one["Key"], one["Size"], one["LastModified"].timestamp()) for one in there)
                token = reply.get("NextContinuationToken")
                if not token or token == asked.get("ContinuationToken"):  # RunPod may repeat the last token
                    return
                asked["ContinuationToken"] = token
        except (ClientError, BotoCoreError) as error:
            self._fail(error, prefix)

    def size(self, key: str) -> int | None:
        """Return the size in bytes, or None if there is no such key."""
        found = self.look(key)
        return found.bytes if found else None

    def look(self, key: str) -> "Object | None":
        """Return size, time and ETag, or None if there is no such key."""
        try:
            found = self.client.head_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if _code(error) in MISSING:
                return None
            self._fail(error, key)
        except BotoCoreError as error:
            self._fail(error, key)
        return Object(int(found["ContentLength"]), found["LastModified"].timestamp(), str(found.get("ETag", "")).strip('"'))

    def download(self, key: str, path: Path, *, progress: Progress = lambda done, total: None, part_bytes: int = PART_BYTES) -> bool:
        """Download a file, resuming an earlier attempt. Returns False if `path` already has the size and time of the file on the volume.

        Parts are appended to `PATH.TIME.part`, which is renamed to `path` when it is complete. Partial files with another time belong to
        an older version of the file and are deleted.
        """
        found = self.look(key)
        if found is None:
            raise VolumeError(f"there is no {key} on the volume", where=self.bucket, fix="see `fvlm volume ls`")
        total = found.bytes
        if path.is_file() and (path.stat().st_size, path.stat().st_mtime) == (total, found.written):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{found.written:.0f}.part")
        for other in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            if other != part or other.stat().st_size > total:
                other.unlink()
        done = part.stat().st_size if part.exists() else 0
        with part.open("ab") as stream:
            while done < total:
                last = min(done + part_bytes, total) - 1
                try:
                    reply = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={done}-{last}")
                    content = reply["Body"].read()
                except (ClientError, BotoCoreError) as error:
                    self._fail(error, key)
                stream.write(content)
                stream.flush()
                done += len(content)
                progress(done, total)
        os.utime(part, (found.written, found.written))
        part.replace(path)
        return True

    def upload(self, path: Path, key: str, *, progress: Progress = lambda done, total: None, part_bytes: int = PART_BYTES) -> bool:
        """Upload a file, resuming an unfinished upload of the same parts. Returns False if the volume already has the same content."""
        total, there = path.stat().st_size, self.look(key)
        if there and there.bytes == total and there.tag in _tags(path, part_bytes):
            return False
        try:
            if total <= part_bytes:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=path.read_bytes())
                progress(total, total)
            else:
                self._in_parts(path, key, total, part_bytes, progress)
        except (ClientError, BotoCoreError) as error:
            self._fail(error, key)
        return True

    def _in_parts(self, path: Path, key: str, total: int, part_bytes: int, progress: Progress) -> None:
        upload = self._unfinished(key) or self.client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        there = {one["PartNumber"]: one["ETag"].strip('"') for one in self._parts(key, upload)}
        parts = []
        with path.open("rb") as stream:
            for number, start in enumerate(range(0, total, part_bytes), 1):
                content = stream.read(part_bytes)
                tag = there.get(number)
                if tag != hashlib.md5(content, usedforsecurity=False).hexdigest():
                    reply = self.client.upload_part(Bucket=self.bucket, Key=key, UploadId=upload, PartNumber=number, Body=content)
                    tag = reply["ETag"].strip('"')
                parts.append({"PartNumber": number, "ETag": tag})
                progress(min(start + part_bytes, total), total)
        self.client.complete_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})

    def _unfinished(self, key: str) -> str | None:
        """Return the id of an unfinished upload to this key, if there is one."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=key).get("Uploads", [])
        return next((one["UploadId"] for one in found if one["Key"] == key), None)

    def _parts(self, key: str, upload: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        marker = 0
        while True:
            reply = self.client.list_parts(Bucket=self.bucket, Key=key, UploadId=upload, PartNumberMarker=marker)
            found += reply.get("Parts", [])
            if not reply.get("IsTruncated"):
                return found
            marker = reply["NextPartNumberMarker"]

    def _fail(self, error: Exception, key: str) -> NoReturn:
        code = _code(error) if isinstance(error, ClientError) else type(error).__name__
        hints = {
            "SignatureDoesNotMatch": "the S3 key is not the same as RUNPOD_API_KEY: set RUNPOD_S3_ACCESS_KEY and RUNPOD_S3_SECRET_KEY",
            "InvalidAccessKeyId": "set RUNPOD_S3_ACCESS_KEY and RUNPOD_S3_SECRET_KEY to an S3 API key of the console's settings",
            "NoSuchBucket": "check the volume's id and its data centre",
        }
        fix = hints.get(code, "try again; see https://uptime.runpod.io")
        raise VolumeError(f"the volume's S3 API: {code}: {error}", where=f"s3://{self.bucket}/{key}", fix=fix) from error


def _tags(path: Path, part_bytes: int) -> tuple[str, str]:
    """Return the two possible ETags of a file: its MD5, and the MD5 of its parts' MD5s for a multipart upload."""
    everything, parts = hashlib.md5(usedforsecurity=False), []
    with path.open("rb") as stream:
        while content := stream.read(part_bytes):
            everything.update(content)
            parts.append(hashlib.md5(content, usedforsecurity=False).digest())
    return everything.hexdigest(), f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


def local_path(folder: Path, key: str) -> Path:
    """Return the local path of a key under a folder. Raises ValueError if the key would leave the folder."""
    path = Path(os.path.normpath(folder / key))
    if not path.is_relative_to(folder):
        raise ValueError(f"the key {key!r} leads out of {folder}")
    return path


def _check_supported(model: Any, **_more: Any) -> None:
    if model.name not in OPERATIONS:
        raise UnsupportedOperationError(f"RunPod's S3 API has no {model.name}")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
