"""Which size is trained after the grid."""

import pytest

from flows.scaling import trained_size
from fvlm_core.errors import UserError
from fvlm_core.scaling.jobs import ScalingReport
from tasks.config import PipelineConfig
from tests.tiny import profile_values


@pytest.mark.parametrize(
    ("undecided", "wins_share", "trained"),
    [(True, 0.6, "other"), (True, 0.95, "best"), (True, None, "other"), (False, 0.6, "best"), (False, None, "best")],
)
def test_a_winner_within_the_noise_gives_way_where_the_profile_says_so(undecided: bool, wins_share: float | None, trained: str) -> None:
    values = profile_values()
    best, other = (size["name"] for size in values["scaling"]["sizes"][:2])
    values["scaling"] |= {"undecided": other} if undecided else {}
    config = PipelineConfig.from_values(values, where="the tests' profile")
    report = ScalingReport.model_construct(chosen=best, wins_share=wins_share)
    assert trained_size(config, report) == {"best": best, "other": other}[trained]


def test_the_size_has_to_be_one_of_the_grid() -> None:
    values = profile_values()
    values["scaling"]["undecided"] = "huge"
    with pytest.raises(UserError, match="there is no size huge"):
        PipelineConfig.from_values(values, where="the tests' profile")
