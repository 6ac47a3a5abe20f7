"""The volume's S3 API: with only RunPod's operations, in step with the folder, and transfers that go on after an interruption."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.board import Board
from infra.mirror import SMALL_BYTES, mirror
from infra.runpod.code import archived, upload_code
from infra.runpod.emulator.s3 import S3Side
from infra.s3 import S3Store, UnsupportedOperationError, VolumeError, _check_supported, connect, local_path
from infra.stack import REPOSITORY
from infra.store import FolderStore, Store

ACCESS, SECRET = "user_planted", "rps_planted"
PART = 5 * 2**20
"""moto, unlike RunPod, takes no smaller parts."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "volume"
    folder.mkdir()
    return folder


@pytest.fixture
def side(folder: Path) -> Iterator[S3Side]:
    with S3Side(lambda: {"vol1": folder}, access_key=ACCESS, secret_key=SECRET) as side:
        yield side


@pytest.fixture
def client(side: S3Side) -> Any:
    return connect("US-KS-2", ACCESS, SECRET, url=side.url)


@pytest.fixture
def bucket(client: Any) -> S3Store:
    return S3Store(client, "vol1")


def test_what_a_pod_writes_is_there_and_what_is_put_is_a_file(bucket: S3Store, folder: Path) -> None:
    (folder / "steps").mkdir()
    (folder / "steps" / "manifest.json").write_text("one")
    assert bucket.read("steps/manifest.json") == b"one"
    (folder / "steps" / "manifest.json").write_text("a second one")
    assert bucket.read("steps/manifest.json") == b"a second one"
    bucket.write("comms/b#c.md", b"hello")
    assert (folder / "comms" / "b#c.md").read_bytes() == b"hello"
    assert bucket.keys("") == ["comms/b#c.md", "steps/manifest.json"]
    assert bucket.keys("steps/") == ["steps/manifest.json"]
    (folder / "steps" / "manifest.json").unlink()
    assert (bucket.read("steps/manifest.json"), bucket.size("steps/manifest.json"), bucket.keys("steps/")) == (None, None, [])


def test_a_listing_of_more_than_one_page_is_complete(bucket: S3Store, folder: Path) -> None:
    """S3 lists 1,000 keys at a time."""
    (folder / "many").mkdir()
    names = [f"many/{number:04d}" for number in range(2001)]
    for name in names:
        (folder / name).touch()
    asked = []
    bucket.client.meta.events.register("before-call.s3.ListObjectsV2", lambda params, **_: asked.append(params["query_string"]))
    assert bucket.keys("many/") == names
    assert ["continuation-token" in query for query in asked] == [False, True, True]


def test_operations_that_runpod_lacks_fail_here_too(client: Any, bucket: S3Store) -> None:
    bucket.write("a", b"1")
    with pytest.raises(UnsupportedOperationError, match="DeleteObjects"):
        client.delete_objects(Bucket="vol1", Delete={"Objects": [{"Key": "a"}]})
    plain = connect("US-KS-2", ACCESS, SECRET, url=client.meta.endpoint_url)
    plain.meta.events.unregister("before-call.s3", _check_supported)
    for refused in (
        lambda: plain.delete_objects(Bucket="vol1", Delete={"Objects": [{"Key": "a"}]}),
        lambda: plain.put_object(Bucket="vol1", Key="b", Body=b"", IfNoneMatch="*"),
        lambda: plain.get_object_tagging(Bucket="vol1", Key="a"),
        lambda: plain.create_bucket(Bucket="vol2"),
    ):
        with pytest.raises(ClientError, match=r"NotImplemented|501"):
            refused()
    assert bucket.read("a") == b"1"


def test_errors_say_what_to_do(side: S3Side, bucket: S3Store) -> None:
    with pytest.raises(VolumeError, match="volumes in US-TX-1 have no S3 API"):
        connect("US-TX-1", ACCESS, SECRET)
    wrong = S3Store(connect("US-KS-2", "rpa_other", SECRET, url=side.url), "vol1")
    with pytest.raises(VolumeError, match="not the same as RUNPOD_API_KEY"):
        wrong.read("a")
    with pytest.raises(VolumeError, match="NoSuchBucket"):
        S3Store(bucket.client, "vol9").write("a", b"")
    with pytest.raises(VolumeError, match="no missing on the volume"):
        bucket.download("missing", Path("x"))


def test_a_download_and_an_upload_go_on_where_they_were_interrupted(bucket: S3Store, folder: Path, tmp_path: Path) -> None:
    content = os.urandom(3 * PART + 17)
    (folder / "large.bin").write_bytes(content)
    seen: list[int] = []

    def breaks(done: int, total: int) -> None:
        assert total == len(content)
        seen.append(done)
        if len(seen) == 2:
            raise ConnectionError("the network is gone")

    here = tmp_path / "home" / "large.bin"
    with pytest.raises(ConnectionError):
        bucket.download("large.bin", here, progress=breaks, part_bytes=PART)
    assert not here.exists()
    assert bucket.download("large.bin", here, progress=breaks, part_bytes=PART) is True
    assert seen == [PART, 2 * PART, 3 * PART, len(content)], "no part twice"
    assert here.read_bytes() == content
    assert bucket.download("large.bin", here) is False

    seen.clear()
    with pytest.raises(ConnectionError):
        bucket.upload(here, "up/large.bin", progress=breaks, part_bytes=PART)
    sent = []
    bucket.client.meta.events.register("before-call.s3.UploadPart", lambda params, **_: sent.append(params["query_string"]["partNumber"]))
    assert bucket.upload(here, "up/large.bin", part_bytes=PART) is True
    assert sent == [3, 4], "the parts that were there are not sent again"
    assert (folder / "up" / "large.bin").read_bytes() == content
    assert bucket.upload(here, "up/large.bin", part_bytes=PART) is False


