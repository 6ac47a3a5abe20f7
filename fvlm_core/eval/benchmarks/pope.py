"""POPE (Li et al. 2023, https://arxiv.org/abs/2305.10355): is an object in the image? 9,000 questions; the answer to half of them is yes.

A model that always gives the same answer has an accuracy of 0.5, so F1 and the share of yes among the predictions are reported too.
"""

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Prompt, groups, picked
from fvlm_core.eval.items import Item, UnreadableItemError, gold_index
from fvlm_core.eval.media import Images

CHOICES = ["yes", "no"]


def item(row: Row) -> Item:
    """Convert a row; `category` says how the absent objects were chosen."""
    image = row.picture("image")
    if image is None:
        raise UnreadableItemError("no image")
    source, category = str(row.get("image_source", "")), str(row.get("category", ""))
    name = picked([row.get("id"), row.get("question_id"), row.number])
    return Item(
        id=f"{category}/{name}",
        media=Images((image,), source),
        question=row.text("question"),
        choices=CHOICES,
        gold=gold_index(CHOICES, row.text("answer").lower()),
        groups=groups(source or name, category),
    )


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    item=item,
    files=("data/test-*.parquet", "test-*.parquet", "Full/*.parquet", "*.jsonl"),
    columns=("question", "answer", "image"),
    hub=("lmms-lab-encoder/POPE", "lmms-lab/POPE"),
    prompt=Prompt(after="Answer the question using a single word or phrase.", option=""),
    answers="yes_no",
    scorer="sum",
)
