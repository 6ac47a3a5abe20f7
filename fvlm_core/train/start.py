"""Set up a run: threads, seeds, compilation, and the initial model."""

import random
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import deterministic

from fvlm_core.config import CompiledPart, Recipe, RunSettings
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.tokenizer import require_same_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.model.build import build_model, load_model
from fvlm_core.model.casts import add
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.train.jobs import MODEL_FOLDER

RECOMPILE_LIMIT = 64
"""Number of recompilations after which a part runs eagerly. torch's default of 8 is barely enough for the model's variants."""
OPTIONS = {"realize_opcount_threshold": 18}
"""Compiler options. A value that two kernels read is materialised if it takes more than this number of operations (default 30), instead of
being computed in both. At the default, GELU's gradient was computed twice, for the matrix product and for the bias, each time from two
tensors of its own size."""
AUTOTUNE = {"max_autotune_gemm": True}
"""Further compiler options, set by `run.autotune`."""


def prepare(run: RunSettings, rank: int, device: torch.device) -> None:
    """Set the number of threads, the seeds and the matmul precision, and deterministic algorithms on CPU, where they are cheap."""
    if run.threads:
        torch.set_num_threads(run.threads)
    seed = run.seed * 1_000_003 + rank  # a large prime, so that no two pairs of seed and rank give the same value
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":
        # Not on CUDA, where it replaces the fast attention and scatter kernels by slow ones.
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]  # for debugging; costs a write
    else:  # operations that autocast leaves in fp32 may use TF32; always set, because one process may run several precisions
        torch.set_float32_matmul_precision("high" if run.precision == "bf16" else "highest")


def initial_model(recipe: Recipe, shards: ShardSet) -> FoveatedVLM:
    """Build the model for the first step, from an earlier run (`init_from`) or from the recipe's settings.

    Raises UserError if the model, the earlier run and the shards do not match.
    """
    settings, manifest = recipe.model, shards.manifest
    if manifest.frame_px != settings.vision.frame_px:
        raise UserError(
            f"the shards' frames are {manifest.frame_px} px, the model's {settings.vision.frame_px} px",
            where="model.vision.frame_px",
            fix="make both the same",
        )
    fresh = recipe.init_from is None
    if fresh and settings.llm.checkpoint is not None:
        require_same_tokenizer(shards.tokenizer, settings.llm.checkpoint, where=str(recipe.shards))
    model = build_model(settings, vocab_size=manifest.vocab_size, seed=recipe.run.seed) if fresh else _continued(recipe)
    held, needed = model.llm.config.vocab_size, manifest.vocab_size
    if held < needed:
        raise UserError(
            f"the shards' tokenizer has {needed} tokens, the model only {held}",
            where=f"{recipe.shards}, {recipe.init_from or 'model.llm'}",
            fix="make the shards with the model's own tokenizer",
        )
    longest = shards.longest_sequence(recipe.data, tokens_per_frame=settings.tokens_per_frame)
    context = model.llm.config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"the longest sample has {longest} tokens, the language model's context is {context}",
            where="model.llm",
            fix="raise the context, or make shards with fewer frames or shorter texts",
        )
    return model


def compile_parts(model: FoveatedVLM, parts: Collection[CompiledPart], *, autotune: bool = False) -> None:
    """`torch.compile` the given parts: the encoder's embedding and layers, its queries, the language model's layers and the loss.

    Each part is one graph and compiled twice: with the static shapes of the first batch and, at the next shape, with dynamic numbers of
    frames and tokens. `dynamic=True` from the start would make widths and grids dynamic too; element indices are then computed by
    divisions, and the gradient of keys and values took 2.8 ms on an H200, where its memory traffic needs 0.2 ms. `autotune`: let the
    compiler benchmark its own matrix products, fused with the elementwise operations that follow, and use them if they are faster than the
    library's.
    """
    options: dict[str, Any] = {"options": OPTIONS | (AUTOTUNE if autotune else {})}
    if parts:
        # modules of a class share one cache, for several dtypes and numbers of queries, training and validation
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # ty: ignore[invalid-assignment] -- its default is not its type
    if "encoder" in parts:
        _compile_method(model.encoder, "embed", options)
        _compile_method(model.encoder.layers[-1], "keys_values", options)
    model.encoder.factored_gradients = {"encoder", "queries"} <= set(parts)
    castable = {"encoder": model.encoder.factored_gradients and model.encoder.castable, "llm": "llm" in parts and model.llm.castable}
    model.casts.parts = frozenset(part for part, so in castable.items() if so)
    if model.casts.parts:
        fixed: dict[str, Any] = options | {"dynamic": False}  # shapes of weights never change
        model.casts.add = torch.compile(add, **fixed)
    for layer in model.encoder.layers:
        if "encoder" in parts:
            layer.compile(**options)
        if "queries" in parts:
            _compile_method(layer, "query", options)
    for layer in model.llm.model.layers if "llm" in parts else ():
        layer.compile(**options)
    if "llm" in parts:
        model.cross_entropy.compile(**options)


def _compile_method(module: nn.Module, name: str, options: dict[str, Any]) -> None:
    object.__setattr__(module, name, torch.compile(getattr(module, name), **options))


def _continued(recipe: Recipe) -> FoveatedVLM:
    """Load the model of the run at `init_from`, with the recipe's settings. Raises UserError if these change its architecture."""
    assert recipe.init_from is not None
    model = load_model(recipe.init_from / MODEL_FOLDER)
    wanted = recipe.model.portable()  # the form in which the earlier run's settings were saved
    if model.settings == wanted:
        return model
    misfit = UserError(
        "the earlier run has another model",
        where=f"init_from {recipe.init_from}, model",
        fix="give the recipe the earlier run's vision, llm, query, tokens_per_frame and film_head_width",
    )
    if (model.settings.vision, model.settings.llm) != (wanted.vision, wanted.llm):
        raise misfit
    changed = FoveatedVLM(recipe.model, model.encoder, model.llm)
    try:
        changed.connector.load_state_dict(model.connector.state_dict())
    except RuntimeError as error:
        raise misfit from error
    return changed
