"""Run benchmarks on any model: `python -m fvlm_core.serve.evaluate job.yaml`, also under torchrun; `fvlm eval` does the same.

Like the pipeline's evaluation, it writes `results.json`, `tables.md` and a record of each item, and resumes after an interruption. Further
benchmarks of the same checkpoint, with the same settings, are added to the results in the folder.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from fvlm_core.cli import run_job
from fvlm_core.devices import device_of
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.external_files import digest
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.eval.part import NotMeasuredError, PartResult
from fvlm_core.eval.parts.benchmarks import VALIDATION, BenchmarksResult, add_up
from fvlm_core.eval.published import comparison
from fvlm_core.eval.ranks import ALONE, Ranks
from fvlm_core.eval.results import TABLES_FILE, Results, measuring_code
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.summary import summary
from fvlm_core.manifest import FILE_NAME as MANIFEST_FILE
from fvlm_core.manifest import AnyManifest, write_atomically
from fvlm_core.model.names import MODES
from fvlm_core.provenance import versions
from fvlm_core.serve.eval_folder import benchmarks_of, claim
from fvlm_core.serve.load import open_model
from fvlm_core.settings import read_yaml
from fvlm_core.train.jobs import MODEL_FOLDER, RECIPE_FILE


def evaluate_checkpoint(
    job: CheckpointJob,
    ranks: Ranks = ALONE,
    *,
    start: Callable[[int], None] = lambda items: None,
    done: Callable[[int], None] = lambda items: None,
    note: Callable[[str], None] = lambda text: None,
) -> Results | None:
    """Run a job. Ranks other than 0 only ask items, and return None.

    `start` is called with the number of items, `done` with the number just asked, `note` with the name of a step that follows them.

    Raises UserError for an unsuitable checkpoint or data, or an output folder with another evaluation, before any item is asked.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    shards = run_shards(job.checkpoint) if VALIDATION in job.benchmarks.run and VALIDATION not in job.benchmarks.data else None
    loaded = job.benchmarks.load(shards)
    device = device_of(job.device, local=ranks.local)
    answerer = open_model(job.checkpoint, device, original=job.original, batch_samples=job.batch_samples, seed=job.seed)
    earlier = claim(job, answerer)
    start(sum(len(one.items) for one in loaded.values()))
    job.benchmarks.ask_items(loaded, answerer, job.output, ranks, done=done)
    if ranks.rank:
        return None
    found = benchmarks_of(earlier) | add_up(job.benchmarks, loaded, answerer, job.output, Bootstrap(job.resamples, job.seed))
    parts: dict[str, PartResult] = {"benchmarks": BenchmarksResult(benchmarks=found, comparison=comparison(found, answerer, job.output))}
    absent = {}
    try:
        note("timing")
        parts["latency"] = job.latency.of_items(answerer, job.benchmarks.ask.modes, loaded.values())
    except NotMeasuredError as reason:
        if earlier is not None and "latency" in earlier.parts and set(found) != set(job.benchmarks.run):
            parts["latency"] = earlier.parts["latency"]  # of the benchmarks that are kept
        else:
            absent["latency"] = str(reason)
    results = Results(
        run=answerer.name,
        checkpoint=answerer.checkpoint,
        shards=AnyManifest.read(shards).digest if shards else earlier.shards if earlier else "",
        code=measuring_code(),
        versions=versions(),
        outside=(earlier.outside if earlier else {})
        | {f"benchmarks.{setting}": digest(path) for setting, path in job.benchmarks.outside().items()},
        seed=job.seed,
        resamples=job.resamples,
        frame_px=answerer.rule.frame_px,
        tokens_per_frame=answerer.tokens_per_frame,
        looks=isinstance(answerer, FoveatedAnswerer) and answerer.subject.gazes,
        modes=[mode for mode in MODES if any(one.mode == mode for result in found.values() for one in result.conditions.values())],
        parts=parts,
        absent=absent,
    )
    results.write(job.output)
    write_atomically(job.output / TABLES_FILE, summary(results).encode())
    return results


def run_shards(checkpoint: Path) -> Path:
    """The shards of a run, which its recipe names. Raises UserError if the checkpoint is no run, or its shards are gone."""
    run = checkpoint.parent if checkpoint.name == MODEL_FOLDER else checkpoint
    fix = "give the folder of shards: link it as DIR/validation for --data DIR (data: {validation: FOLDER} in a job)"
    if not (run / RECIPE_FILE).is_file():
        raise UserError("validation: only a run's folder says which shards it was trained on", where=str(checkpoint), fix=fix)
    recipe = read_yaml(run / RECIPE_FILE)
    shards = Path(str(recipe.get("shards", "")))
    if not (shards / MANIFEST_FILE).is_file():
        raise UserError(f"validation: the run's shards are not found: {shards}", where=str(run / RECIPE_FILE), fix=fix)
    return shards


if __name__ == "__main__":
    run_job(CheckpointJob, lambda job: evaluate_checkpoint(job, Ranks.of(os.environ)))
