"""Caption metrics: BLEU-1..4, ROUGE-L and CIDEr-D as defined by the COCO caption tools, without Java.

Every metric is computed from per-caption numbers (`CaptionStats`) whose sums over a corpus give the corpus score, so captions can be
resampled for an interval without scoring them again. CIDEr-D's document frequencies come from the references of the complete evaluated
set and stay fixed while resampling.
"""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

MAX_N = 4
"""Maximum n-gram length of BLEU and CIDEr."""
CIDER_SIGMA = 6.0
"""Standard deviation, in words, of CIDEr-D's Gaussian penalty on the difference from the reference's length."""
CIDER_SCALE = 10.0
ROUGE_BETA = 1.2
"""Recall counts beta^2 times as much as precision in ROUGE-L."""

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'])
"""Tokens that the COCO tools drop after tokenisation."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""Penn Treebank names of brackets. The COCO tools lowercase them before filtering, so their uppercase drop list never matches them."""

_TOKEN = re.compile(
    r"""
    (?:[a-z]\.){2,}                                     # acronyms keep their points: u.s., p.m.
    | \b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave)\.          # and so do titles and the like
    | \d+(?:[.,:/]\d+)+                                 # 3.5, 1,000, 5:30
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b)  # two words written as one
    | n't\b | '(?:s|m|d|ll|re|ve)\b                     # the second half of a contraction
    | [\w-]+?(?=n't\b|'(?:s|m|d|ll|re|ve)\b)           # and its first
    | \w+(?:[-'_&/]\w+)*                                 # words, with inner hyphens and o'clock
    | \.\.\. | -- | '' | `` | [^\w\s]
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Lowercase Penn Treebank tokens without punctuation, as produced by the COCO tools' Java tokeniser for captions."""
    tokens = [str(token) for token in _TOKEN.findall(caption.lower())]
    return [_BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION]


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of C captions, float64; their sums over captions (or over a resample of them) give the scores."""

    bleu: np.ndarray
    """[C, 2 + 2 * MAX_N]: hypothesis length, closest reference length, matched n-grams for n = 1..MAX_N, then possible n-grams."""
    rouge_l: np.ndarray
    """[C]."""
    cider_d: np.ndarray
    """[C], 0..10."""


def caption_stats(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionStats:
    """Score each hypothesis against its references. Raises ValueError if a hypothesis has no reference."""
    if len(hypotheses) != len(references) or not all(references):
        raise ValueError("every hypothesis needs at least one reference")
    hypothesis_tokens = [tokenize(text) for text in hypotheses]
    reference_tokens = [[tokenize(text) for text in texts] for texts in references]
    pairs = list(zip(hypothesis_tokens, reference_tokens, strict=True))
    return CaptionStats(
        bleu=np.array([_bleu_counts(hypothesis, refs) for hypothesis, refs in pairs], np.float64).reshape(-1, 2 + 2 * MAX_N),
        rouge_l=np.array([_rouge_l(hypothesis, refs) for hypothesis, refs in pairs], np.float64),
        cider_d=_cider_d(hypothesis_tokens, reference_tokens),
    )


def bleu_from_sums(sums: np.ndarray, n: int) -> np.ndarray:
    """BLEU-n without smoothing from summed `CaptionStats.bleu` rows [..., 2 + 2 * MAX_N] -> [...]; 0 where no n-gram matches."""
    lengths, closest = sums[..., 0], sums[..., 1]
    matched, possible = sums[..., 2 : 2 + n], sums[..., 2 + MAX_N : 2 + MAX_N + n]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(np.where(possible > 0, matched / possible, 0.0)).mean(-1)
        log_brevity = np.where(lengths > 0, np.minimum(0.0, 1 - closest / lengths), -np.inf)
    return np.exp(log_precision + log_brevity)


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of the corpus, computed by pycocoevalcap's jar; call it only if `meteor_absence` returns None."""
    from pycocoevalcap.meteor.meteor import Meteor  # optional, heavy

    tokenized = {i: [" ".join(tokenize(text))] for i, text in enumerate(hypotheses)}
    score, _ = Meteor().compute_score({i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(references)}, tokenized)
    return float(score)


def meteor_absence() -> str | None:
    """The reason why METEOR cannot be computed here; None if it can."""
    missing = [name for name, there in (("java", shutil.which("java")), ("pycocoevalcap", find_spec("pycocoevalcap"))) if not there]
    return f"not installed: {', '.join(missing)} (the extra `meteor`, and a Java)" if missing else None


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _bleu_counts(hypothesis: list[str], references: list[list[str]]) -> list[int]:
    closest = min((abs(len(ref) - len(hypothesis)), len(ref)) for ref in references)[1]
    matched, possible = [], []
    for n in range(1, MAX_N + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for ref in references:
            most |= _ngrams(ref, n)
        matched.append((_ngrams(hypothesis, n) & most).total())
        possible.append(max(0, len(hypothesis) - n + 1))
    return [len(hypothesis), closest, *matched, *possible]


def _rouge_l(hypothesis: list[str], references: list[list[str]]) -> float:
    """F-measure of the longest common subsequence, with the best precision and the best recall over the references."""
    common = [_common_subsequence(hypothesis, ref) for ref in references]
    precision = max(common) / len(hypothesis) if hypothesis else 0.0
    recall = max((length / len(ref) for length, ref in zip(common, references, strict=True) if ref), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _cider_d(hypotheses: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """CIDEr-D of each hypothesis, float64 [C]: clipped tf-idf cosine per n-gram order, with a Gaussian length penalty."""
    documents: Counter[tuple[str, ...]] = Counter()
    for refs in references:
        documents.update({gram for ref in refs for n in range(1, MAX_N + 1) for gram in _ngrams(ref, n)})
    log_count = np.log(len(references)) if references else 0.0

    def weights(tokens: list[str], n: int) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_count - np.log(max(1, documents[gram]))) for gram, count in _ngrams(tokens, n).items()}

    def similarity(hypothesis: list[str], ref: list[str]) -> float:
        total = 0.0
        for n in range(1, MAX_N + 1):
            ours, theirs = weights(hypothesis, n), weights(ref, n)
            norms = np.sqrt(sum(w * w for w in ours.values())) * np.sqrt(sum(w * w for w in theirs.values()))
            if norms:
                total += sum(min(w, theirs[gram]) * theirs[gram] for gram, w in ours.items() if gram in theirs) / norms
        # the COCO tools measure length in bigrams; the difference equals that in words, except for empty captions
        difference = max(0, len(hypothesis) - 1) - max(0, len(ref) - 1)
        return total / MAX_N * float(np.exp(-(difference**2) / (2 * CIDER_SIGMA**2)))

    pairs = zip(hypotheses, references, strict=True)
    return np.array([CIDER_SCALE * np.mean([similarity(hypothesis, ref) for ref in refs]) for hypothesis, refs in pairs], np.float64)
