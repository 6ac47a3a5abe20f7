"""The parts of a run on this rank, and how they are saved, restored and rolled back.

Everything that a step depends on is in the checkpoint (weights, optimizer, random generators) or a pure function of the step (learning
rates, data). So a run that was killed and resumed gives the same results as an uninterrupted one: bit for bit on a CPU, and up to rounding
on a GPU, where flash attention's backward accumulates in no fixed order.
"""

from collections.abc import Iterator
from typing import Any

from torch.optim import AdamW

from fvlm_core.config import Recipe
from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.damage import Damage
from fvlm_core.data.loader import damage_count, train_steps
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.train.checkpoint import CheckpointManifest, Checkpoints, rng_tensors, set_rng
from fvlm_core.train.cost import Cost
from fvlm_core.train.display import Display
from fvlm_core.train.distributed import World
from fvlm_core.train.divergence import MARGIN_STEPS, frozen_parameters, next_freeze
from fvlm_core.train.jobs import CHECKPOINTS_FOLDER, METRICS_FILE, Divergence
from fvlm_core.train.metrics import MetricsFile, Tracker, columns
from fvlm_core.train.objective import Objective, PreferenceLoss, TokenLoss
from fvlm_core.train.optimizer import build_optimizer, optimizer_tensors
from fvlm_core.train.parallelism import parallelism_for
from fvlm_core.train.reference import make_reference
from fvlm_core.train.start import compile_parts, initial_model, prepare
from fvlm_core.train.state import Clock, RunState
from fvlm_core.train.validation import require_validation_samples, score


