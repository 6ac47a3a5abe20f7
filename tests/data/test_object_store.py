"""Videos out of an object store and shards into one, through a real S3 server."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.fs
import pytest
import webdataset

from fvlm_core.data import publish as publish_module
from fvlm_core.data.clips import make_clips
from fvlm_core.data.download import download
from fvlm_core.data.jobs import ClipJob, DownloadJob, PublishJob, ShardManifest, Source
from fvlm_core.data.media import read_media
from fvlm_core.data.publish import publish
from fvlm_core.data.sources.record import PATH, SOURCES, make_record, read_rows, record_folder
from fvlm_core.data.sources.stored import copies
from fvlm_core.errors import UserError
from fvlm_core.manifest import sha256_file
from tests.tiny import tiny_shards

PYTHON = Path(__file__).parents[2] / ".venv-video2dataset/bin/python"
moto = pytest.importorskip("moto.server", reason="needs moto's server, of the extra dev")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[pyarrow.fs.FileSystem]:
    """An S3 server with the bucket `fvlm`, and the environment that leads to it."""
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    store = pyarrow.fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
    store.create_dir("fvlm")
    yield store
    server.stop()


@pytest.mark.skipif(not PYTHON.exists(), reason="needs ./infra/video2dataset_env.sh")
def test_videos_of_a_store(store: pyarrow.fs.FileSystem, tmp_path: Path) -> None:
    """Beside the same clips as files: equal content but for the address; what is not there is said."""
    make_clips(ClipJob.model_validate({"output": tmp_path, "sources": {"gaze": {"task": "caption", "train": 3, "val": 0}}}))
    frame = pd.read_parquet(tmp_path / "clips.parquet")[["url", "caption"]]
    pyarrow.fs.copy_files(str(tmp_path / "clips"), "fvlm/clips", destination_filesystem=store)
    stored = frame.assign(url="s3://fvlm/" + frame["url"])
    stored.loc[len(stored)] = ["s3://fvlm/clips/gone.mp4", "a clip"]
    found = {}
    for name, rows in (("files", frame), ("stored", stored)):
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
        source = {"name": "videos", "files": [tmp_path / f"{name}.csv"]}
        settings = {"source": source, "video2dataset_python": PYTHON, "frame_px": 42, "retries": 0, "max_bad_share": 0.5}
        found[name] = download(DownloadJob.model_validate({"output": tmp_path / name, **settings}))
    contents = [pd.read_parquet(tmp_path / name / "content.parquet")[["frames_sha256", "text_sha256"]] for name in found]
    assert contents[0].equals(contents[1])
    assert len(contents[0]) == 3
    assert [(clip.url, clip.reason) for clip in found["stored"].bad] == [("s3://fvlm/clips/gone.mp4", "file not found")]


def test_shards_into_a_store(store: pyarrow.fs.FileSystem, tmp_path: Path) -> None:
    """Complete there, the manifest last; run again, only what is missing or short is copied."""
    shards = tiny_shards(tmp_path / "shards", clips=4)
    job = PublishJob(output=tmp_path / "publish", shards=shards, to="s3://fvlm/v1/shards")
    manifest = publish(job)
    back = tmp_path / "back"
    back.mkdir()
    pyarrow.fs.copy_files("fvlm/v1/shards", str(back), source_filesystem=store)
    assert ShardManifest.read_whole(back) == ShardManifest.read(shards)
    assert manifest.counts["files"] == sum(1 for path in back.rglob("*") if path.is_file())
    tar = next(back.glob("train/*.tar"))
    assert sum(1 for _ in webdataset.WebDataset(str(tar), shardshuffle=False)) > 0

    name = f"fvlm/v1/shards/train/{tar.name}"
    untouched = store.get_file_info("fvlm/v1/shards/index.parquet").mtime
    with store.open_output_stream(name) as stream:
        stream.write(b"cut short")
    publish(job)
    assert store.get_file_info(name).size == tar.stat().st_size
    assert store.get_file_info("fvlm/v1/shards/index.parquet").mtime == untouched


def test_other_shards_of_equal_sizes_replace_those_there(
    store: pyarrow.fs.FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the job is interrupted: no manifest is there meanwhile, and the next one copies the rest only."""
    shards = tiny_shards(tmp_path / "shards", clips=4)
    job = PublishJob(output=tmp_path / "publish", shards=shards, to="s3://fvlm/v1/shards")
    publish(job)
    for path in shards.rglob("*.tar"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")  # of the padding, equal size
    manifest = ShardManifest.read(shards)
    changed = [
        file.model_copy(update={"sha256": sha256_file(shards / file.path)}) if file.path.endswith(".tar") else file
        for file in manifest.files
    ]
    manifest.model_copy(update={"files": changed}).write(shards)

    copied: list[str] = []
    real = publish_module._copy

    def copy(path: Path, *to: Any) -> None:
        if len(copied) == stop_after:
            raise OSError("the connection is lost")
        copied.append(path.name)
        real(path, *to)

    monkeypatch.setattr(publish_module, "_copy", copy)
    monkeypatch.setattr(publish_module, "PARALLEL", 1)
    stop_after = 2
    with pytest.raises(UserError, match="the connection is lost"):
        publish(job)
    assert store.get_file_info("fvlm/v1/shards/manifest.json").type == pyarrow.fs.FileType.NotFound
    stop_after = -1
    publish(job)
    tars = [file.path for file in changed if file.path.endswith(".tar")]
    assert sorted(copied) == sorted([*(Path(path).name for path in tars), "manifest.json"]), "each once, and nothing else"
    back = tmp_path / "back"
    back.mkdir()
    pyarrow.fs.copy_files("fvlm/v1/shards", str(back), source_filesystem=store)
    assert ShardManifest.read_whole(back) == ShardManifest.read(shards)
    assert not (back / publish_module.MARK).exists()


def test_a_store_that_cannot_be_written(store: pyarrow.fs.FileSystem, tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "shards", clips=1)
    with pytest.raises(UserError, match="object store cannot be written"):
        publish(PublishJob(output=tmp_path / "publish", shards=shards, to="s3://nobody/shards"))
    assert not (tmp_path / "publish" / "manifest.json").exists()


def test_tables_of_a_store_are_copied_once_and_again_when_they_change(store: pyarrow.fs.FileSystem, tmp_path: Path) -> None:
    def put(name: str, *captions: str) -> None:
        rows = pd.DataFrame({"url": [f"https://videos.test/{caption}.mp4" for caption in captions], "caption": captions})
        rows.to_parquet(tmp_path / name)
        pyarrow.fs.copy_files(str(tmp_path / name), f"fvlm/tables/{name}", destination_filesystem=store)

    def rows_of() -> list[str]:
        return [caption for batch in read_rows(record_folder(source, tmp_path), ["caption"]) for caption in batch.column(0).to_pylist()]

    source = Source.model_validate({"name": "videos", "stored": ["s3://fvlm/tables/train-*.parquet"]})
    with pytest.raises(UserError, match="no file in the object store matches"):
        make_record(source, tmp_path)
    put("train-0.parquet", "one", "two")
    put("train-1.parquet", "three")
    put("other.parquet", "four")
    assert make_record(source, tmp_path).rows == 3
    assert rows_of() == ["one", "two", "three"]
    before = {path: path.stat().st_ino for path in copies(source.stored, tmp_path / SOURCES)}
    put("train-1.parquet", "five", "six")
    assert make_record(source, tmp_path).rows == 4
    assert rows_of() == ["one", "two", "five", "six"]
    again = {path: path.stat().st_ino for path in copies(source.stored, tmp_path / SOURCES)}
    assert [before[path] == again[path] for path in before] == [True, False], "what has not changed is not fetched again"
    store.delete_file("fvlm/tables/train-0.parquet")
    assert make_record(source, tmp_path).rows == 2


def test_a_zip_archive_of_a_store_is_read_where_it_is(store: pyarrow.fs.FileSystem, tmp_path: Path) -> None:
    contents = {"clips/one.mp4": b"1" * 5000, "clips/two.mp4": bytes(range(256)) * 50}
    with zipfile.ZipFile(tmp_path / "clips.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    pyarrow.fs.copy_files(str(tmp_path / "clips.zip"), "fvlm/clips.zip", destination_filesystem=store)
    (tmp_path / "videos.csv").write_text("url,caption\none.mp4,a\ntwo.mp4,b\n")
    source = Source.model_validate({"name": "videos", "files": [tmp_path / "videos.csv"], "web_archives": ["s3://fvlm/clips.zip"]})
    assert (make_record(source, tmp_path).local, make_record(source, tmp_path).missing) == (2, 0)
    paths = [path for batch in read_rows(record_folder(source, tmp_path), [PATH]) for path in batch.column(0).to_pylist()]
    assert [read_media(path) for path in paths] == list(contents.values())


def test_a_source_has_files_of_some_kind() -> None:
    with pytest.raises(ValueError, match="has no files: give `files` or `stored`"):
        Source.model_validate({"name": "videos"})
