"""A mixture of a source without samples is refused before anything starts, and again when there are shards."""

import re
from typing import Any

import pytest

from deployments.checks import load_profile
from fvlm_core.data.jobs import ShardManifest, SourceCounts
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.sources.record import Record, RowCount
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig
from tasks.mixtures import Known, check_names, check_shards, known_sources
from tests.tiny import changed, profile_values


def config(values: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig.from_values(values, where="the tests' profile")


@pytest.mark.parametrize("profile", ["ci", "laptop"])
def test_shipped_mixtures_name_sources_that_precompute_makes(profile: str) -> None:
    loaded = load_profile(profile)
    check_names(loaded, known_sources(loaded, {}))


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("base.data.mixture.0.source", r"base\.data\.mixture"),
        ("base.data.validation.mixture.0.source", r"base\.data\.validation\.mixture"),
        ("stages.stage3.data.mixture.0.source", r"stages\.stage3\.data\.mixture"),
        ("ablations.0.value.0.source", "ablations, captions-only"),
    ],
)
def test_a_source_that_nothing_makes_is_refused_before_anything_starts(path: str, where: str) -> None:
    wrong = config(changed(path, "gaze_cel"))
    with pytest.raises(UserError, match="'gaze_cel'") as caught:
        check_names(wrong, known_sources(wrong, {}))
    assert re.search(where, caught.value.where)
    assert "gaze_cell" in caught.value.fix


def test_a_source_that_only_an_ablation_validates_on_is_looked_for_too() -> None:
    ablation = {"name": "own", "hypothesis": "x", "path": "data.validation.mixture", "value": [{"source": "gaze_cel", "share": 1.0}]}
    wrong = config(changed("ablations.0", ablation))
    with pytest.raises(UserError, match="no val samples of 'gaze_cel'") as caught:
        check_names(wrong, known_sources(wrong, {}))
    assert "ablations, own" in caught.value.where


def test_a_recorded_source_without_rows_to_validate_on_is_refused_before_anything_starts() -> None:
    values = changed("precompute.sources", [{"name": "mine", "files": ["a.csv"]}])
    values["stages"]["stage1"]["data"]["mixture"] = [{"source": "mine", "share": 1.0}]

    def known(*splits: str, val_share: float = 0.05) -> Known:
        counts = [RowCount(source="mine", split=split, rows=5) for split in splits]
        record = Record(name="mine", kind="video", read=5, filtered=0, left_out=0, rows=5, counts=counts, rows_digest="", rows_bytes=0)
        return known_sources(config(values).with_changes({"precompute.shards.val_share": val_share}), {"mine": record})

    for fine in (known(""), known("train", "val"), known("val", "")):
        check_names(config(values), fine)
    for split, lacking in (("val", known("train")), ("train", known("val")), ("val", known("", val_share=0))):
        with pytest.raises(UserError, match=f"no {split} samples of 'mine'"):
            check_names(config(values), lacking)


def test_a_share_for_validation_is_that_of_the_sources_that_its_rows_name() -> None:
    values = changed("precompute.sources", [{"name": "mine", "files": ["a.csv"], "val_share": 0.0}])
    counts = [RowCount(source="web", split="", rows=5)]
    record = Record(name="mine", kind="video", read=5, filtered=0, left_out=0, rows=5, counts=counts, rows_digest="", rows_bytes=0)
    known = known_sources(config(values), {"mine": record})
    assert "web" in known["train"]
    assert "web" not in known["val"]


def test_a_source_without_samples_to_validate_on_is_refused() -> None:
    counts = [
        SourceCounts(name=name, kind="video", split=split, samples=1, conversations=1, frames=1, tokens=1)
        for name in config(profile_values()).precompute.made_names
        for split in SPLITS
        if (name, split) != ("gaze_cell", "val")
    ]
    shards = ShardManifest(name="shards", settings_hash="", sources=counts, frame_px=42, fps=1, max_frames=64, vocab_size=512)
    with pytest.raises(UserError, match="no val samples of 'gaze_cell'"):
        check_shards(config(profile_values()), shards)
    shards.sources.append(counts[0].model_copy(update={"name": "gaze_cell", "split": "val"}))
    check_shards(config(profile_values()), shards)
