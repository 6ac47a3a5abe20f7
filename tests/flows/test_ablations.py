"""What the ablations decide for later phases: the winner's change, and only where new seeds confirmed it."""

from pathlib import Path

import pytest

from flows.ablations import CONFIRMATION, REPORT, decide, learn, show
from fvlm_core.scaling.ablations import compare
from fvlm_core.scaling.jobs import AblationJob, AblationRun, Confirmation
from tasks.config import PipelineConfig
from tasks.phase import Results
from tasks.steps import StepResult
from tests.scaling.build import finished
from tests.tiny import profile_values

CHANGE = "model.temperature"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A comparison that `cool` wins; its confirmation is to be written."""
    runs = []
    for name, loss in (("baseline", 2.0), ("cool", 1.8)):
        changes = {CHANGE: 0.5} if name == "cool" else {}
        for seed in (0, 1, 2):
            own = 0.001 * (seed if name == "cool" else -seed)
            run = finished(tmp_path / f"{name}{seed}", loss + own, changes=changes | {"run.seed": seed})
            runs.append(AblationRun(name=name, change=CHANGE if changes else "", value=changes.get(CHANGE), seed=seed, run=run))
    compare(AblationJob(output=tmp_path / REPORT, baseline="baseline", runs=runs))
    return Results(tmp_path, {name: StepResult(name=name, folder=name, digest="") for name in (REPORT, CONFIRMATION)})


@pytest.mark.parametrize(("delta", "confirmed"), [(-0.2, True), (0.01, False)])
def test_only_what_new_seeds_show_is_adopted(results, delta, confirmed):
    config = PipelineConfig.from_values(profile_values(), where="tests")
    losses = {"baseline": {3: 2.0}, "cool": {3: 2.0 + delta}}
    Confirmation(name="confirmation", settings_hash="x", winner="cool", losses=losses, delta=delta, confirmed=confirmed).write(
        results.volume / CONFIRMATION
    )
    assert decide(config, results) == ({CHANGE: 0.5} if confirmed else {})
    *runs, again = learn(config, results)
    assert len(runs) == 2
    assert again.verdict == ("confirmed" if confirmed else "not confirmed")
    assert ("confirmed and adopted" if confirmed else "not confirmed, so not adopted") in show(config, results).text
