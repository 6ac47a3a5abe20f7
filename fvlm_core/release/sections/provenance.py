"""The data, code, software and recipes from which the release was made."""

import yaml

from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import fenced, items
from fvlm_core.release.report import Block, Section
from fvlm_core.tables import Table


def section(evidence: Evidence, figures: Figures) -> Section:
    results, manifest, latency = evidence.results, evidence.run.manifest, evidence.latency
    rows = [
        ["run", f"{results.run}, step {manifest.model_step:,} of {manifest.steps:,}, finished {manifest.created_at}"],
        ["weights (sha256)", results.checkpoint],
        ["shards (digest)", results.shards],
        ["evaluation", f"{evidence.evaluation.digest}, seed {results.seed}, {results.resamples} resamples"],
        ["machine of the evaluation", f"{latency.device}, {latency.threads} thread(s)" if latency else "not recorded"],
        ["code (commit)", manifest.commit or "not a git checkout"],
        ["software", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())],
    ]
    blocks: list[Block] = [Table(head=["what", "which"], rows=rows)]
    changed = [f"{step} was made by other code: {'; '.join(changes)}" for step, changes in evidence.other_code.items()]
    if changed:
        blocks.append(items(changed))
    for name, stage in evidence.stages.items():
        recipe = stage.recipe.model_dump(mode="json", exclude={"output", "shards", "init_from"})
        blocks += [f"### Recipe of {name}", fenced(yaml.safe_dump(recipe, sort_keys=False), "yaml")]
    return Section(title="Provenance", blocks=blocks)
