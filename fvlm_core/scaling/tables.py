"""Tables of run comparisons and of the scaling study: CSV for machines, `Table` for people."""

import csv
import io
import json
from collections.abc import Sequence
from statistics import mean, stdev

from pydantic import JsonValue, TypeAdapter

from fvlm_core.config import SourceShares
from fvlm_core.scaling.jobs import AblationReport, AblationRow, GridPoint, Outcome, Quantity
from fvlm_core.scaling.results import Fits
from fvlm_core.tables import Table, signed

OUTCOMES = {"order_gain": "order x mode", "on_target": "gaze on target", "order_drift": "autoregressive drift"}
"""Column titles of the outcomes other than the loss."""


def ablations_csv(rows: list[AblationRow]) -> str:
    """The table as CSV, without timings, so that identical runs give identical bytes."""
    passes = list(dict.fromkeys(name for row in rows for name in row.losses))
    columns = ["name", "hypothesis", "change", "value", "seeds", "loss", "delta", "low", "high", "p_value", "threshold", "verdict"]
    columns += ["delta_equal_flops", *(f"loss_{name}" for name in passes), "mode_gain", "drift", *OUTCOMES, "params", "flops", "samples"]
    columns += ["control", "other_validation", "also_changed", "divergences", "by_seed"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = row.model_dump(include=set(columns)) | {f"loss_{name}": loss for name, loss in row.losses.items()}
        values |= {name: _outcome(getattr(row, name)) for name in OUTCOMES}
        seeds = " ".join(f"{seed}:{loss}" for seed, loss in row.by_seed.items())
        writer.writerow(values | {"value": show_value(row.value), "also_changed": " ".join(row.also_changed), "by_seed": seeds})
    return text.getvalue()


def ablations_table(report: AblationReport) -> Table:
    """A table of all runs, best first."""
    ordered = sorted(report.rows, key=lambda row: row.loss)
    passes = list(dict.fromkeys(name for row in report.rows for name in row.losses))
    note = f"Losses in nats per labelled token, means over n seeds; one change each. {report.method}."
    if report.noise.value is not None:
        note += f" The standard deviation of a run's loss over seeds is {report.noise.value:.4f}."
    note += " Equal FLOPs: from the validation curves, at a point where the learning rate of the longer run had not decayed."
    if report.questions:
        note += (
            f" The last three outcomes are from {report.questions} questions about places, with the difference to the baseline in brackets:"
            " order x mode is the gain of fine passes over the coarse one with the question first, minus that with it after, in nats;"
            " gaze is with the question first; autoregressive drift is relative to the fine pass."
        )
    if any(row.control for row in report.rows):
        note += " Runs with a star are controls, compared but never adopted."
    if any(row.other_validation for row in report.rows):
        note += " Runs with a dagger also change the validation set, so their losses are not comparable and they cannot win."
    cells = [
        [
            marked_name(row),
            change_text(row, report.baseline),
            str(row.seeds),
            f"{row.loss:.4f}",
            "" if row.name == report.baseline else difference_text(row),
            "" if row.threshold is None else f"{row.threshold:.4f}",
            row.verdict,
            "" if row.delta_equal_flops is None else signed(row.delta_equal_flops),
            *(f"{row.losses[name]:.4f}" if name in row.losses else "" for name in passes),
            "" if row.mode_gain is None else signed(row.mode_gain),
            "" if row.drift is None else signed(row.drift),
            *(_outcome(getattr(row, name)) for name in OUTCOMES if report.questions),
            "" if row.frames_per_s is None else f"{row.frames_per_s:.1f}",
            f"{row.params:,}",
            f"{row.flops:.2e}",
        ]
        for row in ordered
    ]
    head = ["run", "change", "n", "validation loss", "difference", "threshold", "verdict", "at equal FLOPs", *passes]
    return Table(
        title="Ablations",
        head=[*head, "fine over coarse", "drift", *(OUTCOMES.values() if report.questions else ()), "frames/s", "parameters", "FLOPs"],
        rows=cells,
        marked=[number for number, row in enumerate(ordered) if row.name == report.winner],
        note=note,
    )


def ablations_summary(report: AblationReport) -> str:
    """The summary: controls that beat the baseline, diverged runs, and the winner."""
    controls = [row for row in report.rows if row.control and row.delta < 0 and row.verdict in ("better", "no verdict")]
    sure = "" if report.noise.value is not None else f" ({report.noise.reason})"
    lines = [
        f"**The control {row.name} beats the baseline** by {-row.delta:.4f} nats{sure}: the component that it removes did not help here."
        for row in controls
    ]
    diverged = [row.name for row in report.rows if row.divergences]
    if diverged:
        lines.append(f"Diverged: {', '.join(diverged)}.")
    why = report.noise.reason if report.noise.value is None else f"no other run is better by a sufficient margin; {report.method}"
    lines.append(f"Winner: **{report.winner}**" + (f" ({why})." if report.winner == report.baseline else "."))
    return " ".join(lines)


def _outcome(one: Outcome | None) -> str:
    """Format value, difference and interval, e.g. `0.31 (+0.2 [0.1, 0.3])`."""
    if one is None:
        return ""
    if one.delta is None:
        return f"{one.value:.4f}"
    interval = "" if one.low is None or one.high is None else f" [{signed(one.low)}, {signed(one.high)}]"
    return f"{one.value:.4f} ({signed(one.delta)}{interval})"


def difference_text(row: AblationRow) -> str:
    """The difference to the baseline, with its interval if there is one."""
    interval = "" if row.low is None or row.high is None else f" [{signed(row.low)}, {signed(row.high)}]"
    return signed(row.delta) + interval


def marked_name(row: AblationRow) -> str:
    """The run's name, with a mark if it cannot win."""
    return row.name + ("*" if row.control else "") + ("†" if row.other_validation else "")


def change_text(row: AblationRow, baseline: str) -> str:
    """The change as text, e.g. `optimizer.lr_llm = 0.0`."""
    return "baseline" if row.name == baseline else f"{row.change} = {show_value(row.value)}"


def show_value(value: JsonValue) -> str:
    """A setting's value as readable text; a mixture as its shares."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        shares = TypeAdapter(SourceShares).validate_python(value)
        return ", ".join(f"{part.source} {part.share:.0%}" for part in shares)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def points_csv(points: Sequence[GridPoint]) -> str:
    """The content of `points.csv`: all inputs of the fits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*GridPoint.model_fields, "visual_tokens"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.model_dump() | {"visual_tokens": point.visual_tokens} for point in points)
    return text.getvalue()


