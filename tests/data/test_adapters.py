"""Every published dataset: files in its form -> rows -> shards -> loader -> a training step; and a mixture of all of them."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.small_shards import write_small
from fvlm_core.config import Recipe
from fvlm_core.data.download import download
from fvlm_core.data.frames import FrameRule, encode_jpeg, extract_frames
from fvlm_core.data.jobs import DownloadJob, ShardJob, Source
from fvlm_core.data.loader import train_steps
from fvlm_core.data.media import read_media, time_window
from fvlm_core.data.mixture import BLOCK_SAMPLES, Mixture
from fvlm_core.data.parts import Part, incomplete
from fvlm_core.data.plan import Plan
from fvlm_core.data.rows import SPLITS, Kind
from fvlm_core.data.shard_files import ShardSample
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.shards import make_shards
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources.record import PATH, Record, make_record, read_rows, record_folder
from fvlm_core.errors import UserError
from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from tests.data.published import PUBLISHED, RATE, clip, rlaif_v_formatted
from tests.data.test_download import PYTHON, needs_video2dataset
from tests.train.conftest import tiny_recipe

FRAME_PX = 42
RULE = FrameRule(frame_px=FRAME_PX)
FORMATS = sorted(PUBLISHED)


def source_of(name: str, folder: Path, **settings: Any) -> Source:
    """The dataset's files in a folder, and the source that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    return Source.model_validate({"name": name, "format": name} | PUBLISHED[name](folder) | settings)


def rows_of(one: Source, volume: Path) -> list[dict[str, Any]]:
    make_record(one, volume)
    return [row for batch in read_rows(record_folder(one, volume)) for row in batch.to_pylist()]


def samples_of(rows: list[dict[str, Any]]) -> Iterator[ShardSample]:
    """A row's sample in each split, its frames read as a download would."""
    for row in rows:
        conversations = json.loads(row["conversations"])
        frames: list[bytes] = []
        duration_s = 0.0
        if row["kind"] != "text":
            found = extract_frames(read_media(row[PATH]), RULE, time_window(row["url"]))
            frames, duration_s = [encode_jpeg(frame) for frame in found.pixels], found.duration_s
        for split in SPLITS:
            yield ShardSample(
                source=row["source"],
                kind=cast(Kind, row["kind"]),
                split=split,
                origin=f"{row['url'] or row['conversations']} {split}",
                conversations=conversations,
                probes=json.loads(row["probes"]),
                caption=row["caption"],
                duration_s=duration_s,
                num_frames=len(frames),
                frames=lambda kept=frames: kept,
            )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of every format, by its name."""
    folder = tmp_path_factory.mktemp("published")
    return {name: rows_of(source_of(name, folder / name), folder) for name in FORMATS}


@pytest.fixture(scope="module")
def shards(rows: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards of all of them."""
    folder = tmp_path_factory.mktemp("mixed") / "shards"
    samples = [sample for name in FORMATS for sample in samples_of(rows[name])]
    return ShardSet(write_small(folder, samples, identity="published", frame_px=FRAME_PX, tokens=400))


def recipe_of(folder: Path, shards: ShardSet, mixture: list[dict[str, Any]], **changes: Any) -> Recipe:
    run = {"run__steps": 1, "run__batch_samples": 2, "run__eval_samples": 2}
    return tiny_recipe(folder, shards.folder, data__mixture=mixture, **run, **changes)


def one_step(recipe: Recipe) -> float:
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), recipe.identity({}), {}, has_wandb_key=False)
    trainer.go_to(None, trainer.state)
    loss, trouble = trainer.step()
    assert trouble is None
    return loss


@pytest.mark.parametrize("name", FORMATS)
def test_from_published_files_to_a_training_step(
    name: str, rows: dict[str, list[dict[str, Any]]], shards: ShardSet, tmp_path: Path
) -> None:
    adapter = ADAPTERS[name]
    mine = rows[name]
    assert len(mine) >= 2
    for row in mine:
        chats = json.loads(row["conversations"])
        assert all(turn["question"] and turn["answer"] for chat in chats for turn in chat)
        if adapter.prompt and row["caption"]:
            assert chats[0][0] == {"question": adapter.prompt, "answer": row["caption"]}
        assert not any(mark in row["conversations"] for mark in ("<image>", "<video>"))
    assert len({row["url"] for row in mine}) == (1 if adapter.kind == "text" else len(mine)), "an address names one sample"
    recipe = recipe_of(tmp_path / "run", shards, [{"source": name, "share": 1.0}])
    (batch,) = next(train_steps(shards, recipe.data, recipe.run, tokens_per_frame=1, rank=0, world_size=1))
    assert set(batch.sources) == {name}
    assert (len(batch.shown_frames) > 0) == (adapter.kind != "text")
    assert 0 < one_step(recipe) < 20


