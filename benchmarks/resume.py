"""The resume certificate: `python -m benchmarks.resume`.

A run is killed repeatedly (SIGKILL at random moments, in the middle of an epoch and in resumed runs), and its newest checkpoint is damaged
after every other kill. At the end it must have bit-identical weights to a run that was never stopped, and must have trained every step on
the same samples in the same order. Two baselines run on the same data and model under the same kills: transformers' Trainer with
accelerate's loader, and Trainer over webdataset's resampled shards.

Bugs that appear only at the second resume are a known class (accelerate #4071 and #4232, torchtitan #3907, datasets #8308), so steps after
the first resume and after later ones are counted separately. If a library does not start from a damaged checkpoint, that checkpoint is
removed, as an operator would do, and counted as a repair by hand.

`python -m tests.campaign.kill_campaign` is a longer test that kills parts of complete pipelines.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import accelerate
import transformers
import webdataset
from pydantic import JsonValue
from rich.console import Console

from benchmarks.mixed_shards import mixed_data, write_mixed
from benchmarks.report import Measurement, arguments, show
from benchmarks.resume_runs import ORDER_FILE, WEIGHTS_FILE, ours, transformers_trainer, webdataset_resampled
from fvlm_core.config import BestSettings, Recipe
from fvlm_core.settings import hash_json
from fvlm_core.tables import Table

STEPS, BATCH, CHECKPOINT_EVERY = 60, 8, 4
CLIPS = 24
"""Number of videos, of images and of texts: an epoch is 9 steps."""
FRAME_PX = 42
TIME_LIMIT_S = 600
"""Time limit of one start of a run."""
Run = Callable[[Recipe], None]
CONTENDERS: dict[str, tuple[Run, str]] = {
    "ours": (ours, "ours"),
    "trainer": (transformers_trainer, f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"),
    "webdataset": (webdataset_resampled, f"webdataset {webdataset.__version__}, resampled"),
}


@dataclass(frozen=True)
class Kill:
    """One kill: the step at which it happens, and whether the newest checkpoint is then damaged."""

    step: int
    damage: bool


@dataclass(frozen=True)
class Ended:
    """The result of a run."""

    weights: str
    trained: list[tuple[int, int, list[str]]]
    """(number of resumes so far, step, keys of its samples) of every trained step, including steps repeated after a resume."""
    kills: int = 0
    damaged: int = 0
    repairs: int = 0
    """Damaged checkpoints that had to be removed by hand."""

    @property
    def order(self) -> dict[int, list[str]]:
        """Sample keys by step; a repeated step counts as last trained."""
        return {step: keys for _, step, keys in self.trained}


def main() -> int:
    """Run the comparison. Returns 1 if our own weights or order of samples differ."""
    options = {
        "kills": {"type": int, "default": 6},
        "seed": {"type": int, "default": 0, "help": "seed of the moments of the kills"},
        "only": {"choices": list(CONTENDERS), "nargs": "+", "default": list(CONTENDERS), "help": "run only these"},
    }
    asked = arguments(__doc__ or "", **options)
    taken: dict[str, list[Measurement]] = {}

    def found() -> Iterator[Measurement]:
        for name in asked.only:
            run, about = CONTENDERS[name]
            straight, killed = certify(run, recipe_of(shards, Path(folder) / name), plan)
            taken[name] = [*measurements(prefix_of(name), about, straight, killed)]
            yield from taken[name]

    with tempfile.TemporaryDirectory(prefix="fvlm-resume-") as folder:
        shards = write_mixed(Path(folder) / "shards", clips=CLIPS, frame_px=FRAME_PX, samples_per_shard=8)
        plan = planned(asked.kills, asked.seed)
        show(found(), as_json=asked.json)
    if not asked.json:
        Console().print()
        Console().print(comparison(taken).terminal())
    mine = {one.metric: one.value for one in taken.get("ours", [])}
    return int(mine.get("weights_equal", 1) != 1 or mine.get("order_equal", 1) != 1)


def prefix_of(name: str) -> str:
    """Return the prefix of a contender's metric names."""
    return "" if name == "ours" else f"{name}_"


def comparison(taken: dict[str, list[Measurement]]) -> Table:
    """Return a table with a row per metric and a column per contender."""
    rows: dict[str, dict[str, JsonValue]] = {}
    for name, found in taken.items():
        for one in found:
            metric = one.metric.removeprefix(prefix_of(name))
            said = ("no", "yes")[int(one.value)] if metric.endswith("_equal") else f"{one.value:.0f} {one.unit}".strip()
            rows.setdefault(metric, {"": metric.replace("_", " ")})[CONTENDERS[name][1]] = said
    return Table.of([*rows.values()], title="The same kills, data and model; equal: to a run that was never stopped")


def planned(kills: int, seed: int, *, steps: int = STEPS) -> list[Kill]:
    """Draw the kills: random steps in order, none before the first checkpoint. Every other kill damages a checkpoint."""
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(CHECKPOINT_EVERY + 1, steps - 1), kills))
    return [Kill(step, damage=number % 2 == 1) for number, step in enumerate(moments)]