def test_a_file_that_was_changed_and_kept_its_size_moves_again(bucket: S3Store, folder: Path, tmp_path: Path) -> None:
    mine, here = tmp_path / "videos.csv", tmp_path / "home" / "videos.csv"
    mine.write_text("url,caption\na,b\n")
    assert bucket.upload(mine, "videos.csv") is True
    assert bucket.upload(mine, "videos.csv") is False
    assert bucket.download("videos.csv", here) is True
    mine.write_text("url,caption\na,c\n")
    assert bucket.upload(mine, "videos.csv") is True
    assert (folder / "videos.csv").read_text() == mine.read_text()
    os.utime(here, (0, 0))  # fetched at another time than the file on the volume was written: S3's are whole seconds
    assert bucket.download("videos.csv", here) is True
    assert here.read_text() == mine.read_text()
    (tmp_path / "home" / "videos.csv.1.part").write_text("of another time")
    mine.write_text("url,caption\na,ddddd\n")
    bucket.upload(mine, "videos.csv")
    bucket.download("videos.csv", here)
    assert here.read_text() == mine.read_text()
    assert [path.name for path in here.parent.iterdir()] == ["videos.csv"]


def test_a_stand_in_has_what_a_plan_reads_and_of_other_large_files_the_size(bucket: S3Store, folder: Path, tmp_path: Path) -> None:
    contents = {"manifest.json": b"{", "index.parquet": b"PAR1", "shard.tar": b"ustar", "note.md": b"n"}
    (folder / "steps").mkdir()
    for name, content in contents.items():
        (folder / "steps" / name).write_bytes(content * (1 if name == "note.md" else SMALL_BYTES))
    assert [mirror(bucket, tmp_path / "home", ["steps/"]) for _ in range(2)] == [3, 0], "the second time from what was fetched"
    here = {name: (tmp_path / "home" / "steps" / name).read_bytes() for name in contents}
    there = {name: (folder / "steps" / name).read_bytes() for name in contents}
    assert here == there | {"shard.tar": bytes(5 * SMALL_BYTES)}


def test_a_board_takes_entries_from_both_sides(bucket: S3Store, folder: Path) -> None:
    now = [1000.0]
    sides = ((FolderStore(folder), "RUNPOD"), (bucket, "LOCAL"))
    pod, home = (Board(store, side, writer=side.lower(), clock=lambda: now[0]) for store, side in sides)
    pod.post("stage1 is done")
    now[0] += 60
    home.post("which learning rate?\nand why")
    now[0] += 60
    pod.post("1e-3")
    text = (folder / "comms" / "BOARD.md").read_text()
    assert text.splitlines()[:2] == ["## [1970-01-01 00:16] RUNPOD", "stage1 is done"]
    assert [entry.text for entry in home.entries()] == ["stage1 is done", "which learning rate?\nand why", "1e-3"]
    with pytest.raises(ValueError, match="needs a text"):
        pod.post("  \n")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_no_entry_of_several_writers_is_lost(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    store: Store = FolderStore(tmp_path_factory.mktemp("board"))
    writers = [Board(store, "RUNPOD", writer=f"pod{number}") for number in range(4)]
    for number, writer in enumerate(order):
        writers[writer].post(str(number))
    assert sorted(int(entry.text) for entry in writers[0].entries()) == list(range(len(order)))
    store.write("comms/BOARD.md", b"lost by a race")
    writers[0].post("last")
    assert (store.read("comms/BOARD.md") or b"").decode().count("## [") == len(order) + 1


def test_code_is_put_on_the_volume_once(folder: Path) -> None:
    store = FolderStore(folder)
    name, content = archived(REPOSITORY)
    assert archived(REPOSITORY) == (name, content)
    assert upload_code(REPOSITORY, store) == name
    made = (folder / "code" / f"{name}.tar.gz").stat().st_mtime_ns
    assert upload_code(REPOSITORY, store) == name
    assert (folder / "code" / f"{name}.tar.gz").stat().st_mtime_ns == made


def test_a_copy_of_the_code_knows_its_commit_and_reaches_the_same_files(tmp_path: Path) -> None:
    """What a pod's manifests say of code and commit is what they say here, though there is no .git: so `on_code_change` holds there."""
    with tarfile.open(fileobj=io.BytesIO(archived(REPOSITORY)[1])) as archive:
        archive.extractall(tmp_path, filter="data")
    code = "from fvlm_core.provenance import *; print(ROOT, commit()); print({p: digest(p) for p in imported_files('fvlm_core.train')})"
    said = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=place, env=os.environ | {"PYTHONPATH": str(place)}, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for place in (tmp_path, REPOSITORY)
    ]
    assert said[0][0] == f"{tmp_path} {said[1][0].split()[1]}"
    assert said[0][1] == said[1][1]
    assert len(said[0][0].split()[1]) >= 40


@pytest.mark.parametrize("key", ["../secret", "a/../../b", "/etc/passwd"])
def test_a_key_never_leads_out_of_its_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        local_path(tmp_path, key)
