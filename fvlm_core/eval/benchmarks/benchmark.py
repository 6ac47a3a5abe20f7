"""The definition of a benchmark: how its published rows become items, its prompt, and its headline number.

Each benchmark is one file in this folder that ends with `BENCHMARK = Benchmark(...)`; its name is registered in `__init__.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fvlm_core.errors import UserError
from fvlm_core.eval.annotations import Row, annotation_files, read_rows
from fvlm_core.eval.items import Item, UnreadableItemError
from fvlm_core.eval.media import FrameFolder, Images, Source, VideoFile
from fvlm_core.settings import hash_json

AnswerKind = Literal["accuracy", "yes_no", "anls", "vqa", "number", "exact"]
"""The metric: accuracy for choices (`yes_no` adds precision, recall and F1), the others for open answers."""
Scorer = Literal["letter", "sum", "mean", "pmi"]
"""The method that scores the choices; see `fvlm_core.eval.records.option_scores`."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
OPTION_LINE = re.compile(r"^\s*\(?(?:(?:Option|Caption|Sentence)\s+)?([A-Z]|\d)[.):]\s+(.+?)\s*$")
EXAMPLES = 5
"""Number of rows named in an error."""


@dataclass(frozen=True)
class Prompt:
    """The prompt template. Its hash is part of the results, because accuracies with different prompts are not comparable."""

    before: str = ""
    question: str = "{question}"
    option: str = "{letter}. {text}"
    after: str = "Answer with the option's letter from the given choices directly."
    """Instruction below the options."""
    open_after: str = "Answer the question using a single word or phrase."
    """Instruction below an open question."""

    def with_letters(self, item: Item) -> str:
        """The question with its lettered choices."""
        options = [self.option.format(letter=letter, text=text) for letter, text in zip(LETTERS, item.choices, strict=False)]
        return _lines(self.before, self.question.format(question=item.question), *options, self.after)

    def open(self, item: Item) -> str:
        """The question without choices."""
        return _lines(self.question.format(question=item.question), self.open_after)

    @property
    def hash(self) -> str:
        """Hash of the whole template."""
        return hash_json([self.before, self.question, self.option, self.after, self.open_after])[:12]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    """Name in profiles and on the command line."""
    title: str
    """Name in papers."""
    item: Callable[[Row], Item] | None = None
    """Converts a row to an item. Raises UnreadableItemError."""
    files: tuple[str, ...] = ()
    """Glob patterns of annotation files; the first pattern with any match is used."""
    skip: tuple[str, ...] = ()
    """Files whose path contains one of these are left out."""
    columns: tuple[str, ...] = ()
    """Required columns; `a|b` means that either is enough."""
    hub: tuple[str, ...] = ()
    """Datasets on the hub in this format."""
    split: str = "test"
    prompt: Prompt = field(default_factory=Prompt)
    answers: AnswerKind = "accuracy"
    scorer: Scorer = "letter"
    """Scoring method of the headline accuracy."""
    macro: str = ""
    """The headline is the mean over the values of this group; empty: the mean over questions."""
    note: str = ""
    """Remark that is printed with the numbers."""
    generate: Callable[[Path | None, int], Iterable[Item]] | None = None
    """Generates items without annotation files, from the folder (if any) and the number of items (0: all)."""
    needs_folder: bool = True

    def locate(self, folder: Path | None) -> Path | None:
        """The folder with the benchmark's files: `folder` itself, or a dataset on the hub, which is downloaded.

        Raises UserError if it is neither.
        """
        if folder is None:
            if self.needs_folder:
                raise UserError(f"{self.name}: its data are not given", where="--data", fix=f"give a folder that holds {self.name}/")
            return None
        if folder.exists():
            return folder
        if not HUB_NAME.match(str(folder)):
            raise UserError(f"{self.name}: its folder is missing", where=str(folder), fix="correct the path, or give OWNER/NAME on the hub")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(folder), repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.name}: download from the hub failed: {reason}", where=str(folder), fix="download it by hand") from error

    def annotations(self, folder: Path) -> list[Path]:
        """The annotation files. Raises UserError if there are none."""
        files = annotation_files(folder, self.files, where=self.name)
        return [file for file in files if not any(part in file.as_posix() for part in self.skip)]

    def rows(self, folder: Path) -> Iterator[Row]:
        """The rows of all annotation files. Raises UserError for files in another format."""
        for file in self.annotations(folder):
            yield from read_rows(file, folder, self.columns, where=self.name)


@dataclass(frozen=True)
class Loaded:
    """The items of a benchmark, and the rows that could not be used."""

    benchmark: Benchmark
    items: list[Item]
    rows: int
    """Number of rows considered."""
    missing: dict[str, str]
    """Paths of missing media, by item."""
    unreadable: dict[str, str]
    """Errors of rows that could not be converted to items, by row."""

    @property
    def lost(self) -> int:
        """Number of rows without a usable item."""
        return len(self.missing) + len(self.unreadable)


