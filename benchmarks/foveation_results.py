"""Tables and plot of finished `benchmarks.foveation_world` runs: accuracy and FLOPs of every opening method, by grid and seed.

python -m benchmarks.foveation --parts --world 6 9 12 --seeds 3 --out foveation-world > /dev/null
python -m benchmarks.foveation_results foveation-world --figure docs/foveation
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.foveation_world import Run
from fvlm_core.canvas import COLOURS, WIDTH, canvas
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.glance import GlanceFeatures, with_all_patches
from fvlm_core.tables import Table

MODELS = (
    ("every patch open", "dense", 0),
    ("the same model, read at k = 1", "dense_read_at_1", 1),
    ("every patch open, 100 more steps", "dense_as_long", 0),
    ("k = 1, after 100 steps on chosen patches", "k1", 1),
    ("the same model, k = 2", "k2", 2),
    ("the same model, k = 4", "k4", 4),
    ("oracle openings, k = 1", "oracle1", 1),
    ("glance only (the coarse pass of the same model)", "glance_only", -1),
    ("random openings, same training, k = 1", "random1", 1),
    ("random openings, same training, k = 2", "random2", 2),
)
"""(name, key in the result file, number of opened patches); 0: all patches, -1: none."""
PLOTTED = {
    "k1": "ours, k = 1",
    "k2": "ours, k = 2",
    "dense_as_long": "every patch open",
    "random2": "random, k = 2",
    "glance_only": "glance only",
}


def read(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the results of a folder by grid, sorted by seed. Raises ValueError if there are none."""
    found = [json.loads(file.read_text()) for file in folder.glob("world_*.json")]
    if not found:
        raise ValueError(f"no world_GRID_SEED.json in {folder}")
    grids = sorted({result["grid"] for result in found})
    return {grid: sorted((one for one in found if one["grid"] == grid), key=lambda one: one["seed"]) for grid in grids}


@cache
@torch.no_grad()
def mflop(grid: int, opened: int, zooms: tuple[int, ...]) -> float:
    """Count the MFLOP of encoding and reading one frame; `opened` as in `MODELS`."""
    run = Run(grid, 0, say=lambda _: None, zooms=zooms)
    model = run.model.eval()
    run.use(open=max(opened, 1))
    _, batch = run.batch("val", 1, 1.0)
    frames, settings = batch.frames[:1], model.settings.glance
    assert settings is not None

    def once() -> None:
        features = model.encode(frames)
        if not opened:
            assert isinstance(features, GlanceFeatures)
            features = with_all_patches(model.encoder, features, settings, model.connector.scale_embeddings)
        model.read(features, model.connector.q_static.detach()[None], opening=opened >= 0)

    return count_flops(once) / 1e6


def table(grid: int, results: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a row per model and the seeds side by side."""
    rows, zooms = [], tuple(results[0]["zooms"])
    for name, key, opened in MODELS:
        cells = [[_seen(one, key, "accuracy"), _seen(one, f"{key}_autoregressive", "accuracy"), _seen(one, key, "hit")] for one in results]
        columns = [", ".join(cell or "-" for cell in column) if any(column) else "" for column in zip(*cells, strict=True)]
        rows.append([name, *columns, f"{mflop(grid, opened, zooms):.1f}"])
    seeds = ", ".join(str(one["seed"]) for one in results)
    patches = (grid // math.prod(zooms)) ** 2
    return Table(
        title=f"{grid} x {grid} cells, zoom {', '.join(map(str, zooms))}",
        head=["model", "coarse->fine", "autoregressive", "right patch opened", "MFLOP a frame"],
        rows=rows,
        marked=[place for place, (_, key, _) in enumerate(MODELS) if key in ("k1", "k2")],
        note=f"Seeds {seeds}; {patches} glance patches, chance .10 and {1 / patches:.2f} of the openings.",
    )


def _seen(result: dict[str, Any], key: str, what: str) -> str:
    """Format a number of a result; empty if it is missing."""
    value = result.get(key, {}).get(what, math.nan)
    return "" if math.isnan(value) else f"{value:.3f}"


def plot(path: Path, by_grid: dict[int, list[dict[str, Any]]]) -> None:
    """Plot accuracy over FLOPs as the grid grows, as PNG and SVG: a line per model through the mean over seeds, a point per seed."""
    opened = {key: k for _, key, k in MODELS}
    with canvas(path.with_suffix(".png"), (WIDTH * 0.7, 4.2), vector=True) as figure:
        axes = figure.subplots()
        for (key, name), colour in zip(PLOTTED.items(), COLOURS, strict=False):
            flops = [mflop(grid, opened[key], tuple(results[0]["zooms"])) for grid, results in by_grid.items()]
            means = [sum(one[key]["accuracy"] for one in results) / len(results) for results in by_grid.values()]
            axes.plot(flops, means, color=colour, label=name)
            for x, (grid, results) in zip(flops, by_grid.items(), strict=True):
                seen = [one[key]["accuracy"] for one in results]
                axes.plot([x] * len(seen), seen, color=colour, marker="o", linestyle="", markersize=4)
                axes.annotate(str(grid), (x, max(seen)), (0, 5), textcoords="offset points", ha="center")
        axes.axhline(0.1, color="#8d99a6", linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("MFLOP a frame, encoder and query (numbers: cells a side; dotted: chance)")
        axes.set_ylabel("accuracy, digits never seen")
        axes.set_ylim(0, 1)
        axes.legend(loc="center left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables as markdown and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, help="path of the plot, without a suffix")
    options = parser.parse_args(arguments)
    by_grid = read(options.folder)
    for grid, results in by_grid.items():
        print(table(grid, results).markdown(), end="\n\n")
    if options.figure:
        plot(options.figure, by_grid)


if __name__ == "__main__":
    main()
