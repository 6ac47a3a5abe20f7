"""Copies a folder of shards into an object store: `python -m fvlm_core.data.publish job.yaml`.

The manifest goes last, so whoever finds it there finds all its files. A job that is run again copies only what is not there in full size.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from fvlm_core.cli import run_job
from fvlm_core.data.jobs import PublishJob, ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, Manifest
from fvlm_core.progress import Progress

PARALLEL = 8
"""Files on their way at a time."""


def publish(job: PublishJob) -> Manifest:
    """Copy what is missing. Raises UserError where the store cannot be reached or written."""
    started = time.monotonic()
    shards = ShardManifest.read(job.shards)
    try:
        store, prefix = FileSystem.from_uri(job.to)
        there = {
            info.path: info.size
            for info in store.get_file_info(FileSelector(prefix, recursive=True, allow_not_found=True))
            if info.type == FileType.File
        }
        left = [file.path for file in shards.files if there.get(f"{prefix}/{file.path}") != file.bytes]
        progress = Progress(job.output, len(left) + 1)
        with ThreadPoolExecutor(PARALLEL) as pool:
            for done, _ in enumerate(pool.map(lambda path: _copy(job.shards / path, store, f"{prefix}/{path}"), left), 1):
                progress.update(done, note="files")
        _copy(job.shards / FILE_NAME, store, f"{prefix}/{FILE_NAME}")
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


def _copy(path: Path, store: FileSystem, to: str) -> None:
    copy_files(str(path), to, source_filesystem=LocalFileSystem(), destination_filesystem=store)


if __name__ == "__main__":
    run_job(PublishJob, publish)
