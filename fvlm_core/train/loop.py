"""The training loop: from a recipe to a RunManifest, exactly resumable at every step.

The loss is the mean over all labelled tokens (or preference pairs) of the global batch: they are counted over all ranks and
micro-batches before the first forward, so neither the number of ranks nor accumulation changes it. Everything a step depends on is in the
checkpoint (weights, optimizer, generators) or a pure function of the step (learning rates, data), so a run that was killed
and started again goes through the same numbers as one that was not: bit for bit on a CPU, and to rounding on a GPU, where flash
attention's backward adds up in no fixed order.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fvlm_core.config import Recipe
from fvlm_core.data.batch import PackedBatch
from fvlm_core.data.loader import damage_count, train_steps
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.exit_status import STOPPED
from fvlm_core.progress import Progress
from fvlm_core.train.checkpoint import CheckpointManifest, Checkpoints, rng_tensors, set_rng
from fvlm_core.train.cost import Cost
from fvlm_core.train.display import Display
from fvlm_core.train.distributed import World
from fvlm_core.train.divergence import MARGIN_STEPS, frozen_parameters, next_freeze
from fvlm_core.train.jobs import CHECKPOINTS_FOLDER, METRICS_FILE, Divergence, OutOfMemory, RunManifest
from fvlm_core.train.metrics import MetricsFile, Tracker, columns, peak_flops, peak_memory_gb
from fvlm_core.train.objective import Objective, PreferenceLoss, TokenLoss
from fvlm_core.train.optimizer import build_optimizer, clip_gradients, gradient_norms, optimizer_tensors, set_learning_rates
from fvlm_core.train.profiling import Profiler
from fvlm_core.train.reference import make_reference
from fvlm_core.train.result import write_result
from fvlm_core.train.schedules import learning_rates
from fvlm_core.train.spread import spread
from fvlm_core.train.start import compile_parts, initial_model, prepare
from fvlm_core.train.state import Clock, RunState, StepResult, Window, halved
from fvlm_core.train.validation import score, validation_losses

_NOTHING = (0.0,) * 6
"""`Trainer._sizes` of no batch."""


class Trainer:
    """One run on this rank."""

    def __init__(self, recipe: Recipe, world: World, identity: str, inputs: dict[str, str], *, has_wandb_key: bool) -> None:
        self.recipe, self.world, self.identity, self.inputs = recipe, world, identity, inputs
        self.shards = ShardSet(recipe.shards)
        prepare(recipe.run, world.rank, world.device)
        self.model = initial_model(recipe, self.shards).to(world.device)
        if recipe.run.gradient_checkpointing:
            self.model.set_gradient_checkpointing(True)
        compile_parts(self.model, recipe.run.compiled_parts)
        self.cost = Cost(self.model, recipe.loss, pairs=recipe.dpo is not None)
        self.steps = self.cost.steps_for(self.shards, recipe.data, recipe.run)
        self.run_settings = recipe.run.with_changes({"steps": self.steps, "budget_flops": None})
        self.objective = self._objective()
        self.spread = spread(self.model, world, recipe.run)
        self.checkpoints = Checkpoints(recipe.output / CHECKPOINTS_FOLDER, world, identity)
        self.metrics = MetricsFile(recipe.output / METRICS_FILE, columns(self.objective.names))
        self.tracker = Tracker(recipe, identity, has_key=has_wandb_key)
        self.display = Display(recipe.name, self.steps, speaks=world.rank == 0, live=world.size == 1)
        self.state, self.clock = RunState(), Clock()
        self.stop_requested = False
        self.may_shrink = world.size == 1
        """Whether a micro-batch that does not fit into memory is cut; not with several ranks, where the others would wait for this one."""
        self.batches: Iterator[list[PackedBatch]] = iter(())

    def _objective(self) -> Objective:
        """What the recipe trains on; for preferences, with the reference that the model as it is now makes."""
        recipe = self.recipe
        if recipe.dpo is None:
            return TokenLoss(recipe.loss, recipe.passes)
        reference = make_reference(self.model, self.shards, recipe, self.run_settings, self.world, self.identity)
        return PreferenceLoss(recipe.loss, recipe.passes, recipe.dpo.beta, reference)

    def run(self, *, stopping: Callable[[], None] | None = None) -> RunManifest:
        """Train to the end (from the last checkpoint where there is one) and write the manifest. Exits with STOPPED on SIGTERM.

        `stopping` is called in the signal's handler.
        """

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.stop_requested = True
            if stopping is not None:
                stopping()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            with self.display, Profiler(self.recipe.run.profile, self.recipe.output, self.world.device) as self.profiler:
                self._train()
        finally:
            signal.signal(signal.SIGTERM, before)
            self.checkpoints.settle()  # nothing writes into the folder any more when its lock is given back
        manifest = None
        of_model = self._choose_weights()
        weights = self.spread.weights()
        if self.world.rank == 0:
            manifest = write_result(self.recipe, self.model, weights, self.state, of_model, self.checkpoints, self.identity, self.inputs)
            self.tracker.finish()
        self.spread.end()
        return self.world.share(manifest)

    def _train(self) -> None:
        """Every step that is left, with its evaluation, checkpoint or way back."""
        self.checkpoints.clean()
        found = self.checkpoints.newest()
        self.go_to(found, RunState() if found is None else RunState.model_validate(found.state))
        if found is not None:
            self.state.resumed_from.append(found.step)
            self.display.say(f"resumed from step {found.step}")
        elif self.recipe.init_from is not None:
            earlier = RunManifest.read(self.recipe.init_from)
            self.display.say(f"starts from step {earlier.model_step} of {earlier.name} ({self.recipe.init_from})")
        progress = Progress(self.recipe.output, self.steps, first_step=self.state.step)
        while self.state.step < self.steps:
            loss, trouble = self.step()
            self.profiler.step()
            step, last = self.state.step, self.state.step == self.steps
            if trouble is None and (last or step % self.run_settings.eval_every == 0):
                trouble = self._evaluate()
            if trouble is not None and self.run_settings.on_divergence == "end":
                self._end_diverged(trouble)
                break
            if trouble is not None:
                self._roll_back(trouble)
            elif last or (step % self.run_settings.checkpoint_every == 0 and not self.state.watch.alarmed):
                self._save()
            if self.world.rank == 0:
                progress.update(self.state.step, loss=loss if math.isfinite(loss) else None)
                self.display.update(self.state.step, loss=loss, lr=max(group["lr"] for group in self.optimizer.param_groups))
        self.checkpoints.wait()

    # a step

    def step(self) -> tuple[float, str | None]:
        """One optimizer step: the loss, and why training has diverged, if it has."""
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed when it starts; a resumed run must not differ by that
            micro_batches = next(self.batches)
        waited = time.perf_counter() - started
        own = [sum(sizes) for sizes in zip(_NOTHING, *(self._sizes(batch) for batch in micro_batches), strict=True)]
        *sizes, flops, damaged, stops, failed = self.world.sum([*own, len(self.damage.new), self.stop_requested, self.checkpoints.failed])
        if failed:
            self.checkpoints.wait()
        if stops:
            self._stop()
        if damaged:
            self.damage.merge(self.world.union(self.damage.new))
            self.damage.check()
            self.state.damaged = sorted(self.damage.samples)
        units, labels, samples, frames, tokens = (int(size) for size in sizes)
        sums = self._gradients(micro_batches, units)
        norms = gradient_norms(self.optimizer)
        norm = torch.stack(list(norms.values())).norm()
        # one transfer from the device for everything that is logged or decided on
        values = torch.cat([sums, torch.stack([*norms.values(), norm]).double()]).tolist()
        objective, *losses, entropy = self.world.sum(values[: len(sums)])
        result = StepResult(
            units=units,
            labels=labels,
            samples=samples,
            frames=frames,
            tokens=tokens,
            flops=flops,
            objective=objective,
            losses=dict(zip(self.objective.names, losses, strict=True)),
            norms=dict(zip(norms, values[len(sums) : -1], strict=True)),
            norm=values[-1],
            entropy=entropy,
        )
        if result.finite:
            clip_gradients(self.optimizer, self.recipe.optimizer.clip_norm, norm)
            set_learning_rates(self.optimizer, learning_rates(self.recipe.optimizer, self.state.step, self.steps))
            self.optimizer.step()
        else:
            self.display.say(f"step {self.state.step + 1}: loss {result.loss}, gradient norm {result.norm}: no update")
        self.optimizer.zero_grad(set_to_none=True)
        trouble = result.count(self.state)
        seconds = time.perf_counter() - started
        self.state.seconds += seconds
        self.clock.add(result, seconds=seconds, waited=waited)
        return result.loss, trouble

    def _gradients(self, micro_batches: list[PackedBatch], units: int) -> Tensor:
        """`_accumulate`; where a micro-batch does not fit into memory, of smaller ones with the same samples, from now on."""
        while True:
            try:
                with self.spread.step():
                    return self._accumulate(micro_batches, units)
            except torch.OutOfMemoryError:
                if not self.may_shrink:
                    raise
                smaller = halved(self.state.budget(self.recipe.run.micro_batch))
                if smaller is None:
                    raise
            # outside of the handler: until it is left, the traceback keeps the forward's tensors
            self.optimizer.zero_grad(set_to_none=True)
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            self.state.out_of_memory.append(OutOfMemory(step=self.state.step, micro_batch=smaller))
            self._read_from(self.state.step)
            self.display.say(
                f"step {self.state.step + 1}: out of memory; micro-batches of {smaller.frames} frames and {smaller.tokens} tokens"
            )
            with torch.random.fork_rng(devices=[]):
                micro_batches = next(self.batches)

    def _accumulate(self, micro_batches: list[PackedBatch], units: int) -> Tensor:
        """Forward and backward of this rank's micro-batches; `units`: labelled tokens or pairs of the global batch.

        Returns this rank's sums, float64: objective, what the objective names, attention entropy over the shown frames.
        """
        sums = torch.zeros(2 + len(self.objective.names), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(micro_batches):
            with self.spread.accumulating(number < len(micro_batches) - 1):
                with self._autocast():
                    part = self.objective(self.spread, batch, self.world.device)
                # the ranks' gradients are averaged, so each rank's share of the global mean is scaled up
                (part.objective * (self.world.size / max(1, units))).backward()
            named = [part.parts[name] for name in self.objective.names]
            sums += torch.stack([value.double() for value in (part.objective.detach(), *named, part.entropy * len(batch.shown_frames))])
        return sums

    def _sizes(self, batch: PackedBatch) -> tuple[float, ...]:
        """Units of the objective, labels, samples, shown frames, tokens, training FLOPs."""
        held = batch.n_labels, batch.n_samples, len(batch.shown_frames), len(batch.input_ids)
        return self.objective.units(batch), *held, self.cost.batch(batch)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.run.precision == "bf16")

    def _spread(self) -> None:
        """A new optimizer and the model on all ranks, with what the state says is frozen."""
        self.optimizer = build_optimizer(self.model, self.recipe.optimizer, frozen=frozen_parameters(self.model, self.state.frozen))
        self.spread.begin()

    # evaluation points

    def _evaluate(self) -> str | None:
        """Validation losses and a row of `metrics.csv`. Returns why training has diverged, if it has."""
        started = time.perf_counter()
        with self._autocast(), self.spread.evaluation():
            self.state.val_losses = validation_losses(self.model, self.shards, self.recipe, self.objective, self.world)
        self.state.validation_s += time.perf_counter() - started
        final = self.state.val_losses[self.recipe.passes[-1]]
        if not math.isfinite(final):
            return f"validation loss {final}"
        self.state.evaluated = self.state.step
        row = self._row(final)
        if self.world.rank == 0:
            self.metrics.append(row)
            self.tracker.log(row)
        rate, train_loss = row["samples_per_s"], row["train_loss"]
        self.display.say(
            f"step {self.state.step}/{self.steps}  train {train_loss:.4f}  val {final:.4f}  {rate:.1f} samples/s  "
            f"validation {self.state.validation_share:.1%} of the time"
        )
        self.state.window, self.clock = Window(), Clock()
        return None

    def _row(self, val_loss: float) -> dict[str, Any]:
        state, window = self.state, self.state.window
        rates = learning_rates(self.recipe.optimizer, state.step - 1, self.steps)
        units = max(1, window.units) if window.steps else math.nan  # nothing is known where every step was skipped
        trained = {group["role"] for group in self.optimizer.param_groups}
        peak = peak_flops(self.world.device)
        return {
            "step": state.step,
            "samples": state.samples,
            "frames": state.frames,
            "label_tokens": state.label_tokens,
            "flops": state.flops,
            "val_loss": val_loss,
            **{f"val_{name}": value for name, value in state.val_losses.items()},
            "train_loss": window.objective / units,
            **{f"train_{name}": value / units for name, value in window.losses.items()},
            **{f"grad_norm_{role}": value / window.steps for role, value in window.norms.items()},
            **{f"lr_{role}": rate if role in trained else 0.0 for role, rate in rates.items()},
            "entropy": window.entropy / window.frames if window.frames else None,
            "skipped_steps": state.skipped_steps,
            **self.clock.rates(peak * self.world.size if peak else None),
            "peak_memory_gb": peak_memory_gb(self.world.device),
        }

    # checkpoints

    def _tensors(self) -> dict[str, Any]:
        """Everything a checkpoint keeps in tensors; loading writes into them."""
        return {
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "optimizer": optimizer_tensors(self.optimizer),
            "rng": {str(self.world.rank): rng_tensors(self.world.device)},
        }

    def _save(self) -> None:
        """A checkpoint of the present step.

        Only one that an undisturbed run makes too has a score: which is the best must not depend on where a run was stopped.
        """
        state = self.state
        reached = None
        suspect = state.watch.suspect_steps
        regular = state.step == self.steps or state.step % self.run_settings.checkpoint_every == 0
        if regular and state.evaluated == state.step > 0 and not suspect:
            reached = score({name: state.val_losses[name] for name in self.recipe.passes}, self.recipe.best)
        if reached is not None and reached < state.best_loss:
            state.best_step, state.best_loss = state.step, reached
        self.checkpoints.save(
            state.step, self._tensors(), healthy_until=state.step - suspect, score=reached, state=state.model_dump(mode="json")
        )

    def _choose_weights(self) -> RunState:
        """Put the weights that the run ends with into the model: the best checkpoint's, or the last. Returns the state at their step."""
        state = self.state
        if self.recipe.best.use == "last" or state.best_step in (0, state.step):
            return state
        found = self.checkpoints.best()
        if found is None or found.score is None or found.step == state.step:
            return state
        state.best_step, state.best_loss = found.step, found.score  # another one than before where that was damaged
        tensors = self._tensors()
        self.checkpoints.load(found.step, {name: tensors[name] for name in ("parameters", "buffers")})
        self.display.say(f"the model is of step {found.step}, the best by the recipe's measure ({found.score:.4f})")
        return RunState.model_validate(found.state)

    def go_to(self, found: CheckpointManifest | None, state: RunState) -> None:
        """Go on from `state`, with the tensors of a checkpoint where one was found; later checkpoints and rows are dropped."""
        self.state, self.clock = state, Clock()
        self._spread()
        if found is not None:
            tensors = self._tensors()
            self.checkpoints.load(found.step, tensors)
            set_rng(tensors["rng"][str(self.world.rank)], self.world.device)
        self.checkpoints.drop_after(state.step)
        state.best_step, state.best_loss = self.checkpoints.best_score()  # the best may have been among those
        if self.world.rank == 0:
            self.metrics.truncate(state.step)
        self.damage = damage_count(self.shards, self.recipe.data, "train", state.damaged)
        self._read_from(state.step)

    def _read_from(self, step: int) -> None:
        """Read the batches from a step on."""
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

    def _end_diverged(self, reason: str) -> None:
        """Go back to the last good checkpoint, and let that be what the run made: that it diverged is its result."""
        self._go_back(reason, froze="")
        if self.state.evaluated != self.state.step or not self.state.val_losses:
            losses = validation_losses(self.model, self.shards, self.recipe, self.objective, self.world)
            self.state.val_losses, self.state.evaluated = losses, self.state.step
        self.display.say(f"ends at step {self.state.step}, because it diverged ({reason})")

    def _roll_back(self, reason: str) -> None:
        """Go back to the last good checkpoint and freeze the next part. Raises UserError when there is nothing left to freeze."""
        at, frozen = self.state.step, self.state.frozen
        froze = next_freeze(self.model, frozen)
        if froze is None:
            raise UserError(
                f"training diverges at step {at}: {reason}{'; frozen by then: ' + ', '.join(frozen) if frozen else ''}",
                where=str(self.recipe.output),
                fix="lower the learning rates or lengthen the warm-up (optimizer.lr_*, optimizer.warmup_steps)",
            )
        self._go_back(reason, froze=froze)
        self.display.say(f"diverged at step {at} ({reason}): back to step {self.state.step}, {froze} frozen")

    def _go_back(self, reason: str, *, froze: str) -> None:
        """The last good checkpoint's weights and state, with the divergence noted."""
        at = self.state.step
        healthy_until = at - max(1, self.state.watch.suspect_steps)
        found = self.checkpoints.newest(up_to=healthy_until - MARGIN_STEPS)
        if found is None:
            prepare(self.recipe.run, self.world.rank, self.world.device)
            self.spread.load(initial_model(self.recipe, self.shards).state_dict())
            state = RunState()
        else:
            state = RunState.model_validate(found.state)
        state.resumed_from = self.state.resumed_from
        state.out_of_memory = self.state.out_of_memory
        state.divergences = [*self.state.divergences, Divergence(step=at, reason=reason, back_to=state.step, froze=froze)]
        self.go_to(found, state)

    def _stop(self) -> None:
        """Save and leave, because of a SIGTERM."""
        self._save()
        self.checkpoints.wait()
        self.display.say(f"stopped by SIGTERM at step {self.state.step}; start it again to go on")
        self.tracker.finish()
        self.spread.end()
        self.world.leave()
        sys.exit(STOPPED)
