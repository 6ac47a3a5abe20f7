"""MathVista (Lu et al. 2024, https://arxiv.org/abs/2310.02255), testmini: 1,000 questions, 540 of them multiple choice.

For published numbers, a language model extracts the answer from the generated text. Here a rule does (the last number, or the named
choice), so the results are marked as not comparable with published ones.
"""

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Prompt, groups
from fvlm_core.eval.items import Item, UnreadableItemError, gold_index
from fvlm_core.eval.media import Images


def item(row: Row) -> Item:
    """Convert a row; the answer to a multiple-choice question is the choice's text."""
    image = row.picture("decoded_image") if row.get("decoded_image") is not None else row.picture("image")
    if image is None:
        raise UnreadableItemError("no image")
    choices = [str(choice) for choice in row.get("choices", [])]
    is_choice = row.text("question_type") == "multi_choice"
    answer = row.text("answer")
    unit = row.get("unit", "")
    metadata = row.get("metadata", {})
    precision = row.get("precision")
    return Item(
        id=row.text("pid"),
        media=Images((image,)),
        question=row.text("question") + (f" (Unit: {unit})" if unit else ""),
        choices=choices if is_choice else [],
        gold=gold_index(choices, answer) if is_choice else None,
        answers=[] if is_choice else [answer],
        groups=groups(row.text("pid"), metadata.get("task"), context=metadata.get("context")),
        hints={"answer_type": str(row.get("answer_type", "text"))} | ({} if precision is None else {"precision": str(int(precision))}),
    )


BENCHMARK = Benchmark(
    name="mathvista",
    title="MathVista",
    item=item,
    files=("data/testmini-*.parquet", "testmini-*.parquet", "*.jsonl"),
    columns=("pid", "question", "answer", "question_type", "decoded_image|image"),
    hub=("AI4Math/MathVista", "lmms-lab/MathVista"),
    split="testmini",
    prompt=Prompt(open_after="Answer with a number or a word only."),
    answers="number",
    note="Answers found by rule: not comparable with published numbers, whose answers a language model extracts.",
)
