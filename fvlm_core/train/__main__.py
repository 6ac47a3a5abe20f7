"""`torchrun -m fvlm_core.train recipe.yaml`, or `python -m fvlm_core.train recipe.yaml` for one process.

A finished run is recognised before torch is imported. Ends with status 2 for bad input and 75 after a SIGTERM (a checkpoint was
made; start it again to go on).
"""

import os

from fvlm_core.cli import run_job
from fvlm_core.config import Recipe
from fvlm_core.train.folder import check_folder, claim_folder, input_digests, whole_manifest
from fvlm_core.train.jobs import RunManifest


def train(recipe: Recipe) -> RunManifest:
    """Train the recipe, or return the manifest of the run that is already there."""
    inputs = input_digests(recipe)
    identity = recipe.identity(inputs)
    check_folder(recipe, identity)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and (done := whole_manifest(recipe.output, identity)):
        print(f"{recipe.name} is already trained: {recipe.output}")
        return done
    # Threads that wait by spinning slow down whatever shares the machine; libgomp reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from fvlm_core.train.distributed import World  # imports torch and transformers: seconds
    from fvlm_core.train.loop import Trainer

    world = World.join(os.environ, recipe.run.device)
    done = world.share(whole_manifest(recipe.output, identity) if world.rank == 0 and not alone else None)
    if done is None:
        if world.rank == 0:
            claim_folder(recipe, identity)
        done = Trainer(recipe, world, identity, inputs, has_wandb_key="WANDB_API_KEY" in os.environ).run()
    world.leave()
    return done


if __name__ == "__main__":
    run_job(Recipe, train)
