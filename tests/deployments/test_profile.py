"""The profile that a command uses knows the command, for the report's line that makes the release again."""

from pathlib import Path

import pytest

from deployments.checks import PROFILES
from deployments.profile import chosen_profile, with_command


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
