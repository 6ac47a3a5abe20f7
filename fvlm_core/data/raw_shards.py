"""Reads the tars that video2dataset writes, one at a time. Samples are in order of arrival; failed ones have no frames.

`content.parquet` has a row for each good sample, so that its tar need not be opened again; `places.parquet` says where the sample is.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm_core.data.rows import IDENTITY_FIELDS

RAW = "raw"
"""Subfolder of a download, with one folder of tars per round."""
SUCCESS = "success"
CONTENT, PLACES = "content.parquet", "places.parquet"
"""In the folder of a download: one row per good sample, sorted by its row in the record."""
CONTENT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("origin", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("num_frames", pa.int32()),
        ("duration_s", pa.float64()),
        ("frames_sha256", pa.string()),
        ("text_sha256", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""The hashes are of the frames, of the texts about them, and of everything that later steps use."""
PLACES_SCHEMA = pa.schema([("tar", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
"""A sample's members, with their headers, are `size` bytes from `offset` on."""
TEXT_FIELDS = ("caption", "conversations", "probes")


@dataclass
class RawSample:
    """One downloaded video."""

    record: dict[str, Any] = field(default_factory=dict)
    """Its JSON: the columns of the table, num_frames, duration_s, status."""
    frames: list[bytes] = field(default_factory=list)
    """The JPEG files."""
    offset: int = 0
    size: int = 0

    @property
    def good(self) -> bool:
        return self.record.get("status") == SUCCESS

    def content(self) -> dict[str, Any]:
        """Return its row of CONTENT_SCHEMA."""
        digest = sha256()
        for jpeg in self.frames:
            digest.update(len(jpeg).to_bytes(8, "big") + jpeg)
        frames = digest.hexdigest()
        known = {name: self.record[name] for name in CONTENT_SCHEMA.names if name in self.record}
        return known | {
            "frames_sha256": frames,
            "text_sha256": _hash([self.record[name] for name in TEXT_FIELDS]),
            "sha256": _hash([frames, *(self.record[name] for name in IDENTITY_FIELDS)]),
        }


def read_tar(path: Path) -> Iterator[RawSample]:
    """Yield the samples of a tar, one at a time. The members of a sample must be consecutive."""
    with path.open("rb") as stream:
        yield from _samples(stream)


def read_sample(path: Path, offset: int, size: int) -> RawSample:
    """Read the sample at this place. Raises OSError if the tar has become shorter."""
    with path.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise OSError(f"{path} is shorter than it was: a sample at {offset} is cut off")
    (sample,) = _samples(io.BytesIO(content))
    return sample


def write_contents(folder: Path) -> tuple[int, int]:
    """Write what the good samples of a download are, and where they are; returns the numbers of samples and frames.

    Raises RuntimeError if a tar does not match the outcomes of its shard, e.g. because the disk was full. The shard is then deleted, and
    fetched again by the next run.
    """
    rows: list[dict[str, Any]] = []
    damaged = []
    for outcomes in sorted(folder.glob(f"{RAW}/*/*.parquet")):
        tar = outcomes.with_suffix(".tar")
        found = _contents(tar, tar.relative_to(folder).as_posix())
        if {row["row"] for row in found} == _outcomes(outcomes)[0]:
            rows += found
        else:
            damaged.append(tar)
    if damaged:
        for tar in damaged:
            for path in (tar.with_name(f"{tar.stem}_stats.json"), tar.with_suffix(".parquet"), tar):
                path.unlink(missing_ok=True)
        names = ", ".join(str(tar.relative_to(folder)) for tar in damaged)
        raise RuntimeError(f"damaged, perhaps by a full disk, and deleted: {names} in {folder}; run again to fetch their videos again")
    rows.sort(key=lambda row: row["row"])
    for file, schema in ((CONTENT, CONTENT_SCHEMA), (PLACES, PLACES_SCHEMA)):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / file, compression="zstd")
    return len(rows), sum(row["num_frames"] for row in rows)


def read_outcomes(folder: Path) -> tuple[set[int], dict[int, str]]:
    """Return the rows fetched by a round, and the reason of each that failed."""
    good: set[int] = set()
    failed: dict[int, str] = {}
    for path in sorted(folder.glob("*.parquet")):
        fetched, reasons = _outcomes(path)
        good |= fetched
        failed |= reasons
    return good, failed


def _outcomes(path: Path) -> tuple[set[int], dict[int, str]]:
    """Like `read_outcomes`, for one shard."""
    table = pq.read_table(path, columns=["row", "status", "error_message"])
    outcomes = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return (
        {row for row, status, _ in outcomes if status == SUCCESS},
        {row: str(reason) for row, status, reason in outcomes if status != SUCCESS},
    )


def _contents(tar: Path, name: str) -> list[dict[str, Any]]:
    """Return what the good samples of a tar are, and where; empty if it cannot be read to the end."""
    try:
        return [sample.content() | {"tar": name, "offset": sample.offset, "size": sample.size} for sample in read_tar(tar) if sample.good]
    except (OSError, tarfile.TarError, ValueError, KeyError):
        return []


def _samples(stream: Any) -> Iterator[RawSample]:
    key: str | None = None
    sample = RawSample()
    with tarfile.open(fileobj=stream) as archive:
        for member in archive:
            archive.members = []  # ty: ignore[missing-attribute] -- tarfile would keep every member in memory
            name, suffix = member.name.split(".", 1)
            if name != key:
                if key is not None:
                    yield sample
                key, sample = name, RawSample(offset=member.offset)
            content = archive.extractfile(member)
            assert content is not None
            if suffix == "json":
                sample.record = json.load(content)
            elif suffix.endswith(".jpg"):
                sample.frames.append(content.read())
            sample.size = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE - sample.offset
    if key is not None:
        yield sample


def _hash(values: list[Any]) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()
