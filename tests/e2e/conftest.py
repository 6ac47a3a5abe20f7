"""One volume for all end-to-end tests: the `ci` profile through the real command, a real server, workers and torchrun jobs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deployments.checks import PROFILES
from infra.processes import JOB_VARIABLE, STACK_VARIABLE, end_marked, mark, marked
from infra.stack import Stack
from infra.volume import password, volume_id
from tasks.config import PipelineConfig
from tasks.phases import PHASES, PhaseManifest, phase_folder

RUN_TIMEOUT_S = 900
"""Of one command; several times what an idle machine takes."""


@dataclass
class Result:
    """A finished command."""

    status: int
    output: str
    seconds: float

    def states(self) -> dict[str, str]:
        """The last state that was printed of each phase; states begin with a capital, sentences about a phase go on without."""
        lines = [line.split() for line in self.output.splitlines()]
        return {words[0]: words[1] for words in lines if len(words) > 1 and words[0] in PHASES and words[1].istitle()}


@dataclass
class Road:
    """A volume and a copy of the ci profile that a test may change."""

    volume: Path
    profile: Path
    values: dict[str, Any] = field(default_factory=lambda: yaml.safe_load((PROFILES / "ci.yaml").read_text()))

    @property
    def config(self) -> PipelineConfig:
        return PipelineConfig.from_values(self.values, where="ci")

    @property
    def mark(self) -> str:
        return volume_id(self.volume)

    @property
    def api(self) -> str:
        """Address of the running server's API."""
        return self.processes("worker", "fvlm-gpu")[0].environ()["PREFECT_API_URL"]

    @property
    def password(self) -> str:
        """The server's."""
        return password(self.volume)

    def start(self, *options: str) -> subprocess.Popen[str]:
        """`fvlm speedrun` in a process of its own."""
        self.profile.write_text(yaml.safe_dump(self.values))
        command = [str(Path(sys.executable).with_name("fvlm")), "speedrun", "--profile", str(self.profile), "--volume", str(self.volume)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.volume.parent,
            preexec_fn=heed_interrupts,
        )

    def run(self, *options: str) -> Result:
        """`fvlm speedrun` to its end."""
        started = time.monotonic()
        return ended(self.start(*options), started)

    def phase(self, name: str) -> PhaseManifest:
        return PhaseManifest.read(phase_folder(name, self.config, self.volume))

    def step(self, phase: str, name: str) -> Path:
        """Folder of a finished step."""
        return self.volume / self.phase(phase).steps[name].folder

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of the volume's stack (server, workers, flow runs, jobs) with all the words in their command line."""
        return [process for process in marked(STACK_VARIABLE, self.mark) if all(word in process.cmdline() for word in words)]


def ended(process: subprocess.Popen[str], started: float) -> Result:
    """Wait for the command."""
    output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    print(output)
    return Result(process.returncode, output, time.monotonic() - started)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def of_job(folder: Path) -> list[psutil.Process]:
    """Processes of the job that fills a step's folder."""
    return list(marked(JOB_VARIABLE, mark(folder)))


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    folder = tmp_path_factory.mktemp("road")
    road = Road(folder / "volume", folder / "ci.yaml")
    yield road
    Stack(road.volume, environment=os.environ).stop()
    end_marked(STACK_VARIABLE, road.mark)


@pytest.fixture(scope="session")
def finished(road: Road) -> Result:
    """The whole pipeline, run once on an empty volume."""
    return road.run()


def heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)
