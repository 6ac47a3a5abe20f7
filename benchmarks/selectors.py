"""Ways to choose the patches to encode (selectors), compared in three worlds at equal encoder FLOPs and equal training.

The worlds (`fvlm_core.data.cells_world`) have 9 x 9 cells and clips of two frames; the glance has 3 x 3 patches, one of which is opened.
The model of each world is first trained with every patch open, starting from the weights of `benchmarks.foveation --world 6 9`. From there
each selector (`benchmarks.choosers`) trains separately, for the same steps on the same clips, and all answer the same held-out clips.

Weights and results are kept in `--out` and not computed again. `--table` prints them as the tables of docs/selectors.md. `--hits` needs no
training: it shows how often the selectors that do not use the query open the right patch.
"""

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.choosers import ENCODINGS, chooser, wanted
from benchmarks.foveation_world import BATCH, GATE, LR, ZOOM, Run
from benchmarks.foveation_world import FRAMES as START_FRAMES
from benchmarks.report import Measurement, arguments, show
from fvlm_core.config import LossSettings
from fvlm_core.data import cells_world
from fvlm_core.data.batch import PackedBatch, pack
from fvlm_core.data.cells_world import CHAT, WORLDS, Name, World
from fvlm_core.data.rows import Split
from fvlm_core.errors import UserError
from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.stats import DECIMALS, Bootstrap, SeedDifference, over_seeds
from fvlm_core.manifest import write_atomically
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.inference import read_batch
from fvlm_core.release.sections.selectors import ACCURACIES, RECORD, Accuracy

GRID, FRAMES, K = 9, 2, 1
SELECTORS = ("ours", "question", "change", "saliency", "random", "centre", "low_resolution", "merging", "full", "oracle")
BLIND = ("change", "saliency", "random", "centre")
"""Selectors that do not use the query."""
BY_P = ("ours", "question")
"""Selectors that choose by p. They train with two open patches and noise, because a single choice would only reinforce itself."""
PASSES = {"asked": 1, "still": 1, "hunt": 2}
"""Fine passes in training and inference. A query knows the previous frame only as the previous pass read it, so every hop needs one
pass."""
DENSE_STEPS = {"asked": 60, "still": 500, "hunt": 400}
"""Training steps with every patch open: first *asked*, from which the other two worlds start. They are needed because the initial weights
were trained on clips of three frames: their loss is .25 nats per digit there and 11.6 on clips of two. Selectors that seldom open the right
patch would learn from such losses not to look."""
FIRST_CLUTTER = {"asked": 1.0, "still": 0.0, "hunt": 1.0}
"""Initial clutter of those steps. At 0 the new digit of a still scene is its only one, so that reading is learned first."""
GATE_PER_DIGIT = GATE * (START_FRAMES + 1) / START_FRAMES
"""Clutter rises while the loss per digit is below this: 1.33 nats, as in `benchmarks.foveation`. Chance is 2.3."""
CHOSEN_STEPS = 100
CLIPS = 512
CHANCE = 0.1
BOOTSTRAP = Bootstrap(resamples=2000, seed=0)


