"""Local or remote: decided once."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.data.addresses import AddressError, local_paths

TABLES = Path("/data/tables")


def paths(*urls: str) -> list[str | None]:
    return local_paths(pa.array(urls, pa.string()), TABLES).to_pylist()


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("a.mp4", "/data/tables/a.mp4"),
        ("clips/a b.mp4", "/data/tables/clips/a b.mp4"),
        ("/elsewhere/a.mp4", "/elsewhere/a.mp4"),
        ("file:///elsewhere/a%20b.mp4", "/elsewhere/a b.mp4"),
        ("FILE://localhost/a.mp4", "/a.mp4"),
        ("http://host/a.mp4", None),
        ("HTTP://host/a.mp4", None),
        ("HttpS://host/a.mp4?x=1", None),
        ("", None),
    ],
)
def test_what_an_address_means(url: str, path: str | None) -> None:
    assert paths(url) == [path]
    assert paths("x.mp4", url, "http://y") == ["/data/tables/x.mp4", path, None]


@pytest.mark.parametrize(
    "url", ["gs://bucket/a.mp4", "GS://bucket/a.mp4", "ftp://host/a.mp4", "data+x://y", "file://host/a.mp4", "file://"]
)
def test_what_cannot_be_fetched_is_named(url: str) -> None:
    with pytest.raises(AddressError) as caught:
        paths("a.mp4", url, "http://host/b.mp4", url)
    assert caught.value.rows == [1, 3]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda url: "://" not in url), max_size=5))
def test_without_a_scheme_it_is_a_path_of_the_folder(urls: list[str]) -> None:
    assert paths(*urls) == [url if url.startswith("/") else f"/data/tables/{url}" for url in urls]
