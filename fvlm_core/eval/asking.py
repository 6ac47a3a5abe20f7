"""Ask a model the items of a benchmark under every condition, in resumable shards.

Items about the same media are grouped, and the media opened once. Each shard is a file; a later run reuses the finished ones. Shards do not
depend on the number of ranks, so one rank or four write the same bytes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from fvlm_core.data.ahead import ahead
from fvlm_core.data.frames import ClipError
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Answerer, Ask, Condition, Order, orders_of
from fvlm_core.eval.benchmarks.benchmark import LETTERS, Benchmark, Loaded, check_share
from fvlm_core.eval.generation import GREEDY, Generation
from fvlm_core.eval.items import Item
from fvlm_core.eval.media import NO_MEDIA, Media
from fvlm_core.eval.ranks import ALONE, Ranks
from fvlm_core.eval.records import ConditionOutput, ItemRecord, read_shard, rounded, write_shard
from fvlm_core.settings import Settings, hash_json

SHARD_ITEMS = 32
"""Items per shard (or those of one video, if it has more): the most work that a killed evaluation loses."""
ANSWER_TOKENS = 24
"""Maximum length of a generated answer, in tokens."""
FORMAT = 2
"""Version of the record format; increase it with every change, so that old shards are not reused."""


class AskSettings(Settings):
    """How items are asked."""

    orders: list[Order] | None = None
    """Question before the video, after it, or both; the headline and the controls use the first. None runs both orders,
    beginning with the model's native one: before the video for fVLM, after it for SmolVLM2."""
    modes: list[str] | None = None
    """Modes to run; None runs all modes of the model."""
    controls: bool = True
    """Also measure the controls: shuffled frames, no frames, random queries, and a single query made from the question."""
    options_text: bool = True
    """Compute the likelihoods of the options' texts."""
    letters: bool = True
    """Compute the likelihoods of the options' letters."""
    generate: bool = False
    """Also generate and parse answers to multiple-choice questions; answers to open questions are always generated."""
    answer_tokens: int = ANSWER_TOKENS
    """Maximum length of a generated answer, in tokens."""
    generation: Generation = GREEDY
    """How answers are generated."""


@dataclass(frozen=True)
class Shard:
    """Items whose records are stored in one file."""

    number: int
    items: list[Item]


def shards_of(items: Sequence[Item], size: int = SHARD_ITEMS) -> list[Shard]:
    """Split items into shards of about `size`, keeping items with the same media together, in the order of their first items."""
    together: dict[str, list[Item]] = {}
    for place, item in enumerate(items):
        together.setdefault(f"text:{place}" if item.media is NO_MEDIA else item.media.key, []).append(item)
    shards: list[list[Item]] = [[]]
    for group in together.values():
        if shards[-1] and len(shards[-1]) + len(group) > size:
            shards.append([])
        shards[-1].extend(group)
    return [Shard(number, some) for number, some in enumerate(shards)]


def ask_all(
    answerer: Answerer,
    loaded: Loaded,
    settings: AskSettings,
    folder: Path,
    *,
    ranks: Ranks = ALONE,
    max_missing_share: float = 0.01,
    done: Callable[[int], None] = lambda items: None,
) -> None:
    """Ask the unfinished shards of this rank and write each to a file in `folder`; call `done` with the number of items after each shard.

    Raises UserError if the model lacks a mode or a generation method, or if more than `max_missing_share` of the items cannot be decoded.
    """
    orders = settings.orders or orders_of(answerer.native_order)
    conditions = answerer.conditions(orders, settings.modes, controls=settings.controls)
    if settings.generation.method not in answerer.methods:
        fix = f"choose of {', '.join(answerer.methods)}"
        raise UserError(f"{answerer.name} does not generate by {settings.generation.method}", where="ask.generation.method", fix=fix)
    failed: dict[str, str] = {}
    for shard in shards_of(loaded.items)[ranks.rank :: ranks.size]:
        path, key = shard_path(folder, shard), shard_key(answerer, loaded.benchmark, settings, shard)
        records = read_shard(path, key)
        if records is None or any(record.error for record in records):  # media may have been replaced
            records = ask_shard(answerer, loaded.benchmark, settings, conditions, shard.items)
            write_shard(path, key, records)
        failed |= {record.id: record.error for record in records if record.error}
        _check_decoded(failed, loaded, max_missing_share)
        done(len(records))


def wait_for_all(answerer: Answerer, loaded: Loaded, settings: AskSettings, folder: Path, *, poll_s: float = 0.5) -> None:
    """Wait until the other ranks have written their shards; torchrun ends all ranks if one of them fails."""
    for shard in shards_of(loaded.items):
        key = shard_key(answerer, loaded.benchmark, settings, shard)
        while read_shard(shard_path(folder, shard), key) is None:
            time.sleep(poll_s)


def collect(answerer: Answerer, loaded: Loaded, settings: AskSettings, folder: Path, *, max_missing_share: float) -> list[ItemRecord]:
    """The records of all shards. Raises UserError if a shard is not finished, or too many items could not be decoded."""
    found = []
    for shard in shards_of(loaded.items):
        path = shard_path(folder, shard)
        records = read_shard(path, shard_key(answerer, loaded.benchmark, settings, shard))
        if records is None:
            raise UserError(
                "a shard of the evaluation is not finished", where=str(path), fix="run the evaluation again: it resumes from there"
            )
        found += [_scored_by(item, record) for item, record in zip(shard.items, records, strict=True)]
    _check_decoded({record.id: record.error for record in found if record.error}, loaded, max_missing_share)
    return found


