"""TempCompass (Liu et al. 2024, https://arxiv.org/abs/2403.00476): multiple choice, yes or no, and caption matching.

The captioning task is left out, because GPT judges its answers. The options of a question are below it, one per line.
"""

from fvlm_core.eval.annotations import Row, find_media
from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups, inline_options, video
from fvlm_core.eval.items import Item, gold_index

YES_NO = ["yes", "no"]
LABEL = (". ", ": ", ") ")


def item(row: Row) -> Item:
    """Convert a row of `<task>/test-*.parquet`."""
    task = row.file.parent.name if row.file.suffix == ".parquet" else str(row.get("task", row.file.stem))
    question, answer, name = row.text("question"), row.text("answer"), row.text("video_id")
    if answer.lower() in YES_NO:
        choices, right = YES_NO, YES_NO.index(answer.lower())
    else:
        question, choices = inline_options(question)
        bare = next((answer.split(mark, 1)[1] for mark in LABEL if mark in answer), answer)
        right = gold_index(choices, bare.strip())
    return Item(
        id=f"{task}/{name}/{row.number}",
        media=video(find_media(row.root, name, ("videos", "video", ""))),
        question=question,
        choices=choices,
        gold=right,
        groups=groups(name, task, dim=row.get("dim")),
    )


BENCHMARK = Benchmark(
    name="tempcompass",
    title="TempCompass",
    item=item,
    files=("*/test-*.parquet", "*.jsonl"),
    skip=("/captioning/",),
    columns=("video_id", "question", "answer"),
    hub=("lmms-lab/TempCompass",),
)
