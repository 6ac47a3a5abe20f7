"""DocVQA (Mathew et al. 2021, https://arxiv.org/abs/2007.00398), validation: 5,349 questions on scanned pages, scored by ANLS."""

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups
from fvlm_core.eval.items import Item, UnreadableItemError
from fvlm_core.eval.media import Images


def item(row: Row) -> Item:
    """Convert a row of the `DocVQA` configuration."""
    image = row.picture("image")
    if image is None:
        raise UnreadableItemError("no image")
    page = f"{row.get('ucsf_document_id', row.get('docId', ''))}:{row.get('ucsf_document_page_no', '')}"
    kinds = row.get("question_types", [])
    return Item(
        id=row.text("questionId"),
        media=Images((image,), page if page != ":" else ""),
        question=row.text("question"),
        answers=row.texts("answers"),
        groups=groups(page if page != ":" else row.text("questionId"), kinds[0] if kinds else None),
    )


BENCHMARK = Benchmark(
    name="docvqa",
    title="DocVQA",
    item=item,
    files=("DocVQA/validation-*.parquet", "validation-*.parquet", "data/validation-*.parquet", "*.jsonl"),
    columns=("questionId", "question", "answers", "image"),
    hub=("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA"),
    split="validation",
    answers="anls",
)
