"""References: whatever holds a clip, the same bytes come out; what is damaged or missing says so."""

import gzip
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.data import cells, media
from fvlm_core.data.archives import AmbiguousMemberError, Archives, joined
from fvlm_core.data.frames import ClipError, FrameRule, extract_frames
from fvlm_core.data.jobs import Source
from fvlm_core.data.media import MediaError, UnreachableError, files_of, open_media, read_media, time_window, without_window
from fvlm_core.data.rejected import is_transient
from fvlm_core.data.sources import json_files
from fvlm_core.data.sources.adapter import read_table
from fvlm_core.data.sources.json_files import read_json
from fvlm_core.data.sources.record import PATH, make_record, read_rows, record_folder
from fvlm_core.errors import UserError
from tests.data.published import clip, picture, pictures

RULE = FrameRule(frame_px=42, max_frames=4)
FILES = st.dictionaries(
    st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3}){0,2}\.mp4", fullmatch=True), st.binary(max_size=2000), min_size=1, max_size=6
)


def archive(path: Path, files: dict[str, bytes], kind: str) -> Path:
    if kind == "tar":
        with tarfile.open(path, "w") as made:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED) as made:
            for name, content in files.items():
                made.writestr(name, content)
    return path


@given(FILES, st.sampled_from(["tar", "stored", "deflated"]), st.lists(st.floats(0, 1), max_size=3))
def test_a_member_is_what_was_put_in_however_the_archive_was_cut(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], kind: str, cuts: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    content = archive(folder / "all.bin", files, kind).read_bytes()
    places = [0, *sorted(int(cut * len(content)) for cut in cuts), len(content)]
    parts = []
    for number, (start, end) in enumerate(pairwise(places)):
        parts.append(folder / f"clips_part{'abcdef'[number]}a")
        parts[-1].write_bytes(content[start:end])
    with Archives(parts, folder / "index") as known:
        for name, expected in files.items():
            found = known.find(name)
            assert found is not None
            assert read_media(found) == expected
            stream, size = open_media(found)
            with stream:
                assert len(stream.read()) == size
        assert known.find("nobody.mp4") is None
    assert not (folder / "index").exists()


def test_an_address_and_a_member_may_have_folders_that_the_other_has_not(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"x/one.mp4": b"1", "two.mp4": b"2", "p/three.mp4": b"3", "q/three.mp4": b"4"}, "stored")
    with Archives([path], tmp_path / "index") as known:
        assert read_media(known.find("one.mp4") or "") == b"1"
        assert read_media(known.find("panda/two.mp4") or "") == b"2"
        assert read_media(known.find("q/three.mp4") or "") == b"4"
        assert known.find("y/one.mp4") is None
        with pytest.raises(AmbiguousMemberError, match=r"2 files in the archives may be meant, e\.g\. p/three\.mp4 and q/three\.mp4"):
            known.find("three.mp4")


def test_parts_are_put_together_by_their_names(tmp_path: Path) -> None:
    names = ["OpenVid_part1.zip", "OpenVid_part2_partab", "OpenVid_part2_partaa", "b.zip.002", "b.zip.001", "c.tar"]
    groups = [[Path(path).name for path in group] for group in joined([tmp_path / name for name in names])]
    assert groups == [["OpenVid_part1.zip"], ["OpenVid_part2_partaa", "OpenVid_part2_partab"], ["b.zip.001", "b.zip.002"], ["c.tar"]]


def test_archives_that_cannot_be_used_are_refused_with_what_to_do(tmp_path: Path) -> None:
    plain = archive(tmp_path / "a.tar", {"a.mp4": b"1" * 2000}, "tar")
    with gzip.open(tmp_path / "a.tar.gz", "wb") as packed:
        packed.write(plain.read_bytes())
    (tmp_path / "noise.zip").write_bytes(b"noise" * 100)
    with pytest.raises(UserError, match="gunzip"):
        Archives([tmp_path / "a.tar.gz"], tmp_path / "index")
    with pytest.raises(UserError, match="not a readable zip or tar archive"):
        Archives([tmp_path / "noise.zip"], tmp_path / "index")


