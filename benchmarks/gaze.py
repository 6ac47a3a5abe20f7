"""The gaze experiment: does a model with one token per frame look where the question asks, and how much does that help?

Trains a model from scratch on one task of `fvlm_core.data.gaze` (0.4 million parameters at laptop size). Evaluates it on clips with digits
by held-out writers: in its three modes, with the question before and after the video, and next to every control. Methods and findings:
docs/research.md.

    python -m benchmarks.gaze                                  # cell, one seed
    python -m benchmarks.gaze --task cell --seeds 5            # five seeds, and a table over seeds
    python -m benchmarks.gaze --no-controls --minutes 2        # the model alone, at most two minutes of CPU time per training
    python -m benchmarks.gaze --only "9 pooled tokens"         # one control alone
    python -m benchmarks.gaze --task hunt --start cell.pt      # start from weights written by --save
    python -m benchmarks.gaze --size production --llm-checkpoint FOLDER   # DINOv2-small and SmolLM2-135M at 224 px, on a GPU
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.gaze_measures import CONTROLS, MAIN, VARIANTS, Answers, Asked, Row, answers, table
from benchmarks.gaze_training import PLANS, Plan, Trained, step_flops, train
from fvlm_core.data.gaze import TASKS
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.tables import Table, number
from fvlm_core.train.vision import probe_accuracy

ASKED_TASKS = tuple(task for task in TASKS if task != "caption")
"""Tasks whose answers are one digit per frame."""
CHANGES = tuple(one.name for one in fields(Plan) if one.name not in ("task", "size", "seed", "model", "max_cpu_s"))
"""Fields of `Plan` that command-line options change."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate and print."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)

    def note(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    found: list[list[Row]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        given = {name: value for name in CHANGES if (value := getattr(options, name, None)) is not None}
        plan = replace(PLANS[options.size], task=options.task, seed=seed, max_cpu_s=60 * options.minutes, **given)
        asked = Asked(plan, options.clips)
        controls = {name: _alike(plan, changes, equal_flops=options.equal_flops) for name, changes in CONTROLS.items()}
        if options.only:
            plan = _alike(plan, (CONTROLS | VARIANTS)[options.only], equal_flops=options.equal_flops)
        trained = train(plan, note, torch.load(options.start, map_location="cpu", weights_only=True) if options.start else None)
        if options.save:
            torch.save(trained.subject.model.state_dict(), options.save)
        said = answers(trained, asked)
        for name, other in controls.items() if options.controls and not options.only else ():
            note(f"control: {name}, {other.steps} steps")
            said[name] = control(other, asked, note)
        rows = table(said, asked, Bootstrap(resamples=2000, seed=0))
        found.append(rows)
        if options.json:
            values = {"control": options.only, "start": options.start and options.start.name, "equal_flops": options.equal_flops}
            print(json.dumps(values | record(plan, trained, asked, rows)), flush=True)
        else:
            console.print(shown(plan, trained, asked, rows).terminal())
    if len(found) > 1 and not options.json:
        console.print(over_seeds(found, options.first_seed).terminal())


def _alike(plan: Plan, changes: dict[str, object], *, equal_flops: bool) -> Plan:
    """Return the plan of a control: the same number of steps, or the same FLOPs."""
    other = replace(plan, model=plan.model | changes)
    return replace(other, steps=round(plan.steps * step_flops(plan) / step_flops(other))) if equal_flops else other


def control(plan: Plan, asked: Asked, note=lambda _: None) -> Answers:
    """Train a control and return its answers with the question first, in the fine mode if it has one, else coarse."""
    said = answers(train(plan, note), asked)
    return said.get(MAIN) or said["coarse, question first"]


def record(plan: Plan, trained: Trained, asked: Asked, rows: Sequence[Row]) -> dict:
    """Return the complete record of one seed, for JSON."""
    return {
        "task": plan.task,
        "size": plan.size,
        "frame_px": plan.vision.frame_px,
        "device": torch.cuda.get_device_name(trained.subject.device) if trained.subject.device.type == "cuda" else "cpu",
        "seed": plan.seed,
        "clips": len(asked.clips),
        "steps": trained.steps,
        "planned_steps": plan.steps,
        "copies": plan.copies,
        "wording": plan.wording,
        "learning_rate": plan.learning_rate,
        "llm_learning_rate": plan.llm_learning_rate,
        "vision_learning_rate": plan.vision_learning_rate,
        "encoder_learning_rate": plan.encoder_learning_rate,
        "llm_checkpoint": plan.llm_checkpoint and Path(plan.llm_checkpoint).name,
        "init_std": plan.init_std,
        "tokens_per_frame": trained.subject.model.settings.tokens_per_frame,
        "params": sum(one.numel() for one in trained.subject.model.parameters()),
        "clutter": round(trained.clutter, 3),
        "full_clutter_at": trained.full_at,
        "train_gflop": round(trained.flops / 1e9, 1),
        "cpu_s": round(trained.cpu_s, 1),
        "seconds": round(trained.seconds, 1),
        "workers": plan.workers,
        "mfu": trained.mfu and round(trained.mfu, 4),
        "encoder_cpu_s": round(trained.encoder_cpu_s, 1),
        "encoder_accuracy": trained.encoder_accuracy,
        "encoder_keeps": probe_accuracy(trained.subject.model.encoder, plan.encoder, plan.workers) if plan.encoder else {},
        "entropy_at_start": trained.entropy,
        "curve": trained.curve,
        "constant": round(asked.constant, 4),
        "bag_ceiling": round(asked.bag_ceiling, 4),
        "rows": [_plain(row) for row in rows],
    }


def shown(plan: Plan, trained: Trained, asked: Asked, rows: Sequence[Row]) -> Table:
    """Return the table of one seed."""
    stopped = f" Stopped by --minutes at step {trained.steps} of {plan.steps}." if trained.steps < plan.steps else ""
    speed = f"; {trained.seconds:.0f} s by the clock, MFU {trained.mfu:.1%}" if trained.mfu else ""
    full = f"reached 1 at step {trained.full_at}" if trained.full_at else f"ended at {trained.clutter:.2f}"
    note = (
        f"Best constant answer {asked.constant:.3f}; all digits without their places {asked.bag_ceiling:.3f}; gaze by chance {1 / 9:.3f}. "
        f"Clutter {full}. Intervals: 95 %, over clips, with the digits held fixed; over clips and digits: both resampled; by form: of "
        f"handwriting, {', '.join(map(str, rows[0].by_form))}. p: paired sign flips by clip against “{MAIN}”, adjusted by Holm. "
        f"Training: {trained.flops / 1e9:,.0f} GFLOP, {trained.cpu_s:.0f} s of one core, the encoder's {trained.encoder_cpu_s:.0f} s "
        f"before{speed}.{stopped}"
    )
    head = ["condition", "accuracy", "over clips and digits", "by form", "by frame", "worst cell", "gaze on target", "below fine", "p"]
    cells = [
        [
            row.condition,
            number(row.accuracy),
            number(row.over_clips_and_digits),
            " ".join(f"{value:.3f}" for value in row.by_form.values()),
            " ".join(f"{value:.2f}" for value in row.by_frame),
            f"{row.worst_cell:.3f}",
            number(row.on_target),
            number(row.difference),
            "" if row.p_value is None else f"{row.p_value:.4f}",
        ]
        for row in rows
    ]
    return Table(title=f"{plan.task}, seed {plan.seed}, {len(asked.clips)} clips", head=head, rows=cells, note=note)


def over_seeds(found: Sequence[Sequence[Row]], first_seed: int) -> Table:
    """Return a table with the mean, the worst seed and every seed of each condition."""
    rows = []
    for same in zip(*found, strict=True):
        values = [row.accuracy.value for row in same]
        worst = int(np.argmin(values))
        rows.append(
            [
                same[0].condition,
                f"{np.mean(values):.3f}",
                f"{values[worst]:.3f} (seed {first_seed + worst})",
                f"{min(row.worst_cell for row in same):.3f}",
                " ".join(f"{value:.3f}" for value in values),
            ]
        )
    return Table(title="over seeds", head=["condition", "mean", "worst seed", "worst cell of any seed", "each"], rows=rows)


def _plain(row: Row) -> dict:
    values = asdict(row)
    names = ("accuracy", "on_target", "difference", "over_clips_and_digits")
    return values | {name: one and one.model_dump() for name in names for one in (getattr(row, name),)}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ASKED_TASKS, default="cell")
    parser.add_argument("--size", choices=PLANS, default="laptop", help="production: DINOv2-small and SmolLM2-135M at 224 px, on a GPU")
    parser.add_argument("--frame-px", type=int, help="side of the frames, a multiple of 14; by default 42 or 224, by size")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit on the CPU time of each training")
    parser.add_argument("--clips", type=int, default=1000, help="held-out clips, with one question each")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--encoder-steps", type=int, help="steps of the encoder's pre-training; 0: random weights")
    parser.add_argument("--copies", type=int, help="distorted copies of each training digit")
    parser.add_argument("--clutter-step", type=float, help="increase of the clutter per step")
    parser.add_argument("--clutter-gate", type=float, help="loss in nats per digit below which the clutter rises")
    parser.add_argument("--learning-rate", type=float, help="of the connector, and by default of the language model")
    parser.add_argument("--llm-learning-rate", type=float, help="of the language model")
    parser.add_argument("--vision-learning-rate", type=float, help="of the encoder")
    parser.add_argument("--encoder-learning-rate", type=float, help="of the encoder's pre-training")
    parser.add_argument("--llm-checkpoint", help="folder or hub name of a language model to start from, such as SmolLM2-135M")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--workers", type=int, help="processes that render clips in advance")
    parser.add_argument("--init-std", type=float, help="standard deviation of the language model's initial weights")
    parser.add_argument("--only", choices=[*CONTROLS, *VARIANTS], help="train only this control or variant")
    parser.add_argument("--start", type=Path, help="file of weights to start from")
    parser.add_argument("--save", type=Path, help="file for the trained weights")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True, help="train the controls too")
    parser.add_argument("--wording", choices=("words", "sentence"), help="of the questions: bare words, or the pipeline's sentences")
    parser.add_argument("--equal-flops", action="store_true", help="train controls for the same FLOPs, not the same steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object per seed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
