"""A micro-batch that does not fit into memory is cut, and nothing but rounding changes; the profile of some steps."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.train.__main__ import train
from tests.train.conftest import losses, same_losses, tiny_recipe


def test_out_of_memory_halves_the_budget_and_goes_on(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (tiny_recipe(tmp_path / name, shards, run__steps=3) for name in ("whole", "cut"))
    expected = train(whole)
    encode, room = FoveatedVLM.encode, 9
    refused: list[int] = []

    def allocate(model: FoveatedVLM, frames: torch.Tensor) -> object:
        """As the allocator of a GPU with room for the activations of few frames."""
        if torch.is_grad_enabled() and len(frames) > room:
            refused.append(len(frames))
            raise torch.OutOfMemoryError(f"tried to allocate {len(frames)} frames")
        return encode(model, frames)

    monkeypatch.setattr(FoveatedVLM, "encode", allocate)
    manifest = train(cut)
    assert refused
    budgets = [cut.run.micro_batch.frames, *(event.micro_batch.frames for event in manifest.out_of_memory)]
    assert len(budgets) == 1 + len(refused)
    assert all(later == earlier // 2 for earlier, later in pairwise(budgets))
    same_losses(cut, whole)
    assert manifest.counts == expected.counts


def test_what_never_fits_is_an_error(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(_model: FoveatedVLM, frames: torch.Tensor) -> object:
        raise torch.OutOfMemoryError(f"tried to allocate {len(frames)} frames")

    monkeypatch.setattr(FoveatedVLM, "encode", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny_recipe(tmp_path / "run", shards))


@pytest.mark.parametrize(("after", "said"), [(1, False), (3, True)])
def test_a_run_too_short_to_be_profiled_says_so(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], after: int, said: bool
) -> None:
    train(tiny_recipe(tmp_path / "run", shards, run__steps=2, run__profile={"steps": 1, "after": after}))
    assert ("no step was profiled: this process ran no more than 3 steps; lower run.profile.after" in capsys.readouterr().out) == said


def test_profiled_steps_leave_a_trace_and_a_table_and_change_nothing(tmp_path: Path, shards: Path) -> None:
    plain = tiny_recipe(tmp_path / "plain", shards, run__steps=2)
    profiled = tiny_recipe(tmp_path / "profiled", shards, run__steps=2, run__profile={"steps": 1, "after": 1})
    assert plain.identity({}) == profiled.identity({})
    train(plain)
    train(profiled)
    names = {event.get("name") for event in json.loads((profiled.output / "profile" / "trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::mm" in (profiled.output / "profile" / "table.txt").read_text()
    assert losses(profiled).equals(losses(plain))