def test_damage_is_said_where_it_is_met(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a.mp4": bytes(5000), "b.mp4": b"b" * 5000}, "deflated")
    with Archives([path], tmp_path / "index") as known:
        first, second = known.find("a.mp4") or "", known.find("b.mp4") or ""
    content = bytearray(path.read_bytes())
    content[40:46] = b"\xff" * 6
    path.write_bytes(content)
    with pytest.raises(MediaError, match="damaged in its zip archive"):
        read_media(first)
    path.write_bytes(content[:50])
    with pytest.raises(MediaError, match="ends within the file"):
        read_media(second)
    path.write_bytes(b"x" * 9000)
    with pytest.raises(MediaError, match="has changed"):
        read_media(second)
    path.unlink()
    with pytest.raises(MediaError, match="file not found"):
        read_media(second)


class Ranges:
    """A web server of one folder that answers with parts of files; what it was asked for is in `asked`.

    `/hub/NAME` is forwarded to `/KEY/NAME`, where every key but the present one is refused.
    """

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.asked: list[tuple[str, str]] = []
        self.failures = 0
        self.key = "key0"
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range", "")
                site.asked.append((self.path, asked))
                kind, _, name = self.path.lstrip("/").rpartition("/")
                path = folder / name
                if kind == "hub":
                    self.send_response(302)
                    self.send_header("Location", f"/{site.key}/{name}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if kind not in ("", site.key):
                    self.send_error(403)
                    return
                if site.failures or not path.is_file():
                    site.failures -= site.failures > 0
                    self.send_error(503 if path.is_file() else 404)
                    return
                content = path.read_bytes()
                first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
                part = content[first : last + 1] if ranges else content
                self.send_response(206 if ranges else 200)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Ranges]:
    made = Ranges(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_of_a_zip_on_the_web_only_what_is_used_is_fetched(kind: str, site: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "WEB_PAUSE_S", 0.0)
    files = {f"{n}.mp4": bytes(np.random.default_rng(n).integers(0, 255, 500_000, np.uint8)) for n in range(4)}
    content = archive(tmp_path / "all.zip", files, kind).read_bytes()
    for number, part in enumerate((content[:600_000], content[600_000:])):
        (tmp_path / f"all_parta{'ab'[number]}").write_bytes(part)
    with Archives([f"{site.url}/all_partaa", f"{site.url}/all_partab"], tmp_path / "index") as known:
        reference = known.find("1.mp4") or ""
        site.asked.clear()
        site.failures = 2
        assert read_media(reference) == files["1.mp4"], "lies in both parts; two requests failed"
    fetched = sum(int(last) - int(first) + 1 for _, asked in site.asked[2:] for first, last in [asked.removeprefix("bytes=").split("-")])
    assert fetched < 520_000


def test_a_file_is_one_request_and_a_hub_that_forwards_is_seldom_asked(site: Ranges, tmp_path: Path) -> None:
    files = {f"{n}.mp4": bytes(np.random.default_rng(n).integers(0, 255, 5000, np.uint8)) for n in range(3)}
    archive(tmp_path / "all.zip", files, "stored")
    with Archives([f"{site.url}/hub/all.zip"], tmp_path / "index") as known:
        references = {name: known.find(name) or "" for name in files}
    assert [path for path, _ in site.asked].count("/hub/all.zip") == 1
    site.asked.clear()
    assert {name: read_media(reference) for name, reference in references.items()} == files
    assert [path for path, _ in site.asked] == ["/key0/all.zip"] * 3
    site.asked.clear()
    site.key = "key1"
    assert read_media(references["1.mp4"]) == files["1.mp4"], "the first key has expired"
    assert [path for path, _ in site.asked] == ["/key0/all.zip", "/hub/all.zip", "/key1/all.zip"]
    (tmp_path / "all.zip").unlink()
    with pytest.raises(UnreachableError, match="HTTP 404"):
        read_media(references["1.mp4"])


def test_a_long_header_is_fetched_too(site: Ranges, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a.mp4")
    info.extra = (0x9999).to_bytes(2, "little") + (3000).to_bytes(2, "little") + bytes(3000)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as made:
        made.writestr(info, b"x" * 1000)
        made.writestr("b.mp4", b"y" * 1000)
    with Archives([f"{site.url}/all.zip"], tmp_path / "index") as known:
        assert read_media(known.find("a.mp4") or "") == b"x" * 1000


def test_braces_stand_for_several_archives_on_the_web(tmp_path: Path) -> None:
    def addresses(*patterns: str) -> list[str]:
        source = {"name": "open", "format": "openvid", "files": ["a.csv"], "web_archives": patterns}
        return Source.model_validate(source).web_archive_addresses

    assert addresses("https://h/p{{0..2},7}.zip", "s3://b/p{8,9}_part{aa,ab}") == [
        *(f"https://h/p{number}.zip" for number in (0, 1, 2, 7)),
        *(f"s3://b/p{number}_part{part}" for number in (8, 9) for part in ("aa", "ab")),
    ]
    with pytest.raises(ValueError, match="Unbalanced braces"):
        addresses("https://h/p{0..2.zip")


def test_a_source_may_have_archives_on_the_web(site: Ranges, tmp_path: Path) -> None:
    archive(tmp_path / "all.zip", {"x/a.mp4": clip(1), "b.mp4": clip(2)}, "stored")
    (tmp_path / "clips.csv").write_text("video,caption\na.mp4,one\nb.mp4,two\nc.mp4,three\n")
    settings = {"name": "open", "format": "openvid", "files": [tmp_path / "clips.csv"], "web_archives": [f"{site.url}/all.zip"]}
    source = Source.model_validate(settings)
    known = make_record(source, tmp_path)
    assert (known.local, known.missing, known.missing_examples) == (3, 1, [str(tmp_path / "c.mp4")])
    paths = [path for batch in read_rows(record_folder(source, tmp_path), [PATH]) for path in batch.column(PATH).to_pylist()]
    assert [len(extract_frames(read_media(path), RULE).pixels) for path in paths[:2]] == [1, 2]
    assert read_media(paths[1]) == clip(2)
    with pytest.raises(MediaError, match="file not found"):
        read_media(paths[2])
    (tmp_path / "all.zip").unlink()
    with pytest.raises(UnreachableError) as caught:
        read_media(paths[0])
    assert is_transient(str(caught.value)), "to be tried again"


def test_web_archives_that_cannot_be_used_are_refused(site: Ranges, tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", {"a.mp4": b"1"}, "tar")
    archive(tmp_path / "a.zip", {"a.mp4": b"1"}, "stored")
    with pytest.raises(UserError, match="a tar on the web"):
        Archives([f"{site.url}/a.tar"], tmp_path / "index")
    with pytest.raises(UserError, match="HTTP 404"):
        Archives([f"{site.url}/none.zip"], tmp_path / "index")
    plain = Ranges(tmp_path, ranges=False)
    with pytest.raises(UserError, match="does not answer with parts of files"):
        Archives([f"{plain.url}/a.zip"], tmp_path / "index")
    plain.server.shutdown()
    plain.server.server_close()


def test_cells_of_parquet_in_small_and_in_large_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    images = [pictures(1, 2), pictures(3), [{"bytes": None, "path": "a.jpg"}]]
    pq.write_table(pa.table({"images": images, "mp4": [b"x", b"y", None], "words": ["a", "b", "c"]}), path, row_group_size=2)
    for cache in (1 << 20, 0):
        monkeypatch.setattr(cells, "CACHE_BYTES", cache)
        monkeypatch.setattr(media, "_CELLS", cells.Cells())
        assert read_media(f"parquet:0:1:images:{path}") == picture(2)
        assert read_media(f"parquet:1:0:images:{path}") == picture(3)
        assert read_media(f"parquet:1::mp4:{path}") == b"y"
        for place in ("2:0:images", "2::mp4", "0:5:images", "0::words"):
            with pytest.raises(MediaError, match="holds no bytes"):
                read_media(f"parquet:{place}:{path}")
        for place in ("9:0:images", "0:0:none"):
            with pytest.raises(MediaError, match="cannot be read"):
                read_media(f"parquet:{place}:{path}")


@given(st.lists(st.integers(0, 29), max_size=40), st.integers(1, 30), st.sampled_from([0, 5000, 1 << 20]), st.sampled_from([1, 2, 64]))
def test_cells_may_be_asked_for_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, asked: list[int], group: int, cache: int, batch: int
) -> None:
    path = tmp_path_factory.mktemp("cells") / "a.parquet"
    values = [bytes([row]) * 900 for row in range(30)]
    pq.write_table(pa.table({"mp4": values}), path, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CACHE_BYTES", cache)
        patch.setattr(cells, "BATCH_ROWS", batch)
        patch.setattr(cells, "CURSORS", 2)
        known = cells.Cells()
        for row in asked:
            assert known.read(str(path), "mp4", row, None) == values[row]
            assert known._bytes == sum(map(len, known._values.values())) <= max(cache, 900)


def test_media_are_counted_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"images": [pictures(1, 2), pictures(3), []], "words": ["a", "b", "c"]}), path)
    meta = pq.read_metadata(path).row_group(0)
    chunks = [meta.column(number) for number in range(meta.num_columns)]
    (content,) = [chunk for chunk in chunks if chunk.path_in_schema.endswith(".bytes")]
    with path.open("r+b") as stream:  # whoever reads these bytes fails
        stream.seek(content.data_page_offset)
        stream.write(b"\xff" * (content.total_compressed_size - (content.data_page_offset - content.dictionary_page_offset)))
    (batch,) = read_table(path, ["words"], ["images"])
    assert batch.to_pydict() == {"images": [2, 1, 0], "words": ["a", "b", "c"]}
    with pytest.raises(MediaError):
        read_media(f"parquet:1:0:images:{path}")


def test_several_images_are_one_tar_of_one_frame_each(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number, "PNG", (40 + 10 * number, 80)))
    references = [str(tmp_path / f"{number}.png") for number in range(5)]
    frames = extract_frames(read_media("\n".join(references[:3])), RULE)
    assert frames.pixels.shape == (3, 42, 42, 3)
    for reference, frame in zip(references, frames.pixels, strict=False):
        assert (extract_frames(read_media(reference), RULE).pixels[0] == frame).all()
    with pytest.raises(ClipError, match="5 images in one sample; at most 4 are allowed"):
        extract_frames(read_media("\n".join(references)), RULE)
    assert files_of("\n".join([*references[:2], "bytes:3+4:/a\t/b"])) == [*references[:2], "/a", "/b"]