@dataclass
class Trial(Run):
    """One selector in one world, one seed."""

    world: Name = "asked"
    selector: str = "ours"

    def __post_init__(self) -> None:
        super().__post_init__()
        passes = PASSES[self.world]
        self.loss = LossSettings(coarse=0.0, fine=[0.0] * (passes - 1) + [1.0])
        digits = FRAMES - 1 if self.world == "still" else FRAMES
        self.gate = GATE_PER_DIGIT * digits / (digits + 1)  # the end-of-answer token is a label, too
        model = self.model
        model.settings = model.settings.model_copy(update={"fine_iterations": passes})
        if self.selector in ENCODINGS:
            encoding = ENCODINGS[self.selector]
            model.encode = lambda frames: encoding(model, frames)
        self.use(train_on="chosen", open=2 if self.selector in BY_P else K)

    def batch(self, split: Split, clips: int, clutter: float, rng: np.random.Generator | None = None) -> tuple[World, PackedBatch]:
        """Render and pack clips, and set the model's chooser for them."""
        world = cells_world.render(rng or self.rng, split, grid=self.grid, clips=clips, frames=FRAMES, clutter=clutter, name=self.world)
        self.model.chooser = chooser(self.selector, world)
        return world, pack(list(cells_world.samples(world)), CHAT)

    @torch.no_grad()
    def answer(self, clips: int) -> dict[str, list]:
        """Return, per clip of held-out digits, whether each answer is right and whether its patch was opened (empty if no patches are
        opened)."""
        model, rng = self.model.eval(), np.random.default_rng([self.grid, 1])
        torch.manual_seed(1)
        self.use(open=K)
        right, hits = [], []
        for first in range(0, clips, BATCH):
            world, batch = self.batch("val", min(BATCH, clips - first), 1.0, rng)
            features = model.encode(batch.frames)
            read = read_batch(model, batch, "coarse_fine", features=features)
            for _ in range(PASSES[self.world] - 1):
                read = read_batch(model, batch, "coarse_fine", features=features, queries=model.queries(read.hidden, batch))
            labelled = torch.from_numpy(batch.labelled)
            correct = model.llm.lm_head(read.hidden[labelled]).argmax(-1) == batch.labels[labelled]
            right += correct.unflatten(0, (len(world.frames), -1))[:, :-1].tolist()  # drop the end-of-answer token
            if read.opened is not None:
                found = read.opened[:, 0].unflatten(0, (-1, FRAMES)) == wanted(world)[..., None]
                hits += found.any(-1).tolist()
        return {"right": right, "hits": hits}

    @torch.no_grad()
    def mflop(self) -> float:
        """Count the MFLOP of encoding and reading one frame."""
        model = self.model.eval()
        self.use(open=K)
        _, batch = self.batch("val", 1, 1.0, np.random.default_rng(0))
        queries = model.connector.q_static.detach().expand(FRAMES, -1, -1)
        return count_flops(lambda: model.read(model.encode(batch.frames), queries)) / FRAMES / 1e6


def main() -> None:
    options = arguments(
        __doc__ or "",
        worlds={"nargs": "*", "choices": WORLDS, "default": list(WORLDS)},
        selectors={"nargs": "*", "choices": SELECTORS, "default": list(SELECTORS)},
        seeds={"type": int, "nargs": "*", "default": [0]},
        start={
            "type": Path,
            "default": Path("foveation-world"),
            "help": "folder of `benchmarks.foveation --world 6 9`",
        },
        start_seed={"type": int, "default": None, "help": "start all seeds from this one's weights"},
        out={"type": Path, "default": Path("selectors"), "help": "folder of weights and results"},
        clips={"type": int, "default": CLIPS},
        chosen_steps={"type": int, "default": CHOSEN_STEPS},
        dense_steps={"type": int, "default": None, "help": f"default: {DENSE_STEPS}"},
        hits={"action": "store_true", "help": "only show how often selectors that do not use the query open the right patch"},
        table={"action": "store_true", "help": "only print the results in `--out` as markdown tables"},
        record={"action": "store_true", "help": "only write the results in `--out` to the file that the release's report reads"},
    )
    if options.record:
        found = [
            Accuracy(
                world=row.world,
                selector=row.selector,
                accuracy=row.accuracy,
                seeds=len(row.seeds),
                mflop=row.mflop,
                by_seed={seed: round(value, DECIMALS) for seed, value in row.seeds.items()},
            )
            for row in rows(options.out)
        ]
        write_atomically(RECORD, ACCURACIES.dump_json(found, indent=1))
        return
    if options.table:
        print(tables(options.out))
        return
    if options.hits:
        show(hits(options.clips), as_json=options.json)
        return
    try:
        compute(options)
    except UserError as error:
        raise SystemExit(str(error)) from None
    show(measurements(options.out), as_json=options.json)


