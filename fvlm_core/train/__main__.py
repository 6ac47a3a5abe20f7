"""`torchrun -m fvlm_core.train recipe.yaml`, or `python -m fvlm_core.train recipe.yaml` for one process.

Finished runs, and folders that another run is using, are detected before torch is imported. The exit status is 2 for bad input and 75 after
a SIGTERM (a checkpoint was saved; run the same command to resume). torchrun turns both into 1.
"""

import gc
import os
from contextlib import nullcontext

from fvlm_core.cli import run_job
from fvlm_core.config import Recipe
from fvlm_core.train.folder import check_folder, claim_folder, input_digests, whole_manifest
from fvlm_core.train.jobs import RunManifest
from fvlm_core.train.lock import SHARED_VARIABLE, RunLock, end_with_launcher


def train(recipe: Recipe) -> RunManifest:
    """Train the recipe, or return the manifest if the run is already finished. Raises UserError if another run uses the folder."""
    end_with_launcher(os.environ)
    inputs = input_digests(recipe)
    identity = recipe.identity(inputs)
    check_folder(recipe, identity)
    if os.environ.get("WORLD_SIZE", "1") == "1" and (done := whole_manifest(recipe.output, identity)):
        print(f"{recipe.name} is already trained: {recipe.output}")
        return done
    lock = RunLock(recipe.output, shared=bool(os.environ.get(SHARED_VARIABLE)))
    with lock.held() if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _train(recipe, identity, inputs, lock)


def _train(recipe: Recipe, identity: str, inputs: dict[str, str], lock: RunLock) -> RunManifest:
    """Train on this rank; rank 0 holds the folder's lock."""
    # Threads that spin while they wait slow down other processes; libgomp reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()  # collection takes a tenth of the import time; imports create hundreds of thousands of objects, none of them garbage
    from fvlm_core.train.distributed import World  # imports torch and transformers, which takes seconds
    from fvlm_core.train.loop import Trainer

    gc.enable()

    world = World.initialize(os.environ, recipe.run.device)
    done = world.broadcast(whole_manifest(recipe.output, identity) if world.rank == 0 else None)
    if done is None:
        if world.rank == 0:
            claim_folder(recipe, identity)
        trainer = Trainer(recipe, world, identity, inputs, has_wandb_key="WANDB_API_KEY" in os.environ)
        done = trainer.run(stopping=lock.ending if world.rank == 0 else None)
    world.destroy()
    return done


if __name__ == "__main__":
    run_job(Recipe, train)
