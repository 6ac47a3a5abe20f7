import json
import logging
import shutil
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.config import DataSettings, RunSettings, SourceShare, ValidationSettings
from fvlm_core.data import buffers, gaze
from fvlm_core.data.batch import IGNORE
from fvlm_core.data.loader import train_steps, val_batches
from fvlm_core.data.shard_io import CorruptSampleError
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from tests.tiny import tiny_shards

MIXTURE = {"gaze_cell": 0.5, "gaze_caption": 0.2, "gaze_image": 0.16, "text": 0.14}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return ShardSet(tiny_shards(tmp_path_factory.mktemp("shards")))


def data(mixture=None, **changes):
    parts = [{"source": source, "share": share} for source, share in (mixture or MIXTURE).items()]
    return DataSettings.model_validate({"mixture": parts, **changes})


def run(**changes):
    return RunSettings.model_validate({"steps": 6, "batch_samples": 12, **changes})


def steps(shards, settings, length, *, rank=0, world_size=1, first_step=0):
    return list(train_steps(shards, settings, length, tokens_per_frame=1, rank=rank, world_size=world_size, first_step=first_step))


def contents(batch):
    """What each sample of a batch is, wherever it stands: tokens, labels, and the pixels it shows."""
    found = []
    shown = torch.repeat_interleave(torch.arange(batch.n_samples), batch.cu_seqlens.diff())[batch.visual_positions[:, 0]]
    for number, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        pixels = batch.frames[batch.shown_frames[shown == number]].numpy().tobytes()
        found.append(
            (batch.keys[number], tuple(batch.input_ids[start:end].tolist()), tuple(batch.labels[start:end].tolist()), hash(pixels))
        )
    return found


def of_step(micro_batches):
    return Counter(item for batch in micro_batches for item in contents(batch))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 2, 3, 4]), st.sampled_from([(1, 1), (9, 200), (6, 1000), (100, 120)]), st.integers(0, 1000))
