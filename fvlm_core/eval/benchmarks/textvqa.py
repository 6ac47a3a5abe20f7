"""TextVQA (Singh et al. 2019, https://arxiv.org/abs/1904.08920), validation: 5,000 questions, ten answers each, scored by VQA accuracy."""

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups
from fvlm_core.eval.items import Item, UnreadableItemError
from fvlm_core.eval.media import Images


def item(row: Row) -> Item:
    """Convert a row."""
    image = row.picture("image")
    if image is None:
        raise UnreadableItemError("no image")
    name = str(row.get("image_id", ""))
    return Item(
        id=row.text("question_id"),
        media=Images((image,), name),
        question=row.text("question").capitalize(),
        answers=row.texts("answers"),
        groups=groups(name or row.text("question_id"), ""),
    )


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    item=item,
    files=("data/validation-*.parquet", "validation-*.parquet", "*.jsonl"),
    columns=("question_id", "question", "answers", "image"),
    hub=("lmms-lab-encoder/textvqa", "lmms-lab/textvqa"),
    split="validation",
    answers="vqa",
    note="Without the OCR tokens that some models are given.",
)
