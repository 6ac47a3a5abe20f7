"""Profiles: what is shipped loads, and what is wrong is refused by key, file and what is allowed."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.checks import load_profile
from deployments.profile import chosen_profile, with_videos
from flows.registry import PHASES
from fvlm_core.data.jobs import ShardManifest, SourceCounts
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.sources.record import Record, RowCount
from fvlm_core.dotted import with_changes
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig, fitted
from tasks.grid import cells, planned
from tasks.mixtures import Known, check_names, check_shards, known_sources
from tasks.pipeline_flow import point
from tasks.plan import look
from tasks.recipes import AN_INPUT, ablation_recipe, base_recipe, baseline_recipe, stage_recipe
from tests.tiny import profile_values

TESTS: dict[str, Any] = profile_values()
SEVEN = {"precompute", "speed", "ablations", "scaling", "train", "evaluate", "release"}
"""The phases that are shipped; another one may follow what it likes."""
ABLATION = {"name": "warm", "hypothesis": "a softer start", "path": "model.temperature", "value": 2}


def changed(path: str, value: Any) -> dict[str, Any]:
    values = deepcopy(TESTS)
    *parents, last = path.split(".")
    node: Any = values
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    return values


def config(values: dict[str, Any] = TESTS) -> PipelineConfig:
    return PipelineConfig.from_values(values, where="the tests' profile")


def keys(values: dict[str, Any]) -> dict[str, str]:
    return {name: phase.key(config(values)) for name, phase in PHASES.items()}


@pytest.mark.parametrize("profile", ["ci", "laptop", "runpod"])
def test_shipped_profiles_load_and_all_their_recipes_are_valid(profile: str) -> None:
    loaded = load_profile(profile)
    assert loaded.name == profile
    base_recipe(loaded, "base", "speed", {})
    for ablation in loaded.ablations:
        ablation_recipe(loaded, ablation, 0, {})
    for one in planned(loaded, {}):
        pooled = one.recipe.model.query == "pooled"
        assert pooled == (one.cell.variant == "baseline") == (one.recipe.model.fine_iterations == 0)
        assert (one.recipe.run.steps, one.recipe.run.budget_flops) == (None, one.cell.budget_flops)
    for stage in ("stage1", "stage2", "stage3"):
        stage_recipe(loaded, stage, changes={}, start=stage != "stage1")


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
        ("precompute.sources", [{"name": "gaze_cell", "files": ["a.csv"]}], ["gaze_cell", "rendered clips or generated text"]),
        ("precompute.sources", [{"name": "text", "files": ["a.csv"]}], ["text", "rendered clips or generated text"]),
        ("precompute.sources", [{"name": "clips", "files": ["a.csv"]}], ["clips", "rendered clips or generated text"]),
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


def test_every_ablation_differs_from_the_base_in_its_one_setting_and_what_follows_from_it() -> None:
    loaded = load_profile("laptop")
    follows = {"model.fine_iterations": {"loss.fine"}, "model.query": {"model.fine_iterations", "loss.fine"}}
    base = flat(baseline_recipe(loaded, 1, {}).model_dump(mode="json") | {"name": "x"})
    for ablation in loaded.ablations:
        recipe = flat(ablation_recipe(loaded, ablation, 1, {}).model_dump(mode="json") | {"name": "x"})
        differing = {path for path in base if base[path] != recipe[path]}
        assert ablation.path in differing
        assert differing - {ablation.path} <= follows.get(ablation.path, set()), ablation.name


GLANCE = {"name": "glance", "hypothesis": "what is not read need not be encoded", "path": "model.glance"}


def test_an_ablation_can_switch_a_group_on_and_later_phases_take_it() -> None:
    """A glance is one change; where it wins, the pooled baseline of the grid, which has no queries, goes without."""
    frame_px = TESTS["model"]["vision"]["frame_px"]
    group = {"px": frame_px // 3, "zoom": 3, "open": 2, "explore": 1.0}
    loaded = config(changed("ablations", [*TESTS["ablations"], GLANCE | {"value": group}]))
    one = loaded.ablations[-1]
    assert PipelineConfig.model_validate(loaded.model_dump(mode="json")) == loaded
    recipe, base = ablation_recipe(loaded, one, 1, {}), baseline_recipe(loaded, 1, {})
    assert recipe.model.glance is not None
    assert (recipe.model.glance.px, recipe.model.glance.zoom, recipe.model.glance.open) == (frame_px // 3, 3, 2)
    assert recipe.with_changes({"model.glance": None, "name": base.name}) == base
    models = [part.recipe.model for part in planned(loaded, one.change)]
    assert {model.query: model.glance is None for model in models} == {"deep": False, "pooled": True}
    assert all(stage_recipe(loaded, stage, changes=one.change, start=False).model.glance for stage in loaded.stages.present)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"px": 5}, "not glance.px x its zooms"),
        ({"zooom": 3}, "unknown key 'model.glance.zooom'"),
        ({"px": {"a": 1}}, "ablations.0.value"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        config(changed("ablations", [GLANCE | {"value": value}]))


def test_of_a_group_that_is_there_an_ablation_changes_one_key() -> None:
    frame_px = TESTS["model"]["vision"]["frame_px"]
    values = changed("model.glance", {"px": frame_px // 3, "zoom": 3})
    values["ablations"] = [GLANCE | {"path": "model.glance.open", "value": 2}]
    loaded = config(values)
    glance = ablation_recipe(loaded, loaded.ablations[0], 0, {}).model.glance
    assert glance is not None
    assert (glance.open, glance.px) == (2, frame_px // 3)
    values["ablations"] = [GLANCE | {"value": {"px": frame_px // 3, "zoom": 3, "open": 2, "explore": 0.5}}]
    with pytest.raises(UserError, match="change one of its keys"):
        config(values)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def test_what_earlier_phases_decided_reaches_the_stages_but_not_their_data() -> None:
    size = config().scaling.sizes[0]
    decided = {
        "run.micro_batch": {"frames": 8, "tokens": 99},
        "model.temperature": 0.5,
        "data.mixture": [{"source": "text", "share": 1.0}],
        "model.llm": size.llm.model_dump(mode="json"),
    }
    recipe = stage_recipe(config(), "stage2", changes=decided, start=True)
    assert (recipe.run.micro_batch.tokens, recipe.model.temperature, recipe.model.llm) == (99, 0.5, size.llm)
    assert recipe.data == config().stages.stage2.data
    assert str(recipe.init_from) == AN_INPUT


def test_settings_that_follow_from_others_are_fitted() -> None:
    values = {
        "model": {"query": "deep", "fine_iterations": 2},
        "loss": {"coarse": 0.0, "fine": [1.0, 2.0]},
    }
    assert fitted(with_changes(values, {"model.fine_iterations": 3}))["loss"]["fine"] == [1.0, 2.0, 2.0]
    pooled = fitted(with_changes(values, {"model.query": "pooled"}))
    assert (pooled["model"]["fine_iterations"], pooled["loss"]) == (0, {"coarse": 1.0, "fine": []})
    with pytest.raises(KeyError, match=r"model\.depth"):
        with_changes(values, {"model.depth": 1})


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


def test_a_source_without_samples_to_validate_on_is_refused() -> None:
    counts = [
        SourceCounts(name=name, kind="video", split=split, samples=1, conversations=1, frames=1, tokens=1)
        for name in config().precompute.made_names
        for split in SPLITS
        if (name, split) != ("gaze_cell", "val")
    ]
    shards = ShardManifest(name="shards", settings_hash="", sources=counts, frame_px=42, fps=1, vocab_size=512)
    with pytest.raises(UserError, match="no val samples of 'gaze_cell'"):
        check_shards(config(), shards)
    shards.sources.append(counts[0].model_copy(update={"name": "gaze_cell", "split": "val"}))
    check_shards(config(), shards)


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
        point(tmp_path / "shards", folder)
        assert (tmp_path / "shards").resolve() == tmp_path / folder
    (tmp_path / "release").mkdir()
    point(tmp_path / "release", "steps/shards-1")
    assert not (tmp_path / "release").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "shards", "steps"]


def test_preference_optimization_is_one_stage_more(tmp_path: Path) -> None:
    stage = TESTS["stages"]["stage3"] | {"dpo": {"beta": 0.2}}
    preferences = {"loss_on": "preferences", "mixture": [{"source": "pairs", "share": 1.0}]}

    def profile(**changes: Any) -> PipelineConfig:
        return config(TESTS | {"stages": TESTS["stages"] | {"dpo": stage | changes}})

    mine = profile(data=preferences)
    recipe = stage_recipe(mine, "dpo", changes={}, start=True)
    assert recipe.dpo is not None
    assert (recipe.dpo.beta, recipe.phase, str(recipe.init_from)) == (0.2, "dpo", AN_INPUT)
    steps = {one.step.name: one.step for one in look(list(PHASES.values()), mine, tmp_path)}
    assert [need.name for need in steps["dpo"].needs] == ["shards", "stage3"]
    assert "dpo" in [need.name for need in steps["evaluation"].needs], "the last stage is evaluated"
    assert "stages.dpo" in steps["release"].inputs
    with pytest.raises(UserError, match="'preferences' go together"):
        stage_recipe(profile(), "dpo", changes={}, start=True)