def test_a_step_depends_on_neither_resuming_nor_ranks(shards, first, world_size, budget, seed):
    frames, tokens = budget
    whole = steps(shards, data(), run(seed=seed))
    micro_batch = {"frames": frames, "tokens": tokens}
    parts = [
        steps(shards, data(), run(seed=seed, micro_batch=micro_batch), rank=rank, world_size=world_size, first_step=first)
        for rank in range(world_size)
    ]
    for number, expected in enumerate(whole[first:]):
        shares = [part[number] for part in parts]
        assert sum((of_step(share) for share in shares), Counter()) == of_step(expected)
        assert len({len(share) for share in shares}) == 1
        for batch in chain(*shares):
            within = len(batch.frames) <= frames and len(batch.input_ids) <= tokens
            assert within or batch.n_samples == 1
            assert sum(batch.lengths) == len(batch.input_ids)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_loader_processes_see_the_same_global_batches(shards, world_size):
    small, expected = (
        run(steps=3, micro_batch={"frames": 9, "tokens": 400}),
        [of_step(step) for step in steps(shards, data(), run(steps=3))],
    )
    for workers in (0, 2):
        ranks = [steps(shards, data(workers=workers), small, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [sum((of_step(share) for share in shares), Counter()) for shares in zip(*ranks, strict=True)] == expected


def test_a_batch_keeps_its_frames_while_it_is_used(shards):
    """Buffers are reused when their batch is gone, and only then; there are fewer buffers than steps here."""
    small = run(steps=40, batch_samples=4, micro_batch={"frames": 3, "tokens": 100})
    held = steps(shards, data({"gaze_cell": 1.0}), small)
    again = (of_step(step) for step in train_steps(shards, data({"gaze_cell": 1.0}), small, tokens_per_frame=1, rank=0, world_size=1))
    assert [of_step(step) for step in held] == list(again)


def test_too_little_shared_memory_is_refused_before_anything_starts(shards, monkeypatch):
    monkeypatch.setattr(buffers.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"need 0\.\d+ GB of shared memory, 0\.00 GB are free"):
        steps(shards, data(workers=1), run())
    assert len(steps(shards, data(), run())) == 6


def test_conversations_about_a_clip_share_its_frames(shards):
    length = run(steps=1, batch_samples=216)  # an epoch: all conversations about each clip
    for batch in chain(*steps(shards, data({"gaze_cell": 1.0}, question_first=0), length)):
        assert len(set(batch.keys)) < batch.n_samples
        assert len(batch.frames) == 3 * len(set(batch.keys))


def test_resumed_is_the_same_tensors(shards):
    small = run(micro_batch={"frames": 9, "tokens": 200})
    whole, resumed = steps(shards, data(), small), steps(shards, data(), small, first_step=3)
    for left, right in zip(chain(*whole[3:]), chain(*resumed), strict=True):
        assert left.keys == right.keys
        for name in ("frames", "input_ids", "labels", "position_ids", "cu_seqlens", "shown_frames", "visual_positions", "query_sources"):
            assert torch.equal(getattr(left, name), getattr(right, name))


def test_without_a_number_of_steps_it_goes_on(shards):
    endless = train_steps(shards, data(), run(steps=None, budget_flops=1e9), tokens_per_frame=1, rank=0, world_size=1)
    assert [of_step(next(endless)) for _ in range(6)] == [of_step(step) for step in steps(shards, data(), run())]


def test_shares_and_seeds(shards):
    long = run(steps=50, batch_samples=20)
    sources = Counter(source for step in steps(shards, data(), long) for batch in step for source in batch.sources)
    assert sources == {"gaze_cell": 500, "gaze_caption": 200, "gaze_image": 160, "text": 140}
    assert of_step(steps(shards, data(), run(seed=0))[0]) != of_step(steps(shards, data(), run(seed=1))[0])


def test_no_validation_sample_is_trained_on(shards):
    trained = {key for step in steps(shards, data(), run(steps=60)) for batch in step for key in batch.keys}
    held = {key for batch in val_batches(shards, 500, data(), tokens_per_frame=1, batch_samples=16) for key in batch.keys}
    assert not trained & held
    assert held <= set(shards.rows("val")["key"])


def test_a_complete_epoch_reads_every_row_once(shards):
    only = data({"gaze_cell": 1.0}, question_first=0)
    rows = len(shards.rows("train", "gaze_cell"))
    assert rows == 216
    seen = sum((of_step(step) for step in steps(shards, only, run(steps=18))), Counter())
    assert len(seen) == rows
    assert set(seen.values()) == {1}


def test_rows_and_samples_agree(shards):
    frame = shards.rows("train", "gaze_cell")
    for row in frame.index[:20]:
        sample, record, entry = shards.read(row, image_repeats=8), shards.record(row), frame.loc[row]
        assert (sample.key, record["key"]) == (entry["key"], entry["key"])
        [turn] = record["conversations"][entry["conversation"]]
        assert shards.tokenizer.decode(sample.turns[0].answer_ids) == turn["answer"]
        assert shards.tokenizer.decode(sample.turns[0].question_ids) == turn["question"]
        assert sample.frames.shape == (3, gaze.FRAME_PX, gaze.FRAME_PX, 3)
        assert sample.media == [[0, 1, 2]]
        assert entry["n_answer_tokens"] == len(turn["answer"]) + 1
        assert record["probes"][entry["conversation"]]["task"] == entry["task"] == "cell"


def test_n_tokens_is_the_packed_length_without_frames(shards):
    for source, repeats in (("gaze_cell", 3), ("gaze_image", 8), ("text", 0)):
        settings_ = data({source: 1.0}, image_repeats=8)
        [batch] = val_batches(shards, 5, settings_, tokens_per_frame=2, batch_samples=8)
        tokens = shards.rows("val", source).groupby("key")["n_tokens"].first()
        assert batch.cu_seqlens.diff().tolist() == [tokens[key] + 2 * repeats for key in batch.keys]
    everything = [*val_batches(shards, 900, data(), tokens_per_frame=2, batch_samples=8)]
    for step in train_steps(shards, data(), run(steps=120), tokens_per_frame=2, rank=0, world_size=1):
        everything.extend(step)
    assert shards.longest_sequence(data(), tokens_per_frame=2) == max(int(batch.cu_seqlens.diff().max()) for batch in everything)


def test_a_source_without_a_share_makes_no_sequence_longer(shards):
    only, too = data({"text": 1.0}), data({"text": 1.0, "gaze_cell": 0.0})
    assert shards.longest_sequence(only, tokens_per_frame=16) == shards.longest_sequence(too, tokens_per_frame=16)


def test_validation_of_its_own(shards):
    """Runs that train on different data are validated on the same samples, in the same orders, with the same labels."""
    own = ValidationSettings(mixture=[SourceShare(source="gaze_cell", share=0.5), SourceShare(source="gaze_caption", share=0.5)])
    plain = data({"gaze_cell": 0.5, "gaze_caption": 0.5})
    others = [data({"text": 1.0}), data({"gaze_cell": 1.0}, question_first=1.0), data({"gaze_cell": 1.0}, loss_on="all_text")]
    others += [data({"gaze_cell": 1.0}, shuffle_shards=1), data({"gaze_cell": 1.0}, shares_of="tokens")]
    held = [
        [item for batch in val_batches(shards, 40, one, tokens_per_frame=1, batch_samples=8) for item in contents(batch)]
        for one in [plain, *(other.model_copy(update={"validation": own}) for other in others)]
    ]
    reading = plain.model_copy(update={"shuffle_shards": 1})
    held.append([item for batch in val_batches(shards, 40, reading, tokens_per_frame=1, batch_samples=8) for item in contents(batch)])
    assert all(one == held[0] for one in held)
    trained = steps(shards, others[0].model_copy(update={"validation": own}), run(steps=2))
    assert {source for step in trained for batch in step for source in batch.sources} == {"text"}
    with pytest.raises(ValueError, match="preferences are validated on preferences"):
        DataSettings(mixture=plain.mixture, loss_on="preferences", validation=own)


def test_validation_samples_do_not_depend_on_how_long_a_models_samples_are(shards):
    mixed = data({"gaze_cell": 0.5, "text": 0.5}, shares_of="tokens")
    for tokens_per_frame in (1, 16):
        batches = val_batches(shards, 16, mixed, tokens_per_frame=tokens_per_frame, batch_samples=8)
        assert Counter(source for batch in batches for source in batch.sources) == {"gaze_cell": 8, "text": 8}


def test_images_are_shown_often_and_stored_once(shards):
    [batch] = val_batches(shards, 4, data({"gaze_image": 1.0}, image_repeats=5), tokens_per_frame=1, batch_samples=8)
    assert len(batch.shown_frames) == 4 * 5
    assert len(batch.frames) == len(set(batch.keys))


def test_question_order_and_labels(shards):
    def first_queries(settings_):
        return [
            int(source)
            for batch in val_batches(shards, 40, settings_, tokens_per_frame=1, batch_samples=1)
            for source in batch.query_sources[:1, 0]
        ]

    assert all(source == -1 for source in first_queries(data({"gaze_cell": 1.0}, question_first=0)))
    assert all(source >= 0 for source in first_queries(data({"gaze_cell": 1.0}, question_first=1)))
    mixed = np.array(first_queries(data({"gaze_cell": 1.0}, question_first=0.5)))
    assert 8 < (mixed >= 0).sum() < 32
    assert all(source == -1 for source in first_queries(data({"gaze_caption": 1.0}, question_first=1)))
    answers, all_text = (
        next(iter(val_batches(shards, 8, data(loss_on=choice), tokens_per_frame=1, batch_samples=8))) for choice in ("answers", "all_text")
    )
    assert (answers.labels != IGNORE).sum() < (all_text.labels != IGNORE).sum()


def test_validation_is_one_set_whoever_reads_it(shards):
    whole = [item for batch in val_batches(shards, 40, data(), tokens_per_frame=1, batch_samples=7) for item in contents(batch)]
    assert len(whole) == 40
    parts = [list(val_batches(shards, 40, data(), tokens_per_frame=1, batch_samples=7, rank=rank, world_size=3)) for rank in range(3)]
    assert Counter(whole) == Counter(item for part in parts for batch in part for item in contents(batch))
    assert Counter(key.rsplit("-", 1)[0] for key, *_ in whole) == {"gaze_cell": 20, "gaze_caption": 8, "gaze_image": 6, "text": 6}
    many = [
        item for batch in val_batches(shards, 10_000, data({"text": 1.0}), tokens_per_frame=1, batch_samples=7) for item in contents(batch)
    ]
    assert len(many) == 24


def test_validation_by_loader_processes_is_the_same(shards):
    """With more processes than one of the ranks has batches; a damaged sample's error comes back from there too."""
    for rank in range(2):
        alone, by_processes = (
            list(val_batches(shards, 40, data(workers=workers), tokens_per_frame=1, batch_samples=15, rank=rank, world_size=2))
            for workers in (0, 2)
        )
        assert len(alone) == len(by_processes) > 0
        for one, other in zip(alone, by_processes, strict=True):
            assert contents(one) == contents(other)
            assert torch.equal(one.frames, other.frames)
    preferences = data({"text": 1.0}, loss_on="preferences", workers=1)
    with pytest.raises(UserError, match="of 'text' has no rejected answer"):
        list(val_batches(shards, 4, preferences, tokens_per_frame=1, batch_samples=4))


@pytest.mark.parametrize(
    ("settings_", "length", "world_size", "message"),
    [
        (
            data({"gaze_cell": 0.5, "openvid": 0.5}),
            run(),
            1,
            "no train samples of 'openvid'(.|\n)*gaze_caption, gaze_cell, gaze_image, text",
        ),
        (data({"gaze_cell": 0.9999, "text": 0.0001}), run(), 1, "below 1/1000"),
        (data(), run(), 5, "do not divide among 5 ranks"),
    ],
)
def test_impossible_plans(shards, settings_, length, world_size, message):
    with pytest.raises(UserError, match=message):
        steps(shards, settings_, length, world_size=world_size)


@pytest.fixture
def damaged(tmp_path):
    """A copy of its own, and a function that damages the frames or the JSON of a row."""
    shards = ShardSet(tiny_shards(tmp_path / "shards"))

    def damage(row, *, part):
        entry = shards._table.slice(row, 1).to_pylist()[0]
        offset = entry["frame_offsets"][0] if part == "frame" else entry["json_offset"]
        with (shards.folder / entry["shard"]).open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"\0" * 40)

    return shards, damage


@pytest.mark.parametrize(("part", "workers"), [("frame", 0), ("json", 0), ("frame", 1)])
def test_damaged_samples_are_replaced_and_counted(damaged, caplog, part, workers):
    shards, damage = damaged
    only, length = data({"gaze_caption": 0.5, "gaze_cell": 0.5}, workers=workers), run(steps=6)
    row = int(shards.rows("train", "gaze_caption").index[5])
    key = shards.record(row)["key"]
    assert key in {key for step in steps(shards, only, length) for batch in step for key in batch.keys}
    damage(row, part=part)
    with pytest.raises(CorruptSampleError):
        shards.read(row, image_repeats=1)
    with caplog.at_level(logging.WARNING):
        found = steps(shards, only, length)
    assert len([record for record in caplog.records if "skipped damaged sample 1 of at most 1" in record.message]) == 1
    assert all(sum(batch.n_samples for batch in step) == 12 for step in found)
    assert key not in {key for step in found for batch in step for key in batch.keys}


def test_a_damaged_clip_is_one_sample_however_many_conversations_it_has(damaged):
    shards, damage = damaged
    rows = shards.rows("train", "gaze_cell")
    conversations = rows[rows["key"] == rows["key"].iloc[0]]
    assert len(conversations) > 2
    damage(int(conversations.index[0]), part="frame")
    for row in conversations.index:
        with pytest.raises(CorruptSampleError):
            shards.read(int(row), image_repeats=1)
    found = steps(shards, data({"gaze_cell": 1.0}), run(steps=24))
    assert rows["key"].iloc[0] not in {key for step in found for batch in step for key in batch.keys}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_samples_stop_the_run(damaged, workers):
    shards, damage = damaged
    for row in shards.rows("train", "gaze_caption").index[:12]:
        damage(int(row), part="frame")
    with pytest.raises(UserError, match="more than 1 damaged samples"):
        steps(shards, data({"gaze_caption": 0.5, "gaze_cell": 0.5}, workers=workers), run(steps=6))


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_shard_is_named(damaged, workers):
    shards, _ = damaged
    shutil.rmtree(shards.folder / "train")
    with pytest.raises(UserError, match=r"a shard cannot be opened(.|\n)*train/gaze_"):
        steps(ShardSet(shards.folder), data({"gaze_cell": 1.0}, workers=workers), run())


def test_missing_index(damaged):
    shards, _ = damaged
    (shards.folder / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="the index cannot be read"):
        ShardSet(shards.folder)
    (shards.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest"):
        ShardSet(shards.folder)


def test_records_hold_the_contract(shards):
    for source, kind in (("gaze_caption", "video"), ("gaze_cell", "video"), ("gaze_image", "image"), ("text", "text")):
        record = shards.record(int(shards.rows("val", source).index[0]))
        assert (record["source"], record["kind"]) == (source, kind)
        assert record["num_frames"] == {"video": 3, "image": 1, "text": 0}[kind]
        assert len(record["probes"]) == len(record["conversations"])
        assert set(record["conversations"][0][0]) == {"question", "answer", "question_ids", "answer_ids"}
        assert json.loads(json.dumps(record)) == record
