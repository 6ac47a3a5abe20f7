"""The stored records of benchmark items, one JSON line per item: likelihoods and generated texts in every condition.

All numbers of a benchmark are computed from these records. Items that could not be decoded are recorded too, with the reason.
"""

from pathlib import Path

import numpy as np

from fvlm_core.eval.answerers.answerer import Reply
from fvlm_core.eval.benchmarks.benchmark import Scorer
from fvlm_core.manifest import write_atomically
from fvlm_core.settings import Settings

DECIMALS = 6
SCORERS: tuple[Scorer, ...] = ("letter", "sum", "mean", "pmi")


class ConditionOutput(Settings):
    """The model's output for one item in one condition."""

    letters: list[float] = []
    """Log-likelihood of each choice's letter."""
    options: list[tuple[float, int, float]] = []
    """Per choice: log-likelihood of its text, number of its tokens, log-likelihood of the end-of-turn token after it."""
    text: str | None = None
    """The generated answer."""


class ItemRecord(Settings):
    """The record of one item."""

    id: str
    clip: str
    groups: dict[str, str]
    choices: list[str] = []
    gold: int | None = None
    answers: list[str] = []
    hints: dict[str, str] = {}
    frames: int = 0
    """Number of shown frames."""
    unconditional: list[float] = []
    """Log-likelihood of each choice's text and end of turn without media and question."""
    said: dict[str, ConditionOutput] = {}
    """Outputs by condition name."""
    error: str = ""
    """Why the item could not be asked; empty if it was."""


def option_scores(record: ItemRecord, condition: str, scorer: Scorer) -> np.ndarray | None:
    """Score of each choice, float64 [choices]; None if the record lacks the likelihoods that the scorer needs.

    * letter: log-likelihood of the choice's letter. Independent of length, but the model has to know multiple-choice letters.
    * sum: log-likelihood of the choice as the complete answer, including the end of the turn. Favours short choices.
    * mean: (mean log-likelihood of the choice's tokens - mean over the tokens of all choices) x sqrt(number of its tokens). Among choices
      of equal length, this ranks by the mean per token. Without the square root, a short choice would win (or lose) more often by chance,
      because its mean is noisier. The end of the turn is excluded: it is easy to predict wherever a word can end, and would make a short
      choice win regardless of its text.
    * pmi: log-likelihood given the question minus the unconditional log-likelihood (Holtzman et al. 2021,
      https://arxiv.org/abs/2104.08315), divided by sqrt(number of its tokens), with which the noise of such a sum grows.
    """
    said = record.said.get(condition)
    if said is None or not (said.letters if scorer == "letter" else said.options) or (scorer == "pmi" and not record.unconditional):
        return None
    if scorer == "letter":
        return np.array(said.letters)
    rows = np.array(said.options)
    if scorer == "sum":
        return rows[:, 0] + rows[:, 2]
    if scorer == "mean":
        return (rows[:, 0] / rows[:, 1] - rows[:, 0].sum() / rows[:, 1].sum()) * np.sqrt(rows[:, 1])
    return (rows[:, 0] + rows[:, 2] - np.array(record.unconditional)) / np.sqrt(rows[:, 1] + 1)


def rounded(reply: Reply) -> list[tuple[float, int, float]]:
    """A reply's sums, rounded for storage."""
    return [(round(float(text), DECIMALS), int(tokens), round(float(end), DECIMALS)) for text, tokens, end in reply.sums]


def write_shard(path: Path, key: str, records: list[ItemRecord]) -> None:
    """Write a shard of records atomically; its first line is `key`, the hash of everything that the records depend on."""
    lines = [key, *(record.model_dump_json(exclude_defaults=True) for record in records)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_shard(path: Path, key: str) -> list[ItemRecord] | None:
    """Read the records of a finished shard; None if it is missing, unreadable or has another key."""
    try:
        # not `splitlines`: it splits at characters such as U+2028, which JSON may contain unescaped
        first, *lines = [line for line in path.read_text().split("\n") if line]
        return [ItemRecord.model_validate_json(line) for line in lines] if first == key else None
    except (OSError, ValueError):
        return None
