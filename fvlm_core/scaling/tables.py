"""The tables of comparisons and of the scaling study: CSV for machines, `Table` for everything that is read."""

import csv
import io
import json
from collections.abc import Sequence

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
    """Losses of the grid, a row per variant and size, a column per budget."""
    budgets = sorted({point.budget_flops for point in points})
    losses = {(point.variant, point.size, point.budget_flops): point.loss for point in points}
    rows = [
        [variant, size, f"{params:,}", *(f"{losses[variant, size, c]:.4f}" if (variant, size, c) in losses else "" for c in budgets)]
        for variant, size, params in dict.fromkeys((point.variant, point.size, point.params) for point in points)
    ]
    head = ["variant", "size", "parameters", *(f"{budget:.1e} FLOPs" for budget in budgets)]
    return Table(title="Validation losses of the grid", head=head, rows=rows, note="Losses in nats per labelled token.")


def fits_table(fits: Fits) -> Table:
    """What the runs determine."""
    found = [[name, f"{q.value:.4g}", show_interval(q)] for name, q in fit_rows(fits) if q.value is not None]
    return Table(title="Fits", head=["fit", "value", "95 % interval"], rows=found)


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
        rows += [(f"{variant}: {name} of the joint law", one.law[name]) for name in ("alpha", "beta", "E")]
        rows += [(f"{variant}: beta at fixed size", one.data["beta"])]
        rows += [(f"{variant}: exponent of the best size over budget", one.allocation["exponent"])]
        if one.held_out is not None:
            rows.append((f"{variant}: held-out error at the largest budget", one.held_out.mean_relative_error))
    return [
        *rows,
        ("crossover (FLOPs)", fits.crossover_flops),
        ("visual tokens at equal loss, baseline / foveated", fits.token_ratio_at_equal_loss),
    ]


def show_interval(quantity: Quantity) -> str:
    """Its interval for reading."""
    if quantity.value is None:
        return ""
    interval = "" if quantity.low is None or quantity.high is None else f"{quantity.low:.4g} to {quantity.high:.4g}"
    return "; ".join(part for part in (interval, quantity.reason) if part)


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