IMAGES = [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("1", "PNG")]
IMAGES += [("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "TIFF")]


@pytest.mark.parametrize(("mode", "kind"), IMAGES)
def test_images_of_datasets_look_as_pillow_shows_them(mode: str, kind: str) -> None:
    original = Image.open(io.BytesIO(picture(5, "PNG", (80, 80)))).resize((8, 8)).resize((80, 80), Image.Resampling.BICUBIC)
    original = original.convert(mode, dither=Image.Dither.NONE)
    stored, plain = io.BytesIO(), io.BytesIO()
    original.save(stored, kind)
    Image.open(stored).convert("RGB").save(plain, "PNG")
    found, expected = (extract_frames(content.getvalue(), RULE).pixels for content in (stored, plain))
    assert found.shape == (1, 42, 42, 3)
    assert np.abs(found.astype(int) - expected).mean() < 6


def test_a_photograph_is_turned_upright_as_its_camera_says() -> None:
    original = Image.open(io.BytesIO(picture(6, "PNG", (80, 80))))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise to show
    stored, upright = io.BytesIO(), io.BytesIO()
    original.save(stored, "PNG", exif=exif)
    original.rotate(-90).save(upright, "PNG")
    found, expected = (extract_frames(content.getvalue(), RULE).pixels.astype(int) for content in (stored, upright))
    assert np.abs(found - expected).mean() < 5


def test_seconds_of_a_video() -> None:
    content = clip(4)
    complete = extract_frames(content, RULE)
    for start, end in ((0.0, 2.0), (1.0, 4.0), (2.5, 9.0)):
        part = extract_frames(content, RULE, (start, end))
        assert part.duration_s == pytest.approx(min(end, 4.0) - start, abs=0.02)
        assert len(part.pixels) == max(1, int(min(end, 4.0) - start))
        if start.is_integer():
            assert (part.pixels == complete.pixels[int(start) : int(start) + len(part.pixels)]).all()
    with pytest.raises(ClipError, match=r"seconds 5 to 6 are not in a video of 4\.0 s"):
        extract_frames(content, RULE, (5.0, 6.0))


@pytest.mark.parametrize(
    ("address", "window", "rest"),
    [
        ("a.mp4", None, "a.mp4"),
        ("a.mp4#t=1,2.5", (1.0, 2.5), "a.mp4"),
        ("x.parquet#row=3&t=0,4", (0.0, 4.0), "x.parquet#row=3"),
        ("b#t=1.mp4", None, "b#t=1.mp4"),
        ("http://h/c.mp4?t=1,2", None, "http://h/c.mp4?t=1,2"),
    ],
)
def test_an_address_says_which_seconds(address: str, window: tuple[float, float] | None, rest: str) -> None:
    assert (time_window(address), without_window(address)) == (window, rest)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["a", "b", "[", ","]), VALUES, max_size=3), max_size=8)