def recipe_of(shards: Path, output: Path, *, steps: int = STEPS) -> Recipe:
    """Return a recipe with a model that takes a few milliseconds per step."""
    return Recipe.model_validate(
        {
            "name": "resume",
            "output": output,
            "shards": shards,
            "model": {
                "vision": {"shape": {"width": 32, "layers": 2, "heads": 2}, "frame_px": FRAME_PX},
                "llm": {"shape": {"width": 48, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 96, "context": 2048}},
            },
            "data": mixed_data(image_repeats=2),
            "best": BestSettings(use="last"),
            "optimizer": {"lr_connector": 1e-3, "lr_vision": 1e-3, "lr_llm": 1e-3},
            "loss": {"coarse": 1.0, "fine": [1.0, 1.0]},
            "run": {
                "steps": steps,
                "batch_samples": BATCH,
                "micro_batch": {"frames": 96, "tokens": 2048},
                "eval_every": steps,
                "eval_samples": 8,
                "checkpoint_every": CHECKPOINT_EVERY,
                "wandb": "disabled",
                "device": "cpu",
            },
        }
    )


def certify(run: Run, recipe: Recipe, plan: list[Kill]) -> tuple[Ended, Ended]:
    """Run once without a stop and once with the planned kills."""
    straight = recipe.model_copy(update={"output": recipe.output / "straight"})
    killed = recipe.model_copy(update={"output": recipe.output / "killed"})
    return _to_the_end(run, straight, []), _to_the_end(run, killed, plan)


def _to_the_end(run: Run, recipe: Recipe, plan: list[Kill]) -> Ended:
    kills = damaged = repairs = 0
    todo, starts = list(plan), []
    recipe.output.mkdir(parents=True, exist_ok=True)
    while not (recipe.output / WEIGHTS_FILE).is_file():
        before = len(_lines(recipe.output))
        starts.append(before)
        process = _start(run, recipe)
        deadline = time.monotonic() + TIME_LIMIT_S
        killed = False
        while process.is_alive():
            if todo and len(_lines(recipe.output)) > before and _lines(recipe.output)[-1][0] >= todo[0].step:
                process.kill()
                killed = True
            if time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"{recipe.output}: a run did not end in {TIME_LIMIT_S} s")
            process.join(0.002)
        if killed:
            kills += 1
            damaged += todo.pop(0).damage and _damage(recipe.output)
        elif process.exitcode:  # a kill during a write can also leave a checkpoint that the library cannot read
            newest = _newest_checkpoint(recipe.output)
            if newest is None or repairs == kills:
                raise RuntimeError(f"{recipe.output}: ended with status {process.exitcode} though nothing is damaged")
            shutil.rmtree(newest)
            repairs += 1
    lines = _lines(recipe.output)
    begun = sorted({start for start in starts if start < len(lines)})  # ignore starts that trained no step
    trained = [(bisect_right(begun, number) - 1, step, keys) for number, (step, keys) in enumerate(lines)]
    return Ended((recipe.output / WEIGHTS_FILE).read_text(), trained, kills, damaged, repairs)


def _start(run: Run, recipe: Recipe):
    """Start the run in a process forked from a server that has done all imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.resume_runs", "transformers.trainer", "webdataset"])
    process = context.Process(target=run, args=(recipe,))
    process.start()
    return process


def _lines(folder: Path) -> list[tuple[int, list[str]]]:
    """Return the complete lines of the log; a kill can leave a partial line."""
    path = folder / ORDER_FILE
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    found = []
    for line in lines:
        try:
            step, keys = json.loads(line)
        except ValueError:
            continue
        found.append((step, keys))
    return found


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the newest checkpoint, ours or Trainer's; None if there is none."""
    found = [path for path in [*folder.glob("checkpoints/step-*"), *folder.glob("checkpoint-*")] if path.is_dir()]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _damage(folder: Path) -> bool:
    """Truncate the largest file of the newest checkpoint to half; False if there is no checkpoint."""
    newest = _newest_checkpoint(folder)
    if newest is None:
        return False
    files = [path for path in newest.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as stream:
        stream.truncate(largest.stat().st_size // 2)
    return True


def measurements(prefix: str, about: str, straight: Ended, killed: Ended) -> Iterator[Measurement]:
    """Yield the measurements of one contender."""
    order, last = straight.order, killed.order
    other = sum(order[step] != last.get(step) for step in order)
    never = f"{about}: a run that was never stopped"
    yield Measurement("resume", f"{prefix}kills", killed.kills, "SIGKILLs", about)
    yield Measurement("resume", f"{prefix}damaged_checkpoints", killed.damaged, "", about)
    yield Measurement("resume", f"{prefix}repairs_by_hand", killed.repairs, "checkpoints removed", about)
    yield Measurement("resume", f"{prefix}weights_equal", float(straight.weights == killed.weights), "1 or 0", never)
    yield Measurement("resume", f"{prefix}order_equal", float(hash_json(order) == hash_json(last)), "1 or 0", never)
    yield Measurement("resume", f"{prefix}steps_with_other_samples", float(other), f"of {len(order)}", never)
    for name, chosen in (("first_resume", {1}), ("later_resumes", set(range(2, len(killed.trained))))):
        same = [order.get(step) == keys for resumes, step, keys in killed.trained if resumes in chosen]
        yield Measurement("resume", f"{prefix}other_samples_after_the_{name}", float(same.count(False)), f"of {len(same)}", never)


if __name__ == "__main__":
    sys.exit(main())