def ask_shard(
    answerer: Answerer, benchmark: Benchmark, settings: AskSettings, conditions: Sequence[Condition], items: Sequence[Item]
) -> list[ItemRecord]:
    """The records of some items. Media of adjacent items are opened once, and the next media are decoded in the background."""
    together = [list(some) for _, some in groupby(items, key=lambda item: item.media.key)]
    records: list[ItemRecord] = []
    for some, media in zip(together, ahead(partial(_load, answerer), together, 1), strict=True):
        if isinstance(media, ClipError):
            records += [_record(item, 0, error=str(media)) for item in some]
        else:
            records += _ask(answerer, benchmark, settings, conditions, some, media)
    return records


def _load(answerer: Answerer, items: Sequence[Item]) -> Media | ClipError:
    """The media that the items share, or the error if they could not be decoded."""
    try:
        return answerer.load_media(items[0].media)
    except ClipError as error:
        return error


def shard_path(folder: Path, shard: Shard) -> Path:
    """The file of a shard."""
    return folder / f"{shard.number:05d}.jsonl"


def shard_key(answerer: Answerer, benchmark: Benchmark, settings: AskSettings, shard: Shard) -> str:
    """Hash of everything that a shard's records depend on."""
    items = [[item.id, item.question, item.choices, item.media.key] for item in shard.items]
    rule = [answerer.rule.frame_px, answerer.rule.fps, answerer.rule.max_frames, answerer.image_repeats]
    return hash_json([FORMAT, answerer.checkpoint, benchmark.name, benchmark.prompt.hash, settings.hash(), rule, items])


def _ask(
    answerer: Answerer,
    benchmark: Benchmark,
    settings: AskSettings,
    conditions: Sequence[Condition],
    items: Sequence[Item],
    media: Media,
) -> list[ItemRecord]:
    """Ask all items about the same media, under every condition."""
    asks, owners = _asks(benchmark, settings, items)
    opened = answerer.open(media, items[0].media.key)
    said: list[dict[str, ConditionOutput]] = [{} for _ in items]
    for condition in conditions:
        for (place, part), reply in zip(owners, opened.replies(asks, condition), strict=True):
            before = said[place].get(condition.name, ConditionOutput())
            if part == "letters":
                new: dict[str, object] = {"letters": [row[0] for row in rounded(reply)]}
            elif part == "options":
                new = {"options": rounded(reply)}
            else:
                new = {"text": reply.said}
            said[place][condition.name] = before.model_copy(update=new)
    texts = list(dict.fromkeys(choice for item in items for choice in item.choices)) if settings.options_text else []
    unconditional = dict(zip(texts, answerer.unconditional(texts), strict=True)) if texts else {}
    records = []
    for item, of_item in zip(items, said, strict=True):
        prior = [row[0] + row[2] for choice in item.choices for row in rounded(unconditional[choice])] if texts else []
        records.append(_record(item, media.n_shown, said=of_item, unconditional=[round(value, 6) for value in prior]))
    return records


def _asks(benchmark: Benchmark, settings: AskSettings, items: Sequence[Item]) -> tuple[list[Ask], list[tuple[int, str]]]:
    """The questions of all items, and for each question its owner: (index of the item, field of the record)."""
    asks: list[Ask] = []
    owners: list[tuple[int, str]] = []
    for place, item in enumerate(items):
        wanted: list[tuple[str, Ask]] = []
        if item.choices:
            lettered = benchmark.prompt.with_letters(item)
            if settings.letters and benchmark.answers != "yes_no":
                wanted.append(("letters", Ask(lettered, tuple(LETTERS[: len(item.choices)]), first_token=True)))
            if settings.options_text:
                text = lettered if benchmark.answers == "yes_no" else item.question
                wanted.append(("options", Ask(text, tuple(item.choices))))
            if settings.generate:
                wanted.append(("text", Ask(lettered, max_new_tokens=settings.answer_tokens, generation=settings.generation)))
        else:
            wanted.append(("text", Ask(benchmark.prompt.open(item), max_new_tokens=settings.answer_tokens, generation=settings.generation)))
        asks += [ask for _, ask in wanted]
        owners += [(place, part) for part, _ in wanted]
    return asks, owners


def _record(item: Item, frames: int, **more: object) -> ItemRecord:
    return ItemRecord.model_validate({"id": item.id, "choices": item.choices, "frames": frames, **_known(item), **more})


def _known(item: Item) -> dict[str, object]:
    """The fields of a record that come from the item and affect scoring only, not what is asked."""
    return {"gold": item.gold, "answers": item.answers, "hints": item.hints, "groups": item.groups, "clip": item.clip}


def _scored_by(item: Item, record: ItemRecord) -> ItemRecord:
    """The record with the item's current annotations, which may have been corrected since the model was asked."""
    return record.model_copy(update=_known(item))


def _check_decoded(failed: dict[str, str], loaded: Loaded, share: float) -> None:
    name = loaded.benchmark.name
    fix = "replace the media, or allow it: --max-missing-share (max_missing_share)"
    check_share(failed, loaded.rows, share, what=f"items of {name} could not be decoded", where=name, fix=fix)
