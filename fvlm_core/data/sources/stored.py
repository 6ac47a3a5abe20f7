"""Files of a source in an object store (`s3://bucket/folder/*.parquet`): copied to the volume once, and again when they change.

A copy has the modification time of the original, so the record of a source notices a new version as with any file.
"""

import fnmatch
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from fvlm_core.errors import UserError
from fvlm_core.settings import hash_json

COPIES = "files"
"""Folder of the copies, beside the records of sources."""
KEY_LENGTH = 12
PARALLEL = 4
"""Files copied at a time."""
FIX = "check the address, AWS_ENDPOINT_URL and the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"


def copies(addresses: Sequence[str], sources: Path) -> list[Path]:
    """Return the copies of the files at these addresses as of the last `fetch`, in order; empty before the first."""
    folder = _folder(addresses, sources)
    return sorted(path for path in folder.glob("*/*") if path.is_file() and not path.name.startswith("."))


def fetch(addresses: Sequence[str], sources: Path) -> None:
    """Copy files that are new or have changed, and delete copies of files that no longer exist.

    Raises UserError if the store does not respond, or if no file matches an address.
    """
    if not addresses:
        return
    folder = _folder(addresses, sources)
    wanted: dict[Path, tuple[FileSystem, FileInfo]] = {}
    for number, address in enumerate(addresses):
        try:
            store, found = _listed(address)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"the object store cannot be read: {error}", where=address, fix=FIX) from error
        if not found:
            raise UserError("no file in the object store matches", where=address, fix="check the name; `*` and `?` are wildcards")
        wanted |= {folder / f"{number:03d}" / info.base_name: (store, info) for info in found}
    for path in copies(addresses, sources):
        if path not in wanted:
            path.unlink()
    with ThreadPoolExecutor(PARALLEL) as pool:
        for future in [pool.submit(_copy, path, *there) for path, there in wanted.items() if not _is_copy(path, there[1])]:
            future.result()


def _folder(addresses: Sequence[str], sources: Path) -> Path:
    return sources / COPIES / hash_json(list(addresses))[:KEY_LENGTH]


def _listed(address: str) -> tuple[FileSystem, list[FileInfo]]:
    """Return the store and the files that match an address, sorted. Wildcards are allowed in its last part."""
    folder, _, pattern = address.rpartition("/")
    store, prefix = FileSystem.from_uri(folder)
    infos = store.get_file_info(FileSelector(prefix, allow_not_found=True))
    found = [info for info in infos if info.type == FileType.File and fnmatch.fnmatchcase(info.base_name, pattern)]
    return store, sorted(found, key=lambda info: info.base_name)


def _is_copy(path: Path, info: FileInfo) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return (status.st_size, status.st_mtime_ns) == (info.size, info.mtime_ns)


def _copy(path: Path, store: FileSystem, info: FileInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_name(f".{path.name}")
    try:
        copy_files(info.path, str(arriving), source_filesystem=store, destination_filesystem=LocalFileSystem())
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"the file cannot be fetched: {error}", where=f"s3://{info.path}", fix=FIX) from error
    os.utime(arriving, ns=(info.mtime_ns, info.mtime_ns))
    arriving.replace(path)
