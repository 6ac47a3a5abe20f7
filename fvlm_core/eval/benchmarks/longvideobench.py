"""LongVideoBench (Wu et al. 2024, https://arxiv.org/abs/2407.15754), validation: videos of up to an hour, without subtitles here."""

from fvlm_core.eval.annotations import Row, find_media
from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups, picked, video
from fvlm_core.eval.items import Item, gold_index

ABSENT = "N/A"
"""Placeholder for a missing option in the table on the hub."""


def item(row: Row) -> Item:
    """Convert a row of `lvb_val.json`, or of the table on the hub, which has one column per option."""
    candidates = row.get("candidates") or [row.get(f"option{number}", ABSENT) for number in range(5)]
    choices = [str(choice) for choice in candidates if choice != ABSENT]
    name = picked([row.get("video_path"), row.get("video_id")])
    return Item(
        id=row.text("id"),
        media=video(find_media(row.root, name, ("videos", "data", ""))),
        question=row.text("question"),
        choices=choices,
        gold=gold_index(choices, int(row["correct_choice"])),
        groups=groups(picked([row.get("video_id"), name]), row.get("question_category"), duration=row.get("duration_group")),
    )


BENCHMARK = Benchmark(
    name="longvideobench",
    title="LongVideoBench",
    item=item,
    files=("lvb_val.json", "validation-*.parquet", "*.jsonl"),
    columns=("id", "question", "correct_choice", "candidates|option0", "video_path|video_id"),
    hub=("longvideobench/LongVideoBench",),
    split="validation",
    note="Without subtitles.",
)
