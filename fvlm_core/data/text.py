"""Generated text-only chats: short exercises on digits and words, so that a tiny model keeps reading and writing text.

A pure function of the seed. Real runs mix in SmolTalk instead (`fvlm_core.data.sources.smoltalk`). The hash of a question decides its
split, so validation never asks a question that training has answered.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from fvlm_core.data.gaze import COLOURS, FEWEST_COLOURS
from fvlm_core.data.rows import Split

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VAL_ONE_IN = 8
"""Of all possible questions, one in this many is kept for validation."""

Turn = dict[str, str]
"""`{"question", "answer"}`"""


def text_chats(seed: int, train: int, val: int) -> Iterator[tuple[Split, int, Turn]]:
    """Yield split, number within the split, and exercise: `train` and `val` of them. Questions may repeat within a split."""
    rng = np.random.default_rng([seed, len(EXERCISES)])
    wanted: dict[Split, int] = {"train": train, "val": val}
    made: dict[Split, int] = {"train": 0, "val": 0}
    drawn = 0
    while made != wanted:
        turn = EXERCISES[drawn % len(EXERCISES)](rng)
        drawn += 1
        split = split_of(turn["question"])
        if made[split] < wanted[split]:
            yield split, made[split], turn
            made[split] += 1


def split_of(question: str) -> Split:
    """Return the split that a question belongs to."""
    return "val" if blake2b(question.encode(), digest_size=4).digest()[0] % VAL_ONE_IN == 0 else "train"


def _copy(rng: np.random.Generator) -> Turn:
    digits = _digits(rng)
    return {"question": f"Repeat {digits}.", "answer": digits}


def _reverse(rng: np.random.Generator) -> Turn:
    digits = _digits(rng)
    return {"question": f"Reverse {digits}.", "answer": digits[::-1]}


def _sort(rng: np.random.Generator) -> Turn:
    digits = _digits(rng)
    return {"question": f"Sort {digits}.", "answer": "".join(sorted(digits))}


def _add(rng: np.random.Generator) -> Turn:
    left, right = rng.integers(10, size=2)
    return {"question": f"What is {left} plus {right}?", "answer": str(left + right)}


def _spell(rng: np.random.Generator) -> Turn:
    digits = rng.integers(10, size=2)
    return {"question": f"Write {digits[0]} and {digits[1]} as words.", "answer": " ".join(DIGIT_WORDS[digit] for digit in digits)}


def _read(rng: np.random.Generator) -> Turn:
    digits = rng.integers(10, size=3)
    return {"question": f"Write {', '.join(DIGIT_WORDS[digit] for digit in digits)} in digits.", "answer": "".join(map(str, digits))}


def _colour(rng: np.random.Generator) -> Turn:
    names = rng.permutation(list(COLOURS)[:FEWEST_COLOURS])[:3]
    place = int(rng.integers(3))
    return {"question": f"Which colour is {('first', 'second', 'third')[place]} in {', '.join(names)}?", "answer": str(names[place])}


EXERCISES = (_copy, _reverse, _sort, _add, _spell, _read, _colour)


def _digits(rng: np.random.Generator) -> str:
    """Two to five digits."""
    return "".join(map(str, rng.integers(10, size=rng.integers(2, 6))))
