"""Score generated text: parsed choices, exact answers, ANLS, VQA accuracy, numbers. Nothing is guessed: an unparsable answer is wrong.

Answers are compared as a whole, never by substring: `5285123` does not match `528`.
"""

import re
from collections.abc import Mapping, Sequence

from fvlm_core.eval.benchmarks.benchmark import LETTERS, AnswerKind

ANLS_THRESHOLD = 0.5
"""Similarities below this count as 0 (Biten et al. 2019, https://arxiv.org/abs/1905.13648)."""
VQA_AGREEING = 3
"""Number of agreeing annotators that makes an answer fully correct (Antol et al. 2015, https://arxiv.org/abs/1505.00468)."""

_LETTER = re.compile(r"^\W*([A-Z])(?:\W*$|[.):,\]])")
_NAMED = re.compile(r"\b(?i:(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\(?([A-Z](?=\W|$)|[a-z](?=\)|\W*$))")
"""A lowercase letter counts only before a bracket or at the end, because `a` is also a word."""
_BRACKETED = re.compile(r"\(([A-Z])\)")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_ONLY_NUMBER = re.compile(r"[-+$]?\s*[\d,]*\.?\d+(?:[eE][-+]?\d+)?\s*%?")
_ARTICLES = ("a", "an", "the")
_NUMBER_WORDS = {
    word: str(value) for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
_PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_CONTRACTIONS = {
    short.replace("'", ""): short
    for short in [
        "ain't",
        "aren't",
        "can't",
        "could've",
        "couldn't",
        "didn't",
        "doesn't",
        "don't",
        "hadn't",
        "hasn't",
        "haven't",
        "he'd",
        "he's",
        "how'd",
        "how'll",
        "how's",
        "i'd",
        "i'm",
        "i've",
        "isn't",
        "it'd",
        "it'll",
        "let's",
        "ma'am",
        "mightn't",
        "might've",
        "mustn't",
        "must've",
        "needn't",
        "not've",
        "o'clock",
        "oughtn't",
        "shan't",
        "she's",
        "should've",
        "shouldn't",
        "somebody'd",
        "somebody'll",
        "somebody's",
        "someone'd",
        "someone'll",
        "someone's",
        "something'd",
        "something'll",
        "that's",
        "there'd",
        "there're",
        "there's",
        "they'd",
        "they'll",
        "they're",
        "they've",
        "'twas",
        "wasn't",
        "we've",
        "weren't",
        "what'll",
        "what're",
        "what's",
        "what've",
        "when's",
        "where'd",
        "where's",
        "where've",
        "who'd",
        "who'll",
        "who's",
        "who've",
        "why'll",
        "why're",
        "why's",
        "won't",
        "would've",
        "wouldn't",
        "y'all",
        "you'd",
        "you'll",
        "you're",
        "you've",
    ]
    if short not in ("let's",)
} | {"lets": "let's", "'twas": "'twas"}


def parse_choice(said: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a text names by its text or its letter; None if it names none.

    A letter counts if it is alone, before punctuation, in brackets, or after `answer`, `option` or `choice`. "A dog" does not name A.
    """
    exact = [place for place, choice in enumerate(choices) if plain(choice) == plain(said)]
    if len(exact) == 1:
        return exact[0]
    text = said.strip()
    for pattern in (_LETTER, _BRACKETED, _NAMED):
        if (match := pattern.search(text)) and (place := LETTERS.find(match[1].upper())) < len(choices):
            return place
    return None


def parse_yes_no(said: str) -> int | None:
    """0 if the first word is yes, 1 if it is no, else None."""
    word = re.match(r"\W*(\w+)", said.lower())
    return {"yes": 0, "no": 1}.get(word[1]) if word else None


def score(said: str, accepted: Sequence[str], kind: AnswerKind, hints: Mapping[str, str]) -> float:
    """Score of an answer against the accepted answers, 0..1."""
    if kind == "anls":
        return anls(said, accepted)
    if kind == "vqa":
        return vqa_accuracy(said, accepted)
    if kind == "number":
        return float(any(same_number(said, answer, hints.get("precision")) for answer in accepted))
    return float(any(plain(said) == plain(answer) for answer in accepted))


def plain(text: str) -> str:
    """Normalise text for comparison: lowercase, single spaces, no surrounding punctuation."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def anls(said: str, accepted: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the closest accepted answer, 0 below `ANLS_THRESHOLD`; its average over questions is ANLS."""
    best = 0.0
    for answer in accepted:
        ours, theirs = " ".join(said.lower().split()), " ".join(answer.lower().split())
        longest = max(len(ours), len(theirs))
        best = max(best, 1 - levenshtein(ours, theirs) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def vqa_accuracy(said: str, accepted: Sequence[str]) -> float:
    """VQA accuracy: the mean, over leaving out each annotator in turn, of min(1, matching answers among the others / 3).

    Answers are normalised by `vqa_plain`.
    """
    ours, theirs = vqa_plain(said), [vqa_plain(answer) for answer in accepted]
    agreeing = [sum(answer == ours for place, answer in enumerate(theirs) if place != left_out) for left_out in range(len(theirs))]
    return sum(min(1.0, count / VQA_AGREEING) for count in agreeing) / len(agreeing)


def vqa_plain(text: str) -> str:
    """Normalise an answer as the VQA evaluation does: no articles or punctuation, number words as digits, apostrophes restored."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_NUMBER_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def same_number(said: str, answer: str, precision: str | None = None) -> bool:
    """Whether the last number in a text equals the answer to `precision` decimals (default: those of the answer).

    An answer that is not a number has to match exactly.
    """
    if not _is_number(answer):
        return plain(said) == plain(answer)
    wanted, found = _numbers(answer)[0], _numbers(said)
    decimals = int(precision) if precision is not None else len(answer.rpartition(".")[2]) if "." in answer else 0
    return bool(found) and round(found[-1], decimals) == round(wanted, decimals)


def _is_number(text: str) -> bool:
    return _ONLY_NUMBER.fullmatch(text.strip()) is not None


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for match in _NUMBER.finditer(text) if re.search(r"\d", found := match[0])]
