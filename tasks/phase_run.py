"""One execution of a phase inside its flow: checked inputs, steps as cached and retried Prefect tasks, and the phase's manifest."""

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task, exponential_backoff
from pydantic import JsonValue

from fvlm_core.data.jobs import ShardManifest
from fvlm_core.errors import UserError
from fvlm_core.progress import ProgressReport
from infra.launch import JobStoppedError
from tasks import artifacts
from tasks.config import PipelineConfig
from tasks.mixtures import check_shards
from tasks.phases import PHASES, PhaseManifest, inputs_of, phase_folder, phase_key, require_upstream
from tasks.status import StatusBoard
from tasks.steps import Made, Reporter, Step, make

RESULTS = "prefect/results"
"""Folder of the volume where Prefect keeps results of tasks and their cache keys: one for all workers."""
RETRIES = 2
FIRST_RETRY_S = 5
GB = 10**9


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed step may succeed when it is run again: not when its input is bad, nor when it was cancelled."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, UserError | JobStoppedError | InterruptedError)


def result_storage(volume: Path) -> Path:
    """Where tasks that work on `volume` keep their results."""
    return volume / RESULTS


class RunReporter(Reporter):
    """Reports a step to the flow run's log and the phase's status."""

    def __init__(self, board: StatusBoard) -> None:
        self.board = board

    def log(self, message: str) -> None:
        get_run_logger().info(message)

    def progress(self, step: str, report: ProgressReport) -> None:
        self.board.running(step, report)


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
def make_step(step: Step, run: "PhaseRun", cache_key: str) -> Made:
    """The step's result, found on the volume or made by its job. Cached by `cache_key`."""
    run.board.running(step.name, None)
    well = False
    try:
        made = make(
            step,
            run.volume,
            verify=run.config.machine.verify,
            min_free_bytes=int(run.config.machine.min_free_gb * GB),
            stop=run.stop,
            reporter=RunReporter(run.board),
        )
        well = True
        return made
    finally:
        run.board.ended(step.name, well=well)


class PhaseRun:
    """Use as `with PhaseRun(...) as run:` in the phase's flow; `run.make` its steps, then `run.finish`."""

    def __init__(self, phase: str, config: PipelineConfig, volume: str, *, steps: int) -> None:
        """`steps`: how many the phase has. Raises UserError where an earlier phase's results are missing, damaged or stale, or lack
        a source that the profile trains or validates on."""
        self.phase, self.config, self.volume, self.started = phase, config, Path(volume), time.monotonic()
        if not self.volume.is_absolute():
            raise UserError("the volume must be an absolute path", where=volume, fix="a worker may run in any folder; give the whole path")
        self.folder = phase_folder(phase, config, self.volume)
        self.upstream = require_upstream(phase, config, self.volume)
        if "precompute" in self.upstream:
            check_shards(config, ShardManifest.read(self.volume / self.input("precompute", "shards").folder))
        self.stop = threading.Event()
        self.board = StatusBoard(phase, self.folder, steps)
        self.made: dict[str, Made] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.set()  # whatever ended the flow, no job goes on

    def input(self, phase: str, step: str) -> Made:
        """A step of an earlier phase."""
        return self.upstream[phase].steps[step]

    def chosen(self) -> dict[str, JsonValue]:
        """What the earlier phases decided, as changes of a recipe."""
        return {path: value for name in PHASES if name in self.upstream for path, value in self.upstream[name].chosen.items()}

    def make(self, step: Step) -> Made:
        """The step's result; a Prefect task of its own."""
        return self._keep(step, self._task(step)(step, self, step_cache_key(step)))

    def make_all(self, steps: Iterable[Step]) -> dict[str, Made]:
        """Results of independent steps by name, at most `machine.parallel_jobs` at a time.

        A step that fails does not stop the others; the first failure is raised when all have ended.
        """
        steps = list(steps)
        with ThreadPoolTaskRunner(max_workers=self.config.machine.parallel_jobs) as runner:
            try:
                parameters = [{"step": step, "run": self, "cache_key": step_cache_key(step)} for step in steps]
                futures = [runner.submit(self._task(step), given) for step, given in zip(steps, parameters, strict=True)]
                for future in futures:
                    future.wait()
            except BaseException:
                self.stop.set()
                raise
        return {step.name: self._keep(step, future.result()) for step, future in zip(steps, futures, strict=True)}

    def finish(
        self,
        rows: Sequence[dict[str, JsonValue]],
        *,
        text: str,
        chosen: dict[str, JsonValue] | None = None,
        pictures: Iterable[Path] = (),
    ) -> PhaseManifest:
        """Write the phase's manifest and publish its table and pictures. `text`: what the table shows and what was decided, in markdown."""
        manifest = PhaseManifest(
            name=self.phase,
            settings_hash=phase_key(self.phase, self.config),
            inputs=inputs_of(self.phase, self.config, self.volume, self.upstream),
            steps=self.made,
            chosen=chosen or {},
            rows=list(rows),
            seconds=time.monotonic() - self.started,
        ).write(self.folder)
        artifacts.publish(self.phase, self.config.name, rows, text, pictures)
        self.board.finish()
        return manifest

    def _task(self, step: Step) -> Task[..., Made]:
        """The task that makes `step`: its cached result is not trusted when the step's files are gone or damaged."""
        damaged = step.found(self.volume, self.config.machine.verify) is None
        return make_step.with_options(
            task_run_name=f"{self.config.name} · {self.phase} · {step.name}",
            refresh_cache=damaged,
            result_storage=result_storage(self.volume),
        )

    def _keep(self, step: Step, made: Made) -> Made:
        """Note the result as it is on the volume: the cached record of a step that was made again may be older."""
        self.made[step.name] = step.found(self.volume, "sizes") or made
        return self.made[step.name]


def step_cache_key(step: Step) -> str:
    """Key of the task's cached result."""
    return step.folder.rpartition("/")[2]
