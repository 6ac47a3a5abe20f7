"""Where a run starts: the machine's settings, and the model it begins with."""

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
"""Beyond it a part runs uncompiled; torch's own 8 is just about what the model's variants need."""
OPTIONS = {"realize_opcount_threshold": 18}
"""Options of the compiler: what two kernels read and takes more than so many operations (its own limit is 30) is written once, and not
computed by both. GELU's gradient was computed for the product and once more for the bias, from two tensors as large as itself."""
AUTOTUNE = {"max_autotune_gemm": True}
"""Further options that `run.autotune` sets."""


def prepare(run: RunSettings, rank: int, device: torch.device) -> None:
    """Threads, seeds, and determinism where it costs little."""
    if run.threads:
        torch.set_num_threads(run.threads)
    seed = run.seed * 1_000_003 + rank  # a large prime: neighbouring seeds do not meet over the ranks
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":
        # On CUDA it would exchange the fast attention and scatter kernels for slow ones.
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]  # finds bugs, costs a write
    else:  # what autocast leaves in fp32 may use TF32; set either way, since one process measures several precisions
        torch.set_float32_matmul_precision("high" if run.precision == "bf16" else "highest")


def initial_model(recipe: Recipe, shards: ShardSet) -> FoveatedVLM:
    """The model before the first step: from an earlier run (`init_from`) or from the recipe's own settings.

    Raises UserError where the model, the earlier run and the shards do not fit together.
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
    """`torch.compile` the encoder's embedding and layers, the queries' way through them, the language model's layers and the loss.

    Each is one graph, compiled twice: for the first batch's shapes, and when another comes, with the numbers of frames and tokens as
    variables. From the start, widths and grids would be variables too (`dynamic=True`): the indices of every element are then computed
    by divisions, and the gradient of keys and values took 2.8 ms on an H200 where its bytes need 0.2. `autotune`: where a matrix product
    written by the compiler is measured to be faster than the library's, it is taken, with the elementwise operations that follow.
    """
    options: dict[str, Any] = {"options": OPTIONS | (AUTOTUNE if autotune else {})}
    if parts:
        # modules of a class share one cache, and each sees several dtypes, numbers of queries, training and validation
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # ty: ignore[invalid-assignment] -- its default is not its type
    if "encoder" in parts:
        _compile_method(model.encoder, "embed", options)
        _compile_method(model.encoder.layers[-1], "keys_values", options)
    model.encoder.has_tickets = {"encoder", "queries"} <= set(parts)
    castable = {"encoder": model.encoder.has_tickets and model.encoder.castable, "llm": "llm" in parts and model.llm.castable}
    model.casts.parts = frozenset(part for part, so in castable.items() if so)
    if model.casts.parts:
        fixed: dict[str, Any] = options | {"dynamic": False}  # a weight's shape is always the same
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
    """The model of the run at `init_from`, with the recipe's settings where they only change how it is used."""
    assert recipe.init_from is not None
    model = load_model(recipe.init_from / MODEL_FOLDER)
    wanted = recipe.model.portable()  # as the earlier run's settings were saved
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
