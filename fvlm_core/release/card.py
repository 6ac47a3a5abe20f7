"""The model card, `README.md` of the released folder: metadata for the hub, and numbers from `results.json` only."""

import re

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from fvlm_core import __version__
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.eval.estimates import Dataset, Estimate, Metric
from fvlm_core.eval.part import OWN_SPLIT
from fvlm_core.eval.results import Results
from fvlm_core.figures import Figure
from fvlm_core.model.names import SHORT_MODES
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.html import TEMPLATES
from fvlm_core.release.sections.evaluation import modes_table
from fvlm_core.release.sections.limitations import limitations
from fvlm_core.tables import Table

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
DATASETS_AT = "https://huggingface.co/datasets/"
TAGS = ["fvlm", "foveated", "video", "vision-language-model", "custom_code"]
BACKBONE_TAGS = ("dinov2", "smollm2")
"""Tags for a model built from such a checkpoint; the same architecture with random weights does not get them."""


def card(evidence: Evidence, verdict: str, *, picture: Figure | None) -> str:
    """Return the card's text; `picture` is a file of the folder that shows where the model looks."""
    job, results, shards = evidence.job, evidence.results, evidence.shards
    environment = Environment(loader=PackageLoader("fvlm_core.release", TEMPLATES), undefined=StrictUndefined, trim_blocks=True)
    body = environment.get_template("card.md.j2").render(
        name=job.name,
        repository=job.push_to or f"path/to/{job.name}",
        verdict=verdict,
        summary=job.summary,
        picture=picture.markdown() if picture else None,
        params=evidence.run.manifest.params,
        tokens_per_frame=results.tokens_per_frame,
        frame_px=results.frame_px,
        frames_a_second="one frame per second is" if shards.fps == 1 else f"{shards.fps:g} frames per second are",
        max_frames=shards.max_frames,
        measured_on=_measured_on(results),
        origins=_origins(evidence),
        looks=results.looks,
        short_mode=next(name for name, mode in SHORT_MODES.items() if mode == evidence.best_mode),
        modes=modes_table(results).markdown(),
        sources=_sources_table(evidence).markdown(),
        limitations=limitations(evidence),
        fvlm=__version__,
        versions=evidence.run.manifest.versions,
        checkpoint=results.checkpoint,
        licence=job.license,
    )
    return str(ModelCard(f"---\n{_metadata(evidence).to_yaml()}\n---\n\n{body}"))


def _measured_on(results: Results) -> str:
    """Name the evaluation data: the project's own held-out samples, or public benchmarks too."""
    parts = [part for part in results.parts.values() if not part.timing]
    public = sorted({(metric.dataset or part.dataset).name for part in parts for metric in part.card_results()} - {OWN_SPLIT.name})
    own = "On held-out samples of the training sources"
    return f"{own}, and on {', '.join(public)}." if public else f"{own}."


def _origins(evidence: Evidence) -> list[str]:
    """A sentence per backbone: its initial weights, and whether it was trained."""
    model, optimizer = evidence.recipe.model, evidence.recipe.optimizer
    sentences = []
    parts = (
        ("language model", model.llm.checkpoint, optimizer.peaks["llm"]),
        ("vision encoder", model.vision.checkpoint, optimizer.peaks["vision"]),
    )
    for name, checkpoint, rate in parts:
        start = "random weights" if checkpoint is None else checkpoint if HUB_NAME.match(checkpoint) else "a local checkpoint"
        sentences.append(f"The {name} started from {start} and was {'trained' if rate else 'frozen'} in the last stage.")
    return sentences


def base_models(evidence: Evidence) -> list[str]:
    """The hub names of the checkpoints that the model was built from; local folders have none."""
    parts = (evidence.recipe.model.llm.checkpoint, evidence.recipe.model.vision.checkpoint)
    return [name for name in parts if name is not None and HUB_NAME.match(name)]


def hub_datasets(evidence: Evidence) -> list[str]:
    """The hub names of the datasets among the released run's sources."""
    homepages = (ADAPTERS[source.name].homepage for source in evidence.shards.sources if source.name in ADAPTERS)
    return sorted({homepage.removeprefix(DATASETS_AT) for homepage in homepages if homepage.startswith(DATASETS_AT)})


def hub_results(evidence: Evidence) -> str:
    """Results on hub datasets in the format of `.eval_results/*.yaml`; empty if there are none."""
    entries = [
        EvalResultEntry(
            dataset_id=dataset.type,
            task_id=dataset.split,
            value=value.value if isinstance(value, Estimate) else value,
            notes=f"{metric.name}, {mode}, weights {evidence.results.checkpoint[:12]}",
        )
        for metric, dataset, mode, value in _card_results(evidence)
        if HUB_NAME.match(dataset.type)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def _metadata(evidence: Evidence) -> ModelCardData:
    job = evidence.job
    return ModelCardData(
        license=job.license,
        language=job.language,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        base_model=base_models(evidence) or None,
        datasets=hub_datasets(evidence) or None,
        tags=[*TAGS, *(tag for tag in BACKBONE_TAGS if any(tag in name.lower() for name in base_models(evidence)))],
        model_name=job.name,
        eval_results=_eval_results(evidence),
    )


def _eval_results(evidence: Evidence) -> list[EvalResult]:
    """The card's numbers of every part and mode, for its model-index."""
    return [
        EvalResult(
            task_type="video-text-to-text",
            task_name=f"Video question answering and captioning, {mode}",
            dataset_type=dataset.type,
            dataset_name=dataset.name,
            dataset_config=mode,  # the hub merges results of equal dataset, configuration and split
            dataset_split=dataset.split,
            dataset_args={"shards": evidence.results.shards} if dataset == OWN_SPLIT else None,
            metric_type=metric.hub_type,
            metric_name=f"{metric.name} ({mode})",
            metric_value=value.value if isinstance(value, Estimate) else value,
        )
        for metric, dataset, mode, value in _card_results(evidence)
    ]


def _card_results(evidence: Evidence) -> list[tuple[Metric, Dataset, str, Estimate | float]]:
    """(Metric, dataset, mode, value) of all numbers on the card, from the checkpoint's `results.json`."""
    return [
        (metric, metric.dataset or part.dataset, mode, value)
        for part in evidence.results.parts.values()
        for metric in part.card_results()
        for mode, value in metric.values.items()
    ]


def _sources_table(evidence: Evidence) -> Table:
    shares = {part.source: f"{part.share:.0%}" for part in evidence.recipe.data.mixture}
    rows = [
        [source.name, source.kind, f"{source.samples:,}", shares.get(source.name, "")]
        for source in evidence.shards.sources
        if source.split == "train"
    ]
    return Table(head=["source", "kind", "samples", "share in the last stage"], rows=rows)
