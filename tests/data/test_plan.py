"""The plan is a function of seed, step, rank and number of ranks: resumed anywhere it is the straight one."""

import sys
from collections import Counter
from itertools import count

import numpy as np
import pytest

from deployments.cli import app
from fvlm_core.config import DataSettings, RunSettings
from fvlm_core.data.mixture import BLOCK_SAMPLES
from fvlm_core.data.plan import Plan
from fvlm_core.data.plan_tables import load, plan_tables
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from tests.tiny import tiny_shards
from tests.train.conftest import tiny_recipe

MIXTURE = {"gaze_cell": 0.5, "gaze_caption": 0.2, "gaze_image": 0.16, "text": 0.14}
BATCH = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return ShardSet(tiny_shards(tmp_path_factory.mktemp("shards")))


def data(mixture=None, **changes):
    parts = [{"source": source, "share": share} for source, share in (mixture or MIXTURE).items()]
    return DataSettings.model_validate({"mixture": parts, **changes})


def plan(shards, seed=0, world_size=1, settings=None, tokens_per_frame=1, **run):
    length = RunSettings.model_validate({"steps": 10**6, "batch_samples": BATCH, "seed": seed, **run})
    return Plan(shards, settings or data(), length, tokens_per_frame=tokens_per_frame, world_size=world_size)


def straight(shards, seed, steps):
    """The samples of every step (row and order of the question), drawn one after the other with counters and no arithmetic."""
    mixed = plan(shards, seed).mixed
    position, orders = [0] * len(mixed.rows), [iter(())] * len(mixed.rows)
    drawn = []
    for number in range(steps * BATCH):
        source = int(mixed.mixture.block[number % BLOCK_SAMPLES])
        row = next(orders[source], None)
        if row is None:  # the next epoch
            size = len(mixed.rows[source])
            first = position[source]
            orders[source] = iter([int(mixed.rows[source][mixed.mixture.row(source, first + place)]) for place in range(size)])
            row = next(orders[source])
        drawn.append((row, mixed.slot(source, position[source]).question_first))
        position[source] += 1
    return [drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH)]


def test_ten_thousand_resumed_positions_are_the_straight_plans(shards):
    """A new plan, as a resumed run makes it, asked for a random step first; its ranks together have the straight run's samples."""
    rng = np.random.default_rng(0)
    asked = 0
    for seed in range(25):
        expected = straight(shards, seed, 120)
        for world_size in (1, 2, 3, 4, 6):
            resumed = plan(shards, seed, world_size, micro_batch={"frames": 9, "tokens": 200})
            for step in rng.permutation(120)[:27].tolist():
                ranks = resumed.micro_batches(step)
                assert len(ranks) == world_size
                assert len({len(micro_batches) for micro_batches in ranks}) == 1
                slots = [slot for micro_batches in ranks for micro_batch in micro_batches for slot in micro_batch]
                assert Counter((resumed.mixed.row(slot), slot.question_first) for slot in slots) == Counter(expected[step])
                asked += world_size
    assert asked >= 10_000


def test_every_row_once_an_epoch_whatever_the_ranks(shards):
    for window in (None, 1, 3):
        only = plan(shards, world_size=4, settings=data({"gaze_cell": 1.0}, shuffle_shards=window))
        for epoch in range(2):
            steps = range(epoch * 18, (epoch + 1) * 18)  # 216 rows
            rows = [only.mixed.row(slot) for step in steps for rank in only.micro_batches(step) for batch in rank for slot in batch]
            assert sorted(rows) == shards.row_numbers("train", "gaze_cell").tolist()


def test_shares_of_tokens(shards):
    """Counted over an epoch's worth of samples, by the index and not by the plan's own means."""
    mixture = {"gaze_cell": 0.5, "text": 0.5}
    for shares_of in ("samples", "tokens"):
        made = plan(shards, settings=data(mixture, shares_of=shares_of), tokens_per_frame=16, batch_samples=1000)
        counts, tokens = Counter(), Counter()
        for slot in (slot for step in range(20) for slot in made.samples(step)):
            row = made.mixed.row(slot)
            counts[slot.source] += 1
            tokens[slot.source] += int(shards.n_tokens[row] + 16 * shards.n_frames[row])
        of = {"samples": counts, "tokens": tokens}
        assert of[shares_of][0] / sum(of[shares_of].values()) == pytest.approx(0.5, abs=0.01)
        other = of["tokens" if shares_of == "samples" else "samples"]
        assert abs(other[0] / sum(other.values()) - 0.5) > 0.05


def test_more_epochs_than_allowed_are_refused(shards):
    parts = [{"source": "gaze_cell", "share": 0.5}, {"source": "text", "share": 0.5, "max_epochs": 2}]
    settings = DataSettings.model_validate({"mixture": parts})
    rows = len(shards.row_numbers("train", "text"))
    plan(shards, settings=settings, steps=4 * rows // BATCH)
    with pytest.raises(UserError, match=r"go through 'text' 2\.50 times, more than 2"):
        plan(shards, settings=settings, steps=5 * rows // BATCH)


def test_the_tables_say_what_is_planned(shards):
    made = plan(shards, world_size=2, steps=50, micro_batch={"frames": 9, "tokens": 200})
    sources, loads, steps = plan_tables(made, steps=50, looked_at=20, shown=2)
    by_name = {row[0]: row for row in sources.rows}
    assert by_name["gaze_cell"][1] == "50.0%"
    assert by_name["text"][3] == "0.0%"  # no frames
    assert by_name["gaze_cell"][-2:] == ["300", f"{300 / 216:.2f}"]
    assert float(loads.rows[1][3]) == load(made, range(20)).frames.max() <= 9
    assert sum(int(row[3]) for row in steps.rows) == sum(made.mixed.costs(list(made.samples(step)))[:, 0].sum() for step in range(2))
    assert {row[1] for row in steps.rows} == {"0", "1"}


def test_the_command_prints_a_recipes_plan(shards, tmp_path, capsys, monkeypatch):
    recipe = tiny_recipe(tmp_path / "run", shards.folder)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["fvlm"])
    with pytest.raises(SystemExit, match="0"):
        app(["data", "plan", str(tmp_path / "recipe.yaml"), "--ranks", "2", "--steps", "100"])
    printed = capsys.readouterr().out
    assert "800 samples in 100 steps of 8" in printed
    assert all(part.source in printed for part in recipe.data.mixture)


def test_an_endless_run_has_a_plan_too(shards):
    endless = plan(shards, steps=None, budget_flops=1e9)
    assert len(list(endless.samples(next(count(10**9))))) == BATCH