def test_preferences_train_as_pairs(shards: ShardSet, tmp_path: Path) -> None:
    data = {"mixture": [{"source": "rlaif_v", "share": 1.0}], "loss_on": "preferences"}
    recipe = recipe_of(tmp_path / "run", shards, data["mixture"], data__loss_on="preferences", dpo={"beta": 0.5})
    assert one_step(recipe) == pytest.approx(np.log(2), abs=1e-4), "the model is its own reference"


def test_both_layouts_of_preferences_are_read(tmp_path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    (tmp_path / "formatted").mkdir()
    formatted = Source.model_validate({"name": "rlaif_v", "format": "rlaif_v"} | rlaif_v_formatted(tmp_path / "formatted"))
    found = [json.loads(row["conversations"])[0][0] for row in rows_of(formatted, tmp_path)]
    assert found == [{"question": f"Question {n}?", "answer": "Squares.", "rejected": "A dog."} for n in range(3)]
    plain = [json.loads(row["conversations"])[0][0] for row in rows["rlaif_v"]]
    assert {turn["rejected"] for turn in plain} == {"A dog on a beach."}


def test_several_images_and_several_turns(rows: dict[str, list[dict[str, Any]]], shards: ShardSet) -> None:
    by_url = {row["url"]: row for row in rows["cauldron"]}
    two_turns = json.loads(by_url["vqav2/train-00000-of-00001-abc.parquet#row=1"]["conversations"])
    assert [turn["question"] for turn in two_turns[0]] == ["Question: which colour?\nAnswer briefly.", "And how dark?"]
    assert len(by_url) == 4, "the row without images is left out"
    for images, row in shards.rows("train", "cauldron").groupby("n_frames").first().iterrows():
        assert images in (1, 2, 3), row
    for number in shards.rows("train", "cauldron").index:
        for repeats in (1, 2, 8):
            sample = shards.read(int(number), image_repeats=repeats)
            assert sample.media == [[index] * repeats for index in range(len(sample.frames))]
            assert len({frame.tobytes() for frame in sample.frames}) == len(sample.frames), "different images"


def test_files_of_equal_folder_and_name_are_told_apart(tmp_path: Path) -> None:
    for configuration in ("one", "two"):
        (tmp_path / configuration).mkdir()
        PUBLISHED["finevideo"](tmp_path / configuration)
    source = Source.model_validate({"name": "films", "format": "finevideo", "files": [tmp_path / "*" / "data" / "train-*.parquet"]})
    make_record(source, tmp_path)
    urls = [url for batch in read_rows(record_folder(source, tmp_path), ["url"]) for url in batch.column(0).to_pylist()]
    assert len(urls) == len(set(urls))
    assert urls[0] == "one/data/train-00000-of-00001.parquet#row=1"
    assert urls[-1].startswith("two/data/train-00000-of-00001.parquet#row=")


@pytest.mark.parametrize("repeats", [1, 3, 8])
def test_images_train_as_one_frame_or_several(shards: ShardSet, tmp_path: Path, repeats: int) -> None:
    mixture = [{"source": "cauldron", "share": 0.5}, {"source": "user", "share": 0.5}]
    assert 0 < one_step(recipe_of(tmp_path / "run", shards, mixture, data__image_repeats=repeats)) < 20


def test_scenes_of_a_film_are_its_own_seconds(rows: dict[str, list[dict[str, Any]]], shards: ShardSet) -> None:
    films, scenes = rows["finevideo"], rows["finevideo_scenes"]
    assert [time_window(row["url"]) for row in scenes] == [(0.0, 2.0), (2.0, 6.0)] * 2, "scenes without a stretch of time are left out"
    assert scenes[0]["caption"] == "Part 1 is grey. Nobody moves."
    assert [len(json.loads(row["conversations"])) for row in films] == [2, 2]
    for row, (start, end) in zip(scenes, [(0, 2), (2, 6)] * 2, strict=True):
        frames = extract_frames(read_media(row[PATH]), RULE, time_window(row["url"]))
        assert frames.duration_s == pytest.approx(end - start)
        levels = [round(float(frame.mean()) / 40) - 1 for frame in frames.pixels]
        assert levels == list(range(start, end))[: len(levels)]
        assert len(levels) == end - start


def test_clips_without_a_window_start_at_their_first_frame(rows: dict[str, list[dict[str, Any]]]) -> None:
    row = next(row for row in rows["user"] if row["url"].endswith("#t=1,3"))
    frames = extract_frames(read_media(row[PATH]), RULE, (1.0, 3.0))
    assert [round(float(frame.mean()) / 40) - 1 for frame in frames.pixels] == [1, 2]
    assert frames.duration_s == pytest.approx(2.0, abs=1 / RATE)


REQUIRED = [(name, column) for name in FORMATS for column in ADAPTERS[name].required if name != "user"]


@pytest.mark.parametrize(("name", "column"), REQUIRED)
def test_a_missing_column_is_named(name: str, column: str, tmp_path: Path) -> None:
    """The published files with one column called otherwise."""
    made = source_of(name, tmp_path / "files")
    for pattern in made.files:
        for path in sorted(pattern.parent.parent.glob("**/*")) if "*" in str(pattern) else [pattern]:
            if path.suffix == ".parquet":
                _rename_in_parquet(path, column)
            elif path.suffix in (".csv", ".json", ".jsonl"):
                path.write_text(path.read_text().replace(column, "renamed").replace('"image"', '"other"'))
            elif path.name.endswith("captions.zip"):
                _rename_in_zip(path, column)
    with pytest.raises(UserError, match=f"not a file of the format {name}: it lacks the columns? .*{column}"):
        make_record(made, tmp_path)


def _rename_in_parquet(path: Path, column: str) -> None:
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([f"renamed_{name}" if name == column else name for name in table.column_names]), path)


