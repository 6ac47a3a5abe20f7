"""Runs a phase as a Prefect flow: its steps as cached, retried tasks, then its manifest and its artifacts."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.flows import Flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff
from pydantic import JsonValue

from fvlm_core.data.jobs import ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.progress import ProgressReport
from infra.launch import JobStoppedError
from tasks import artifacts
from tasks.board import on_board
from tasks.config import PipelineConfig
from tasks.helpers import helped, share
from tasks.make import MakeOptions, Reporter, make
from tasks.mixtures import check_shards
from tasks.phase import Phase, PhaseManifest, Results, conclude, earlier_results, link_steps, require
from tasks.status_board import StatusBoard
from tasks.steps import Step, StepResult, StepState, in_dependency_order

RESULTS = "prefect/results"
"""Folder of the volume where Prefect keeps task results and cache keys, shared by all workers."""
RETRIES = 2
FIRST_RETRY_S = 5


def phase_flow(phase: Phase, module: str) -> Flow[..., None]:
    """Return the phase's flow. It must become a variable of `module` with the phase's name, where a worker looks for it."""

    # `changes` comes first: in the UI's form the complete profile is several screens long
    def run(changes: dict[str, JsonValue] | None = None, *, config: PipelineConfig, volume: str, helper: int | None = None) -> None:
        """
        Args:
            changes: Settings to change in `config`, by dotted path: {"stages.stage2.run.steps": 10}.
            config: What every phase does.
            volume: Folder that holds all results (an absolute path).
            helper: Number of this run if it is a helper that another run of the phase has started; leave it empty.
        """
        if helper is not None:
            help_phase(phase, config, volume, helper)
            return
        config = changed(config, changes, volume)
        with on_board(phase.name, config, Path(volume)) as post:
            post(run_phase(phase, config, volume).shown.text or "has nothing to show")

    run.__name__ = run.__qualname__ = phase.name
    run.__module__ = module
    run.__doc__ = f"{phase.purpose}\n{run.__doc__}"
    return flow(name=phase.name, description=phase.purpose, flow_run_name=f"{{config.name}} · {phase.name}")(run)


def flow_on_demand(phase: Phase, module: str) -> Callable[[str], Flow[..., None]]:
    """Return the `__getattr__` of `module`, which makes the phase's flow, a variable with the phase's name, on first access.

    When a flow is made, Prefect builds the schema of its parameters, which takes a tenth of a second for a profile; a run needs only one
    flow of eight.
    """

    def get(name: str) -> Flow[..., None]:
        if name != phase.name:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        made = phase_flow(phase, module)
        setattr(sys.modules[module], name, made)
        return made

    return get


def changed(config: PipelineConfig, changes: dict[str, JsonValue] | None, volume: str) -> PipelineConfig:
    """Return the profile with some settings changed. Relative paths among them are relative to the volume, which every worker sees.

    Raises UserError for an unknown setting or an invalid value.
    """
    return config.with_changes(changes, where="changes", folder=Path(volume)) if changes else config


def run_phase(phase: Phase, config: PipelineConfig, volume: str) -> PhaseManifest:
    """Make every step that is not done already, then write the phase's manifest and publish what it shows.

    Raises UserError if an earlier phase's results are missing, damaged or outdated, or lack a source that the phase needs.
    """
    started, root = time.monotonic(), Path(volume)
    if not root.is_absolute():
        raise UserError("the volume must be an absolute path", where=volume, fix="a worker may run in any folder; give the complete path")
    # a pipeline run has already verified the files of the earlier phases; a phase that runs by itself has to do so
    alone = flow_run.parent_flow_run_id is None
    verify = config.machine.verify if alone else "sizes"
    for one in (*phase.ancestors, phase) if alone else ():
        one.prepare(config, root)
    done = require(phase.ancestors, config, root, by=phase.name, verify=verify)
    if "precompute" in done:
        check_shards(config, ShardManifest.read(root / done["precompute"].steps["shards"].folder))
    steps = phase.steps(config, earlier_results(phase, config, root, done))
    folder = phase.folder(config, root)
    helpers = phase.helpers(config)
    with StepRunner(config, root, StatusBoard(phase.name, folder, len(steps)), phase.name) as runner:
        for number, wave in enumerate(in_dependency_order(steps)):
            bound = [step.bound(runner.made) for step in wave]
            if number == 0 and helpers and any(step.find(root, verify).made is None for step in bound):
                with helped(phase.name, config, volume, helpers):
                    runner.share(bound, helpers + 1)
                    runner.make(bound)
            else:
                runner.make(bound)
    manifest = conclude(phase, config, Results(root, runner.made), done, seconds=time.monotonic() - started)
    link_steps(phase, manifest, root)
    artifacts.publish(phase.name, config.name, manifest.shown, root)
    runner.board.finish()
    return manifest


def help_phase(phase: Phase, config: PipelineConfig, volume: str, number: int) -> list[str]:
    """Make steps of a phase that runs elsewhere, and return their names. Steps that need other steps are left to that run."""
    root, log = Path(volume), get_run_logger()
    done = require(phase.ancestors, config, root, by=phase.name, verify="sizes")
    steps = next(in_dependency_order(phase.steps(config, earlier_results(phase, config, root, done))), [])
    stop, machine, how = threading.Event(), config.machine, MakeOptions.of(config.machine)
    try:
        made = share(
            steps,
            root,
            how,
            number=number,
            of=phase.helpers(config) + 1,
            at_once=machine.parallel_jobs,
            stop=stop,
            reporter=RunReporter(),
        )
    finally:
        stop.set()
        how.close()
    log.info("made %d of %d steps: %s", len(made), len(steps), ", ".join(made))
    return made


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether a failed step may succeed when it is run again: not if its input is bad, nor if it was cancelled."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, UserError | JobStoppedError | InterruptedError)


def result_storage(volume: Path) -> Path:
    """Return where tasks that work on `volume` keep their results."""
    return volume / RESULTS


class RunReporter(Reporter):
    """Reports steps to the run's log and, in the phase's own run, to its status."""

    def __init__(self, board: StatusBoard | None = None) -> None:
        self.board, self.logger = board, get_run_logger()

    def log(self, message: str) -> None:
        self.logger.info(message)

    def progress(self, step: str, report: ProgressReport | None) -> None:
        if self.board:
            self.board.running(step, report)

    def ended(self, step: str, *, succeeded: bool) -> None:
        if self.board:
            self.board.ended(step, succeeded=succeeded)


@task(
    name="step",
    persist_result=True,
    result_serializer="json",
    cache_key_fn=lambda _context, parameters: parameters["cache_key"],
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(FIRST_RETRY_S),
    retry_jitter_factor=0.2,
    retry_condition_fn=worth_retrying,
)
def make_step(step: Step, runner: "StepRunner", cache_key: str) -> StepResult:
    """Return the step's result, found on the volume or made by its job. Cached by `cache_key`."""
    reporter, succeeded = RunReporter(runner.board), False
    reporter.progress(step.name, None)
    try:
        made = make(step, runner.volume, how=runner.how, stop=runner.stop, reporter=reporter)
        succeeded = True
        return made
    finally:
        reporter.ended(step.name, succeeded=succeeded)


