"""Samples that are drawn where they are used, or ahead in other processes."""

from itertools import count, islice, repeat

import numpy as np

from fvlm_core.data.generate import generate


def draw(rng: np.random.Generator, wanted: float) -> tuple[float, float]:
    return wanted, rng.random()


def test_without_processes_everything_comes_from_the_one_generator() -> None:
    expected = np.random.default_rng(0).random(3).tolist()
    assert [number for _, number in generate(draw, repeat(1.0, 3), np.random.default_rng(0), 0)] == expected


def test_however_many_processes_draw_it_is_the_same() -> None:
    alone, both = (list(generate(draw, range(8), np.random.default_rng(0), workers)) for workers in (1, 2))
    assert alone == both
    assert [wanted for wanted, _ in alone] == list(range(8)), "in order"
    assert len({number for _, number in alone}) == 8
    other = list(generate(draw, range(8), np.random.default_rng(1), 1))
    assert {number for _, number in alone}.isdisjoint(number for _, number in other)


def test_what_is_wanted_may_have_no_end_and_is_asked_for_a_little_early() -> None:
    asked = []

    def wanted():
        for number in count():
            asked.append(number)
            yield number

    for workers in (0, 2):
        asked.clear()
        taken = [number for number, _ in islice(generate(draw, wanted(), np.random.default_rng(0), workers), 3)]
        assert taken == [0, 1, 2]
        assert len(asked) <= 3 + workers
