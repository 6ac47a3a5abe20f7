"""Tables of a benchmark: each mode with its controls and baselines, and significance tests of the differences."""

from fvlm_core.eval.answerers.answerer import ORDERS
from fvlm_core.eval.benchmark_result import BenchmarkResult, ConditionScores
from fvlm_core.eval.benchmarks.benchmark import LETTERS
from fvlm_core.eval.tables import by_mode
from fvlm_core.tables import Table, difference, number, words

CONTROLS = {
    "random_query": "random queries",
    "question_query": "one query, from the question, for all frames",
    "blind": "no frames (blind)",
}


def benchmark_tables(result: BenchmarkResult) -> list[Table]:
    """All tables of one benchmark."""
    tables = [_main(result), *_reading(result), *_orders(result), *_groups(result)]
    return [*tables, *([_differences(result)] if result.differences else [])]


def _main(result: BenchmarkResult) -> Table:
    shown, shuffled = result.of(result.main_order), result.of(result.main_order, "shuffled")
    rows = [[mode, *_cells(one), number(shuffled[mode].headline) if mode in shuffled else ""] for mode, one in shown.items()]
    rows += [[name, *_cells(result.conditions[view]), ""] for view, name in CONTROLS.items() if view in result.conditions]
    if result.majority is not None:
        rows.append(["always the most frequent letter", number(result.majority), *_blank(result), _histogram(result.gold_positions), ""])
        rows.append(["chance", number(result.chance), *_blank(result), "", ""])
    extra = list(next(iter(result.conditions.values())).yes_no)
    head = ["", words(result.metric), *map(words, extra), "letters chosen", "frames shuffled"]
    used = [place for place in range(len(head)) if place == 0 or any(row[place] for row in rows)]
    return Table(
        title=result.title, head=[head[place] for place in used], rows=[[row[place] for place in used] for row in rows], note=_note(result)
    )


def _cells(one: ConditionScores) -> list[str]:
    return [number(one.headline), *(number(value) for value in one.yes_no.values()), _histogram(one.positions)]


def _blank(result: BenchmarkResult) -> list[str]:
    return [""] * len(next(iter(result.conditions.values())).yes_no)


def _histogram(positions: list[int]) -> str:
    return " ".join(f"{letter} {count}" for letter, count in zip(LETTERS, positions, strict=False))


def _note(result: BenchmarkResult) -> str:
    text = f"{result.questions} questions about {result.clips} clips"
    lost = {
        "without their media": result.missing,
        "unreadable": result.unreadable,
        "not decodable": len(result.undecodable),
    }
    text += "".join(f", {count} {what}" for what, count in lost.items() if count)
    text += f"; {words(result.main_order)}; {result.frames:.1f} frames on average (at most {result.most_frames}, {result.fps:g} a second)"
    if result.scorer:
        text += f"; choices scored by {result.scorer}"
    if result.macro:
        text += f"; the mean over {words(result.macro)}s"
    open_questions = result.questions - sum(result.gold_positions)
    if result.majority is not None and open_questions:
        text += f"; {open_questions} questions are open: chance and the most frequent letter count them as wrong"
    unparsed = sum(one.unparsed for one in result.conditions.values())
    text += f"; {unparsed} answers named no choice and count as wrong" if unparsed else ""
    return f"{text}. Prompt `{result.prompt}`.{' ' + result.note if result.note else ''}"


def _reading(result: BenchmarkResult) -> list[Table]:
    """Accuracy by scoring method."""
    shown = result.of(result.main_order)
    scorers = list(dict.fromkeys(scorer for one in shown.values() for scorer in one.by_scorer))
    if len(scorers) < 2:
        return []
    columns = dict(shown) | {name: result.conditions[name] for name in ("blind",) if name in result.conditions}
    rows = {scorer: {name: one.by_scorer.get(scorer) for name, one in columns.items()} for scorer in scorers}
    note = "Over questions. letter: likelihood of the letter; sum, mean, pmi: likelihood of the option's text; generated: parsed answer."
    return [by_mode(f"{result.title} by scoring method", "", list(columns), rows, note=note)]


def _orders(result: BenchmarkResult) -> list[Table]:
    """Accuracy with the question before and after the video, in every mode."""
    rows = {words(order): {mode: one.headline for mode, one in result.of(order).items()} for order in ORDERS if result.of(order)}
    if len(rows) < 2:
        return []
    return [by_mode(f"{result.title} by question order", "order", list(result.of(result.main_order)), rows)]


def _groups(result: BenchmarkResult) -> list[Table]:
    shown = result.of(result.main_order)
    columns = dict(shown) | {name: result.conditions[name] for name in ("blind",) if name in result.conditions}
    tables = []
    for group in next(iter(shown.values())).by_group:
        kinds = next(iter(shown.values())).by_group[group]
        rows = {kind: {name: one.by_group[group].get(kind) for name, one in columns.items()} for kind in kinds}
        tables.append(by_mode(f"{result.title} by {words(group)}", words(group), list(columns), rows))
    return tables


def _differences(result: BenchmarkResult) -> Table:
    rows = [
        [
            f"{words(one.a)} − {words(one.b)}",
            difference(one.value),
            f"{one.p_value:.3g}",
            f"{one.p_holm:.3g}",
            "within noise" if one.noise else "differs",
        ]
        for one in result.differences
    ]
    note = "Paired on the same questions; sign-flip test by clip; p-values Holm-adjusted over all rows of the table."
    if result.macro:
        note += f" Value, interval and test are of the headline, in which every {words(result.macro)} has the same weight."
    return Table(title=f"{result.title}, differences", head=["difference", "value", "p", "p (Holm)", "verdict"], rows=rows, note=note)
