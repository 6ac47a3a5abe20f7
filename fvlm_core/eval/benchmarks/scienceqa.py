"""ScienceQA (Lu et al. 2022, https://arxiv.org/abs/2209.09513), test: 4,241 questions, 2,017 of them with an image.

Both configurations on the hub can be read: all questions, or those with an image (`ScienceQA-IMG`, which image models report).
"""

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Prompt, groups
from fvlm_core.eval.items import Item, gold_index
from fvlm_core.eval.media import NO_MEDIA, Images


def item(row: Row) -> Item:
    """Convert a row; the answer is the index of a choice. A hint is put before the question."""
    image, hint, choices = row.picture("image"), str(row.get("hint", "")).strip(), row.texts("choices")
    name = f"{row.file.stem}:{row.number}"
    return Item(
        id=name,
        media=NO_MEDIA if image is None else Images((image,)),
        question=(f"Context: {hint}\n" if hint else "") + row.text("question"),
        choices=choices,
        gold=gold_index(choices, int(row["answer"])),
        groups=groups(
            name, row.get("subject"), topic=row.get("topic"), grade=row.get("grade"), image="without image" if image is None else "image"
        ),
    )


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    item=item,
    files=("ScienceQA-IMG/test-*.parquet", "data/test-*.parquet", "test-*.parquet", "*.jsonl"),
    columns=("image", "question", "choices", "answer"),
    hub=("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA"),
    prompt=Prompt(),
)
