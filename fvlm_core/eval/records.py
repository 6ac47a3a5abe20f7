"""What is kept of every item, a JSON line each: likelihoods and texts in every condition. Every number of a benchmark is made from these.

An item that could not be decoded is there too, with the reason.
"""

from pathlib import Path

import numpy as np

from fvlm_core.eval.answerers.answerer import Reply
from fvlm_core.eval.benchmarks.benchmark import Scorer
from fvlm_core.manifest import write_atomically
from fvlm_core.settings import Settings

DECIMALS = 6
SCORERS: tuple[Scorer, ...] = ("letter", "sum", "mean", "pmi")


class Said(Settings):
    """One item in one condition."""

    letters: list[float] = []
    """Log-likelihood of each choice's letter."""
    options: list[tuple[float, int, float]] = []
    """Per choice: log-likelihood of its text, its tokens, log-likelihood of the end of the turn after it."""
    text: str | None = None
    """What was generated."""


class ItemRecord(Settings):
    """One item."""

    id: str
    clip: str
    groups: dict[str, str]
    choices: list[str] = []
    gold: int | None = None
    answers: list[str] = []
    hints: dict[str, str] = {}
    frames: int = 0
    """Shown frames."""
    unconditional: list[float] = []
    """Log-likelihood of each choice's text with its end, as the answer to nothing."""
    said: dict[str, Said] = {}
    """By condition."""
    error: str = ""
    """Why it was not asked."""


def option_scores(record: ItemRecord, condition: str, scorer: Scorer) -> np.ndarray | None:
    """What a scorer gives each choice; None where that was not asked.

    * letter: the letter's log-likelihood. No length is in it; the model has to know letters.
    * sum: the log-likelihood of the choice as the complete answer. It favours short choices.
    * mean: of the text's tokens, against that of all the choices' tokens, times the root of its tokens. Of equally long choices it is the
      one with the best mean per token. Without the root, a short choice wins (or loses) more often by chance, its mean being the noisier;
      with the end of the turn among its tokens, which is easy wherever a word can end, it wins whatever it says.
    * pmi: how much the question makes the choice more likely than it is as the answer to nothing (Holtzman et al. 2021,
      https://arxiv.org/abs/2104.08315), per root of its tokens, in which the noise of such a sum grows.
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
    """A reply's sums as they are kept."""
    return [(round(float(text), DECIMALS), int(tokens), round(float(end), DECIMALS)) for text, tokens, end in reply.sums]


def write_shard(path: Path, key: str, records: list[ItemRecord]) -> None:
    """Write a shard of items, complete or not at all; its first line is what the records depend on."""
    lines = [key, *(record.model_dump_json(exclude_defaults=True) for record in records)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_shard(path: Path, key: str) -> list[ItemRecord] | None:
    """A finished shard's records; None where there is none that can be read, or one of something else."""
    try:
        # not `splitlines`: characters that it splits at, such as U+2028, stand in JSON as they are
        first, *lines = [line for line in path.read_text().split("\n") if line]
        return [ItemRecord.model_validate_json(line) for line in lines] if first == key else None
    except (OSError, ValueError):
        return None
