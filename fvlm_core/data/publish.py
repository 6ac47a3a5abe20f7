"""Copies a folder of shards into an object store: `python -m fvlm_core.data.publish job.yaml`.

The manifest is copied last, and an older manifest of other shards is deleted first, so a manifest in the store means that all its files
are there. A job that is run again copies only missing files: existing files are identified by the store's manifest or, after an
interrupted job, by the mark that it left.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from fvlm_core.cli import run_job
from fvlm_core.data.jobs import PublishJob, ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, AnyManifest, Manifest
from fvlm_core.progress import Progress
from fvlm_core.settings import hash_json

PARALLEL = 8
"""Files copied at a time."""
MARK = "publishing.txt"
"""In the store while files are being copied: the digest of the shards. A file of the right name and size then counts as copied."""


def publish(job: PublishJob) -> Manifest:
    """Copy the missing files. Raises UserError if the store cannot be reached or written."""
    started = time.monotonic()
    shards = ShardManifest.read(job.shards)
    try:
        store, prefix = FileSystem.from_uri(job.to)
        with ThreadPoolExecutor(PARALLEL) as pool:
            left = _begin(shards, job.shards, store, prefix, pool)
            progress = Progress(job.output, len(left) + 1)
            for done, _ in enumerate(pool.map(lambda path: _copy(job.shards / path, store, f"{prefix}/{path}"), left), 1):
                progress.update(done, note="files")
        _copy(job.shards / FILE_NAME, store, f"{prefix}/{FILE_NAME}")
        store.delete_file(f"{prefix}/{MARK}")
    except (OSError, pa.ArrowException) as error:
        fix = "check the address, AWS_ENDPOINT_URL and the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        raise UserError(f"the object store cannot be written: {error}", where=job.to, fix=fix) from error
    progress.update(len(left) + 1)
    return Manifest(
        name="publish",
        settings_hash=job.hash(exclude={"output", "shards"}),
        inputs={"shards": shards.digest},
        counts={"files": len(shards.files) + 1, "bytes": sum(file.bytes for file in shards.files)},
        seconds=time.monotonic() - started,
    ).write(job.output)


def _begin(shards: ShardManifest, folder: Path, store: FileSystem, prefix: str, pool: ThreadPoolExecutor) -> list[str]:
    """Delete files that could be mistaken for these shards, write the mark, and return the files to copy."""
    there = {
        info.path.removeprefix(f"{prefix}/"): info.size
        for info in store.get_file_info(FileSelector(prefix, recursive=True, allow_not_found=True))
        if info.type == FileType.File
    }

    def read(name: str) -> bytes:
        if name not in there:
            return b""
        with store.open_input_stream(f"{prefix}/{name}") as stream:
            return stream.readall()

    ours = {file.path: file.sha256 for file in shards.files}
    mark = hash_json(ours).encode()
    known: dict[str, str] = {}
    if published := read(FILE_NAME):
        known = _digests(published)
    elif read(MARK) == mark:
        known = ours
    left = [file for file in shards.files if (there.get(file.path), known.get(file.path)) != (file.bytes, file.sha256)]
    if published and published != (folder / FILE_NAME).read_bytes():
        store.delete_file(f"{prefix}/{FILE_NAME}")
    # before the mark is written: with it, files of the right size count as copied
    others = [f"{prefix}/{file.path}" for file in left if there.get(file.path) == file.bytes]
    list(pool.map(store.delete_file, others))
    with store.open_output_stream(f"{prefix}/{MARK}") as stream:
        stream.write(mark)
    return [file.path for file in left]


def _digests(manifest: bytes) -> dict[str, str]:
    """Return the sha256 of each file of a manifest; empty if the manifest is damaged."""
    try:
        return {file.path: file.sha256 for file in AnyManifest.model_validate_json(manifest).files}
    except ValueError:
        return {}


def _copy(path: Path, store: FileSystem, to: str) -> None:
    copy_files(str(path), to, source_filesystem=LocalFileSystem(), destination_filesystem=store)


if __name__ == "__main__":
    run_job(PublishJob, publish)
