"""Fit scaling laws to the points in a user's CSV file. What cannot be fitted is refused or reported, never guessed."""

import csv
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.manifest import write_atomically
from fvlm_core.scaling.choice import choose
from fvlm_core.scaling.fits import MIN_SIZES
from fvlm_core.scaling.jobs import FITS_FILE, GridPoint, Variant, Weights
from fvlm_core.scaling.study import Study
from fvlm_core.scaling.tables import show_interval
from fvlm_core.tables import Table

NEEDED = ("run_id", "size", "params", "loss")
DATA = ("tokens", "samples")
"""Columns for the amount of training data; the first that exists is used."""
FLOPS_PER_PARAM_AND_TOKEN = 6.0
"""Training FLOPs per parameter and token, used if a table has no `flops` (Kaplan et al. 2020)."""
ROUNDED = 1e-3
"""Maximum relative deviation of a count from a whole number; computed counts may deviate slightly."""
SAME_BUDGET = 0.02
"""Runs whose FLOPs differ by less than this share belong to one budget."""


@dataclass(frozen=True)
class Fitted:
    """The fits to a table of points, and the text and tables to show."""

    study: Study
    shown: list[Table | str]

    def require_law(self) -> None:
        """Raise UserError if the points do not determine the joint law."""
        if self.study.law is None:
            reason = self.study.fits.law["alpha"].reason.removeprefix("not identifiable: ")
            raise UserError(
                f"these points do not determine the joint law: {reason}",
                where="the points",
                fix=f"add runs: {MIN_SIZES} sizes or more, each with several amounts of data, and losses that differ by more than noise",
            )


def read_points(path: Path) -> tuple[list[GridPoint], str]:
    """Read the runs in a table; return them and the name of the column that is D. Of a grid's `points.csv`, only foveated runs are read.

    Raises UserError that names the row and the column.
    """
    rows, columns = _rows(path)
    data = next((name for name in DATA if name in columns), None)
    missing = [name for name in NEEDED if name not in columns] + ([] if data else ["tokens or samples"])
    if missing or data is None:
        raise UserError(
            f"columns are missing: {', '.join(missing)}",
            where=str(path),
            fix=f"give {', '.join(NEEDED)} and {' or '.join(DATA)}; there are {', '.join(columns) or 'none'}",
        )
    numbered = [(number, row) for number, row in enumerate(rows, 2) if "variant" not in columns or row["variant"] == "foveated"]
    if not numbered:
        raise UserError("the table has no runs", where=str(path), fix="give a row per finished run")
    twice = [name for name, count in Counter(row["run_id"] for _, row in numbered).items() if count > 1]
    if twice:
        raise UserError(
            f"several rows are of one run: {', '.join(twice[:5])}",
            where=f"{path}, run_id",
            fix="keep the last row of each run: before the learning rate has decayed, the loss is higher than that of a finished run with "
            "the same tokens, so intermediate points bias the law",
        )
    points = [_point(row, data, where=f"{path}, line {number}") for number, row in numbered]
    names: dict[int, set[str]] = {}
    for point in points:
        names.setdefault(point.params, set()).add(point.size)
    if alike := next((sorted(sizes) for sizes in names.values() if len(sizes) > 1), None):
        raise UserError(
            f"the sizes {' and '.join(alike)} have the same parameters, so a law over N cannot tell them apart",
            where=f"{path}, size",
            fix="give them one name, or fit them one by one",
        )
    return _budgets(points), data


def fit_points(path: Path, *, weights: Weights = "relative", target_flops: float | None = None, output: Path | None = None) -> Fitted:
    """Fit the joint law and each size's own law to a table, and write them to `output` if given. Raises UserError for unusable points."""
    points, data = read_points(path)
    study = Study(points, weights=weights)
    shown: list[Table | str] = [_law_table(study, data), _size_table(study)]
    if reasons := _undetermined(study):
        shown.append("Not determined by these points:\n" + "\n".join(f"* {name}: {reason}" for name, reason in reasons.items()))
    if target_flops is not None:
        choice = choose(points, study.grid, target_flops=target_flops, weights=weights)
        shown.append(f"Size for {target_flops:.2e} FLOPs: {choice.size} ({choice.reason}).")
    if output is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_atomically(output / FITS_FILE, study.fits.model_dump_json(indent=2).encode())
        write_atomically(output / "points.sha256", f"{digest}  {path.name}\n".encode())
        _plot(output, points, study)
    return Fitted(study, shown)


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            return list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the table cannot be read: {error}", where=str(path), fix="give a CSV file in UTF-8") from error


