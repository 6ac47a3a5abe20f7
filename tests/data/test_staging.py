"""Shards on a slow or failing file system: copies on a local disk under a cap, and reads that are tried again."""

import errno
import logging
import os
import time
from contextlib import suppress

import pytest
from filelock import FileLock

from fvlm_core.config import DataSettings, RunSettings, StagingSettings
from fvlm_core.data import shard_io
from fvlm_core.data.loader import loader_processes, train_steps
from fvlm_core.data.shard_io import GAP_BYTES, CorruptSampleError, ShardFile, spans
from fvlm_core.data.shard_set import ShardSet
from tests.tiny import tiny_shards

RUN = RunSettings(steps=6, batch_samples=12)


@pytest.fixture
def shards(tmp_path):
    return ShardSet(tiny_shards(tmp_path / "shards"))


def data(**changes):
    parts = [{"source": source, "share": 0.5} for source in ("gaze_cell", "text")]
    return DataSettings.model_validate({"mixture": parts, **changes})


def keys(shards, settings):
    steps = train_steps(shards, settings, RUN, tokens_per_frame=1, rank=0, world_size=1)
    return [sorted(key for batch in step for key in batch.keys) for step in steps]


def copies(folder):
    return {path.name.replace("--", "/") for path in folder.glob("shards-*/*.tar")}


def test_staged_shards_give_the_same_samples(shards, tmp_path):
    settings = data(staging={"folder": tmp_path / "local"})
    assert keys(shards, settings) == keys(shards, data())
    assert copies(tmp_path / "local") == {name for name in shards.shard_names if name.startswith(("train/gaze_cell", "train/text"))}
    assert not list((tmp_path / "local").glob("shards-*/*.part"))


def test_the_cap_holds_and_the_least_recently_read_go(shards, tmp_path):
    sizes = sorted((shards.folder / name).stat().st_size for name in shards.shard_names)
    cap = sizes[-1] + sizes[-2]
    staged = shards.staged(StagingSettings(folder=tmp_path / "local", max_gb=cap / 1e9))
    rows = {name: int((shards.shard_numbers == number).argmax()) for number, name in enumerate(shards.shard_names)}
    for name, row in rows.items():
        assert staged.read(row, image_repeats=1).turns == shards.read(row, image_repeats=1).turns
        assert name in copies(tmp_path / "local")
        assert sum(path.stat().st_size for path in (tmp_path / "local").glob("shards-*/*.tar")) <= cap
    assert len(copies(tmp_path / "local")) < len(rows)


def test_what_a_killed_process_left_of_a_copy_does_not_count(shards, tmp_path):
    name = shards.shard_names[0]
    size = (shards.folder / name).stat().st_size
    settings = StagingSettings(folder=tmp_path / "local", max_gb=1.5 * size / 1e9)
    row = int((shards.shard_numbers == 0).argmax())
    shards.staged(settings).read(row, image_repeats=1)
    (copy,) = (tmp_path / "local").glob("shards-*/*.tar")
    copy.rename(copy.with_suffix(".part"))
    shards.staged(settings).read(row, image_repeats=1)
    assert copies(tmp_path / "local") == {name}


def test_a_shard_above_the_cap_is_read_where_it_is(shards, tmp_path, caplog):
    staged = shards.staged(StagingSettings(folder=tmp_path / "local", max_gb=1e-6))
    with caplog.at_level(logging.WARNING):
        assert keys(staged, data(staging=staged.staging_settings)) == keys(shards, data())
    assert "do not fit" in caplog.text
    assert not copies(tmp_path / "local")


def test_a_copy_that_is_not_the_manifests_is_not_used(shards, tmp_path, caplog):
    name = shards.shard_names[0]
    row = int((shards.shard_numbers == 0).argmax())
    expected = shards.read(row, image_repeats=1)
    with (shards.folder / name).open("ab") as stream:
        stream.write(b"more")
    staged = shards.staged(StagingSettings(folder=tmp_path / "local"))
    with caplog.at_level(logging.WARNING):
        assert staged.read(row, image_repeats=1).turns == expected.turns
    assert "differs from the manifest's" in caplog.text
    assert not copies(tmp_path / "local")