def _rename_in_zip(path: Path, column: str) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name).decode().replace(f'"{column}"', '"renamed"') for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_single_records_of_another_form_are_left_out_and_counted(tmp_path: Path) -> None:
    made = source_of("llava_video", tmp_path / "files")
    (path,) = (tmp_path / "files").glob("*/*.json")
    good = json.loads(path.read_text())
    said = good[0]["conversations"]
    odd = ["words", 3, None, [], [{"from": "human"}], [{"from": "human", "value": 5}, said[1]], said[:1], [said[1], said[0]], ["a", "b"]]
    only_picture = [{"from": "human", "value": "<image>"}, said[1]]
    path.write_text(json.dumps([good[0] | {"conversations": one} for one in [*odd, only_picture]] + good))
    known = make_record(made, tmp_path)
    assert (known.rows, known.left_out) == (len(good), len(odd) + 1)


FILTERS: list[tuple[str, dict[str, Any], int]] = [
    ("webvid", {"column": "duration", "max": 3}, 2),
    ("openvid", {"column": "aesthetic score", "min": 7}, 2),
    ("cauldron", {"column": "images", "max": 1}, 2),
    ("cauldron", {"column": "images", "min": 2}, 2),
    ("llava_video", {"column": "id", "one_of": ["academic-0"]}, 1),
    ("vista", {"column": "id", "one_of": ["temporal_niah_qa_1", "hr_video_grid_mcq_0"]}, 2),
    ("finevideo", {"column": "duration_seconds", "min": 7}, 1),
    ("finevideo_scenes", {"column": "content_fine_category", "one_of": ["Painting"]}, 4),
    ("smoltalk", {"column": "source", "one_of": ["smol-magpie"]}, 4),
    ("rlaif_v", {"column": "idx", "one_of": [2]}, 1),
    ("vript", {"column": "clip_id", "one_of": ["007EvOaWFOA-Scene-002"]}, 1),
    ("sharegpt4video", {"column": "video_id", "one_of": ["id2"]}, 1),
]


