"""Write the result of a run: the model folder and the manifest."""

from torch import Tensor

from fvlm_core.config import Recipe
from fvlm_core.data.frame_sampling import FRAME_SAMPLING_FILE, FrameSampling
from fvlm_core.data.jobs import TOKENIZER_FOLDER, ShardManifest
from fvlm_core.manifest import file_entries
from fvlm_core.model.build import save_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.train.checkpoint import Checkpoints
from fvlm_core.train.jobs import CHECKPOINTS_FOLDER, IDENTITY_FILE, METRICS_FILE, MODEL_FOLDER, RECIPE_FILE, REFERENCE_FOLDER, RunManifest
from fvlm_core.train.state import RunState


def write_result(
    recipe: Recipe,
    model: FoveatedVLM,
    weights: dict[str, Tensor],
    state: RunState,
    of_model: RunState,
    checkpoints: Checkpoints,
    identity: str,
    inputs: dict[str, str],
) -> RunManifest:
    """Write `model/` (weights, settings, tokenizer, how frames were shown in training) and, last, the manifest. Call on rank 0 only.

    `weights`: complete weights of the model to save. `of_model`: the run's state at their step. `state`: the run's final state.
    """
    shown = FrameSampling.of_training(ShardManifest.read(recipe.shards), recipe.data.image_repeats)
    save_model(model, recipe.output / MODEL_FOLDER, tokenizer=recipe.shards / TOKENIZER_FOLDER, weights=weights)
    shown.to_yaml(recipe.output / MODEL_FOLDER / FRAME_SAMPLING_FILE)
    files = file_entries(recipe.output, [f"{MODEL_FOLDER}/*"])
    # not part of the identity: rates, paths and storage layout may differ between runs with equal results
    files += file_entries(recipe.output, [METRICS_FILE, RECIPE_FILE, IDENTITY_FILE], identity=False)
    files += file_entries(recipe.output, [f"{REFERENCE_FOLDER}/*"], identity=False)
    files += checkpoints.files(CHECKPOINTS_FOLDER)
    counts = {
        "steps": state.step,
        "samples": state.samples,
        "frames": state.frames,
        "label_tokens": state.label_tokens,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }
    return RunManifest(
        name=f"train-{recipe.name}",
        settings_hash=identity,
        inputs=inputs,
        counts=counts,
        files=files,
        seconds=state.seconds,
        validation_share=state.validation_share,
        steps=state.step,
        model_step=of_model.step,
        final_loss=of_model.val_losses[recipe.passes[-1]],
        losses={name: of_model.val_losses[name] for name in recipe.passes},
        best_step=state.best_step,
        best_loss=state.best_loss if state.best_step else None,
        samples_seen=state.samples,
        frames_seen=state.frames,
        label_tokens_seen=state.label_tokens,
        flops=state.flops,
        params=counts["params"],
        resumed_from=state.resumed_from,
        skipped_steps=state.skipped_steps,
        divergences=state.divergences,
        out_of_memory=state.out_of_memory,
    ).write(recipe.output)
