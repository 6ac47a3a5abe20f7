"""Your own questions: a JSONL file whose lines have `question`, `answer` (or `answers`) and one of `video`, `image`, `images`, `frames`.

With `choices`, the question is multiple choice; its answer is a letter, an index (from 0) or the choice's text. `task` and `clip` group
results; `start` and `end` (seconds) select a part of a video. Paths are relative to the benchmark's folder. A line without media is a
text-only question.
"""

from pathlib import Path

from fvlm_core.eval.annotations import Row
from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups, picked, video
from fvlm_core.eval.items import Item, UnreadableItemError, gold_index
from fvlm_core.eval.media import NO_MEDIA, Images, Source

MEDIA = ("video", "frames", "image", "images")


def item(row: Row) -> Item:
    """Convert a line."""
    media, place = _media(row)
    choices = [str(choice) for choice in row.get("choices", [])]
    answer = row.get("answers") or row["answer"]
    name = picked([row.get("id"), f"{row.file.stem}:{row.number + 1}"])
    return Item(
        id=name,
        media=media,
        question=row.text("question"),
        choices=choices,
        gold=gold_index(choices, answer) if choices else None,
        answers=[] if choices else [str(one) for one in answer] if isinstance(answer, list) else [str(answer)],
        groups=groups(picked([row.get("clip"), place, name]), row.get("task", row.file.stem)),
    )


def _media(row: Row) -> tuple[Source, str]:
    given = [name for name in MEDIA if row.get(name)]
    if len(given) > 1:
        raise UnreadableItemError(f"one of {', '.join(MEDIA)} can be given, not {' and '.join(given)}")
    if not given:
        return NO_MEDIA, ""
    value = row[given[0]]
    if given[0] in ("image", "images"):
        names = [str(one) for one in (value if isinstance(value, list) else [value])]
        return Images(tuple(row.root / name for name in names)), ",".join(names)
    path = row.root / Path(str(value))
    return video(path, row.get("start"), row.get("end")), str(value)


BENCHMARK = Benchmark(
    name="own",
    title="Own questions",
    item=item,
    files=("*.jsonl",),
    columns=("question", "answer|answers"),
    answers="exact",
    scorer="mean",
)
