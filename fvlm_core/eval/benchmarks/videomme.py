"""Video-MME (Fu et al. 2024, https://arxiv.org/abs/2405.21075): 2,700 questions on 900 videos, four options, without subtitles here."""

from fvlm_core.eval.annotations import Row, find_media
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Prompt, groups, video, without_letter
from fvlm_core.eval.items import Item, gold_letter


def item(row: Row) -> Item:
    """Convert a row of `videomme/test-*.parquet`; its options start with their letters."""
    choices = [without_letter(option) for option in row.texts("options")]
    name = row.text("videoID")
    return Item(
        id=row.text("question_id"),
        media=video(find_media(row.root, name, ("data", "videos", "video", ""))),
        question=row.text("question"),
        choices=choices,
        gold=gold_letter(choices, row.text("answer")),
        groups=groups(
            name, row.get("task_type"), duration=row.get("duration"), domain=row.get("domain"), sub_category=row.get("sub_category")
        ),
    )


BENCHMARK = Benchmark(
    name="videomme",
    title="Video-MME",
    item=item,
    files=("videomme/test-*.parquet", "test-*.parquet", "data/test-*.parquet", "*.parquet", "*.jsonl"),
    columns=("videoID", "question_id", "question", "options", "answer"),
    hub=("lmms-eval/Video-MME", "lmms-lab/Video-MME"),
    prompt=Prompt(
        before="Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.",
        after="The best answer is:",
    ),
    note="Without subtitles.",
)