@given(RECORDS, st.sampled_from([None, 1]), st.integers(1, 40))
def test_json_is_read_as_a_stream_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict], indent: int | None, block: int
) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_text(json.dumps(records, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "BLOCK_CHARACTERS", block)
        with (folder / "a.json").open() as stream:
            assert list(json_files._items(stream)) == records
        (folder / "lines.json").write_text("\n".join(json.dumps(record, indent=indent) for record in records))
        with (folder / "lines.json").open() as stream:
            assert list(json_files._items(stream)) == records
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}, {"a"', "Expecting|Unterminated|ends within"),
        ('[{"a": 1}] {"a": 2}', "follows"),
        ("[1]", "is int"),
        ('[{"a": 1}', "ends within"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_json(tmp_path / "a.json", ["a"]))


def test_columns_of_several_types_are_texts_and_unknown_ones_are_absent(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "x": "a"}\n\n{"id": "two"}\n')
    (batch,) = read_table(tmp_path / "a.jsonl", ["id", "x", "y"])
    assert batch.to_pydict() == {"id": ["1", "two"], "x": ["a", None]}


def test_integers_beyond_64_bits_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"id": 1}}\n{{"id": {2**64 - 1}}}\n')
    (batch,) = read_table(tmp_path / "a.jsonl", ["id"])
    assert batch.to_pydict() == {"id": ["1", str(2**64 - 1)]}
