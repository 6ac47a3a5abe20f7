"""The training runs that `benchmarks.resume` kills and restarts: ours, and the same data and model in other libraries.

Each function trains from the last checkpoint in its folder to the end. It appends the step and the keys of its samples to `order.log` in
every step, and at the end writes the sha256 of its weights to `weights.sha256`. `benchmarks.resume` runs them as processes.
"""

import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from fvlm_core.config import LossSettings, Recipe
from fvlm_core.data.batch import PackedBatch, Sample, pack
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.model.build import build_model
from fvlm_core.train.distributed import World
from fvlm_core.train.folder import claim_folder, input_digests
from fvlm_core.train.loop import Trainer

ORDER_FILE, WEIGHTS_FILE = "order.log", "weights.sha256"
LEARNING_RATE = 1e-3


def ours(recipe: Recipe) -> None:
    """`fvlm_core.train`."""
    torch.set_num_threads(1)
    inputs = input_digests(recipe)
    identity = recipe.identity(inputs)
    claim_folder(recipe, identity)
    trainer = _Logged(recipe, World.initialize({}, "cpu"), identity, inputs, has_wandb_key=False)
    trainer.run()
    _end(recipe.output, trainer.model)


class _Logged(Trainer):
    """Logs the sample keys of every step."""

    def _accumulate(self, micro_batches: list[PackedBatch], units: int) -> torch.Tensor:
        _log(self.recipe.output, self.state.step, [key for batch in micro_batches for key in batch.keys])
        return super()._accumulate(micro_batches, units)


def transformers_trainer(recipe: Recipe) -> None:
    """transformers' Trainer with accelerate's loader, over the rows in its own random order."""
    _peer(recipe, _Rows(ShardSet(recipe.shards), recipe))


def webdataset_resampled(recipe: Recipe) -> None:
    """The same Trainer over webdataset's resampled shards, its authors' approach to resuming: continue with the endless stream.

    All seeds that can be set are fixed, because otherwise no two runs would be equal.
    """
    _peer(recipe, _Resampled(ShardSet(recipe.shards), recipe), ignore_data_skip=True)


def _peer(recipe: Recipe, data: Dataset, **arguments: Any) -> None:
    """Train with transformers' Trainer, from its last checkpoint if there is one."""
    from transformers import Trainer as TransformersTrainer
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shards, run = ShardSet(recipe.shards), recipe.run
    model = _Model(recipe, shards)

    class Step(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            model.step = state.global_step

    recipe.output.mkdir(parents=True, exist_ok=True)
    trainer = TransformersTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(recipe.output),
            per_device_train_batch_size=run.batch_samples,
            max_steps=run.steps or 0,
            learning_rate=LEARNING_RATE,
            save_strategy="steps",
            save_steps=run.checkpoint_every,
            save_total_limit=3,
            seed=run.seed,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
            accelerator_config={"dispatch_batches": False},  # a packed batch cannot be split over ranks; there is only one rank
            **arguments,
        ),
        train_dataset=data,
        data_collator=lambda samples: {"batch": pack(samples, shards.chat)},
        callbacks=[Step()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(recipe.output)))
    _end(recipe.output, model.model)


class _Model(nn.Module):
    """Adapts our model to Trainer: `forward` takes keyword arguments and returns a loss; the state dict omits the tied output embedding."""

    def __init__(self, recipe: Recipe, shards: ShardSet) -> None:
        super().__init__()
        self.recipe, self.step = recipe, 0
        self.model = build_model(recipe.model, vocab_size=shards.manifest.vocab_size, seed=recipe.run.seed)
        self.losses: LossSettings = recipe.loss

    def forward(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        _log(self.recipe.output, self.step, batch.keys)
        return {"loss": self.model(batch, self.losses).objective / max(1, batch.n_labels)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if not name.endswith("lm_head.weight")}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        head, embedding = "model.llm.lm_head.weight", "model.llm.model.embed_tokens.weight"
        return super().load_state_dict({head: state_dict[embedding]} | dict(state_dict), strict=strict, assign=assign)


class _Rows(Dataset[Sample]):
    """Map-style dataset over the rows of the recipe's sources."""

    def __init__(self, shards: ShardSet, recipe: Recipe) -> None:
        self.shards, self.repeats = shards, recipe.data.image_repeats
        self.rows = [int(row) for part in recipe.data.mixture for row in shards.row_numbers("train", part.source)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.shards.read(self.rows[index], image_repeats=self.repeats)


class _Resampled(IterableDataset[Sample]):
    """Iterable dataset over webdataset's resampled shards with its shuffle buffer; reads the first conversation of each sample."""

    def __init__(self, shards: ShardSet, recipe: Recipe) -> None:
        self.rows = _Rows(shards, recipe)
        names = sorted({shards.shard_names[shards.shard_numbers[row]] for row in self.rows.rows})
        self.urls, self.seed = [str(shards.folder / name) for name in names], recipe.run.seed
        of = shards.rows("train")
        self.first = dict(zip(reversed(of["key"].tolist()), reversed(of.index.tolist()), strict=True))

    def __iter__(self) -> Iterator[Sample]:
        import webdataset as wds

        pipeline = wds.DataPipeline(
            wds.ResampledShards(self.urls, seed=self.seed, deterministic=True),
            wds.tarfile_to_samples(),
            wds.shuffle(20, rng=random.Random(self.seed)),
        )
        for sample in pipeline:
            yield self.rows.shards.read(self.first[sample["__key__"]], image_repeats=self.rows.repeats)


def _log(folder: Path, step: int, keys: list[str]) -> None:
    with (folder / ORDER_FILE).open("a") as stream:
        stream.write(json.dumps([step, keys]) + "\n")


def _end(folder: Path, model: nn.Module) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    (folder / f"{WEIGHTS_FILE}.part").write_text(digest.hexdigest())
    os.replace(folder / f"{WEIGHTS_FILE}.part", folder / WEIGHTS_FILE)