def _point(row: dict[str, str], data: str, *, where: str) -> GridPoint:
    if unnamed := [name for name in ("run_id", "size") if not row.get(name)]:
        raise UserError(f"{' and '.join(unnamed)} of a row is empty: {row}", where=where, fix="give every row all columns")

    def number(name: str) -> float:
        text = (row.get(name) or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(
                f"{name} is {text or 'empty'!r}, not a number above 0",
                where=f"{where}, run {row['run_id']}",
                fix="leave out runs that diverged or did not end, and correct the number",
            )
        return value

    def count(name: str) -> int:
        value = number(name)
        if abs(value - round(value)) > ROUNDED * value:
            where_it_is = f"{where}, run {row['run_id']}"
            raise UserError(f"{name} is {value:g}, which is no count", where=where_it_is, fix="give counts, not millions or billions")
        return round(value)

    params, tokens = count("params"), count(data)
    flops = number("flops") if row.get("flops") else FLOPS_PER_PARAM_AND_TOKEN * params * tokens
    return GridPoint(
        run_id=row["run_id"],
        size=row["size"],
        variant="foveated",
        params=params,
        budget_flops=number("budget_flops") if row.get("budget_flops") else flops,
        flops=flops,
        samples=round(number("samples")) if row.get("samples") else 0,
        frames=0,
        tokens_per_frame=1,
        tokens=tokens,
        loss=number("loss"),
    )


def _budgets(points: list[GridPoint]) -> list[GridPoint]:
    """Merge nearly equal budgets, so that the points form IsoFLOP curves."""
    budgets: list[float] = []
    for point in sorted(points, key=lambda point: point.budget_flops):
        if not budgets or point.budget_flops > budgets[-1] * (1 + SAME_BUDGET):
            budgets.append(point.budget_flops)
    nearest = {point.budget_flops: max(one for one in budgets if one <= point.budget_flops) for point in points}
    return [point.model_copy(update={"budget_flops": nearest[point.budget_flops]}) for point in points]


def _law_table(study: Study, data: str) -> Table:
    rows = [
        [name, "not identified" if q.value is None else f"{q.value:.5g}", show_interval(q), _huber(study, name)]
        for name, q in study.fits.law.items()
    ]
    return Table(
        title="L(N, D) = E + A / N^alpha + B / D^beta",
        head=["number", "value", "95 % interval", "by Huber loss"],
        rows=rows,
        note=f"{len(study.points)} runs, {study.weights} errors; N in parameters, D in {data}; ratio = beta / (alpha + beta), the exponent "
        "of the best size over a budget C ~ N D.",
    )


def _huber(study: Study, name: str) -> str:
    value = study.fits.law_huber[name].value
    return "" if value is None else f"{value:.5g}"


def _size_table(study: Study) -> Table:
    """E and B of each size, if the fit determines them."""
    data, sizes = study.fits.data, {point.size: point.params for point in sorted(study.points, key=lambda point: point.params)}
    beta = data["beta"]
    rows = []
    for size, params in sizes.items():
        e, b = data.get(f"E.{size}"), data.get(f"B.{size}")
        runs = sum(point.size == size for point in study.points)
        rows.append([size, f"{params:,}", str(runs), *("" if q is None or q.value is None else f"{q.value:.5g}" for q in (e, b))])
    exponent = "not identified" if beta.value is None else f"{beta.value:.4g}, {show_interval(beta) or 'no interval'}"
    note = f"One beta for all sizes: {exponent}."
    return Table(title="Each size's own law, L = E + B / D^beta", head=["size", "parameters", "runs", "E", "B"], rows=rows, note=note)


def _undetermined(study: Study) -> dict[str, str]:
    found = {}
    for title, numbers in (("joint law", study.fits.law), ("each size's own law", study.fits.data), ("parabolas", study.fits.allocation)):
        for name, quantity in numbers.items():
            if quantity.value is None:
                found[f"{title}"] = quantity.reason
            elif quantity.reason and title == "joint law":
                found[f"{name} of the joint law"] = quantity.reason
    return found


def _plot(output: Path, points: list[GridPoint], study: Study) -> None:
    from fvlm_core.scaling.plots import plot_grid  # half a second that only this needs

    variant: Variant = "foveated"
    plot_grid(output, points, {variant: study}, None)
