"""A local mirror of a volume that only pods have mounted: files that are read are downloaded, others only have the right name and size.

Code that reads manifests and checks file sizes (status, plan, results) thus works here as it does on a pod. Large files are sparse files
of the right size: they take no space and must not be read.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from infra.s3 import S3Store, local_path

SMALL_BYTES = 1_000_000
READ = (".json", ".yaml", ".csv", ".md")
"""Suffixes of the small files that are downloaded."""
READ_WHOLE = ("manifest.json", "index.parquet")
"""Names of files that are downloaded whatever their size: a plan counts the samples in the shards' index."""


def mirror(bucket: S3Store, folder: Path, prefixes: Iterable[str]) -> int:
    """Make `folder` look like the volume under these prefixes. Returns the number of downloaded files.

    Files that have not changed since their download are not downloaded again; files that are no longer on the volume are deleted.
    """
    fetched = 0
    for prefix in prefixes:
        there = set()
        for key, size, written in bucket.objects(prefix):
            path = local_path(folder, key)
            there.add(path)
            if path.is_file() and (path.stat().st_size, path.stat().st_mtime) == (size, written):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name in READ_WHOLE:
                fetched += bucket.download(key, path)
            elif size <= SMALL_BYTES and key.endswith(READ):
                path.write_bytes(bucket.read(key) or b"")
                fetched += 1
            else:
                with path.open("wb") as stream:
                    stream.truncate(size)
            os.utime(path, (written, written))
            os.utime(path.parent, (written, written))
        for path in sorted((folder / prefix).rglob("*"), reverse=True) if (folder / prefix).is_dir() else ():
            if path.is_file() and path not in there:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return fetched
