"""The campaign's plan and its verdict; the campaign itself runs end to end, in tests/e2e."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.campaign.kill_campaign import EARLIEST, LATEST, STAGES, VICTIMS, CampaignError, Ended, Outcome, measurements, order_of, planned
from tests.e2e.volume import Volume, lengthen

HEADER = "step,samples,train_loss,samples_per_s\n"


@given(st.integers(0, 40), st.integers(0, 2**32), st.lists(st.integers(20, 900), min_size=3, max_size=3))
def test_kills_come_in_order_and_inside_the_stages(kills: int, seed: int, lengths: list[int]) -> None:
    volume = Volume(Path("unused"))
    lengthen(volume.values, **dict(zip(STAGES, lengths, strict=True)))
    plan = planned(volume, kills, random.Random(seed))
    assert plan == planned(volume, kills, random.Random(seed)), "the seed says it all"
    assert len(plan) == kills
    moments = [sum(lengths[: STAGES.index(kill.stage)]) + kill.step for kill in plan]
    assert moments == sorted(moments)
    assert all(1 <= kill.step <= lengths[STAGES.index(kill.stage)] for kill in plan)
    assert all(EARLIEST * sum(lengths) - 1 <= moment <= LATEST * sum(lengths) + 1 for moment in moments)


def test_every_victim_is_chosen_sooner_or_later() -> None:
    volume = Volume(Path("unused"))
    assert {kill.victim for kill in planned(volume, 200, random.Random(0))} == set(VICTIMS)


def test_order_is_what_a_run_reported_but_its_timings(tmp_path: Path) -> None:
    digests = []
    for rows in ("5,40,2.5,100.0\n", "5,40,2.5,7.0\n", "5,41,2.5,100.0\n", "5,40,2.5000001,100.0\n", "5,40,2.5,100.0\n10,80,2.4,9.0\n"):
        (tmp_path / "metrics.csv").write_text(HEADER + rows)
        digests.append(order_of(tmp_path / "metrics.csv"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    (tmp_path / "metrics.csv").write_text(HEADER)
    with pytest.raises(CampaignError, match="empty"):
        order_of(tmp_path / "metrics.csv")


def test_one_other_stage_on_one_volume_is_a_difference() -> None:
    same = Ended({"stage1": "a", "stage2": "b"}, {"stage1": "c", "stage2": "d"})
    other = Ended({"stage1": "a", "stage2": "B"}, {"stage1": "c", "stage2": "d"})
    values = [{one.metric: one.value for one in measurements(Outcome(3, same, ended))} for ended in ([same, same], [same, other])]
    assert values == [{"kills": 3, "weights_equal": 1, "order_equal": 1}, {"kills": 3, "weights_equal": 0, "order_equal": 1}]
