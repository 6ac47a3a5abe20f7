"""DPO: the loss and its gradient, the stored reference, ranks, and resuming."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from benchmarks.small_shards import write_small
from fvlm_core.config import LossSettings, Recipe
from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_files import ShardSample
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.text import text_chats
from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import token_losses
from fvlm_core.train.__main__ import train
from fvlm_core.train.cost import Cost
from fvlm_core.train.expected import expected_cost
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.objective import PreferenceLoss
from fvlm_core.train.reference import ReferenceLogProbs, sample_ids
from tests.tiny import gaze_sample
from tests.train.conftest import ONE_SAMPLE, losses, on_ranks, tiny_recipe
from tests.train.test_resume import same_end

CLIPS = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which the right digit is preferred to the next one (`cells`), and an answer in digits to none (`chats`)."""
    folder = tmp_path_factory.mktemp("pairs") / "shards"
    samples = [_with_rejected(gaze_sample("gaze_cell")(0, split, number)) for split in SPLITS for number in range(CLIPS)]
    for split, number, turn in text_chats(0, CLIPS, CLIPS):
        samples.append(ShardSample("chats", "text", split, f"{split}-{number}", [[turn | {"rejected": "I do not know."}]], [None]))
    return write_small(folder, samples, identity="pairs", frame_px=42, tokens=400)


def _with_rejected(sample: ShardSample) -> ShardSample:
    (turn,) = sample.conversations[0]
    wrong = str((int(turn["answer"]) + 1) % 10) if turn["answer"].isdigit() else f"{turn['answer']} 0"
    return replace(sample, source="cells", conversations=[[turn | {"rejected": wrong}]], probes=[None])


def dpo_recipe(output: Path, pairs: Path, **changes: Any) -> Recipe:
    data = {"mixture": [{"source": "cells", "share": 0.75}, {"source": "chats", "share": 0.25}], "loss_on": "preferences"}
    return tiny_recipe(output, pairs, data=data, dpo={"beta": 0.5}, **changes)


def start_model(recipe: Recipe, seed: int | None = None) -> FoveatedVLM:
    shards = ShardSet(recipe.shards)
    return build_model(recipe.model, vocab_size=shards.manifest.vocab_size, seed=recipe.run.seed if seed is None else seed)


def read(recipe: Recipe, split: Any, n: int) -> list[Sample]:
    shards = ShardSet(recipe.shards)
    chosen = [row for source in ("cells", "chats") for row in shards.rows(split, source).index[:n]]
    return [shards.read(int(row), image_repeats=2, question_first=row % 2 == 0) for row in chosen]


def alone(model: FoveatedVLM, sample: Sample, recipe: Recipe, pass_number: int) -> tuple[float, dict[str, Tensor]]:
    """The log-probability of a sample's labels in one pass, by itself, and its gradient in float64."""
    weights = [float(number == pass_number) for number in range(3)]
    model.zero_grad()
    chat = ShardSet(recipe.shards).chat
    objective = model(pack([sample], chat), LossSettings(coarse=weights[0], fine=weights[1:])).objective
    objective.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else -p.grad.clone() for name, p in model.named_parameters()}
    return -float(objective.detach()), gradients


