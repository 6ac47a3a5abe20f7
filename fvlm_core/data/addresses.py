"""Decides whether the address of a video is a local file or remote, for a column at a time. Nothing else decides this."""

from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa

from fvlm_core.data.arrow import pc

FILE = "file"
REMOTE = ("http", "https", "s3")
SCHEME = r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"


class AddressError(ValueError):
    """Addresses that cannot be fetched. `rows` are their indexes in the column; the message says why."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


def local_paths(urls: pa.Array, folder: Path) -> pa.Array:
    """Return the local file of each url (string); null for addresses on the web or in an object store, and for empty ones.

    A path without a scheme is a file; a relative one starts at `folder`. `file:///...` is percent-decoded. Schemes are case-insensitive.
    Raises AddressError for any other scheme, and for a relative `file://` address.
    """
    scheme = pc.fill_null(pc.utf8_lower(pc.struct_field(pc.extract_regex(urls, SCHEME), "scheme")), "")
    allowed = pc.is_in(scheme, pa.array(["", FILE, *REMOTE]))
    if not pc.all(allowed, min_count=0).as_py():
        wrong = pc.indices_nonzero(pc.invert(allowed)).to_pylist()
        schemes = sorted(set(scheme.take(pa.array(wrong)).to_pylist()))
        raise AddressError(f"{', '.join(f'{name}://' for name in schemes)} cannot be fetched", wrong)
    absolute = pc.if_else(pc.starts_with(urls, "/"), urls, pc.binary_join_element_wise(f"{folder}/", urls, ""))
    is_path = pc.and_(pc.equal(scheme, ""), pc.not_equal(urls, ""))
    paths = pc.if_else(is_path, absolute, pa.scalar(None, pa.string()))
    is_file = pc.equal(scheme, FILE)
    if not pc.any(is_file, min_count=0).as_py():
        return paths
    numbers = pc.indices_nonzero(is_file).to_pylist()
    found = [_path_of(url) for url in urls.filter(is_file).to_pylist()]
    if wrong := [number for number, path in zip(numbers, found, strict=True) if path is None]:
        raise AddressError("a file:// address must be absolute: file:///folder/clip.mp4", wrong)
    return pc.replace_with_mask(paths, is_file, pa.array(found, pa.string()))


def _path_of(url: str) -> str | None:
    """Return the absolute path of a file:// address, or None if it has none."""
    rest = url[len(FILE) + len("://") :]
    if rest.startswith("localhost/"):
        rest = rest.removeprefix("localhost")
    return unquote(rest) if rest.startswith("/") else None
