"""The resume certificate at its smallest, and what it must not overlook."""

from pathlib import Path

import pytest

from benchmarks.mixed_shards import write_mixed
from benchmarks.resume import FRAME_PX, Ended, Kill, certify, comparison, measurements, planned, recipe_of
from benchmarks.resume_runs import ours


@pytest.mark.slow(reason="five training processes")
def test_killed_twice_with_a_damaged_checkpoint_between(tmp_path: Path) -> None:
    """The second kill is of a resumed run, which had to pass over its newest checkpoint."""
    shards = write_mixed(tmp_path / "shards", clips=4, frame_px=FRAME_PX, samples_per_shard=4)
    straight, killed = certify(ours, recipe_of(shards, tmp_path / "run", steps=14), [Kill(6, damage=False), Kill(11, damage=True)])
    found = {one.metric: one.value for one in measurements("", "ours", straight, killed)}
    assert sorted(straight.order) == list(range(14))
    assert {resumes for resumes, _, _ in straight.trained} == {0}
    assert {resumes for resumes, _, _ in killed.trained} == {0, 1, 2}, "steps are counted with the resume that trained them"
    assert found == {
        "kills": 2,
        "damaged_checkpoints": 1,
        "repairs_by_hand": 0,
        "weights_equal": 1,
        "order_equal": 1,
        "steps_with_other_samples": 0,
        "other_samples_after_the_first_resume": 0,
        "other_samples_after_the_later_resumes": 0,
    }


def test_a_difference_is_counted() -> None:
    straight = Ended("a", [(0, 0, ["x", "y"]), (0, 1, ["z"]), (0, 2, ["x"])])
    killed = Ended("b", [(0, 0, ["x", "y"]), (1, 1, ["z"]), (2, 0, ["y", "x"])], kills=1, repairs=1)
    found = {one.metric: one.value for one in measurements("p_", "peer", straight, killed)}
    assert found["p_weights_equal"] == found["p_order_equal"] == 0
    assert found["p_steps_with_other_samples"] == 2
    assert found["p_repairs_by_hand"] == 1
    assert (found["p_other_samples_after_the_first_resume"], found["p_other_samples_after_the_later_resumes"]) == (0, 1)
    taken = {"ours": [*measurements("", "ours", straight, straight)], "trainer": [*measurements("trainer_", "", straight, killed)]}
    rows = {name: cells for name, *cells in comparison(taken).rows}
    assert rows["weights equal"] == ["yes", "no"]
    assert rows["steps with other samples"] == ["0 of 3", "2 of 3"]


def test_kills_come_in_order_and_some_leave_damage() -> None:
    plan = planned(6, seed=3)
    assert [kill.step for kill in plan] == sorted({kill.step for kill in plan})
    assert [kill.damage for kill in plan] == [False, True] * 3
