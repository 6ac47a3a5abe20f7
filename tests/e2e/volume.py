"""`fvlm speedrun` as a user starts it, and what it left on its volume. What the tests know of the pipeline's inside is in this file."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.registry import PHASES
from fvlm_core.manifest import AnyManifest
from fvlm_core.progress import ProgressReport
from infra.prefect_settings import without
from infra.processes import JOB_VARIABLE, STACK_VARIABLE, end_marked, mark, marked
from infra.stack import Stack
from infra.volume import password, volume_id
from tasks.config import PipelineConfig
from tasks.phase import PhaseManifest
from tests.conftest import QUIETER
from tests.tiny import profile_values

RUN_TIMEOUT_S = 1500
"""Of one command: many times what an idle machine takes."""
LONG_STAGE2_STEPS = 500
"""Long enough to be stopped in the middle, five times, by something that takes seconds to arrive."""
FVLM = Path(sys.executable).with_name("fvlm")


def lengthen(values: dict[str, Any], **steps: int) -> dict[str, Any]:
    """The profile's values with stages long enough to be stopped in the middle: `stage2=500`; changed in place too."""
    for stage, number in steps.items():
        values["stages"][stage]["run"] |= {"steps": number, "eval_every": number // 4, "checkpoint_every": 10}
    return values


CACHED = dict.fromkeys(PHASES, "Cached")
COMPLETED = dict.fromkeys(PHASES, "Completed")
"""States of a run, by phase."""


@dataclass
class Result:
    """A finished command."""

    status: int
    output: str
    seconds: float

    @property
    def ui(self) -> str:
        """Address of the UI, as it was printed."""
        return next(line for line in self.output.splitlines() if line.startswith("Prefect UI: ")).removeprefix("Prefect UI: ").strip()

    @property
    def states(self) -> dict[str, str]:
        """The last state that was printed of each phase; states begin with a capital, sentences about a phase do not."""
        lines = [line.split() for line in self.output.splitlines()]
        return {words[0]: words[1] for words in lines if len(words) > 1 and words[0] in PHASES and words[1].istitle()}


@dataclass
class Command:
    """A running command and the file that gets its output."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def result(self) -> Result:
        """Wait for its end."""
        try:
            status = self.process.wait(RUN_TIMEOUT_S)
        finally:
            output = self.log.read_text()
            print(output)
        return Result(status, output, time.monotonic() - self.started)


@dataclass
class Volume:
    """A volume, and the profile that its commands are given."""

    path: Path
    values: dict[str, Any] = field(default_factory=lambda: lengthen(profile_values(), stage2=LONG_STAGE2_STEPS))

    @property
    def config(self) -> PipelineConfig:
        return PipelineConfig.from_values(self.values, where="the tests' profile")

    @property
    def stack(self) -> Stack:
        return Stack(self.path, environment=os.environ)

    @property
    def password(self) -> str:
        """Of its server."""
        return password(self.path)

    def start(self, *options: str, phase: str | None = None) -> Command:
        """`fvlm speedrun`, or `fvlm run PHASE`, in a process of its own."""
        profile, log = self.path.with_suffix(".yaml"), self.path.with_suffix(".log")
        profile.write_text(yaml.safe_dump(self.values))
        command = ["run", phase] if phase else ["speedrun"]
        environment = without(os.environ) | QUIETER
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [FVLM, *command, "--profile", profile, "--volume", self.path, "--port", str(_unused_port()), *options],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.path.parent,
                preexec_fn=_heed_interrupts,
            )
        return Command(process, log)

    def run(self, *options: str) -> Result:
        """`fvlm speedrun` to its end."""
        return self.start(*options).result()

    def client(self) -> SyncPrefectClient:
        """A client of the running server: asks again when SQLite is busy, as every client of a Prefect server has to."""
        worker = self.processes("worker", "start")[0].environ()
        return SyncPrefectClient(worker["PREFECT_API_URL"], auth_string=worker.get("PREFECT_API_AUTH_STRING"))

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of the volume's stack (server, workers, flow runs, jobs) with all the words in their command line."""
        return [process for process in marked(STACK_VARIABLE, volume_id(self.path)) if all(word in process.cmdline() for word in words)]

    def end(self) -> None:
        """End whatever works on the volume."""
        self.stack.stop()
        end_marked(STACK_VARIABLE, volume_id(self.path))

    def phase_folder(self, name: str) -> Path:
        return PHASES[name].folder(self.config, self.path)

    def phase(self, name: str) -> PhaseManifest:
        return PhaseManifest.read(self.phase_folder(name))

    def step(self, phase: str, name: str) -> Path:
        """Folder of a finished step of the present profile."""
        return self.path / self.phase(phase).steps[name].folder

    def made_at(self) -> dict[str, str]:
        """When each step of the present profile was made."""
        return {
            name: f"{made.folder} {AnyManifest.read(self.path / made.folder).created_at}"
            for phase in PHASES
            for name, made in self.phase(phase).steps.items()
        }


def newest_pipeline_run(client: SyncPrefectClient) -> FlowRun:
    """The pipeline run that was started last."""
    pipeline = FlowFilter(name=FlowFilterName(any_=["pipeline"]))
    (run,) = client.read_flow_runs(flow_filter=pipeline, sort=FlowRunSort.START_TIME_DESC, limit=1)
    return run


def of_job(folder: Path) -> list[psutil.Process]:
    """Processes of the job that fills a step's folder."""
    return list(marked(JOB_VARIABLE, mark(folder)))


def progress(folder: Path, *, since: float = 0.0) -> int:
    """Steps that the job in `folder` has done, as it reported after `since` (seconds since the epoch); 0 where it did not."""
    report = ProgressReport.read(folder)
    return report.step if report and (folder / "progress.json").stat().st_mtime > since else 0


def _unused_port() -> int:
    """A port that no other test run on this machine is about to take, as the first free one after 4200 may be."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
