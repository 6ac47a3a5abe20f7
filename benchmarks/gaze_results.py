"""Tables and the efficiency plot of finished `benchmarks.gaze` runs: a row per seed, the worst of each column, and the controls.

python -m benchmarks.gaze --json --no-controls > benchmarks/gaze_runs/cell_0.json
python -m benchmarks.gaze_results benchmarks/gaze_runs --document docs/research.md --figure docs/gaze_efficiency
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gaze_measures import MAIN, VARIANTS
from benchmarks.gaze_training import PLANS, VISION
from fvlm_core.canvas import COLOURS, WIDTH, canvas
from fvlm_core.eval.estimates import Estimate
from fvlm_core.tables import Table, number

BEGIN, END = "<!-- benchmarks.gaze_results -->", "<!-- end of benchmarks.gaze_results -->"
"""Markers around the tables in a document."""


class Seed(NamedTuple):
    """The numbers of a run that have targets, question first, in the order of the table's columns."""

    coarse: float
    fine: float
    drift: float
    """Fine minus autoregressive."""
    first: float
    """Accuracy of the first frame, fine."""
    cell: float
    """Accuracy of the worst cell, fine."""
    gaze: float
    """Gaze on target, fine."""
    others: float
    """Mean accuracy of the later frames, fine."""


COARSE_AIM, FINE_AIM, DRIFT_AIM, CELL_AIM, GAZE_AIM = 0.32, 0.93, 0.02, 0.85, 0.9
AIMS = (f"<= {COARSE_AIM}", f">= {FINE_AIM}", f"fine - {DRIFT_AIM}", "as the others", f">= {CELL_AIM}", f">= {GAZE_AIM}")
"""Targets for the worst seed, in the order of the table's columns."""
REACHED: dict[str, Callable[[Seed], bool]] = {
    f"coarse at most {COARSE_AIM}": lambda seed: seed.coarse <= COARSE_AIM,
    f"fine at least {FINE_AIM}": lambda seed: seed.fine >= FINE_AIM,
    "fine above coarse by 0.20": lambda seed: seed.fine - seed.coarse >= 0.20,
    f"autoregressive within {DRIFT_AIM}": lambda seed: seed.drift <= DRIFT_AIM,
    "first frame within 0.05 of the others": lambda seed: seed.first >= seed.others - 0.05,
    f"every cell at least {CELL_AIM}": lambda seed: seed.cell >= CELL_AIM,
    f"gaze at least {GAZE_AIM}": lambda seed: seed.gaze >= GAZE_AIM,
}
"""The same targets, and the one for *hunt*, as tests of a seed."""
COARSE, AUTOREGRESSIVE = "coarse, question first", "autoregressive, question first"
SAID = {
    "device": " on {}",
    "frame_px": ", frames of {} px",
    "llm_checkpoint": ", from {}",
    "wording": ", questions as {}s",
    "vision_learning_rate": ", encoder at {:g}",
    "learning_rate": ", all else at {:g}",
    "llm_learning_rate": ", language model at {:g}",
    "encoder_learning_rate": ", encoder's own training at {:g}",
    "init_std": ", weights of standard deviation {:g}",
}
"""Wording of settings that differ from the default."""
USUAL = {
    size: {"device": "cpu", "frame_px": VISION[size].frame_px}
    | {name: value for name, value in vars(plan).items() if name in list(SAID)[2:]}
    for size, plan in PLANS.items()
}
"""Default settings by size; these are not mentioned."""
RECIPE = ("task", "size", *SAID)
"""The keys in which a control must equal the runs that it is compared with."""
Run = dict[str, Any]
"""A record of `benchmarks.gaze --json`."""


def read(folder: Path) -> list[Run]:
    """Read all records of a folder, in the order of file names. Keys that older records lack get the laptop size's defaults."""
    lines = [line for path in sorted(folder.glob("*.json")) for line in path.read_text().splitlines() if line.strip()]
    return [{"size": "laptop"} | USUAL["laptop"] | json.loads(line) for line in lines]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the model's own runs by task, number of steps and non-default settings, e.g. `cell, 1,600 steps`."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if not run["control"]:
            size, usual = run["size"], USUAL[run["size"]]
            unusual = [said.format(run[name]) for name, said in SAID.items() if run[name] != usual[name]]
            at = "" if size == "laptop" else f", {size} size"
            found.setdefault(f"{run['task']}, {run['planned_steps']:,} steps{at}{''.join(unusual)}", []).append(run)
    return found


