"""A phase inside a real Prefect flow: cached steps, damage, retries, parallel runs, artifacts."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.testing.utilities import prefect_test_harness

from deployments.checks import load_profile
from fvlm_core.errors import UserError
from tasks.phase_run import PhaseRun
from tasks.phases import PhaseManifest, current, phase_folder, require_upstream
from tasks.status import PhaseStatus, StatusBoard
from tasks.steps import Made, Step

CI = load_profile("ci")
MODULE = "tests.jobs.count"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with prefect_test_harness(server_startup_timeout=120):
            yield


def counting(name: str, inputs: dict[str, Made] | None = None, **settings: object) -> Step:
    reads = [f"input:{key}" for key in inputs or {}]
    return Step(name=name, module=MODULE, settings={"value": len(name), "reads": reads} | settings, inputs=inputs or {})


def run_phase(volume: Path, *steps: Step, **last: object) -> tuple[dict[str, str], dict[str, int], str]:
    """Run steps side by side and then one that reads them, as phase precompute; states and run counts by step, and the flow run's id."""
    seen: list[str] = []

    @flow(name="precompute")
    def phase() -> None:
        context = FlowRunContext.get()
        assert context is not None
        assert isinstance(context.flow_run, FlowRun)
        seen.append(str(context.flow_run.id))
        with PhaseRun("precompute", CI, str(volume), steps=len(steps) + 1) as run:
            made = run.make_all(steps)
            run.make(counting("last", made, **last))
            run.finish([{"name": name, "share": 1 / 3} for name in made], text="Two counted.", chosen={"model.temperature": 0.5})

    state: State[None] = phase(return_state=True)
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[seen[0]])))
    names = {task.name.removeprefix("ci · precompute · "): task for task in tasks}
    if state.is_failed():
        state.result()
    return (
        {name: task.state.name or "" for name, task in names.items() if task.state},
        {name: task.run_count for name, task in names.items()},
        seen[0],
    )


def test_a_second_run_is_cached_and_its_artifacts_are_there(tmp_path: Path) -> None:
    first, _, run = run_phase(tmp_path, counting("one"), counting("two"))
    assert set(first.values()) == {"Completed"}
    manifest = current("precompute", CI, tmp_path, upstream={})
    assert manifest is not None
    assert set(manifest.steps) == {"one", "two", "last"}
    assert manifest.chosen == {"model.temperature": 0.5}
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
    kinds = {artifact.key: (artifact.type, str(artifact.data)) for artifact in artifacts}
    assert kinds["precompute-progress"] == ("progress", "100")
    assert "0.3333" in kinds["precompute-table"][1]
    assert "Two counted." in kinds["precompute-summary"][1]
    status = PhaseStatus.read(phase_folder("precompute", CI, tmp_path))
    assert status is not None
    assert (status.done, status.total, status.percent) == (3, 3, 100.0)

    again, _, _ = run_phase(tmp_path, counting("one"), counting("two"))
    assert set(again.values()) == {"Cached"}
    assert current("precompute", CI, tmp_path, upstream={}) is not None


def test_a_damaged_step_is_made_again_and_the_others_stay_cached(tmp_path: Path) -> None:
    run_phase(tmp_path, counting("one"), counting("two"))
    (tmp_path / counting("two").folder / "value.txt").write_text("4")
    assert current("precompute", CI, tmp_path, upstream={}) is None
    again, _, _ = run_phase(tmp_path, counting("one"), counting("two"))
    assert again == {"one": "Cached", "two": "Completed", "last": "Cached"}
    assert current("precompute", CI, tmp_path, upstream={}) is not None


def test_a_changed_setting_reruns_the_step_and_what_reads_it(tmp_path: Path) -> None:
    run_phase(tmp_path, counting("one"), counting("two"))
    again, _, _ = run_phase(tmp_path, counting("one"), counting("two", value=9))
    assert again == {"one": "Cached", "two": "Completed", "last": "Completed"}


def test_results_without_cache_records_are_found_on_the_volume(tmp_path: Path) -> None:
    run_phase(tmp_path, counting("one"))
    for record in (tmp_path / "prefect" / "results").iterdir():
        record.unlink()
    again, _, _ = run_phase(tmp_path, counting("one"))
    assert again == {"one": "Completed", "last": "Completed"}
    assert len((tmp_path / f"{counting('one').folder}.runs").read_text().splitlines()) == 1


def test_a_failed_job_is_tried_again_and_bad_input_is_not(tmp_path: Path) -> None:
    states, counts, _ = run_phase(tmp_path, counting("shaky", fail_first=1))
    assert states == {"shaky": "Completed", "last": "Completed"}
    assert counts["shaky"] == 2
    with pytest.raises(UserError, match="the value is bad"):
        run_phase(tmp_path / "other", counting("one"), counting("bad", refuse=True))
    assert counting("one").found(tmp_path / "other", "sha256") is not None, "the other runs go on"
    assert current("precompute", CI, tmp_path / "other", upstream={}) is None


def test_a_relative_volume_is_refused() -> None:
    with pytest.raises(UserError, match="absolute"):
        run_phase(Path("volume"), counting("one"))


def test_a_phase_by_itself_says_which_deployment_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="speed needs the results of precompute") as caught:
        require_upstream("speed", CI, tmp_path)
    assert "precompute/ci" in caught.value.fix

    run_phase(tmp_path, counting("one"))
    assert set(require_upstream("speed", CI, tmp_path)) == {"precompute"}
    with pytest.raises(UserError, match="ablations needs the results of speed"):
        require_upstream("ablations", CI, tmp_path)

    folder = phase_folder("speed", CI, tmp_path)
    old = PhaseManifest(name="speed", settings_hash="", inputs={"precompute": "of-another-time"}, steps={})
    old.write(folder)
    with pytest.raises(UserError, match="older than what they were made from"):
        require_upstream("ablations", CI, tmp_path)

    done = PhaseManifest.read(phase_folder("precompute", CI, tmp_path))
    done.model_copy(update={"inputs": {"videos": "a table that was changed since"}}).write(phase_folder("precompute", CI, tmp_path))
    with pytest.raises(UserError, match="older than what they were made from"):
        require_upstream("speed", CI, tmp_path)
    done.write(phase_folder("precompute", CI, tmp_path))

    (tmp_path / counting("one").folder / "value.txt").unlink()
    with pytest.raises(UserError, match="damaged"):
        require_upstream("speed", CI, tmp_path)


def test_steps_that_report_and_end_at_once_are_all_counted(tmp_path: Path) -> None:
    @flow
    def phase() -> None:
        board = StatusBoard("precompute", tmp_path, 64)

        def step(number: int) -> None:
            for _ in range(5):
                board.running(f"step{number}", None)
            board.ended(f"step{number}", well=True)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(step, range(64)))

    phase()
    assert PhaseStatus.read(tmp_path) == PhaseStatus(phase="precompute", total=64, done=64)
