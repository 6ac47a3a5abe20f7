"""A phase inside a real Prefect flow: cached steps, damage, retries, parallel runs, artifacts."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import TaskRunSort
from prefect.context import FlowRunContext, refresh_global_settings_context

from fvlm_core.errors import UserError
from fvlm_core.tables import Table
from infra.stack import Stack
from tasks import phase_flow, pipeline_flow
from tasks.config import PipelineConfig
from tasks.phase import Phase, PhaseManifest, Results, Shown, current, require
from tasks.status import PhaseStatus
from tasks.status_board import StatusBoard
from tasks.steps import Step
from tests.tiny import PROFILE

pytestmark = pytest.mark.slow(reason="a Prefect server, and jobs in processes of their own")

TESTS = PipelineConfig.from_yaml(PROFILE)
MODULE = "tests.jobs.count"


@pytest.fixture(scope="module", autouse=True)
def server(stack: Stack) -> Iterator[None]:
    """The server is known to every thread: what a flow starts threads for does not hand its own settings on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.client_environment().items():
            patch.setenv(name, value)
        refresh_global_settings_context()
        yield
    refresh_global_settings_context()


def counting(name: str, reads: Sequence[Step] = (), **settings: object) -> Step:
    return Step(name=name, module=MODULE, settings={"value": len(name)} | settings, inputs={"reads": list(reads)})


def phase_of(*steps: Step, name: str = "counted", after: tuple[Phase, ...] = (), **last: object) -> Phase:
    """A phase of steps side by side and one that reads them."""

    def show(config: PipelineConfig, results: Results) -> Shown:
        return Shown(table=Table.of([{"name": name, "share": 1 / 3} for name in results.made]), text="Two counted.")

    return Phase(
        name=name,
        purpose="Count.",
        pool="cpu",
        after=after,
        reads=("precompute",),
        steps=lambda config, before: [*steps, counting("last", steps, **last)],
        decide=lambda config, results: {"model.temperature": 0.5},
        show=show,
    )


def run_phase(volume: Path, *steps: Step, **last: object) -> tuple[dict[str, str], dict[str, int], UUID]:
    """Run `phase_of` the steps; states and run counts by step, and the flow run's id."""
    phase = phase_of(*steps, **last)
    seen: list[UUID] = []

    @flow(name=phase.name)
    def run() -> None:
        context = FlowRunContext.get()
        assert context is not None
        assert isinstance(context.flow_run, FlowRun)
        seen.append(context.flow_run.id)
        phase_flow.run_phase(phase, TESTS, str(volume))

    state: State[None] = run(return_state=True)
    states, counts = tasks_of(seen[0])
    if state.is_failed():
        state.result()
    return states, counts, seen[0]


def tasks_of(run: UUID) -> tuple[dict[str, str], dict[str, int]]:
    """States and run counts of a flow run's steps; of those that ran twice, the last."""
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])), sort=TaskRunSort.EXPECTED_START_TIME_ASC
        )
    names = {task.name.removeprefix("tests · counted · "): task for task in tasks}
    states = {name: task.state.name or "" for name, task in names.items() if task.state}
    return states, {name: task.run_count for name, task in names.items()}


def phase() -> Phase:
    return phase_of()


def test_a_second_run_is_cached_and_its_artifacts_are_there(tmp_path: Path) -> None:
    first, _, run = run_phase(tmp_path, counting("one"), counting("two"))
    assert set(first.values()) == {"Completed"}
    manifest = current(phase(), TESTS, tmp_path, done={})
    assert manifest is not None
    assert set(manifest.steps) == {"one", "two", "last"}
    assert manifest.decided == {"model.temperature": 0.5}
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
    kinds = {artifact.key: (artifact.type, str(artifact.data)) for artifact in artifacts}
    assert kinds["counted-progress"] == ("progress", "100")
    assert "0.3333" in kinds["counted-table"][1]
    assert "Two counted." in kinds["counted-summary"][1]
    status = PhaseStatus.read(phase().folder(TESTS, tmp_path))
    assert status is not None
    assert (status.done, status.total, status.percent) == (3, 3, 100.0)

    again, _, _ = run_phase(tmp_path, counting("one"), counting("two"))
    assert set(again.values()) == {"Cached"}
    assert current(phase(), TESTS, tmp_path, done={}) is not None


def test_a_phase_that_was_done_by_its_own_run_is_not_started_by_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_phase(tmp_path, counting("one"))
    started: list[str] = []
    monkeypatch.setattr(pipeline_flow, "run_deployment", lambda name, **_: started.append(name))

    @flow
    def pipeline() -> None:
        assert pipeline_flow.phase_result(phase_of(counting("one")), TESTS, tmp_path, {}).shown.text == "Two counted."

    pipeline()
    assert started == []


def test_a_damaged_step_is_made_again_and_the_others_stay_cached(tmp_path: Path) -> None:
    run_phase(tmp_path, counting("one"), counting("two"))
    (tmp_path / counting("two").folder / "value.txt").write_text("4")
    assert current(phase(), TESTS, tmp_path, done={}) is None
    again, _, _ = run_phase(tmp_path, counting("one"), counting("two"))
    assert again == {"one": "Cached", "two": "Completed", "last": "Cached"}
    assert current(phase(), TESTS, tmp_path, done={}) is not None


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
    assert counting("one").find(tmp_path / "other", "sha256").made, "the other runs go on"
    assert current(phase(), TESTS, tmp_path / "other", done={}) is None


