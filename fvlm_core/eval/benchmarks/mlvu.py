"""MLVU (Zhou et al. 2024, https://arxiv.org/abs/2406.04264), the seven multiple-choice tasks of its development set.

The headline, M-Avg, is the mean of the tasks' accuracies. The open-ended tasks are left out, because GPT judges their answers.
"""

from fvlm_core.eval.annotations import Row, find_media
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Prompt, groups, inline_options, picked, video
from fvlm_core.eval.items import Item, gold_index, gold_letter
from fvlm_core.eval.media import relative_key


def item(row: Row) -> Item:
    """Convert a row of `json/<task>.json` as first published, or of the table on the hub, whose questions may contain the options."""
    task = picked([row.get("task_type"), row.get("question_type"), row.file.stem])
    name = picked([row.get("video_name"), row.get("video")])
    question = row.text("question")
    if candidates := row.get("candidates"):
        choices = [str(choice) for choice in candidates]
        gold = gold_index(choices, row.text("answer"))
    else:
        question, choices = inline_options(question)
        gold = gold_letter(choices, row.text("answer"))
    folders = (f"video/{row.file.stem}", f"video/{task}", f"MLVU/video/{row.file.stem}", f"videos/{task}", "video", "videos", "")
    found = find_media(row.root, name, folders)
    return Item(
        id=f"{task}/{row.file.stem}:{row.number}",
        media=video(found),
        question=question,
        choices=choices,
        gold=gold,
        groups=groups(relative_key(row.root, found), task),
    )


BENCHMARK = Benchmark(
    name="mlvu",
    title="MLVU",
    item=item,
    files=("json/*.json", "MLVU/json/*.json", "**/*.parquet", "*.jsonl", "*.json"),
    columns=("video_name|video", "question", "answer", "task_type|question_type"),
    hub=("MLVU/MVLU", "sy1998/MLVU_dev"),
    split="dev",
    skip=("_sub_scene.json", "_summary.json"),
    prompt=Prompt(option="({letter}) {text}", after="Only give the best option.\nBest option:"),
    macro="task",
)