def row(run: Run, condition: str) -> dict[str, Any] | None:
    """Return the row of a condition, or None."""
    return next((one for one in run["rows"] if one["condition"] == condition), None)


def estimate(run: Run, condition: str, what: str = "accuracy") -> Estimate | None:
    """Return a number of a condition with its interval, or None."""
    found = row(run, condition)
    return None if found is None or found.get(what) is None else Estimate.model_validate(found[what])


def worst_cell(run: Run, condition: str = MAIN) -> float:
    """Return the lowest accuracy of any cell."""
    found = row(run, condition)
    assert found is not None
    return min(share for share in found["by_cell"] if share is not None)


def seeds_table(task: str, runs: Sequence[Run]) -> Table:
    """Return a table with a row per seed, then the worst of each column, then the targets."""
    rows = []
    for run in runs:
        main = row(run, MAIN)
        assert main is not None
        rows.append(
            [
                f"{run['seed']}" + (f", from {run['start']}" if run["start"] else ""),
                f"{run['steps']:,}",
                number(estimate(run, COARSE)),
                number(estimate(run, MAIN)),
                number(estimate(run, AUTOREGRESSIVE)),
                f"{main['by_frame'][0]:.3f}",
                f"{worst_cell(run):.3f}",
                number(estimate(run, MAIN, "on_target")),
                number(estimate(run, "fine, question after")),
                number(estimate(run, "fine, only the digit that counts")),
                f"{run['cpu_s'] + run['encoder_cpu_s']:.0f}",
            ]
        )
    rows.append(["worst", "", *_worst(runs), "", "", ""])
    rows.append(["aim", "", *AIMS, "", "", ""])
    head = ["seed", "steps", "coarse", "fine", "autoregressive", "first frame, fine", "worst cell, fine", "gaze on target"]
    head += ["fine, question after", "fine, alone", "CPU s"]
    clips = runs[0]["clips"]
    note = f"Question first unless it says otherwise; {clips} clips; bag of digits {runs[0]['bag_ceiling']:.3f}; CPU: with the encoder's."
    both = [estimate(run, MAIN, "over_clips_and_digits") for run in runs]
    if any(both):  # older records lack them
        forms = [" ".join(f"{value:.3f}" for value in (row(run, MAIN) or {}).get("by_form", {}).values()) for run in runs]
        head += ["fine, over clips and digits", "fine, by form"]
        rows = [[*line, *more] for line, more in zip(rows, [*zip(map(number, both), forms, strict=True), ("", ""), ("", "")], strict=True)]
        note += " Other intervals hold the digits fixed."
    return Table(title=task, head=head, rows=rows, marked=[len(runs)], note=note)


def numbers(run: Run) -> Seed:
    """Return the numbers of a run of the model itself."""
    main = row(run, MAIN)
    assert main is not None
    fine, frames = _value(run, MAIN), main["by_frame"]
    return Seed(
        coarse=_value(run, COARSE),
        fine=fine,
        drift=fine - _value(run, AUTOREGRESSIVE),
        first=frames[0],
        cell=worst_cell(run),
        gaze=_value(run, MAIN, "on_target"),
        others=float(np.mean(frames[1:])),
    )


def reached(runs: Sequence[Run]) -> str:
    """Say which targets the worst seed reaches."""
    seeds = [numbers(run) for run in runs]
    good = [aim for aim, holds in REACHED.items() if all(map(holds, seeds))]
    bad = [aim for aim in REACHED if aim not in good]
    return f"Of the worst seed reached: {', '.join(good) or 'nothing'}. Not reached: {', '.join(bad) or 'nothing'}."


def _worst(runs: Sequence[Run]) -> list[str]:
    """Return the worst value of each column, with its seed."""
    seeds, said = [numbers(run) for run in runs], []
    for name in Seed._fields[: len(AIMS)]:
        high_is_worse = name in ("coarse", "drift")
        values = [getattr(seed, name) for seed in seeds]
        place = int(np.argmax(values) if high_is_worse else np.argmin(values))
        value = values[place]
        text = f"fine {'-' if value >= 0 else '+'} {abs(value):.3f}" if name == "drift" else f"{value:.3f}"
        said.append(f"{text} (seed {runs[place]['seed']})")
    return said