class StepRunner:
    """Makes steps as tasks of the running flow; use as a context manager: no job outlives it."""

    def __init__(self, config: PipelineConfig, volume: Path, board: StatusBoard, phase: str) -> None:
        self.config, self.volume, self.board, self.phase = config, volume, board, phase
        self.how = MakeOptions.of(config.machine)
        self.stop = threading.Event()
        self.made: dict[str, StepResult] = {}

    def __enter__(self) -> "StepRunner":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop.set()  # no job may continue, however the flow ended
        self.how.close()

    def make(self, steps: Sequence[Step]) -> None:
        """Make independent steps, at most `machine.parallel_jobs` at a time, into `made`.

        A step that fails does not stop the others; the first failure is raised when all have ended.
        """
        missing = self._submit(steps)
        # a retried flow run returns the results of its completed tasks unchecked: steps that are still damaged run as new tasks
        if left := [step for step in missing if self._find(step).made is None]:
            self._submit(left)
        for step in steps:
            found = step.find(self.volume, "sizes")
            if found.made is None:
                raise RuntimeError(f"{step.name}: {found.reason}")
            self.made[step.name] = found.made

    def share(self, steps: Sequence[Step], runs: int) -> None:
        """Make independent steps together with helpers, `runs` runs in all. What helpers are making, and what fails, is left to `make`."""
        reporter = RunReporter(self.board)
        at_once = self.config.machine.parallel_jobs
        share(steps, self.volume, self.how, number=0, of=runs, at_once=at_once, stop=self.stop, reporter=reporter)

    def _submit(self, steps: Sequence[Step]) -> list[Step]:
        """Run the steps' tasks; returns the steps that had no intact result before."""
        found = {step.name: self._find(step) for step in steps}
        tasks = [(self._task(step, found[step.name]), step, self, step_cache_key(step)) for step in steps]
        if len(tasks) == 1:
            ((run, *parameters),) = tasks
            run(*parameters)
        else:
            with ThreadPoolTaskRunner(max_workers=self.config.machine.parallel_jobs) as pool:
                try:
                    futures = [pool.submit(run, {"step": step, "runner": self, "cache_key": key}) for run, step, _, key in tasks]
                    for future in futures:
                        future.wait()
                except BaseException:
                    self.stop.set()
                    raise
            for future in futures:
                future.result()
        return [step for step in steps if found[step.name].made is None]

    def _find(self, step: Step) -> StepState:
        return step.find(self.volume, self.how.verify, self.how.on_code_change)

    def _task(self, step: Step, found: StepState) -> Task[..., StepResult]:
        """Return the task that makes `step`. Its cached result is not used if the step's files are missing or damaged."""
        if found.other_code:
            get_run_logger().warning("%s was made by other code: %s", step.name, "; ".join(found.other_code))
        return make_step.with_options(
            task_run_name=f"{self.config.name} · {self.phase} · {step.name}",
            refresh_cache=found.made is None,
            result_storage=result_storage(self.volume),
        )


def step_cache_key(step: Step) -> str:
    """Return the key of the task's cached result."""
    return step.folder.rpartition("/")[2]
