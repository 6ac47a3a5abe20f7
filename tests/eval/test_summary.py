"""The verdict and differences, from numbers at and around nothing."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fvlm_core.eval.estimates import Estimate, PairedTest
from fvlm_core.eval.parts.losses import LossResult, ModeLoss
from fvlm_core.eval.results import Results
from fvlm_core.eval.summary import verdict
from fvlm_core.tables import NO_DIFFERENCE, difference

SIX_DECIMALS = st.integers(-(10**7), 10**7).map(lambda millionths: millionths / 10**6)


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=24, count=96)


def results(gain: Estimate) -> Results:
    loss = ModeLoss(loss=estimate(2.0, 1.9, 2.1), by_source={})
    test = PairedTest(a="coarse_only", b="coarse_fine", metric="loss", difference=gain)
    losses = LossResult(modes={"coarse_only": loss, "coarse_fine": loss}, samples=24, foveation_gain=test)
    modes = list(losses.modes)
    values = {
        "run": "r",
        "checkpoint": "c",
        "shards": "s",
        "seed": 0,
        "resamples": 10,
        "frame_px": 42,
        "tokens_per_frame": 1,
        "looks": True,
    }
    return Results.model_validate(values | {"modes": modes, "parts": {"losses": losses}})


@pytest.mark.parametrize(
    ("gain", "text", "tone"),
    [
        (estimate(0.31, 0.29, 0.33), "better than coarse-only by 0.310 nats", "good"),
        (estimate(-0.000044, -0.000071, -0.00001), "worse than coarse-only by 0.000044 nats", "bad"),
        (estimate(-0.00013, -0.001295, 0.001287), "No difference", "neutral"),
        (estimate(0.0, 0.0, 0.0), "No difference", "neutral"),
    ],
)
def test_verdict(gain: Estimate, text: str, tone: str) -> None:
    found = verdict(results(gain))
    assert text in found.text
    assert found.tone == tone
    assert difference(gain) in found.line


@given(SIX_DECIMALS, SIX_DECIMALS, SIX_DECIMALS)
def test_a_difference_is_never_printed_as_zero_when_it_is_not(a: float, b: float, c: float) -> None:
    low, value, high = sorted((a, b, c))
    shown = difference(estimate(value, low, high))
    if value == low == high == 0:
        assert shown == NO_DIFFERENCE
    else:
        assert float(shown.split()[0]) == pytest.approx(value, rel=0.05, abs=1e-12)


def test_small_differences_keep_their_digits() -> None:
    assert difference(estimate(0.000044, 0.00001, 0.000071)) == "+0.000044 [+0.000010, +0.000071]"
    assert difference(estimate(0.31, 0.29, 0.33)) == "+0.3100 [+0.2900, +0.3300]"
    assert difference(estimate(0.0, -0.05, 0.05)) == "+0.0000 [-0.0500, +0.0500]"
