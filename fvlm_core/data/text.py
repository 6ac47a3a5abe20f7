"""Generated text-only chats: small exercises on digits and words, so that a tiny model keeps reading and writing text.

A pure function of seed, split and number; a real run mixes in SmolTalk instead (`fvlm_core.data.sources.smoltalk`).
"""

from zlib import crc32

import numpy as np

from fvlm_core.data.gaze import COLOURS
from fvlm_core.data.shard_files import Split

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def text_chat(seed: int, split: Split, number: int) -> list[dict[str, str]]:
    """One exercise as a conversation of one turn, `{"question", "answer"}`."""
    rng = np.random.default_rng([seed, crc32(split.encode()), number])
    return [EXERCISES[number % len(EXERCISES)](rng)]


def _copy(rng: np.random.Generator) -> dict[str, str]:
    digits = _digits(rng)
    return {"question": f"Repeat {digits}.", "answer": digits}


def _reverse(rng: np.random.Generator) -> dict[str, str]:
    digits = _digits(rng)
    return {"question": f"Reverse {digits}.", "answer": digits[::-1]}


def _sort(rng: np.random.Generator) -> dict[str, str]:
    digits = _digits(rng)
    return {"question": f"Sort {digits}.", "answer": "".join(sorted(digits))}


def _add(rng: np.random.Generator) -> dict[str, str]:
    left, right = rng.integers(10, size=2)
    return {"question": f"What is {left} plus {right}?", "answer": str(left + right)}


def _spell(rng: np.random.Generator) -> dict[str, str]:
    digit = int(rng.integers(10))
    return {"question": f"Write {digit} as a word.", "answer": DIGIT_WORDS[digit]}


def _read(rng: np.random.Generator) -> dict[str, str]:
    digits = rng.integers(10, size=3)
    return {"question": f"Write {', '.join(DIGIT_WORDS[d] for d in digits)} in digits.", "answer": "".join(map(str, digits))}


def _colour(rng: np.random.Generator) -> dict[str, str]:
    names = rng.permutation(list(COLOURS))[:3]
    place = int(rng.integers(3))
    return {"question": f"Which colour is {('first', 'second', 'third')[place]} in {', '.join(names)}?", "answer": str(names[place])}


EXERCISES = (_copy, _reverse, _sort, _add, _spell, _read, _colour)


def _digits(rng: np.random.Generator) -> str:
    """Two to five digits."""
    return "".join(map(str, rng.integers(10, size=rng.integers(2, 6))))