def test_loss_and_gradient(tmp_path: Path, pairs: Path) -> None:
    """Against each answer run by itself, one pass at a time, and DPO's gradient as its paper gives it (equation 7), in float64."""
    recipe = dpo_recipe(tmp_path, pairs)
    model, reference_model = start_model(recipe).double(), start_model(recipe, seed=7).double()
    samples, beta, weights = read(recipe, "train", 2), 0.5, {"coarse": 2.0, "fine1": 0.0, "fine2": 1.0}
    settings = LossSettings(coarse=2.0, fine=[0.0, 1.0])
    answers = [answer for sample in samples for answer in sample.pair()]
    batch = pack(answers, ShardSet(pairs).chat)
    assert len(batch.frames) == sum(len(sample.frames) for sample in samples)  # chosen and rejected share them
    expected, gradient = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    stored: list[list[float]] = [[] for _ in answers]
    for number, weight in enumerate(weights.values()):
        if not weight:
            continue
        share = weight / sum(weights.values())
        for chosen, rejected in zip(range(0, len(answers), 2), range(1, len(answers), 2), strict=True):
            log_probs = [alone(model, answers[place], recipe, number) for place in (chosen, rejected)]
            held = [alone(reference_model, answers[place], recipe, number)[0] for place in (chosen, rejected)]
            for place, value in zip((chosen, rejected), held, strict=True):
                stored[place].append(value)
            margin = beta * ((log_probs[0][0] - held[0]) - (log_probs[1][0] - held[1]))
            expected += share * math.log1p(math.exp(-margin))
            pull = share * beta / (1 + math.exp(margin))
            for name, total in gradient.items():
                total -= pull * (log_probs[0][1][name] - log_probs[1][1][name])
    reference = ReferenceLogProbs(dict(zip(sample_ids(batch), stored, strict=True)))
    objective = PreferenceLoss(settings, ["coarse", "fine2"], beta, reference)
    assert objective.units(batch) == len(samples)
    model.zero_grad()
    sums = objective(model, batch, torch.device("cpu"))
    sums.objective.backward()
    assert sums.objective.item() == pytest.approx(expected, rel=1e-5)
    assert sums.objective.item() != pytest.approx(len(samples) * math.log(2), rel=1e-2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_plan_counts_both_answers(tmp_path: Path, pairs: Path) -> None:
    recipe = dpo_recipe(tmp_path, pairs)
    cost = Cost(build_model(recipe.model, vocab_size=ShardSet(pairs).manifest.vocab_size), recipe.loss, pairs=True)
    shards, counted = ShardSet(pairs), 0.0
    for part in recipe.data.mixture:
        rows = shards.rows("train", part.source).index
        batches = [pack(shards.read(int(row), image_repeats=2).pair(), shards.chat) for row in rows]
        counted += part.share * sum(map(cost.batch, batches)) / len(rows)
    assert recipe.run.steps is not None
    assert expected_cost(recipe, pairs).flops == pytest.approx(counted * recipe.run.steps * recipe.run.batch_samples, rel=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Recipe:
    recipe = dpo_recipe(tmp_path_factory.mktemp("dpo") / "run", pairs, run__steps=20)
    train(recipe)
    return recipe


def test_learns_what_is_preferred(trained: Recipe) -> None:
    rows = pd.read_csv(trained.output / "metrics.csv")
    assert rows["train_loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-4)  # the model is its reference
    assert rows["train_loss"].iloc[-1] < 0.3
    assert rows["train_preferred"].iloc[-1] > 0.9
    manifest = RunManifest.read_whole(trained.output)
    assert manifest is not None
    assert manifest.final_loss == rows.loc[rows["step"] == manifest.model_step, "val_fine2"].item()
    assert manifest.losses.keys() == {"coarse", "fine1", "fine2"}
    assert manifest.samples_seen == 20 * 8 * 2


def test_reference_equals_recomputation(trained: Recipe, pairs: Path) -> None:
    """Stored once for every answer, and what the starting model says of it in inference."""
    folder = trained.output / "reference"
    manifest = Manifest.read_whole(folder)
    assert manifest is not None
    table = pd.concat(pq.read_table(path).to_pandas() for path in folder.glob("*.parquet")).set_index("id")
    assert table.index.is_unique
    assert len(table) == manifest.counts["samples"]
    model, shards = start_model(trained), ShardSet(pairs)
    met = set()
    for split in SPLITS:
        for sample in read(trained, split, CLIPS):
            for order in (False, True):
                for answer in replace(sample, question_first=order).pair():
                    batch = pack([answer], shards.chat)
                    (name,) = sample_ids(batch)
                    if name in table.index:
                        met.add(name)
                        for mode, column in (("coarse_only", "coarse"), ("coarse_fine", "fine1")):
                            assert table.loc[name, column] == pytest.approx(-float(token_losses(model, batch, mode).sum()), abs=1e-4)
    assert met == set(table.index)


@pytest.mark.slow(reason="two training processes, several times")
def test_two_ranks_equal_one(tmp_path: Path, pairs: Path, trained: Recipe) -> None:
    """Both ways of spreading, with micro-batches of one pair; the reference is computed by both ranks."""
    for sharding in ("ddp", "fsdp2"):
        recipe = dpo_recipe(tmp_path / sharding, pairs, run__steps=20, run__micro_batch=ONE_SAMPLE, run__sharding=sharding)
        on_ranks(recipe, 2)
        # whether a pair that is as the reference has it counts as preferred is a matter of rounding
        mine, one = (losses(run).drop(columns="train_preferred") for run in (recipe, trained))
        pd.testing.assert_frame_equal(mine, one, atol=2e-5, rtol=1e-4)
        assert RunManifest.read(recipe.output).counts == RunManifest.read(trained.output).counts


@pytest.mark.slow(reason="trains three times")
def test_resumes_bit_for_bit(tmp_path: Path, trained: Recipe) -> None:
    """Killed while the reference was made, and killed in training: the tables there are stay, the others are made again."""
    reference = Manifest.read(trained.output / "reference").digest
    for step in (0, 8):
        recipe = trained.model_copy(update={"output": tmp_path / str(step)})
        shutil.copytree(trained.output, recipe.output)
        (recipe.output / "manifest.json").unlink()
        for checkpoint in (recipe.output / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        if step == 0:
            (recipe.output / "reference" / "manifest.json").unlink()
            (recipe.output / "reference" / "train-000000.parquet").unlink()
        else:  # damaged: all of it is made again
            (recipe.output / "reference" / "val-000000.parquet").write_bytes(b"")
        train(recipe)
        same_end(recipe, trained)
        assert Manifest.read(recipe.output / "reference").digest == reference


def test_damaged_sample_is_replaced_by_one_with_a_reference(tmp_path: Path, pairs: Path) -> None:
    """Whichever clip it is: another takes its place in each of several epochs, in an order of question and frames of its own."""
    whole = ShardSet(pairs)
    cells = {whole.record(int(row))["key"] for row in whole.rows("train", "cells").index}
    assert len(cells) == CLIPS
    for key in sorted(cells):
        copy = tmp_path / key
        shutil.copytree(pairs, copy)
        shards = ShardSet(copy)
        (row,) = [int(row) for row in shards.rows("train", "cells").index if shards.record(int(row))["key"] == key]
        entry = shards._table.slice(row, 1).to_pylist()[0]
        with (copy / entry["shard"]).open("r+b") as stream:
            stream.seek(entry["frame_offsets"][0])
            stream.write(b"\0" * 40)
        recipe = dpo_recipe(tmp_path / f"run-{key}", copy, run__steps=3)
        train(recipe)
        assert RunManifest.read(recipe.output).samples_seen == 3 * 8 * 2


def test_what_is_no_preference(tmp_path: Path, shards: Path, pairs: Path) -> None:
    with pytest.raises(UserError, match="has no rejected answer"):
        train(dpo_recipe(tmp_path / "run", shards, data__mixture=[{"source": "gaze_cell", "share": 1.0}]))
    with pytest.raises(UserError, match=r"dpo and data\.loss_on 'preferences' go together"):
        tiny_recipe(tmp_path / "run", pairs, dpo={"beta": 0.1})
    with pytest.raises(ValueError, match="no rejected answer"):
        replace(read(dpo_recipe(tmp_path, pairs), "train", 1)[0], turns=[Turn([1], [2])]).pair()