def test_an_evicted_copy_is_made_again(shards, tmp_path):
    staged = shards.staged(StagingSettings(folder=tmp_path / "local"))
    first = staged.read(0, image_repeats=1)
    for path in (tmp_path / "local").glob("shards-*/*.tar"):
        path.unlink()
    assert staged.read(0, image_repeats=1).turns == first.turns
    assert copies(tmp_path / "local")


def read_all(folder, staging, stride):
    shards = ShardSet(folder, staging)
    rows = range(len(shards.n_frames))[::stride]
    assert all(shards.read(row, image_repeats=1).turns for row in [*rows, *rows])


def test_processes_that_stage_together_stay_under_the_cap(shards, tmp_path):
    """Two processes read all shards at once, in other orders; nothing fails, and never is more held than allowed."""
    cap = 3 * max((shards.folder / name).stat().st_size for name in shards.shard_names)
    (tmp_path / "local").mkdir()
    staging, most = StagingSettings(folder=tmp_path / "local", max_gb=cap / 1e9), 0
    processes = [loader_processes().Process(target=read_all, args=(shards.folder, staging, stride)) for stride in (7, -7)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        held: dict[int, int] = {}  # by inode: a copy that is renamed meanwhile is one
        with FileLock(tmp_path / "local" / "eviction.lock"):
            for path in (tmp_path / "local").glob("shards-*/*"):
                with suppress(FileNotFoundError):
                    held[path.stat().st_ino] = path.stat().st_size
        most = max(most, sum(held.values()))
        time.sleep(0.005)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert 0 < most <= cap


def test_a_failing_read_is_tried_again(shards, monkeypatch, caplog):
    monkeypatch.setattr(shard_io, "RETRY_DELAYS_S", (0.0, 0.0))
    path, failures = shards.folder / shards.shard_names[0], [errno.EIO, errno.ESTALE]
    pread = os.pread

    def failing(descriptor, size, offset):
        if failures:
            raise OSError(failures.pop(), "no answer")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with caplog.at_level(logging.WARNING):
        assert ShardFile(path).read(0, 512) == path.read_bytes()[:512]
    assert caplog.text.count("trying again") == 2
    failures.extend([errno.EIO] * 3)
    with pytest.raises(CorruptSampleError, match="cannot be read: no answer"):
        ShardFile(path).read(0, 512)


def test_a_sample_that_cannot_be_read_is_counted_and_replaced(shards, monkeypatch, caplog):
    """A bad place on the disk: what is read together with it still comes."""
    monkeypatch.setattr(shard_io, "RETRY_DELAYS_S", (0.0, 0.0))
    row = int(shards.row_numbers("train", "text")[3])
    key, bad, shard = (
        shards.record(row)["key"],
        int(shards._json_offsets[row]),
        shards.folder / shards.shard_names[shards.shard_numbers[row]],
    )
    pread = os.pread

    def failing(descriptor, size, offset):
        if os.path.samefile(f"/proc/self/fd/{descriptor}", shard) and offset <= bad < offset + size:
            raise OSError(errno.EIO, "no answer")
        return pread(descriptor, size, offset)

    assert key in {key for step in keys(shards, data()) for key in step}
    monkeypatch.setattr(os, "pread", failing)
    with caplog.at_level(logging.WARNING):
        found = keys(shards, data())
    assert [len(step) for step in found] == [12] * 6
    assert key not in {key for step in found for key in step}
    assert caplog.text.count("skipped damaged sample 1 of at most 1") == 1
    assert "skipped damaged sample 2" not in caplog.text


def test_neighbours_are_read_by_one_request():
    places = {7: (0, 100), 3: (612, 700), 9: (GAP_BYTES + 701, GAP_BYTES + 800), 1: (650, 660)}
    assert spans(places) == [((0, 700), {7: (0, 100), 3: (612, 700), 1: (650, 660)}), ((GAP_BYTES + 701, GAP_BYTES + 800), {9: places[9]})]
