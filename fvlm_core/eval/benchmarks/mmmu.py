"""MMMU (Yue et al. 2024, https://arxiv.org/abs/2311.16502), validation: 900 questions of 30 subjects, some with several images.

A rule checks the answers to open questions. If no letter can be parsed, the reference code picks one at random; here such an answer counts
as wrong.
"""

import ast

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups
from fvlm_core.eval.items import Item, UnreadableItemError, gold_letter
from fvlm_core.eval.media import Images

MOST_IMAGES = 7

DECIMALS = "2"
"""Decimals to which numbers are rounded before comparison (as in MMMU's eval_utils.py)."""


def item(row: Row) -> Item:
    """Convert a row; `options` is a list literal as text, `answer` a letter or the accepted answers to an open question."""
    name = row.text("id")
    images = tuple(image for number in range(1, MOST_IMAGES + 1) if (image := row.picture(f"image_{number}")) is not None)
    if not images:
        raise UnreadableItemError("no image")
    options = row.get("options", [])
    choices = [str(option) for option in (ast.literal_eval(options) if isinstance(options, str) else options)]
    answer = row.text("answer")
    is_choice = row.get("question_type", "multiple-choice") == "multiple-choice"
    accepted = ast.literal_eval(answer) if answer.startswith("[") else [answer]
    return Item(
        id=name,
        media=Images(images, name),
        question=row.text("question"),
        choices=choices if is_choice else [],
        gold=gold_letter(choices, answer) if is_choice else None,
        hints={} if is_choice else {"precision": DECIMALS},
        answers=[] if is_choice else [str(one) for one in accepted],
        groups=groups(name, name.removeprefix("validation_").rpartition("_")[0], subfield=row.get("subfield")),
    )


BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU",
    item=item,
    files=("data/validation-*.parquet", "validation-*.parquet", "*/validation-*.parquet", "*.jsonl"),
    columns=("id", "question", "options", "answer", "image_1"),
    hub=("MMMU/MMMU", "lmms-lab-encoder/MMMU", "lmms-lab/MMMU"),
    split="validation",
    answers="number",
    note="Open questions by rule; no random guesses.",
)