def losses_table(points: Sequence[GridPoint]) -> Table:
    """Losses of the grid: one row per variant and size, one column per budget, means over the seeds of a cell."""
    budgets = sorted({point.budget_flops for point in points})
    cells: dict[tuple[str, str, float], list[float]] = {}
    for point in points:
        cells.setdefault((point.variant, point.size, point.budget_flops), []).append(point.loss)
    rows = [
        [variant, size, f"{params:,}", *(_cell(cells.get((variant, size, budget), [])) for budget in budgets)]
        for variant, size, params in dict.fromkeys((point.variant, point.size, point.params) for point in points)
    ]
    head = ["variant", "size", "parameters", *(f"{budget:.1e} FLOPs" for budget in budgets)]
    note = "Losses in nats per labelled token."
    if any(len(losses) > 1 for losses in cells.values()):
        note += " ± is the standard deviation over the seeds of a cell; cells without it have one seed."
    return Table(title="Validation losses of the grid", head=head, rows=rows, note=note)


def _cell(losses: list[float]) -> str:
    if not losses:
        return ""
    return f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f} (n={len(losses)})" if len(losses) > 1 else "")


def fits_table(fits: Fits) -> Table:
    """The fitted quantities that the runs determine."""
    found = [[name, f"{q.value:.4g}", show_interval(q), q.reason] for name, q in fit_rows(fits) if q.value is not None]
    return Table(title=f"Fits, by {fits.weights} errors", head=["fit", "value", "95 % interval", "note"], rows=found)


def undetermined(fits: Fits) -> dict[str, list[str]]:
    """The quantities that the runs do not determine: names by reason."""
    reasons: dict[str, list[str]] = {}
    for name, quantity in fit_rows(fits):
        if quantity.value is None:
            reasons.setdefault(quantity.reason, []).append(name)
    return reasons


def fit_rows(fits: Fits) -> list[tuple[str, Quantity]]:
    """The headline quantities with their display names."""
    rows = []
    for variant, one in fits.variants.items():
        rows += [(f"{variant}: {name} of the joint law", one.law[name]) for name in ("E", "A", "alpha", "B", "beta")]
        rows += [(f"{variant}: exponent of the best size over the budget, by the law", one.law["ratio"])]
        rows += [(f"{variant}: the same, through the parabolas' vertices", one.allocation["exponent"])]
        rows += [(f"{variant}: {name} of the joint law, by Huber loss", one.law_huber[name]) for name in ("alpha", "beta")]
        rows += [(f"{variant}: beta at fixed size", one.data["beta"])]
        rows += [(f"{variant}: relative scatter around the law", one.residual), (f"{variant}: relative noise of a seed", one.noise)]
        if one.held_out is not None:
            by = f" by {one.held_out.law}" if one.held_out.law else ""
            rows.append((f"{variant}: mean relative error at the largest budget, held out{by}", one.held_out.mean_relative_error))
    return [
        *rows,
        ("crossover (FLOPs)", fits.crossover_flops),
        ("visual tokens at equal loss, baseline / foveated", fits.token_ratio_at_equal_loss),
    ]


def show_interval(quantity: Quantity) -> str:
    """The interval as text, e.g. `0.2 to 0.4` or `above 0.2`; empty if there is none."""
    low, high = quantity.low, quantity.high
    if quantity.value is None or (low is None and high is None):
        return ""
    if low is None or high is None:
        return f"below {high:.4g}" if low is None else f"above {low:.4g}"
    return f"{low:.4g} to {high:.4g}"


def scaling_text(points: Sequence[GridPoint], fits: Fits) -> str:
    """The content of `scaling.md`: the choice, the grid, the fits, and what could not be fitted."""
    parts = [f"Chosen size: **{fits.chosen}** ({fits.chosen_reason}).", losses_table(points).markdown()]
    if (found := fits_table(fits)).rows:
        parts.append(found.markdown())
    if reasons := undetermined(fits):
        parts.append("Not determined by these runs:")
        parts.append("\n".join(f"* {'; '.join(names)}: {reason}" for reason, names in reasons.items()))
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in fits.notes)]) + "\n"


def ablations_text(report: AblationReport) -> str:
    """The content of `ablations.md`."""
    return f"{ablations_summary(report)}\n\n{ablations_table(report).markdown()}\n"
