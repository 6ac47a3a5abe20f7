"""Compiling any part leaves the numbers as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fvlm_core.config import COMPILED_PARTS, RunSettings
from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from fvlm_core.train.start import AUTOTUNE, OPTIONS, compile_parts
from tests.model.build import tiny_model
from tests.train.conftest import tiny_recipe

FEW = {"frames": 8, "tokens": 200}
"""`run.micro_batch` with which a step has a few micro-batches."""


def test_setting() -> None:
    assert RunSettings(steps=1).compiled_parts == ()
    assert RunSettings(steps=1, compile=True).compiled_parts == COMPILED_PARTS
    assert RunSettings(steps=1, compile=["llm"]).compiled_parts == ("llm",)


@pytest.mark.parametrize(("parts", "precision"), [(["queries"], "fp32"), (True, "fp32"), (True, "bf16")], ids=str)
def test_same_numbers(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, parts: Any, precision: str) -> None:
    """With a backend that only traces: what is wrong with the graphs shows, and no compiler is needed. In bf16 to its rounding.

    How many frames, queries of a frame, and tokens there are may vary; with widths, heads or grids as variables too, the compiler's kernels
    would divide to find every element.
    """
    compiled: list[str] = []
    variable: set[tuple[str, int]] = set()

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor], **_options: Any) -> Any:
        compiled.append(str(graph.graph))
        given = ((node.name, node.meta["example_value"]) for node in graph.graph.find_nodes(op="placeholder"))
        tensors = [(name, one) for name, one in given if isinstance(one, torch.Tensor)]
        variable.update((name, n) for name, one in tensors for n, side in enumerate(one.shape) if isinstance(side, torch.SymInt))
        return graph.forward

    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: plain_compile(model, backend=backend, **options))
    losses = []
    for chosen in (False, parts):
        torch.compiler.reset()
        changes = {"run__precision": precision, "run__micro_batch": FEW, "model__llm__shape__layers": 1}
        recipe = tiny_recipe(tmp_path / str(chosen), shards, run__compile=chosen, **changes)
        trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
        trainer.go_to(None, trainer.state)
        losses.append([trainer.step()[0] for _ in range(3)])
        assert bool(compiled) == bool(chosen)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5 if precision == "fp32" else 0.02)
    assert any("_foreach_add_" in graph for graph in compiled) == (precision == "bf16")
    assert variable
    assert all(n == 0 or (name, n) == ("l_q_", 1) for name, n in variable)


@pytest.mark.parametrize("autotune", [False, True])
def test_autotuning_is_asked_of_the_compiler_for_every_part(monkeypatch: pytest.MonkeyPatch, autotune: bool) -> None:
    """By options that it has."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    model = tiny_model()
    compile_parts(model, COMPILED_PARTS, autotune=autotune)
    # embedding, last keys and values, loss; the encoder's layers, for patches and for queries; the language model's; sums of gradients
    assert len(asked) == 4 + 2 * len(model.encoder.layers) + len(model.llm.model.layers)
    assert all(options["options"] == OPTIONS | (AUTOTUNE if autotune else {}) for options in asked)
    # gradients have the shapes of weights; of all else the compiler finds out what changes
    assert sorted(str(options.get("dynamic")) for options in asked) == ["False"] + ["None"] * (len(asked) - 1)
    assert (OPTIONS | AUTOTUNE).keys() <= set(torch._inductor.list_options())