def compute(options: Namespace) -> None:
    """Train and evaluate everything requested that is not yet in `--out`. Raises UserError if the initial weights are missing."""
    for seed in options.seeds:
        start_file(options, seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for world in options.worlds:
            todo = [name for name in options.selectors if not result_file(options.out, world, name, seed).exists()]
            if not todo:
                continue
            state = dense(options, world, seed)
            for name in todo:
                started = time.monotonic()
                trial = Trial(GRID, seed, say=log(options.out), world=world, selector=name)
                trial.model.load_state_dict(state)
                trial.train(options.chosen_steps, lr=LR / 2, clutter=1.0)
                result = {"world": world, "selector": name, "seed": seed, "mflop": trial.mflop(), "steps": options.chosen_steps}
                result |= trial.answer(options.clips) | {"seconds": time.monotonic() - started}
                write_atomically(result_file(options.out, world, name, seed), json.dumps(result).encode())
                trial.say(f"{world} {name} seed {seed}: {np.mean(scored(result)):.3f}, {result['seconds']:.0f} s")


def hits(clips: int) -> Iterator[Measurement]:
    """Yield how often the selectors that do not use the query open the right patch, over frames whose answer is scored."""
    torch.manual_seed(1)
    for name in WORLDS:
        world = cells_world.render(np.random.default_rng([GRID, 1]), "val", grid=GRID, clips=clips, frames=FRAMES, name=name)
        nothing = torch.zeros(clips * FRAMES, (GRID // ZOOM) ** 2)
        for selector in BLIND:
            chosen = chooser(selector, world)(nothing, K).unflatten(0, (clips, FRAMES))
            right = (chosen == wanted(world)[..., None]).any(-1)[:, 0 if name == "asked" else 1 :].double().mean(1)
            share = BOOTSTRAP.mean(right.numpy(), [str(n) for n in range(clips)])
            yield Measurement(
                "selectors", f"{name}_{selector}_opens", share.value, "", f"95 % [{share.low:.3f}, {share.high:.3f}], {clips} clips"
            )


def start_file(options: Namespace, seed: int) -> Path:
    """Return the file of a seed's initial weights. Raises UserError if it is missing."""
    first = seed if options.start_seed is None else options.start_seed
    start = options.start / f"dense_{GRID}_{first}.pt"
    if not start.exists():
        fix = f"python -m benchmarks.foveation --parts --world 6 {GRID} --seeds {first + 1} --out {options.start}"
        raise UserError(f"no weights of seed {first} to start from", where=str(start), fix=fix)
    return start


def dense(options: Namespace, world: Name, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights from which all selectors of a world start, training them if necessary."""
    steps = DENSE_STEPS[world] if options.dense_steps is None else options.dense_steps
    if not steps:
        return torch.load(start_file(options, seed))
    kept = options.out / f"dense_{world}_{seed}.pt"
    if not kept.exists():
        trial = Trial(GRID, seed, say=log(options.out), world=world, selector="full")
        trial.model.load_state_dict(torch.load(start_file(options, seed)) if world == "asked" else dense(options, "asked", seed))
        trial.train(steps, lr=LR, clutter=FIRST_CLUTTER[world])
        torch.save(trial.model.state_dict(), kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    return torch.load(kept)


def log(out: Path) -> Callable[[str], None]:
    """Return a logger that writes to a file, so that `--json` prints only results."""

    def say(text: str) -> None:
        with (out / "log.txt").open("a") as file:
            print(text, file=file)

    return say


def result_file(out: Path, world: str, selector: str, seed: int) -> Path:
    return out / f"{world}_{selector}_{seed}.json"


def scored(result: dict) -> np.ndarray:
    """Return the share of right answers per clip [clips]. In *hunt* only the second answer counts, because the question names the first
    cell."""
    right = np.array(result["right"], float)
    return right[:, -1] if result["world"] == "hunt" else right.mean(1)


def opened(result: dict) -> float:
    """Return the share of scored frames in which the right patch was opened; NaN if the selector opens none."""
    if not result["hits"]:
        return math.nan
    hits = np.array(result["hits"], float)
    return float((hits if result["world"] == "asked" else hits[:, 1:]).mean())


@dataclass(frozen=True)
class Row:
    """One selector in one world, over its seeds."""

    world: str
    selector: str
    seeds: dict[int, float]
    """Accuracy by seed."""
    accuracy: Estimate
    """Mean over seeds, with an interval over clips; all seeds answer the same clips."""
    gain: Estimate | None
    """Ours minus this, on the same clips and seeds, with an interval over clips: what other clips would change for these very models."""
    over_seeds: SeedDifference | None
    """The same with an interval over seeds: what other trainings would change."""
    opened: float
    mflop: float


def rows(out: Path) -> Iterator[Row]:
    """Yield the results in `out`, in the order of `WORLDS` and `SELECTORS`."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    by = {(result["world"], result["selector"], result["seed"]): result for result in found}
    for world in WORLDS:
        means = {
            name: {key[2]: float(scored(result).mean()) for key, result in by.items() if key[:2] == (world, name)} for name in SELECTORS
        }
        over = over_seeds(means.pop("ours"), means)
        for selector in SELECTORS:
            seeds = {seed: by[key] for key in by if key[:2] == (world, selector) for seed in key[2:]}
            if not seeds:
                continue
            scores = {seed: scored(result) for seed, result in seeds.items()}
            gains = [scored(by[world, "ours", seed]) - score for seed, score in scores.items() if (world, "ours", seed) in by]
            yield Row(
                world,
                selector,
                {seed: float(score.mean()) for seed, score in scores.items()},
                over_clips(list(scores.values())),
                over_clips(gains) if gains and selector != "ours" else None,
                over.get(selector),
                float(np.mean([opened(result) for result in seeds.values()])),
                next(iter(seeds.values()))["mflop"],
            )


def over_clips(by_seed: list[np.ndarray]) -> Estimate:
    """Return the mean over seeds and clips. The interval resamples clips, each with all its seeds."""
    clips = [str(n) for scores in by_seed for n in range(len(scores))]
    return BOOTSTRAP.mean(np.concatenate(by_seed), clips)


def measurements(out: Path) -> Iterator[Measurement]:
    """Yield the accuracy of every selector, and the gain of ours over it."""
    for row in rows(out):
        seeds = ", ".join(f"seed {seed}: {value:.3f}" for seed, value in row.seeds.items())
        against = f"95 % [{row.accuracy.low:.3f}, {row.accuracy.high:.3f}], {row.accuracy.n} clips, {seeds}; {row.mflop:.1f} MFLOP a frame"
        yield Measurement("selectors", f"{row.world}_{row.selector}", row.accuracy.value, "", against)
        if row.gain is not None:
            against = f"95 % [{row.gain.low:.3f}, {row.gain.high:.3f}] over the same clips"
            if (seeds := row.over_seeds) is not None:
                against += f"; over {len(seeds.by_seed)} seeds [{seeds.low:.3f}, {seeds.high:.3f}], p {seeds.p_holm:.2g} (Holm)"
            yield Measurement("selectors", f"{row.world}_ours_minus_{row.selector}", row.gain.value, "", against)


def tables(out: Path) -> str:
    """Return two markdown tables per world, accuracies and differences from ours, with a warning if no selector has learned the world."""
    lines: list[str] = []
    found = list(rows(out))
    for world in dict.fromkeys(row.world for row in found):
        own = [row for row in found if row.world == world]
        lines += _table([world, "accuracy [95 % over clips]", "by seed", "right patch opened", "MFLOP a frame"], map(_accuracy, own))
        if differences := [_difference(row) for row in own if row.gain is not None]:
            lines += _table([f"{world}: ours minus", "mean [95 % over clips]", "by seed", "95 % over seeds", "p (Holm)"], differences)
        if all(row.accuracy.low <= CHANCE for row in own):
            lines += ["", f"**Not learned**: no selector answers above chance ({CHANCE}); the rows of *{world}* do not say which one wins."]
    return "\n".join(lines).strip()


def _table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))]


def _accuracy(row: Row) -> list[str]:
    one = row.accuracy
    seeds = " ".join(f"{value:.3f}" for value in row.seeds.values())
    hit = "" if math.isnan(row.opened) else f"{row.opened:.3f}"
    return [row.selector, f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]", seeds, hit, f"{row.mflop:.1f}"]


def _difference(row: Row) -> list[str]:
    assert row.gain is not None
    gain, over = f"{row.gain.value:+.3f} [{row.gain.low:+.3f}, {row.gain.high:+.3f}]", row.over_seeds
    if over is None:
        return [row.selector, gain, "", "", ""]
    seeds = " ".join(f"{value:+.3f}" for value in over.by_seed.values())
    return [row.selector, gain, seeds, f"[{over.low:+.3f}, {over.high:+.3f}]", f"{over.p_holm:.2g}"]


if __name__ == "__main__":
    main()