def _value(run: Run, condition: str, what: str = "accuracy") -> float:
    found = estimate(run, condition, what)
    assert found is not None
    return found.value


def encoders_table(runs: Sequence[Run]) -> Table | None:
    """Return a table of linear-probe accuracies of the encoder before and after training; None if no run has them."""
    asked = [run for run in runs if run["encoder_keeps"]]
    if not asked:
        return None
    names = list(dict.fromkeys(name for run in asked for name in run["encoder_keeps"]))
    rows = []
    for run in asked:
        both = [run["encoder_accuracy"], run["encoder_keeps"]]
        shares = [" -> ".join(f"{one[name]:.3f}" for one in both) if name in both[0] else "" for name in names]
        task = run["task"] if run["init_std"] is None else f"{run['task']}, weights of {run['init_std']:g}"
        rows.append([task, str(run["seed"]), f"{run['vision_learning_rate']:g}", f"{run['steps']:,}", *shares])
    note = "Held-out digits, full grids, before -> after; after: by heads trained anew on the encoder as it is."
    return Table(title="What the encoder knows", head=["task", "seed", "encoder's rate", "steps", *names], rows=rows, note=note)


def entropies_table(runs: Sequence[Run]) -> Table | None:
    """Return a table of the attention's entropy before the model's training, by seed; None if no run has it.

    Runs that differ only in what follows, such as the number of steps, start alike: each start is shown once.
    """
    starts: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        if run["entropy_at_start"] and run["start"] is None and (not run["control"] or run["control"] in VARIANTS):
            changes = [run["control"]] if run["control"] else []
            changes += [f"questions as {run['wording']}s"] if run["wording"] != USUAL[run["size"]]["wording"] else []
            changes += [f"weights of {run['init_std']:g}"] if run["init_std"] is not None else []
            starts.setdefault(", ".join([run["task"], *changes]), {}).setdefault(run["seed"], run["entropy_at_start"])
    if not starts:
        return None
    rows = []
    for name, found in starts.items():
        seeds = sorted(found)
        both = [" ".join(f"{found[seed][query]:.3f}" for seed in seeds) for query in ("coarse", "fine")]
        rows.append([name, " ".join(map(str, seeds)), *both])
    note = "Last layer's attention on full grids, mean of heads, as a share of the uniform distribution's entropy; by seed."
    return Table(
        title="Entropy at the start",
        head=["task", "seeds", "learned query (coarse pass)", "language model's queries (fine pass)"],
        rows=rows,
        note=note,
    )


def beside_controls(runs: Sequence[Run]) -> list[Run]:
    """Return the controls and the model's own runs with the same recipe."""
    recipes = [tuple(run[key] for key in RECIPE) for run in runs if run["control"]]
    return [run for run in runs if tuple(run[key] for key in RECIPE) in recipes]


def controls_table(runs: Sequence[Run]) -> Table:
    """Return a table of the model and the trained controls: tokens, FLOPs, accuracy."""
    rows = []
    for run in runs:
        first = estimate(run, MAIN) or estimate(run, COARSE)
        after = estimate(run, "fine, question after") or estimate(run, "coarse, question after")
        rows.append(
            [
                (run["control"] or "fVLM, fine") + (", equal FLOPs" if run["control"] and run["equal_flops"] else ""),
                str(run["seed"]),
                str(run["tokens_per_frame"]),
                f"{run['steps']:,}",
                f"{run['train_gflop']:,.0f}",
                f"{run['params']:,}",
                number(first),
                number(after),
                f"{run['clutter']:.2f}",
            ]
        )
    head = ["model", "seed", "tokens a frame", "steps", "training GFLOP", "parameters", "question first", "question after", "clutter"]
    own = [number_of for number_of, run in enumerate(runs) if not run["control"]]
    return Table(
        title="Trained controls", head=head, rows=rows, note="Accuracy with 95 % intervals over clips; clutter at the end.", marked=own
    )


