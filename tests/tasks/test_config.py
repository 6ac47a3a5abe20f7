"""Profiles: what is shipped loads, and what is wrong is refused by key, file and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.checks import load_profile
from deployments.profile import chosen_profile, with_videos
from flows.registry import PHASES
from fvlm_core.errors import UserError
from tasks.ablations import ablation_recipe
from tasks.config import PipelineConfig
from tasks.grid import cells, planned
from tasks.phase import relink
from tasks.recipes import base_recipe, stage_recipe
from tests.tiny import changed, profile_values

TESTS: dict[str, Any] = profile_values()
SEVEN = {"precompute", "speed", "ablations", "scaling", "train", "evaluate", "release"}
"""The phases that are shipped; another one may follow what it likes."""
ABLATION = {"name": "warm", "hypothesis": "a softer start", "path": "model.temperature", "value": 2}


def config(values: dict[str, Any] = TESTS) -> PipelineConfig:
    return PipelineConfig.from_values(values, where="the tests' profile")


def keys(values: dict[str, Any]) -> dict[str, str]:
    return {name: phase.key(config(values)) for name, phase in PHASES.items()}


RENTED = {"name": "rented", "type": "runpod"}
FILMS_AND_SCENES = [{"name": name, "format": name, "files": ["/films/train-*.parquet"]} for name in ("finevideo", "finevideo_scenes")]


@pytest.mark.parametrize("profile", ["ci", "laptop", "runpod"])
def test_shipped_profiles_load_and_all_their_recipes_are_valid(profile: str) -> None:
    loaded = load_profile(profile)
    assert loaded.name == profile
    base_recipe(loaded.model, loaded.base, "base", "speed", {})
    for ablation in loaded.ablations:
        ablation_recipe(loaded.model, loaded.base, ablation, 0, {})
    for one in planned(loaded.grid, {}):
        pooled = one.recipe.model.query == "pooled"
        assert pooled == (one.cell.variant == "baseline") == (one.recipe.model.fine_iterations == 0)
        assert (one.recipe.run.steps, one.recipe.run.budget_flops) == (None, one.cell.budget_flops)
    for stage in ("stage1", "stage2", "stage3"):
        stage_recipe(loaded.model, loaded.base, loaded.stages, stage, changes={}, start=stage != "stage1")


def test_laptop_and_runpod_have_the_grid_and_the_ablations_that_are_promised() -> None:
    for profile in ("laptop", "runpod"):
        loaded = load_profile(profile)
        grid = cells(loaded.scaling)
        assert len([cell for cell in grid if cell.seed == 0]) == 24
        assert len({cell.size.name for cell in grid}) >= 4
        assert len({(cell.size.name, cell.budget_flops) for cell in grid if cell.seed}) == 4
        assert len(loaded.ablations) >= 6


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("stages.stage2.run.step", 3, ["stages.stage2.run.step", "allowed here", "steps"]),
        ("base.optimizer.schedule", "sinus", ["base.optimizer.schedule", "'cosine'", "'constant'"]),
        ("base.run.steps", "many", ["base.run.steps", "integer", "'many'"]),
        ("scaling.sizes", [], ["scaling.sizes", "at least 1"]),
        ("stages.stage1.data.mixture.0.share", 0.5, ["stages.stage1.data", "add up to 1"]),
        ("base.data.validation.mixture.0.share", 0.9, ["base.data.validation", "add up to 1"]),
        ("ablations.0.value.0.share", 0.5, ["ablations.0.value", "add up to 1"]),
        ("ablations.0.path", "optimizer.lr_conector", ["'optimizer.lr_conector'", "optimizer.lr_connector"]),
        ("ablations.0", ABLATION | {"name": "same", "path": "optimizer.warmup_steps", "value": 4}, ["same", "already"]),
        ("ablations.0", ABLATION | {"path": "model.query", "value": "sideways"}, ["model.query", "'deep'"]),
        ("ablations.0", {"name": "none", "hypothesis": "x"}, ["an ablation has exactly one change, none has none"]),
        (
            "ablations.0",
            {"name": "two", "hypothesis": "x", "changes": {"model.temperature": 0.5, "model.query": "shallow"}},
            ["exactly one change, two has 2: model.query, model.temperature"],
        ),
        ("ablations.0", ABLATION | {"changes": {"model.query": "shallow"}}, ["exactly one change, warm has 2"]),
        ("ablations.0.hypothesis", "", ["ablations.0.hypothesis", "at least 1"]),
        ("ablation_seeds", {"baseline": 1, "others": 2}, ["a seed that the baseline lacks has no pair"]),
        ("ablations.1.name", "baseline", ["ablations", "'baseline' is the run that they are compared with"]),
        ("ablations.1.name", TESTS["ablations"][0]["name"], ["ablations", TESTS["ablations"][0]["name"], "twice"]),
        ("precompute.clips.sources.gaze_cell.trian", 3, ["precompute.clips.sources.gaze_cell.trian", "allowed here", "train"]),
        ("ablations.0", ABLATION | {"value": -1}, ["ablations: warm", "model.temperature"]),
        ("name", "Mein Profil", ["name", "pattern"]),
        ("evaluation.captions.sample", 5, ["evaluation.captions.sample", "samples"]),
        ("release", {"name": "mine", "push": True}, ["release", "push needs push_to"]),
        ("precompute.shards.tiles", {"px": 21, "small_px": 16}, ["shards.tiles: px 21 and small_px 16 do not divide", "frame_px 42"]),
        ("release.push_to", "mine", ["release.push_to", "pattern"]),
        ("precompute.sources", [{"name": "mine", "files": ["a.csv"], "format": "xml"}], ["precompute.sources.0.format", "webvid"]),
        ("precompute.sources", [{"name": "mine", "files": []}], ["precompute.sources.0", "the source mine has no files"]),
        ("precompute.sources", [{"name": "mine", "files": ["a.csv"]}] * 2, ["the name mine appears twice"]),
        ("precompute.sources", FILMS_AND_SCENES, ["train-*.parquet is read as finevideo and as finevideo_scenes"]),
        ("precompute.sources", [{"name": "gaze_cell", "files": ["a.csv"]}], ["gaze_cell", "rendered clips or generated text"]),
        ("precompute.sources", [{"name": "text", "files": ["a.csv"]}], ["text", "rendered clips or generated text"]),
        ("precompute.sources", [{"name": "clips", "files": ["a.csv"]}], ["clips", "rendered clips or generated text"]),
        ("machine.pools", {"cpu": RENTED | {"job_variables": {"max_runtime": 4}}}, ["machine.pools.cpu", "did you mean max_runtime_h?"]),
        ("machine.pools", {"cpu": RENTED | {"job_variables": {"vcpus": 24}}}, ["machine.pools.cpu", "vcpus", "powers of two"]),
        ("machine.pools", {"cpu": RENTED | {"job_variables": {"min_cuda": 12.8}}}, ["machine.pools.cpu", "min_cuda", "string"]),
        ("machine.pools", {"gpu": RENTED | {"job_variables": {"gpus": ["A"], "gpu_count": 4}}}, ["gpu_count is 4, ranks is 1"]),
    ],
)
def test_what_is_wrong_is_refused_by_key_file_and_what_is_allowed(tmp_path: Path, path: str, value: Any, said: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(UserError) as caught:
        load_profile(str(file))
    text = str(caught.value)
    for part in [*said, str(file)]:
        assert part in text


def test_an_unknown_profile_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="use one of ci, laptop, runpod"):
        load_profile("desktop")


@pytest.mark.parametrize(
    ("path", "value", "rerun"),
    [
        ("evaluation.multiple_choice.questions", 25, {"evaluate", "release"}),
        ("stages.stage2.run.steps", 11, {"train", "evaluate", "release"}),
        ("release.name", "fVLM-other", {"release"}),
        ("ablations.1.value", "shallow", {"ablations", "scaling", "train", "evaluate", "release"}),
        ("precompute.shards.seed", 1, SEVEN),
        ("model.temperature", 0.5, SEVEN - {"precompute"}),
        ("machine.parallel_jobs", 1, set()),
        ("name", "other", set()),
    ],
)
def test_a_change_reaches_its_phase_and_those_after_it_and_no_other(path: str, value: Any, rerun: set[str]) -> None:
    before, after = keys(TESTS), keys(changed(path, value))
    assert {phase for phase in SEVEN if before[phase] != after[phase]} == rerun


def test_own_videos_without_a_share_are_refused(tmp_path: Path) -> None:
    values = changed("ablations", [one for one in TESTS["ablations"] if one["name"] != "captions-only"])
    without = yaml.safe_load(yaml.safe_dump(values).replace("gaze_caption", "gaze_cell2").replace("natural", "gaze_cell3"))
    with pytest.raises(UserError, match="no mixture of the profile tests has a share"):
        with_videos(config(without | {"precompute": TESTS["precompute"]}), tmp_path / "clips.csv")


def test_own_videos_take_the_place_of_the_captioned_default_clips(tmp_path: Path) -> None:
    mine = with_videos(config(), tmp_path / "clips.csv")
    shares = {one.source: one.share for one in mine.stages.stage1.data.mixture}
    before = {one.source: one.share for one in config().stages.stage1.data.mixture}
    assert shares["videos"] == pytest.approx(sum(before.get(name, 0) for name in ("gaze_caption", "natural")))
    stages = (mine.stages.stage1, mine.stages.stage2, mine.stages.stage3)
    parts = [mine.base.data, mine.base.data.validation, *(stage.data for stage in stages)]
    named = {one.source for part in parts if part for one in part.mixture}
    named |= {one["source"] for ablation in mine.ablations for one in ablation.change.get("data.mixture", [])}
    assert not {"natural", "gaze_caption"} & named
    assert [(one.name, one.format, one.files) for one in mine.precompute.sources] == [("videos", "user", [tmp_path / "clips.csv"])]
    assert with_videos(mine, tmp_path / "others.csv").precompute.sources[0].files == [tmp_path / "others.csv"]
    assert keys(TESTS)["precompute"] != PHASES["precompute"].key(mine)


def test_paths_of_a_profile_start_at_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = changed("precompute.sources", [{"name": "mine", "files": ["data/a.csv"], "media": "../videos"}])
    values["machine"] |= {"video2dataset_python": "env/bin/python"}
    values["model"]["vision"] = {"checkpoint": "./dinov2", "frame_px": 42}
    values["precompute"]["shards"] = {"tokenizer": "tokenizers/mine"}
    values["precompute"].pop("vision")
    (tmp_path / "tokenizers" / "mine").mkdir(parents=True)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path.parent)
    loaded = load_profile(f"{tmp_path.name}/mine.yaml")
    [source] = loaded.precompute.sources
    assert (source.files, source.media) == ([tmp_path / "data/a.csv"], tmp_path.parent / "videos")
    assert loaded.machine.video2dataset_python == tmp_path / "env/bin/python"
    assert loaded.model.vision.checkpoint == str(tmp_path / "dinov2")
    assert loaded.precompute.shards.tokenizer == str(tmp_path / "tokenizers/mine")
    assert config(loaded.model_dump(mode="json")) == loaded, "a worker in another folder gets the same"


def test_paths_of_a_change_start_at_the_working_directory_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, here = tmp_path / "profile", tmp_path / "here"
    profile.mkdir()
    here.mkdir()
    values = profile_values()
    values["precompute"]["sources"] = [{"name": "mine", "files": ["mine.csv"]}]
    (profile / "p.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(here)
    config = chosen_profile(str(profile / "p.yaml"), changes=["precompute.shards.validation=held/out.csv", "stages.stage2.run.steps=11"])
    assert config.precompute.shards.validation == here / "held" / "out.csv"
    assert config.precompute.sources[0].files == [profile / "mine.csv"]
    assert config.stages.stage2.run.steps == 11


def test_the_newest_step_s_link_is_renewed_and_takes_nobody_s_place(tmp_path: Path) -> None:
    for folder in ("steps/shards-1", "steps/shards-2"):
        (tmp_path / folder).mkdir(parents=True)
        relink(tmp_path / "shards", folder)
        assert (tmp_path / "shards").resolve() == tmp_path / folder
    (tmp_path / "release").mkdir()
    relink(tmp_path / "release", "steps/shards-1")
    assert not (tmp_path / "release").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "shards", "steps"]