def load(benchmark: Benchmark, folder: Path | None, *, limit: int = 0, max_missing_share: float = 0.01) -> Loaded:
    """Read the items of a benchmark, at most `limit` (0: all), spread evenly over its rows.

    Raises UserError for files in another format, or if more than `max_missing_share` of the rows lack media or cannot be converted.
    """
    place = benchmark.locate(folder)
    if benchmark.generate is not None:
        items = list(benchmark.generate(place, limit))
        return _checked(Loaded(benchmark, items, len(items), {}, {}), max_missing_share, place)
    assert place is not None
    assert benchmark.item is not None
    rows = list(benchmark.rows(place))
    if limit and limit < len(rows):
        rows = [rows[number] for number in np.linspace(0, len(rows) - 1, limit).round().astype(int)]
    loaded = Loaded(benchmark, [], len(rows), {}, {})
    for row in rows:
        name = f"{row.file.name}:{row.number + 1}"
        try:
            item = _rooted(benchmark.item(row), place)
        except (UnreadableItemError, ValueError, TypeError, KeyError, SyntaxError) as error:
            loaded.unreadable[name] = str(error)
            continue
        if absent := _absent(item.media):
            loaded.missing[item.id] = str(absent)
        else:
            loaded.items.append(item)
    return _checked(loaded, max_missing_share, place)


def check_share(lost: dict[str, str], total: int, share: float, *, what: str, where: str, fix: str) -> None:
    """Raise UserError with the first few reasons if more than `share` of `total` items are lost."""
    if len(lost) > share * total:
        shown = "".join(f"\n    {name}: {why}" for name, why in list(lost.items())[:EXAMPLES])
        more = f"\n    and {len(lost) - EXAMPLES} more" if len(lost) > EXAMPLES else ""
        raise UserError(f"{len(lost)} of {total} {what}; the limit is {share:.0%}:{shown}{more}", where=where, fix=fix)


def video(path: Path, start_s: float | None = None, end_s: float | None = None) -> VideoFile | FrameFolder:
    """A video at `path`: a file, or a folder of frames."""
    return FrameFolder(path, start_s=start_s, end_s=end_s) if path.is_dir() else VideoFile(path, start_s, end_s)


def inline_options(question: str) -> tuple[str, list[str]]:
    """Split a question from the options below it, one per line (`A. text`, `(A) text`, `Option 1: text`).

    Raises UnreadableItemError if there are fewer than two options.
    """
    lines = question.strip().splitlines()
    found = [(place, match) for place, line in enumerate(lines) if (match := OPTION_LINE.match(line))]
    if len(found) < 2:
        raise UnreadableItemError("neither candidates nor options in the question")
    head = "\n".join(line for line in lines[: found[0][0]] if line.strip().lower() not in ("options:", "option:", "choices:"))
    return head.strip(), [match[2] for _, match in found]


def without_letter(option: str) -> str:
    """Remove the leading letter of an option: `A. a cat` -> `a cat`."""
    return re.sub(r"^\s*\(?[A-Z][.):]\s*", "", option).strip()


def _rooted(item: Item, root: Path) -> Item:
    """The item with `root` set on its media, so that their keys are relative to the benchmark's folder."""
    if isinstance(item.media, VideoFile | FrameFolder | Images):
        return replace(item, media=replace(item.media, root=root))
    return item


def _absent(media: Source) -> Path | None:
    """The first missing file of the media, or None."""
    if isinstance(media, VideoFile | FrameFolder):
        return None if media.path.exists() else media.path
    if isinstance(media, Images):
        return next((image for image in media.images if isinstance(image, Path) and not image.is_file()), None)
    return None


def _checked(loaded: Loaded, share: float, place: Path | None) -> Loaded:
    name, where = loaded.benchmark.name, str(place or loaded.benchmark.name)
    allow = "or allow it: --max-missing-share (max_missing_share)"
    for lost, what, fix in (
        (loaded.missing, f"items of {name} lack their media", "complete the download"),
        (loaded.unreadable, f"rows of {name} are invalid", "correct them"),
    ):
        check_share(lost, loaded.rows, share, what=what, where=where, fix=f"{fix}, {allow}")
    if not loaded.items:
        raise UserError(f"{name} has no items", where=where, fix="give the folder as it is published")
    return loaded


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def groups(clip: object, task: object, **more: object) -> dict[str, str]:
    """The groups of an item, without empty ones."""
    values = {"clip": clip, "task": task} | more
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def picked(values: Sequence[object]) -> str:
    """The first non-empty value, as text; empty if there is none."""
    return next((str(value) for value in values if value not in (None, "")), "")
