"""The training loop: from a recipe to a RunManifest, exactly resumable at every step.

The loss is the mean over all labelled tokens (or preference pairs) of the global batch. They are counted over all ranks and micro-batches
before the first forward pass, so the loss does not depend on the number of ranks or on gradient accumulation. See `fvlm_core.train.run` for
the parts of a run and for saving and restoring them.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType

import torch
from torch import Tensor

from fvlm_core.config import Recipe
from fvlm_core.data.batch import PackedBatch
from fvlm_core.exit_status import STOPPED
from fvlm_core.progress import Progress
from fvlm_core.train.distributed import World
from fvlm_core.train.jobs import OutOfMemory, RunManifest
from fvlm_core.train.metrics import metrics_row
from fvlm_core.train.optimizer import clip_gradients, gradient_norms, set_learning_rates
from fvlm_core.train.profiling import Profiler
from fvlm_core.train.result import write_result
from fvlm_core.train.run import Run
from fvlm_core.train.schedules import learning_rates
from fvlm_core.train.state import Clock, RunState, StepResult, Window, halved
from fvlm_core.train.validation import validation_losses

_NOTHING = (0.0,) * 6
"""`Trainer._sizes` of an empty batch."""


class Trainer(Run):
    """Trains a run."""

    def __init__(self, recipe: Recipe, world: World, identity: str, inputs: dict[str, str], *, has_wandb_key: bool) -> None:
        """See `Run`."""
        super().__init__(recipe, world, identity, inputs, has_wandb_key=has_wandb_key)
        self.stop_requested = False
        self.may_shrink = world.size == 1
        """Whether to shrink micro-batches when out of memory. Not with several ranks, which would wait for this one in a collective."""

    def run(self, *, stopping: Callable[[], None] | None = None) -> RunManifest:
        """Train to the end, from the last checkpoint if there is one, and write the manifest. Exits with status STOPPED after SIGTERM.

        `stopping` is called in the signal handler.
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
            self.checkpoints.wait_on_this_rank()  # nothing may write into the folder after its lock is released
        if self.profiler.missing:
            self.display.say(self.profiler.missing)
        manifest = None
        of_model = self._choose_weights()
        weights = self.parallelism.weights()
        if self.world.rank == 0:
            manifest = write_result(self.recipe, self.model, weights, self.state, of_model, self.checkpoints, self.identity, self.inputs)
            self.tracker.finish()
        self.parallelism.end()
        return self.world.broadcast(manifest)

    def _train(self) -> None:
        """Run all remaining steps, with evaluations, checkpoints and rollbacks."""
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
        """Run one optimizer step. Return its loss, and the reason if training has diverged."""
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # a new DataLoader draws a seed, which must not change a resumed run
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
        # a single device-to-host transfer for all values to log or check
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
        """`_accumulate`. When out of memory, retry with smaller micro-batches of the same samples, and use these from now on."""
        while True:
            try:
                with self.parallelism.step():
                    return self._accumulate(micro_batches, units)
            except torch.OutOfMemoryError:
                if not self.may_shrink:
                    raise
                smaller = halved(self.state.budget(self.recipe.run.micro_batch))
                if smaller is None:
                    raise
            # outside of the except block: inside it, the traceback keeps the tensors of the forward pass alive
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
        """Run forward and backward on this rank's micro-batches. `units`: labelled tokens or pairs of the global batch.

        Returns this rank's sums, float64 [2 + names]: objective, the values that the objective names, attention entropy over shown frames.
        """
        sums = torch.zeros(2 + len(self.objective.names), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(micro_batches):
            with self.parallelism.accumulating(number < len(micro_batches) - 1):
                with self._autocast():
                    part = self.objective(self.parallelism, batch, self.world.device)
                # gradients are averaged over ranks, so multiply by their number to get the global mean
                (part.objective * (self.world.size / max(1, units))).backward()
            named = [part.parts[name] for name in self.objective.names]
            sums += torch.stack([value.double() for value in (part.objective.detach(), *named, part.entropy * len(batch.shown_frames))])
        return sums

    def _sizes(self, batch: PackedBatch) -> tuple[float, ...]:
        """Count units of the objective, labels, samples, shown frames, tokens and training FLOPs."""
        held = batch.n_labels, batch.n_samples, len(batch.shown_frames), len(batch.input_ids)
        return self.objective.units(batch), *held, self.cost.batch(batch)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.run.precision == "bf16")

    # evaluation and end

    def _evaluate(self) -> str | None:
        """Compute the validation losses and write a row of `metrics.csv`. Return the reason if training has diverged."""
        self._validate()
        final = self.state.val_losses[self.recipe.passes[-1]]
        if not math.isfinite(final):
            return f"validation loss {final}"
        self.state.evaluated = self.state.step
        row = metrics_row(self.state, self.clock, self.optimizer, self.recipe.optimizer, steps=self.steps, val_loss=final, world=self.world)
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

    def _validate(self) -> None:
        """Compute the validation losses of the current step and store them in the state."""
        started = time.perf_counter()
        with self._autocast(), self.parallelism.evaluation():
            self.state.val_losses = validation_losses(self.model, self.shards, self.recipe, self.objective, self.world)
        self.state.validation_s += time.perf_counter() - started

    def _end_diverged(self, reason: str) -> None:
        """Roll back to the last good checkpoint and end the run with it as the result."""
        self._go_back(reason, froze="")
        if self.state.evaluated != self.state.step or not self.state.val_losses:
            self._validate()
            self.state.evaluated = self.state.step
        self.display.say(f"ends at step {self.state.step}, because it diverged ({reason})")

    def _stop(self) -> None:
        """Save a checkpoint and exit, after a SIGTERM."""
        if self.saved != self.state.step:  # saving it again would first delete it
            self._save()
        self.checkpoints.wait()
        self.display.say(f"stopped by SIGTERM at step {self.state.step}; start it again to go on")
        self.tracker.finish()
        self.parallelism.end()
        self.world.destroy()
        sys.exit(STOPPED)
