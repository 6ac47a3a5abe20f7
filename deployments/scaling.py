"""`fvlm scaling`: fit scaling laws to any runs."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from fvlm_core.scaling.jobs import Weights

app = App(name="scaling", help="Fit scaling laws to a table of your own runs.")


@app.command
def fit(
    points: Path,
    /,
    *,
    weights: Weights = "relative",
    target_flops: Annotated[float | None, Parameter(name="--target-flops")] = None,
    output: Path | None = None,
) -> int:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to a table of finished runs, one per row.

    Parameters
    ----------
    points
        CSV with the columns run_id, size, params, tokens (or samples) and loss, and flops if they are not 6 * params * tokens. Every row
        is the end of a separate run whose learning rate had decayed.
    weights
        Which errors the fit minimizes: relative to the losses (relative), or in nats (unit).
    target_flops
        Also print which size is expected to be best at this training budget.
    output
        Folder for fits.json and the five plots, as SVG and PNG.
    """
    from fvlm_core.scaling.points import fit_points

    found = fit_points(points, weights=weights, target_flops=target_flops, output=output)
    console = Console(highlight=False)
    for part in found.shown:
        console.print(part if isinstance(part, str) else part.terminal())
    found.require_law()
    return 0
