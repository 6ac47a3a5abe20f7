"""`tables.md`: the results for reading, made from `results.json` and `latency.json` alone."""

from collections.abc import Sequence

from fvlm_core.eval.references import references_table
from fvlm_core.eval.results import CaptionScores, Estimate, Latency, PairedTest, Results
from fvlm_core.model.names import Mode


def tables(results: Results, latency: Latency | None) -> str:
    """All tables as markdown."""
    sections = [
        ("Modes", _modes(results, latency)),
        ("Paired differences", _paired(results)),
        ("Validation loss by source", _sources(results)),
        ("Question order", _order(results)),
        ("Multiple choice", _choices(results)),
        ("Captions", _captions(results)),
        ("Reference models", references_table()),
        ("Not measured", "\n".join(f"* {what}: {why}" for what, why in results.absent.items())),
    ]
    head = f"# Evaluation of {results.run}\n\nCheckpoint `{results.checkpoint[:12]}`, {results.frame_px} px frames, "
    head += f"{results.tokens_per_frame} token(s) per frame. Square brackets: 95 % bootstrap interval over clips.\n"
    return head + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections if body)


def number(estimate: Estimate | None, decimals: int = 3) -> str:
    """E.g. `0.512 [0.480, 0.541]`; empty for None."""
    if estimate is None:
        return ""
    return f"{estimate.value:.{decimals}f} [{estimate.low:.{decimals}f}, {estimate.high:.{decimals}f}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; cells lose what would break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(printable(cell.replace('|', '/')) for cell in line)} |" for line in lines)


def printable(text: str) -> str:
    """Text on one line, with control characters shown as a dot: an untrained model says anything."""
    return "".join(character if character.isprintable() else "·" for character in text)


def _modes(results: Results, latency: Latency | None) -> str:
    rows = [
        [
            mode,
            number(result.loss),
            number(result.captions.cider_d if result.captions else None),
            number(result.captions.bleu_4 if result.captions else None),
            number(result.multiple_choice.accuracy if result.multiple_choice else None),
            number(result.attention_entropy),
            f"{latency.modes[mode].median_ms:.1f}" if latency else "",
        ]
        for mode, result in results.modes.items()
    ]
    return markdown_table(["mode", "loss (nats/token)", "CIDEr-D", "BLEU-4", "multiple choice", "attention entropy", "ms per clip"], rows)


def _paired(results: Results) -> str:
    tests = [test for test in (results.train_inference_gap, results.foveation_gain) if test] + results.paired_tests
    rows = [[test.metric.replace("_", " "), f"{test.a} - {test.b}", number(test.difference, 4), _p(test)] for test in tests]
    return markdown_table(["metric", "difference", "value", "McNemar p"], rows) if rows else ""


def _p(test: PairedTest) -> str:
    return "" if test.p_value is None else f"{test.p_value:.3g} ({test.only_a} against {test.only_b})"


def _sources(results: Results) -> str:
    names = sorted({source for result in results.modes.values() for source in result.loss_by_source})
    rows = [[name, *(number(result.loss_by_source[name]) for result in results.modes.values())] for name in names]
    return markdown_table(["source", *results.modes], rows)


def _order(results: Results) -> str:
    rows = [
        [
            cell.order.replace("_", " "),
            cell.mode,
            number(cell.accuracy),
            number(cell.first_frame),
            number(cell.later_frames),
            number(cell.loss),
            number(cell.gaze_hit_rate),
            str(cell.accuracy.n),
        ]
        for cell in results.question_order
    ]
    if not rows:
        return ""
    hits = "gaze hits" + (f" (chance {results.gaze_chance:.2f})" if results.gaze_chance else "")
    return markdown_table(["order", "mode", "accuracy", "first frame", "later frames", "loss", hits, "clips"], rows)


def _choices(results: Results) -> str:
    base = results.multiple_choice
    if base is None:
        return ""
    rows = [
        [mode, number(scores.accuracy), number(scores.shuffled_frames), str(scores.predicted_positions)]
        for mode, result in results.modes.items()
        if (scores := result.multiple_choice)
    ]
    rows += [
        ["no frames (blind)", number(base.blind), "", ""],
        ["always the most frequent position", f"{base.majority:.3f}", "", str(base.gold_positions)],
        ["chance", f"{base.chance:.3f}", "", ""],
    ]
    text = markdown_table(["", "accuracy", "frames shuffled", "positions chosen"], rows)
    return f"{base.questions} questions about {base.clips} clips; mean log-likelihood per token of each option's text.\n\n{text}"


def _captions(results: Results) -> str:
    scored: dict[Mode, CaptionScores] = {mode: result.captions for mode, result in results.modes.items() if result.captions}
    if not scored:
        return ""
    metrics = {"CIDEr-D": "cider_d", "BLEU-1": "bleu_1", "BLEU-2": "bleu_2", "BLEU-3": "bleu_3", "BLEU-4": "bleu_4", "ROUGE-L": "rouge_l"}
    rows = [[name, *(number(getattr(scores, field)) for scores in scored.values())] for name, field in metrics.items()]
    if any(scores.meteor is not None for scores in scored.values()):
        rows.append(["METEOR", *("" if scores.meteor is None else f"{scores.meteor:.3f}" for scores in scored.values())])
    examples = [[example.reference, *(example.generated.get(mode, "") for mode in scored)] for example in results.caption_examples]
    return f"{markdown_table(['metric', *scored], rows)}\n\n{markdown_table(['reference', *scored], examples)}"