class Run:
    """A run on this rank. All ranks must call every method."""

    optimizer: AdamW
    damage: Damage
    saved: int | None = None
    """Step of the last checkpoint saved by this process, reset by `go_to`."""

    def __init__(self, recipe: Recipe, world: World, identity: str, inputs: dict[str, str], *, has_wandb_key: bool) -> None:
        self.recipe, self.world, self.identity, self.inputs = recipe, world, identity, inputs
        self.shards = ShardSet(recipe.shards)
        require_validation_samples(self.shards, recipe)
        prepare(recipe.run, world.rank, world.device)
        self.model = initial_model(recipe, self.shards).to(world.device)
        if recipe.run.gradient_checkpointing:
            self.model.set_gradient_checkpointing(True)
        compile_parts(self.model, recipe.run.compiled_parts, autotune=recipe.run.autotune)
        build_optimizer(self.model, recipe.optimizer)  # freezes parameters: `steps_for` depends on what is trained
        self.cost = Cost(self.model, recipe.loss, pairs=recipe.dpo is not None)
        self.steps = self.cost.steps_for(self.shards, recipe.data, recipe.run)
        self.run_settings = recipe.run.with_changes({"steps": self.steps, "budget_flops": None})
        self.objective = self._objective()
        self.parallelism = parallelism_for(self.model, world, recipe.run)
        self.checkpoints = Checkpoints(recipe.output / CHECKPOINTS_FOLDER, world, identity)
        self.metrics = MetricsFile(recipe.output / METRICS_FILE, columns(self.objective.names))
        self.tracker = Tracker(recipe, identity, has_key=has_wandb_key)
        self.display = Display(recipe.name, self.steps, enabled=world.rank == 0, live=world.size == 1)
        self.state, self.clock = RunState(), Clock()
        self.batches: Iterator[list[PackedBatch]] = iter(())

    def _objective(self) -> Objective:
        """Build the recipe's objective. For DPO, compute the reference with the model's current weights."""
        recipe = self.recipe
        if recipe.dpo is None:
            return TokenLoss(recipe.loss, recipe.passes)
        reference = make_reference(self.model, self.shards, recipe, self.run_settings, self.world, self.identity)
        return PreferenceLoss(recipe.loss, recipe.passes, recipe.dpo.beta, reference)

    def _tensors(self) -> dict[str, Any]:
        """Return all tensors of a checkpoint. Loading writes into them."""
        return {
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "optimizer": optimizer_tensors(self.optimizer),
            "rng": {str(self.world.rank): rng_tensors(self.world.device)},
        }

    def _save(self) -> None:
        """Save a checkpoint of the current step.

        Only checkpoints that an uninterrupted run saves too get a score, so that the best one does not depend on interruptions.
        """
        state = self.state
        reached = None
        suspect = state.watch.suspect_steps
        regular = state.step == self.steps or state.step % self.run_settings.checkpoint_every == 0
        if regular and state.evaluated == state.step > 0 and not suspect:
            reached = score({name: state.val_losses[name] for name in self.recipe.passes}, self.recipe.best)
        if reached is not None and reached < state.best_loss:
            state.best_step, state.best_loss = state.step, reached
        self.saved = state.step
        self.checkpoints.save(
            state.step, self._tensors(), healthy_until=state.step - suspect, score=reached, state=state.model_dump(mode="json")
        )

    def _choose_weights(self) -> RunState:
        """Load the final weights into the model: the best checkpoint's, or the last ones. Returns the state at their step."""
        state = self.state
        if self.recipe.best.use == "last" or state.best_step in (0, state.step):
            return state
        found = self.checkpoints.best()
        if found is None or found.score is None:
            return state
        state.best_step, state.best_loss = found.step, found.score  # differs from before if the best was damaged
        if found.step == state.step:
            return state
        tensors = self._tensors()
        self.checkpoints.load(found.step, {name: tensors[name] for name in ("parameters", "buffers")})
        self.display.say(f"the model is from step {found.step}, which has the best score ({found.score:.4f})")
        return RunState.model_validate(found.state)

    def go_to(self, found: CheckpointManifest | None, state: RunState) -> None:
        """Continue from `state`, with the tensors of the checkpoint `found`, if any. Deletes later checkpoints and metrics rows."""
        self.state, self.clock, self.saved = state, Clock(), None
        self._distribute()
        if found is not None:
            tensors = self._tensors()
            self.checkpoints.load(found.step, tensors)
            set_rng(tensors["rng"][str(self.world.rank)], self.world.device)
        self.checkpoints.drop_after(state.step)
        state.best_step, state.best_loss = self.checkpoints.best_score()  # the best may just have been deleted
        if self.world.rank == 0:
            self.metrics.truncate(state.step)
        self.damage = damage_count(self.shards, self.recipe.data, "train", state.damaged)
        self._read_from(state.step)

    def _read_from(self, step: int) -> None:
        """Start to read batches at a step."""
        self.batches = train_steps(
            self.shards,
            self.recipe.data,
            self.run_settings.with_changes({"micro_batch": self.state.budget(self.recipe.run.micro_batch).model_dump()}),
            tokens_per_frame=self.recipe.model.tokens_per_frame,
            rank=self.world.rank,
            world_size=self.world.size,
            first_step=step,
            damage=self.damage,
        )

    def _roll_back(self, reason: str) -> None:
        """Roll back to the last good checkpoint and freeze the next part. Raises UserError if nothing is left to freeze."""
        at, frozen = self.state.step, self.state.frozen
        froze = next_freeze(self.model, frozen)
        if froze is None:
            raise UserError(
                f"training diverges at step {at}: {reason}{'; already frozen: ' + ', '.join(frozen) if frozen else ''}",
                where=str(self.recipe.output),
                fix="lower the learning rates or lengthen the warm-up (optimizer.lr_*, optimizer.warmup_steps)",
            )
        self._go_back(reason, froze=froze)
        self.display.say(f"diverged at step {at} ({reason}): back to step {self.state.step}, {froze} frozen")

    def _go_back(self, reason: str, *, froze: str) -> None:
        """Restore the last good checkpoint, or the start, and record the divergence."""
        at = self.state.step
        healthy_until = at - max(1, self.state.watch.suspect_steps)
        found = self.checkpoints.newest(up_to=healthy_until - MARGIN_STEPS)
        if found is None:
            prepare(self.recipe.run, self.world.rank, self.world.device)
            self.parallelism.load(initial_model(self.recipe, self.shards).state_dict())
            state = RunState()
        else:
            state = RunState.model_validate(found.state)
        state.resumed_from = self.state.resumed_from
        state.out_of_memory = self.state.out_of_memory
        state.divergences = [*self.state.divergences, Divergence(step=at, reason=reason, back_to=state.step, froze=froze)]
        self.go_to(found, state)

    def _distribute(self) -> None:
        """Build a new optimizer, freeze the parts given by the state, and distribute the model over the ranks."""
        self.optimizer = build_optimizer(self.model, self.recipe.optimizer, frozen=frozen_parameters(self.model, self.state.frozen))
        self.parallelism.begin()
