"""Reads the tars that video2dataset leaves: samples in order of arrival, failed ones among them without frames."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fvlm_core.data.rows import IDENTITY_FIELDS

SUCCESS = "success"


@dataclass
class RawSample:
    """One downloaded video."""

    tar: Path
    record: dict[str, Any] = field(default_factory=dict)
    """Its JSON: the columns of the table, num_frames, duration_s, status."""
    frames: list[tuple[int, int]] = field(default_factory=list)
    """Offset and size of every JPEG in the tar."""

    def read_frames(self) -> list[bytes]:
        """The JPEG files, in order."""
        with self.tar.open("rb") as stream:
            contents = []
            for offset, size in self.frames:
                stream.seek(offset)
                contents.append(stream.read(size))
        return contents

    def frames_hash(self) -> str:
        """Equal frames give equal hashes."""
        digest = sha256()
        for content in self.read_frames():
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()

    def identity(self) -> str:
        """Hash of everything that goes on from here: frames and text, not where they were found."""
        return sha256(json.dumps([self.frames_hash(), *(self.record[name] for name in IDENTITY_FIELDS)]).encode()).hexdigest()


def read_samples(folder: Path) -> list[RawSample]:
    """All good samples of a download's rounds, the folders in `folder`, by their row in the record."""
    samples = [sample for tar in sorted(folder.glob("*/*.tar")) for sample in _samples_of(tar) if sample.record["status"] == SUCCESS]
    return sorted(samples, key=lambda sample: sample.record["row"])


def read_outcomes(folder: Path) -> tuple[set[int], dict[int, str]]:
    """Of one round: the rows that were fetched, and the reason of each that failed."""
    good: set[int] = set()
    failed: dict[int, str] = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["row", "status", "error_message"])
        for row, status, reason in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if status == SUCCESS:
                good.add(row)
            else:
                failed[row] = str(reason)
    return good, failed


def _samples_of(tar: Path) -> Iterator[RawSample]:
    samples: dict[str, RawSample] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, suffix = member.name.split(".", 1)
            sample = samples.setdefault(key, RawSample(tar))
            if suffix == "json":
                content = archive.extractfile(member)
                assert content is not None
                sample.record = json.load(content)
            elif suffix.endswith(".jpg"):
                sample.frames.append((member.offset_data, member.size))
    yield from samples.values()
