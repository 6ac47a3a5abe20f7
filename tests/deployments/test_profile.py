"""The profile that a command uses knows the command, for the report's line that makes the release again."""

from pathlib import Path

import pytest
import yaml

from deployments import cli
from deployments.checks import PROFILES, load_profile
from deployments.profile import chosen_profile, with_command
from tasks.ablations import baseline_recipe
from tasks.recipes import stage_recipe


@pytest.mark.parametrize(
    ("profile", "changes", "command"),
    [
        ("ci", [], "./speedrun.sh --profile ci"),
        (str(PROFILES / "ci.yaml"), [], f"./speedrun.sh --profile {PROFILES / 'ci.yaml'}"),
        ("ci", ["stages.stage2.run.steps=41"], "./speedrun.sh --profile ci --set stages.stage2.run.steps=41"),
        ("ci", ["release.summary=two words"], "./speedrun.sh --profile ci --set 'release.summary=two words'"),
    ],
)
def test_a_release_names_the_command_that_makes_it_again(profile, changes, command):
    assert chosen_profile(profile, changes=changes).release.reproduce == [command]


def test_the_users_videos_are_part_of_the_command():
    config = with_command(chosen_profile("ci").with_changes({"release.reproduce": []}), "ci", videos=Path("my clips.csv"))
    assert config.release.reproduce == ["./speedrun.sh --profile ci --videos 'my clips.csv'"]


def test_a_profile_may_name_its_own_command_and_neither_decides_the_result():
    ours, own = chosen_profile("ci"), chosen_profile("ci", changes=["release.reproduce=[make release]"])
    assert own.release.reproduce == ["make release"]
    assert own.hash() == ours.hash()


def test_production_trains_on_copies_on_the_pods_own_disk() -> None:
    """The network volume is slow with many small reads; what is copied has to fit beside everything else on that disk."""
    config = load_profile("runpod")
    stages = [stage_recipe(config.model, config.base, config.stages, name, changes={}, start=False) for name in config.stages.present]
    recipes = [baseline_recipe(config.model, config.base, 0, {}), *stages]
    assert len(recipes) >= 4
    disk_gb = config.machine.pools.gpu.job_variables["disk_gb"]
    assert config.machine.rental is not None
    assert isinstance(disk_gb, int)
    for recipe in recipes:
        assert recipe.data.shuffle_shards
        assert (staging := recipe.data.staging)
        assert not staging.folder.is_relative_to(config.machine.rental.mount_path)
        assert staging.max_gb <= 0.7 * disk_gb


def test_a_printed_recipe_names_the_folder_behind_the_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later pipeline run moves `VOLUME/shards`; the recipe's run has to find its own shards again."""
    folder = tmp_path / "volume" / "steps" / "shards-1"
    folder.mkdir(parents=True)
    link = tmp_path / "volume" / "shards"
    link.symlink_to(Path("steps/shards-1"))
    for given, named in ((link, folder), (folder, folder), (Path("not/made/yet"), Path("not/made/yet"))):
        cli.app(["recipe", "stage1", "--output", str(tmp_path / "run"), "--shards", str(given)], result_action="return_value")
        assert yaml.safe_load(capsys.readouterr().out)["shards"] == str(named)
