"""What `benchmarks.selectors` compares: choosers on cases made by hand, merging against its definition, and a run from end to end."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import choosers, foveation_world, selectors
from benchmarks.choosers import ENCODINGS, central, change, chooser, from_first_frame, merge, unexplained, wanted
from benchmarks.foveation_world import ZOOM
from fvlm_core.data import cells_world
from fvlm_core.data.cells_world import render
from fvlm_core.data.gaze import CELL_PX
from fvlm_core.errors import UserError
from fvlm_core.release.sections import selectors as section
from fvlm_core.tables import Table
from tests.model.build import tiny_model

PATCH = ZOOM * CELL_PX
"""Side of what a glance patch covers."""


def still(clips: int = 8):
    return render(np.random.default_rng(3), "train", grid=9, clips=clips, frames=3, name="still")


def asked_for(folder: Path, seed: int, selectors: Sequence[str]) -> Namespace:
    """Options of a run in the hunt, as small as it can be."""
    chosen = {"seeds": [seed], "worlds": ["hunt"], "selectors": selectors, "clips": 4, "chosen_steps": 1, "dense_steps": 0}
    return Namespace(out=folder / "out", start=folder, start_seed=None, **chosen)


def uniform(world) -> Tensor:
    return torch.zeros(world.frames.shape[0] * world.frames.shape[1], 9)


def test_change_opens_what_changed():
    world = still(32)
    opened = chooser("change", world)(uniform(world), 1).unflatten(0, (32, 3))[..., 0]
    assert torch.equal(opened[:, 1:], wanted(world)[:, 1:])


def test_change_is_nothing_to_a_frame_shown_twice_and_a_first_frame_is_scored_by_itself():
    frames = torch.zeros(2, 3, 3 * PATCH, 3 * PATCH, 3, dtype=torch.uint8)
    frames[1, :, PATCH, 2 * PATCH] = 255  # one pixel of patch 5, in all frames of the second clip
    scores = change(frames).unflatten(0, (2, 3))
    assert (scores[:, 1:] == 0).all()
    assert (scores[0, 0] == 0).all()
    assert scores[1, 0].argmax() == 5


def test_saliency_is_what_the_glance_does_not_show():
    frames = torch.zeros(1, 3 * PATCH, 3 * PATCH, 3, dtype=torch.uint8)
    frames[0, :PATCH, :PATCH] = 200  # even: the glance shows it
    frames[0, PATCH + 9 : 2 * PATCH - 9 : 2, PATCH + 9 : 2 * PATCH - 9] = 90  # stripes finer than the glance
    assert unexplained(frames)[0].argmax() == 4


def test_the_first_frames_choice_is_every_frames():
    log_p = torch.zeros(6, 9)
    log_p[0, 7], log_p[1, 2], log_p[3, 4], log_p[5, 8] = 1.0, 2.0, 1.0, 2.0
    assert from_first_frame(3, log_p, 1).flatten().tolist() == [7, 7, 7, 4, 4, 4]


def test_the_centre_and_what_is_nearest_to_it():
    assert central(torch.zeros(2, 9), 1).tolist() == [[4], [4]]
    assert sorted(central(torch.zeros(1, 9), 5)[0].tolist()) == [1, 3, 4, 5, 7]


@pytest.mark.parametrize("name", ["asked", "still", "hunt"])
def test_the_oracle_opens_the_patch_over_the_cell_that_counts(name):
    world = render(np.random.default_rng(4), "train", grid=9, clips=4, frames=2, name=name)
    opened = chooser("oracle", world)(torch.zeros(8, 9), 1).flatten()
    for patch, (row, column) in zip(opened.tolist(), world.path.reshape(-1, 2).tolist(), strict=True):
        assert divmod(patch, 3) == (row // 3, column // 3)


@pytest.mark.parametrize("world", ["asked", "still", "hunt"])
def test_clutter_rises_at_equal_nats_a_digit(world):
    """The loss is per label, and the end of an answer, which costs nothing, is one."""
    trial = selectors.Trial(9, 0, world=world, say=lambda _: None)
    made, batch = trial.batch("train", 2, 0.0)
    per_digit = trial.gate * batch.n_labels / made.answers.size
    assert per_digit == pytest.approx(foveation_world.GATE * (foveation_world.FRAMES + 1) / foveation_world.FRAMES)


def test_merging_joins_equal_contents_and_counts_every_token_once():
    content = torch.eye(6)[torch.tensor([0, 0, 1, 2, 3, 1, 4, 5])][None]
    x = torch.arange(8.0)[None, :, None]
    assert sorted(merge(x, content, 6).flatten().tolist()) == [0.5, 3.0, 3.5, 4.0, 6.0, 7.0]
    assert torch.equal(merge(x, content, 8), x)
    assert merge(x[:, :7], torch.ones(1, 7, 2), 1).item() == pytest.approx(3.0)  # in three rounds


def test_every_selector_is_trained_and_answers_and_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(foveation_world, "BATCH", 4)
    torch.save(selectors.Trial(9, 0).model.state_dict(), tmp_path / "dense_9_0.pt")
    options = asked_for(tmp_path, seed=0, selectors=selectors.SELECTORS)
    selectors.compute(options)
    results = {row.selector: row for row in selectors.rows(options.out)}
    assert list(results) == list(selectors.SELECTORS)
    assert results["oracle"].opened == 1.0
    same = [results[name].mflop for name in ("ours", "question", "change", "saliency", "random", "centre", "oracle")]
    assert len(set(same)) == 1
    assert abs(results["low_resolution"].mflop / same[0] - 1) < 0.15
    assert results["full"].mflop > 4 * same[0]
    assert results["merging"].mflop > same[0]  # it has embedded everything
    assert ENCODINGS.keys() == {"full", "low_resolution", "merging"}
    before = {file: file.stat().st_mtime_ns for file in options.out.glob("*.json")}
    selectors.compute(options)
    assert before == {file: file.stat().st_mtime_ns for file in options.out.glob("*.json")}


def test_gains_are_paired_by_clip_and_seed(tmp_path):
    right = {("ours", 0): [[0, 1], [0, 1], [1, 0]], ("random", 0): [[1, 0], [1, 1], [1, 0]], ("ours", 1): [[0, 1], [0, 0], [0, 1]]}
    for (name, seed), answers in right.items():
        result = {"world": "hunt", "selector": name, "seed": seed, "mflop": 1.0, "right": answers, "hits": []}
        (tmp_path / f"{name}{seed}.json").write_text(json.dumps(result))
    ours, other = selectors.rows(tmp_path)
    assert ours.seeds == {0: pytest.approx(2 / 3), 1: pytest.approx(2 / 3)}  # the hunt's second answers
    assert other.gain is not None
    assert other.gain.value == pytest.approx(1 / 3)
    assert other.gain.n == 3


def test_seeds_that_disagree_make_no_difference_between_methods(tmp_path):
    """Ours is far better with one seed and hardly with the other: certain over clips, not over seeds."""
    shares = {("ours", 0): 90, ("ours", 1): 22, ("random", 0): 20, ("random", 1): 20, ("centre", 0): 10, ("centre", 1): 10}
    for (name, seed), share in shares.items():
        result = {"world": "asked", "selector": name, "seed": seed, "mflop": 1.0, "right": [[n < share] for n in range(100)], "hits": []}
        (tmp_path / f"{name}{seed}.json").write_text(json.dumps(result))
    _, random, _ = selectors.rows(tmp_path)
    assert random.gain is not None
    assert random.gain.low > 0
    assert random.over_seeds is not None
    assert random.over_seeds.by_seed == {0: pytest.approx(0.7), 1: pytest.approx(0.02)}
    assert random.over_seeds.low < 0 < random.over_seeds.high
    assert random.over_seeds.p_holm > 0.5
    _, line = [line for line in selectors.tables(tmp_path).splitlines() if line.startswith("| random")]
    assert "| +0.700 +0.020 | [-3.960, +4.680] |" in line


def test_the_page_and_the_report_hold_the_recorded_differences_over_seeds():
    recorded = section.ACCURACIES.validate_json(section.RECORD.read_bytes())
    for one in recorded:
        assert len(one.by_seed) == one.seeds
        assert np.mean(list(one.by_seed.values())) == pytest.approx(one.accuracy.value, abs=2e-6)
    page = (Path(selectors.__file__).parents[1] / "docs" / "selectors.md").read_text()
    accuracies, _, differences = section.blocks(recorded)
    assert isinstance(accuracies, Table)
    assert isinstance(differences, Table)
    for place, world in enumerate(cells_world.WORLDS):
        lines = page.partition(f"| {world}: ours minus |")[2].partition("\n\n")[0].splitlines()
        cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:]}
        gains = section.seed_differences(recorded, world)
        assert gains.keys() == set(selectors.SELECTORS) - {"ours"}
        for row in differences.rows:
            one = gains[row[0]]
            by_seed, interval, p = (cell.strip(" |") for cell in cells[row[0]][2:5])
            assert row[1 + place] == f"{by_seed}; {interval}, p {p}"
            assert by_seed == " ".join(f"{gain:+.3f}" for gain in one.by_seed.values())
            assert (interval, p) == (f"[{one.low:+.3f}, {one.high:+.3f}]", f"{one.p_holm:.2g}")
    older = [one.model_copy(update={"by_seed": {}}) for one in recorded]
    assert len(section.blocks(older)) == 1, "records of before seeds were kept have no such table"


@pytest.mark.parametrize(("right", "learned"), [(1, False), (4, True)])
def test_a_world_that_nobody_learned_says_so(tmp_path, right, learned):
    answers = [[int(clip % 10 < right)] for clip in range(200)]
    for name in ("ours", "change"):
        result = {"world": "still", "selector": name, "seed": 0, "mflop": 1.0, "right": answers, "hits": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    table = selectors.tables(tmp_path)
    assert f"| ours | {right / 10:.3f} [" in table
    assert ("Not learned" in table) is not learned


def test_missing_weights_are_refused_before_anything_is_trained(tmp_path):
    options = asked_for(tmp_path, seed=2, selectors=["ours"])
    with pytest.raises(UserError, match="--seeds 3"):
        selectors.compute(options)
    assert not options.out.exists()


def test_where_nothing_is_merged_it_is_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own way through the layers, with their scales and residual sums."""
    model = tiny_model()
    frames = torch.randint(0, 256, (3, 42, 42, 3), dtype=torch.uint8)
    monkeypatch.setattr(choosers, "merge", lambda patches, _content, _left: patches)
    with torch.no_grad():
        ours, expected = choosers.merged(model, frames), model.encoder.encode(frames)
    torch.testing.assert_close([*ours.keys, *ours.values], [*expected.keys, *expected.values])
