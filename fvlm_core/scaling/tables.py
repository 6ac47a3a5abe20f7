"""The tables of comparisons and of the scaling study: CSV for machines, `Table` for everything that is read."""

import csv
import io
import json
from collections.abc import Sequence
from statistics import mean, stdev

from pydantic import JsonValue, TypeAdapter

from fvlm_core.config import SourceShares
from fvlm_core.scaling.jobs import AblationRow, GridPoint, Quantity
from fvlm_core.scaling.results import Fits
from fvlm_core.tables import Table, signed


def ablations_csv(rows: list[AblationRow]) -> str:
    """The table without timings: equal runs give equal bytes."""
    passes = list(dict.fromkeys(name for row in rows for name in row.losses))
    columns = ["name", "change", "value", "loss", "delta", *(f"loss_{name}" for name in passes)]
    columns += ["params", "flops", "samples", "control", "other_validation", "also_changed", "divergences"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = row.model_dump(include=set(columns)) | {f"loss_{name}": loss for name, loss in row.losses.items()}
        writer.writerow(values | {"value": show_value(row.value), "also_changed": " ".join(row.also_changed)})
    return text.getvalue()


def ablations_table(rows: Sequence[AblationRow], baseline: str, winner: str) -> Table:
    """Every run, best first, worse ones too."""
    ordered = sorted(rows, key=lambda row: row.loss)
    passes = list(dict.fromkeys(name for row in rows for name in row.losses))
    note = "Losses in nats per labelled token; one change, one run and one seed each."
    if any(row.control for row in rows):
        note += " With a star: a control, compared, never adopted."
    if any(row.other_validation for row in rows):
        note += " With a dagger: changes the validation set too, so its loss is of other samples and cannot win."
    cells = [
        [
            marked_name(row),
            change_text(row, baseline),
            f"{row.loss:.4f}",
            "" if row.name == baseline else signed(row.delta),
            *(f"{row.losses[name]:.4f}" if name in row.losses else "" for name in passes),
            "" if row.frames_per_s is None else f"{row.frames_per_s:.1f}",
            f"{row.params:,}",
            f"{row.flops:.2e}",
        ]
        for row in ordered
    ]
    return Table(
        title="Ablations",
        head=["run", "change", "validation loss", "difference", *passes, "frames/s", "parameters", "FLOPs"],
        rows=cells,
        marked=[number for number, row in enumerate(ordered) if row.name == winner],
        note=note,
    )


def marked_name(row: AblationRow) -> str:
    """The run's name, with a mark where it cannot win."""
    return row.name + ("*" if row.control else "") + ("†" if row.other_validation else "")


def change_text(row: AblationRow, baseline: str) -> str:
    """E.g. `optimizer.lr_llm = 0.0`."""
    return "baseline" if row.name == baseline else f"{row.change} = {show_value(row.value)}"


def show_value(value: JsonValue) -> str:
    """A setting's value as a person would write it; a mixture as its shares."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        shares = TypeAdapter(SourceShares).validate_python(value)
        return ", ".join(f"{part.source} {part.share:.0%}" for part in shares)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def points_csv(points: Sequence[GridPoint]) -> str:
    """`points.csv`: everything the fits use."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*GridPoint.model_fields, "visual_tokens"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.model_dump() | {"visual_tokens": point.visual_tokens} for point in points)
    return text.getvalue()


def losses_table(points: Sequence[GridPoint]) -> Table:
    """Losses of the grid, a row per variant and size, a column per budget; the mean where a cell has several seeds."""
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
        note += " ± is the standard deviation over the seeds of a cell; the others have one seed."
    return Table(title="Validation losses of the grid", head=head, rows=rows, note=note)


def _cell(losses: list[float]) -> str:
    if not losses:
        return ""
    return f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f} (n={len(losses)})" if len(losses) > 1 else "")


def fits_table(fits: Fits) -> Table:
    """What the runs determine."""
    found = [[name, f"{q.value:.4g}", show_interval(q), q.reason] for name, q in fit_rows(fits) if q.value is not None]
    return Table(title=f"Fits, by {fits.weights} errors", head=["fit", "value", "95 % interval", "note"], rows=found)


def undetermined(fits: Fits) -> dict[str, list[str]]:
    """What the runs do not determine: the fits' names by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, quantity in fit_rows(fits):
        if quantity.value is None:
            reasons.setdefault(quantity.reason, []).append(name)
    return reasons


def fit_rows(fits: Fits) -> list[tuple[str, Quantity]]:
    """The headline fits with their names, for tables."""
    rows = []
    for variant, one in fits.variants.items():
        rows += [(f"{variant}: {name} of the joint law", one.law[name]) for name in ("E", "A", "alpha", "B", "beta")]
        rows += [(f"{variant}: exponent of the best size over the budget, by the law", one.law["ratio"])]
        rows += [(f"{variant}: the same through parabolas' vertices", one.allocation["exponent"])]
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
    """Its interval for reading: nothing but bounds."""
    low, high = quantity.low, quantity.high
    if quantity.value is None or (low is None and high is None):
        return ""
    if low is None or high is None:
        return f"below {high:.4g}" if low is None else f"above {low:.4g}"
    return f"{low:.4g} to {high:.4g}"


def scaling_text(points: Sequence[GridPoint], fits: Fits) -> str:
    """`scaling.md`: the grid, what was fitted, what could not be, and the choice."""
    parts = [f"Chosen size: **{fits.chosen}** ({fits.chosen_reason}).", losses_table(points).markdown()]
    if (found := fits_table(fits)).rows:
        parts.append(found.markdown())
    if reasons := undetermined(fits):
        parts.append("What these runs do not determine:")
        parts.append("\n".join(f"* {'; '.join(names)}: {reason}" for reason, names in reasons.items()))
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in fits.notes)]) + "\n"


def ablations_text(rows: Sequence[AblationRow], baseline: str, winner: str) -> str:
    """`ablations.md`."""
    return f"Winner: **{winner}**.\n\n{ablations_table(rows, baseline, winner).markdown()}\n"
