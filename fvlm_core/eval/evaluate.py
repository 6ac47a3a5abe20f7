"""Evaluate one training run: measure all parts of the registry, then write `results.json`, the tables, and finally the manifest."""

import time

import torch

from fvlm_core.config import Recipe
from fvlm_core.data.frame_sampling import FrameSampling
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.devices import device_of
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.external_files import check_external_files, digest
from fvlm_core.eval.jobs import EvalJob
from fvlm_core.eval.part import Context, NotMeasuredError, Part, PartResult
from fvlm_core.eval.ranks import ALONE, Ranks
from fvlm_core.eval.results import FILE_NAME, TABLES_FILE, EvalReport, Results, measuring_code
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.subject import Subject
from fvlm_core.eval.summary import summary, verdict
from fvlm_core.eval.tables import headline_table
from fvlm_core.eval.validation import ValidationSplit
from fvlm_core.manifest import AnyManifest, file_entries, sha256_file, write_atomically
from fvlm_core.model.build import WEIGHTS_FILE, load_model
from fvlm_core.model.names import MODES
from fvlm_core.progress import Progress
from fvlm_core.provenance import versions
from fvlm_core.train.jobs import MODEL_FOLDER, RECIPE_FILE, RunManifest


def evaluate(job: EvalJob, ranks: Ranks = ALONE) -> EvalReport | None:
    """Run an evaluation job. Ranks other than 0 only ask benchmark items, and return None.

    Raises UserError if the run, the shards, the modes or the external files are missing or do not match.
    """
    started = time.monotonic()
    run = RunManifest.read(job.run)
    inputs = {"run": run.digest, "shards": AnyManifest.read(job.shards).digest}
    check_external_files(job)
    recipe = Recipe.from_yaml(job.run / RECIPE_FILE)
    subject = load_subject(job, ranks)
    shards = ShardSet(job.shards)
    shown = FrameSampling.of_model(job.run / MODEL_FOLDER, subject.model.settings.vision.frame_px)
    answerer = FoveatedAnswerer(
        subject,
        name=recipe.name,
        checkpoint=sha256_file(job.run / MODEL_FOLDER / WEIGHTS_FILE),
        rule=shown.rule,
        image_repeats=shown.image_repeats,
        seed=job.seed,
    )
    wanted = job.parts() | {"benchmarks": (benchmarks := job.benchmarks.in_modes(job.modes))}
    if ranks.rank:
        benchmarks.ask_items(benchmarks.load(job.shards), answerer, job.output, ranks)
        return None
    outside = {f"{part}.{setting}": digest(path) for (part, setting), path in job.outside().items()}
    progress = Progress(job.output, len(wanted))
    context = Context(
        subject=subject,
        answerer=answerer,
        split=ValidationSplit(shards, image_repeats=recipe.data.image_repeats, seed=job.seed, workers=recipe.data.workers),
        modes=[mode for mode in MODES if mode in (job.modes or subject.model.modes)],
        bootstrap=Bootstrap(job.resamples, job.seed),
        output=job.output,
        ranks=ranks,
        note=progress.say,
    )
    parts, absent = measure(wanted, context, progress)
    results = Results(
        run=recipe.name,
        checkpoint=answerer.checkpoint,
        shards=inputs["shards"],
        code=measuring_code(),
        versions=versions(),
        outside=outside,
        seed=job.seed,
        resamples=job.resamples,
        frame_px=subject.model.settings.vision.frame_px,
        tokens_per_frame=subject.model.settings.tokens_per_frame,
        looks=subject.gazes,
        modes=context.modes,
        parts=parts,
        absent=absent,
    )
    timings = results.write(job.output)
    write_atomically(job.output / TABLES_FILE, summary(results).encode())
    report = EvalReport(
        name="evaluate",
        settings_hash=job.hash(exclude={"output", "run", "shards"}),
        inputs=inputs | outside,
        counts={"modes": len(results.modes)} | {name: part.count() for name, part in parts.items()},
        files=[
            *file_entries(job.output, [FILE_NAME, *(figure.file for figure in results.figures())]),
            *file_entries(job.output, [*timings, TABLES_FILE], identity=False),
        ],
        seconds=time.monotonic() - started,
        model_step=run.model_step,
        verdict=verdict(results).line,
        headline=headline_table(results.headline()),
    ).write(job.output)
    progress.update(len(wanted), note="done")
    return report


def measure(parts: dict[str, Part], context: Context, progress: Progress) -> tuple[dict[str, PartResult], dict[str, str]]:
    """Measure the parts; return the results by name, and the reasons why the other parts have none."""
    results: dict[str, PartResult] = {}
    absent: dict[str, str] = {}
    for number, (name, part) in enumerate(parts.items()):
        progress.update(number, note=name.replace("_", " "))
        try:
            if part.needs_queries and not context.subject.gazes:
                raise NotMeasuredError("the model pools its patches and looks nowhere")
            results[name] = part.measure(context)
        except NotMeasuredError as reason:
            absent[name] = str(reason)
    return results, absent


def load_subject(job: EvalJob, ranks: Ranks = ALONE) -> Subject:
    """Load the run's model, with the tokenizer of the shards. Raises UserError if model, modes and shards do not match."""
    if job.threads:
        torch.set_num_threads(job.threads)
    shards = ShardSet(job.shards)
    model = load_model(job.run / MODEL_FOLDER).eval().requires_grad_(False)
    if unknown := [mode for mode in job.modes or [] if mode not in model.modes]:
        raise UserError(
            f"the model (query {model.settings.query!r}) has no mode {', '.join(unknown)}",
            where="modes",
            fix=f"leave modes empty, or choose some of: {', '.join(model.modes)}",
        )
    if model.settings.vision.frame_px != shards.manifest.frame_px:
        raise UserError(
            f"the model sees frames of {model.settings.vision.frame_px} px, the shards hold {shards.manifest.frame_px} px",
            where=f"{job.run} and {job.shards}",
            fix="evaluate on the shards the run was trained on",
        )
    device = device_of(job.device, local=ranks.local)
    return Subject(model.to(device), shards.tokenizer, shards.chat, device, job.batch_samples)