def plot(path: Path, runs: Sequence[Run]) -> None:
    """Plot accuracy over visual tokens per frame and over training FLOPs, as PNG and SVG."""
    names = [run["control"] or "fVLM, fine" for run in runs]
    colours = dict(zip(dict.fromkeys(names), COLOURS, strict=False))
    with canvas(path.with_suffix(".png"), (WIDTH, 4.2), vector=True) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, what, label in zip(panels, ("tokens_per_frame", "train_gflop"), ("visual tokens a frame", "training GFLOP"), strict=True):
            for run, name in zip(runs, names, strict=True):
                one = estimate(run, MAIN) or estimate(run, COARSE)
                assert one is not None
                error = [[one.value - one.low], [one.high - one.value]]
                marker = "s" if run["control"] and run["equal_flops"] else "o"
                axes.errorbar([run[what]], [one.value], yerr=error, color=colours[name], marker=marker, capsize=3, linestyle="")
            axes.axhline(runs[0]["bag_ceiling"], color="#8d99a6", linestyle=":")
            values = sorted({run[what] for run in runs})
            if values[-1] > 3 * values[0]:
                axes.set_xscale("log")
                axes.set_xticks(values, [f"{value:,}" for value in values], minor=False)
                axes.set_xticks([], minor=True)
            axes.set_xlabel(label)
        for name, colour in colours.items():
            panels[0].plot([], [], color=colour, marker="o", linestyle="", label=name)
        panels[0].set_ylabel("accuracy, question first")
        panels[0].legend()
        panels[1].set_title("squares: as many FLOPs as fVLM; dotted: all digits without their places", fontsize=9, loc="right")


def plot_curves(path: Path, runs: Sequence[Run]) -> None:
    """Plot nats per digit and clutter over the steps of the model's own trainings, as PNG and SVG."""
    with canvas(path.with_suffix(".png"), (WIDTH, 4.2), vector=True) as figure:
        nats, clutter = figure.subplots(1, 2)
        for run, colour in zip(runs, cycle(COLOURS)):
            steps = [point["step"] for point in run["curve"]]
            for order, style in (("first", "-"), ("after", ":")):
                name = f"{run['task']}, seed {run['seed']}, question {order}"
                nats.plot(steps, [point[order] for point in run["curve"]], style, color=colour, label=name)
            clutter.plot(steps, [point["clutter"] for point in run["curve"]], color=colour)
        nats.axhline(math.log(10), color="#8d99a6", linewidth=0.8)
        nats.set_ylabel("nats a digit (line: chance)")
        clutter.set_ylabel("clutter")
        for axes in (nats, clutter):
            axes.set_xlabel("step")
        nats.legend(fontsize=7)


def report(runs: Sequence[Run]) -> str:
    """Return all tables as markdown."""
    parts = []
    for title, own in groups(runs).items():
        task, _, how = title.partition(",")
        seeds = f"{len(own)} seed{'s' if len(own) > 1 else ''}"
        parts += [f"*{task}*,{how}, {seeds}:", seeds_table(task, own).markdown().strip(), reached(own)]
    if known := encoders_table([run for run in runs if not run["control"]]):
        parts += ["What the encoder knows before and after the model's training:", known.markdown().strip()]
    if entropies := entropies_table(runs):
        parts += ["How sharp the attention is before the model's training:", entropies.markdown().strip()]
    if compared := beside_controls(runs):
        parts += ["Controls, trained alike, beside the seeds of their recipe:", controls_table(compared).markdown().strip()]
    return "\n\n".join(parts)


def write_into(document: Path, text: str) -> None:
    """Write the tables between the two markers of a document."""
    between = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    document.write_text(between.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", document.read_text()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables as markdown or write them into a document, and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--document", type=Path, help="document that gets the tables between its two markers")
    parser.add_argument("--figure", type=Path, help="path of the plot of the controls, without a suffix")
    parser.add_argument("--curves", type=Path, help="path of the plot of training curves, without a suffix")
    options = parser.parse_args(arguments)
    runs = read(options.folder)
    text = report(runs)
    if options.document:
        write_into(options.document, text)
    else:
        print(text)
    if options.figure and (compared := beside_controls(runs)):
        plot(options.figure, compared)
    if options.curves and (recorded := [run for run in runs if run.get("curve") and not run["control"]]):
        plot_curves(options.curves, recorded)


if __name__ == "__main__":
    main()