def test_a_relative_volume_is_refused() -> None:
    with pytest.raises(UserError, match="absolute"):
        run_phase(Path("volume"), counting("one"))


def test_a_phase_by_itself_says_which_deployment_to_run_first(tmp_path: Path) -> None:
    counted = phase_of(counting("one"))
    middle = phase_of(name="middle", after=(counted,))
    last = phase_of(name="final", after=(middle,))
    assert [one.name for one in last.ancestors] == ["counted", "middle"]

    def needed(by: Phase) -> set[str]:
        return set(require(by.ancestors, TESTS, tmp_path, by=by.name, verify="sha256"))

    with pytest.raises(UserError, match="middle needs the results of counted") as caught:
        needed(middle)
    assert "counted/tests" in caught.value.fix

    run_phase(tmp_path, counting("one"))
    assert needed(middle) == {"counted"}
    with pytest.raises(UserError, match="final needs the results of middle"):
        needed(last)

    old = PhaseManifest(name="middle", settings_hash="", inputs={"counted": "of-another-time"}, steps={})
    old.write(middle.folder(TESTS, tmp_path))
    with pytest.raises(UserError, match="older than what they were made from"):
        needed(last)

    done = PhaseManifest.read(counted.folder(TESTS, tmp_path))
    done.model_copy(update={"inputs": {"videos": "a table that was changed since"}}).write(counted.folder(TESTS, tmp_path))
    with pytest.raises(UserError, match="older than what they were made from"):
        needed(middle)
    done.write(counted.folder(TESTS, tmp_path))

    (tmp_path / counting("one").folder / "value.txt").unlink()
    with pytest.raises(UserError, match="damaged"):
        needed(middle)


def test_a_retried_flow_run_makes_good_what_was_damaged_in_between(tmp_path: Path) -> None:
    """Prefect hands a retried flow run the results of its completed tasks without running them; ours are checked all the same."""
    damaged = counting("one")
    attempts: list[int] = []
    seen: list[UUID] = []
    counted = phase_of(damaged)

    @flow(name="counted", retries=1)
    def run() -> None:
        context = FlowRunContext.get()
        assert context is not None
        assert isinstance(context.flow_run, FlowRun)
        seen.append(context.flow_run.id)
        attempts.append(context.flow_run.run_count)
        phase_flow.run_phase(counted, TESTS, str(tmp_path))
        if len(attempts) == 1:
            (tmp_path / damaged.folder / "value.txt").write_text("4")
            raise RuntimeError("so that Prefect runs the flow again")

    run()
    assert len(attempts) == 2
    assert len(set(seen)) == 1, "the same flow run"
    assert (tmp_path / damaged.folder / "value.txt").read_text() == "3"
    assert len((tmp_path / f"{damaged.folder}.runs").read_text().splitlines()) == 2
    assert current(counted, TESTS, tmp_path, done={}) is not None


def test_two_runs_share_the_steps_of_a_phase_and_make_each_once(tmp_path: Path) -> None:
    steps = [counting(f"{number}-of-six", seconds=0.5) for number in range(6)]
    shared = replace(phase_of(*steps), helpers=lambda config: 1)

    both = threading.Barrier(2, timeout=60)

    @flow
    def helps() -> list[str]:
        both.wait()
        return phase_flow.help_phase(shared, TESTS, str(tmp_path), 1)

    @flow(name=shared.name)
    def run() -> None:
        both.wait()
        phase_flow.run_phase(shared, TESTS, str(tmp_path))

    with ThreadPoolExecutor(2) as pool:
        helper, own = pool.submit(helps), pool.submit(run)
        own.result()
        made = helper.result()
    assert made, "the helper has made some"
    assert "3-of-six" in made, "it began in the middle of the list"
    runs = {step.name: len((tmp_path / f"{step.folder}.runs").read_text().splitlines()) for step in steps}
    assert set(runs.values()) == {1}, runs
    manifest = current(shared, TESTS, tmp_path, done={})
    assert manifest is not None
    assert len(manifest.steps) == 7


def test_steps_that_report_and_end_at_once_are_all_counted(tmp_path: Path) -> None:
    @flow
    def phase() -> None:
        board = StatusBoard("precompute", tmp_path, 64)

        def step(number: int) -> None:
            for _ in range(5):
                board.running(f"step{number}", None)
            board.ended(f"step{number}", succeeded=True)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(step, range(64)))

    phase()
    assert PhaseStatus.read(tmp_path) == PhaseStatus(phase="precompute", total=64, done=64)


def test_a_status_that_cannot_be_shown_stops_nothing(tmp_path: Path) -> None:
    @flow
    def phase() -> None:
        board = StatusBoard("precompute", tmp_path, 1)
        with get_client(sync_client=True) as client:
            client.delete_artifact(board.artifact)
        board.sent = 0.0
        board.running("step", None)
        board.finish()

    phase()
    assert PhaseStatus.read(tmp_path) == PhaseStatus(phase="precompute", total=1, done=1)