@pytest.mark.parametrize(("name", "condition", "kept"), FILTERS)
def test_filters_see_published_columns_and_refuse_others(name: str, condition: dict[str, Any], kept: int, tmp_path: Path) -> None:
    made = source_of(name, tmp_path / "files", filter=[condition])
    assert len(rows_of(made, tmp_path)) == kept
    unknown = made.model_copy(update={"filter": [made.filter[0].model_copy(update={"column": "no such column"})]})
    with pytest.raises(UserError, match="there is no column 'no such column'"):
        make_record(unknown, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_limit_takes_the_first_rows(name: str, rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    some = rows_of(source_of(name, tmp_path / "files", limit=2), tmp_path)
    assert [row["conversations"] for row in some] == [row["conversations"] for row in rows[name][:2]]


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_there_and_complete(name: str, tmp_path: Path) -> None:
    made = source_of(name, tmp_path / "files")
    known: Record = make_record(made, tmp_path)
    assert known.missing == 0
    if known.kind != "text":
        assert known.local == known.rows
        folder = record_folder(made, tmp_path)
        assert incomplete(folder, Part.of(folder, 0, make_record(made, tmp_path).rows)) == {}


def test_every_source_in_one_stage_3_mixture_with_exact_shares(shards: ShardSet, tmp_path: Path) -> None:
    shares = [round(1 / len(FORMATS), 3)] * (len(FORMATS) - 1)
    mixture = [{"source": name, "share": share} for name, share in zip(FORMATS, [*shares, 1 - sum(shares)], strict=True)]
    recipe = tiny_recipe(tmp_path / "run", shards.folder, data__mixture=mixture, run__steps=1, run__batch_samples=40)
    batches = next(train_steps(shards, recipe.data, recipe.run, tokens_per_frame=1, rank=0, world_size=1))
    assert {source for batch in batches for source in batch.sources} == set(FORMATS)
    assert 0 < one_step(recipe) < 20
    long = recipe.run.model_copy(update={"steps": 100})
    plan = Plan(shards, recipe.data, long, tokens_per_frame=1, world_size=1)
    planned = np.array([slot.source for step in range(100) for slot in plan.samples(step)])
    so_far = np.cumsum(planned[:, None] == np.arange(len(FORMATS)), axis=0)
    in_windows = so_far[BLOCK_SAMPLES:] - so_far[:-BLOCK_SAMPLES]
    assert (in_windows == plan.mixed.mixture.counts).all(), "in all 3,000 windows of 1000, wherever they begin"
    assert np.abs(in_windows[0] - BLOCK_SAMPLES * np.array([part.share for part in recipe.data.mixture])).max() < 1


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=13),
    st.lists(st.integers(1, 10**7), min_size=13, max_size=13),
    st.integers(0, 10**9),
)
def test_shares_are_exact_in_every_window_of_1000(parts: list[int], sizes: list[int], first: int) -> None:
    """Whatever the shares, sizes and place: any 1000 samples in a row have each source's share, rounded to a sample."""
    shares = [part / sum(parts) for part in parts]
    if min(shares) < 1 / BLOCK_SAMPLES:
        return
    mixture = Mixture([f"s{n}" for n in range(len(shares))], shares, [[size] for size in sizes[: len(shares)]], seed=0)
    found = np.bincount([mixture.at(number)[0] for number in range(first, first + BLOCK_SAMPLES)], minlength=len(shares))
    assert np.abs(found - np.array(shares) * BLOCK_SAMPLES).max() < 1
    assert found.tolist() == mixture.counts
    positions = [mixture.at(number) for number in range(first, first + BLOCK_SAMPLES)]
    for source in range(len(shares)):
        mine = [position for one, position in positions if one == source]
        assert mine == list(range(mine[0], mine[0] + len(mine))), "none twice, none left out"


@needs_video2dataset
def test_archives_seconds_and_lists_of_images_go_through_video2dataset(tmp_path: Path) -> None:
    """A user's own table with media of every kind, one of them missing: real HTTP, real video2dataset, shards."""
    settings = PUBLISHED["user"](tmp_path)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("deep/inside.mp4", clip(3, 7))
    rows = [{"url": "inside.mp4", "caption": "In an archive."}, {"url": "gone.mp4", "caption": "Nowhere."}]
    with (tmp_path / "mine.jsonl").open("a") as table:
        table.write("\n" + "\n".join(map(json.dumps, rows)))
    source = {"name": "mine"} | settings | {"archives": [tmp_path / "clips.zip"]}
    job = {"output": tmp_path / "download", "source": source, "video2dataset_python": PYTHON, "frame_px": FRAME_PX, "max_bad_share": 0.5}
    made = download(DownloadJob.model_validate(job))
    assert [(bad.url, bad.reason) for bad in made.bad] == [("gone.mp4", "file not found")]
    make_shards(ShardJob(output=tmp_path / "shards", downloads=[tmp_path / "download"], vocab_size=300, val_share=0.3))
    shards = ShardSet(tmp_path / "shards")
    found = {
        shards.record(int(row))["origin"]: shards.read(int(row), image_repeats=2) for split in SPLITS for row in shards.rows(split).index
    }
    assert {origin: len(sample.frames) for origin, sample in found.items()} == {
        "film.mp4": 5,
        "film.mp4#t=1,3": 2,
        "inside.mp4": 3,
        '["0.png", "1.png", "2.png"]': 3,
    }
    assert found['["0.png", "1.png", "2.png"]'].media == [[0, 0], [1, 1], [2, 2]]
    assert (found["film.mp4#t=1,3"].frames == found["film.mp4"].frames[1:3]).all()
