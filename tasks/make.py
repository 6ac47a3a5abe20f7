"""Makes a step: finds its result on the volume, or runs its job as a subprocess. This module does not depend on Prefect."""

import shlex
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fvlm_core.errors import UserError
from fvlm_core.manifest import FILE_NAME, write_atomically
from fvlm_core.progress import ProgressReport
from fvlm_core.train.grace_period import stop_grace_s
from infra.devices import Devices
from infra.fork_server import ForkServer
from infra.launch import DiskFullError, JobRefusedError, forked_ranks_job, launch, python_job, torchrun_job
from infra.locks import locked
from tasks.machine import Machine
from tasks.steps import RECORD, OnCodeChange, Step, StepResult, Verify

PROBLEMS_SHOWN = 5
GB = 10**9
PRELOADED = "fvlm_core.train.preload", "infra.launch"
"""Modules that a fork server imports."""
GRACE_S = 10.0
"""Time to end for a stopped job that has nothing to save."""


@dataclass(frozen=True)
class MakeOptions:
    """How steps are made; results do not depend on it."""

    verify: Verify = "sha256"
    on_code_change: OnCodeChange = "warn"
    min_free_bytes: int = 0
    """Free space on the volume below which no job starts."""
    stop_grace_s: float | None = None
    """Time that a stopped training job has to save its state and end; None: derived from the size of its checkpoints."""
    devices: Devices = field(default_factory=lambda: Devices(0))
    """The GPUs, if concurrent training jobs each get their own."""
    server: ForkServer | None = None
    """Fork server for training jobs and, once it runs, for other jobs; None: each job is a new Python process."""

    @classmethod
    def of(cls, machine: Machine) -> "MakeOptions":
        """Return the settings of a profile. The caller must call `close`."""
        return cls(
            verify=machine.verify,
            on_code_change=machine.on_code_change,
            min_free_bytes=int(machine.min_free_gb * GB),
            stop_grace_s=machine.stop_grace_s,
            devices=Devices(machine.ranks if machine.parallel_jobs > 1 else 0),
            server=ForkServer(PRELOADED) if machine.fork_server else None,
        )

    def close(self) -> None:
        """Stop the fork server, which several steps share."""
        if self.server:
            self.server.close()


class BusyError(RuntimeError):
    """Another process is making the step."""


class Reporter:
    """Receives reports about steps. The base class ignores them."""

    def log(self, message: str) -> None:
        """Report a message for the run's log."""

    def progress(self, step: str, report: ProgressReport) -> None:
        """Report the progress of the step's job."""

    def ended(self, step: str, *, succeeded: bool) -> None:
        """Report that work on the step has ended here."""


def make(
    step: Step,
    volume: Path,
    *,
    how: MakeOptions | None = None,
    stop: threading.Event | None = None,
    reporter: Reporter | None = None,
    wait: bool = True,
) -> StepResult:
    """Return the step's result: found intact on the volume, or made by its job.

    Only one process makes a step at a time. A folder that a killed process left unfinished is given to the job as it is, so that the job
    can resume; a finished result that is damaged is deleted and made again.

    Raises UserError (the job rejects its input, or the disk is full), infra.launch.JobError or JobStoppedError, and InterruptedError if
    `stop` is set while it waits for another process. Without `wait`, raises BusyError if another process is making the step.
    """
    how, reporter = how or MakeOptions(), reporter or Reporter()
    folder = volume / step.folder

    def waiting() -> None:
        if not wait:
            raise BusyError(f"{step.name}: another process is making it")
        reporter.log(f"{step.name}: another process is making it; waiting for it to finish or end")
        if stop is not None and stop.wait(1.0):
            raise InterruptedError(f"{step.name} was cancelled while it waited for another process")

    with locked(step.lock(volume), waiting=waiting):
        found = step.find(volume, how.verify, how.on_code_change)
        if found.made:
            reporter.log(f"{step.name}: found in {step.folder}")
            return found.made
        if (folder / FILE_NAME).exists():
            reporter.log(f"{step.name}: made again from scratch; {found.reason}")
            shutil.rmtree(folder)
        _run(step, volume, how, stop, reporter)
        made = step.result(volume)
        if made is None or (problems := made.problems(volume, "sizes")):
            faults = "; ".join(problems[:PROBLEMS_SHOWN]) if made else "it wrote no manifest.json"
            raise RuntimeError(f"{step.name}: the job succeeded but its result is not complete: {faults}")
        return made


def _run(step: Step, volume: Path, how: MakeOptions, stop: threading.Event | None, reporter: Reporter) -> None:
    """Run the step's job in its folder."""
    folder = volume / step.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, step.record.model_dump_json(indent=2).encode())
    settings = folder / "job.yaml"
    settings.write_text(yaml.safe_dump(step.job_settings(volume), sort_keys=False))
    server = how.server if how.server and step.nodes == 1 and (step.ranks or how.server.runs(step.threads)) else None
    if server and step.ranks:
        command = forked_ranks_job(step.module, settings, processes=step.ranks)
    elif step.ranks:
        command = torchrun_job(step.module, settings, processes=step.ranks, nodes=step.nodes, rendezvous=step.rendezvous)
    else:
        command = python_job(step.module, settings)

    def watch() -> None:
        if report := ProgressReport.read(folder):
            reporter.progress(step.name, report)

    reporter.log(f"{step.name}: {shlex.join(command)}")
    if step.nodes > 1:
        reporter.log(f"{step.name}: waits for {step.nodes - 1} more nodes; start the same command on each of them")
    try:
        with how.devices.taken(step.ranks) as devices:
            launch(
                command,
                folder,
                threads=step.threads,
                min_free_bytes=how.min_free_bytes,
                devices=devices,
                server=server,
                stop=stop,
                watch=watch,
                grace_s=_grace_s(step, volume, how),
            )
    except JobRefusedError as error:
        raise UserError(error.what, where=error.where, fix=error.fix) from error
    except DiskFullError as error:
        raise UserError(str(error), where=str(volume), fix="free some space, or give another volume") from error


def _grace_s(step: Step, volume: Path, how: MakeOptions) -> float:
    """Return how long the step's job may take to end after it is stopped."""
    if not step.ranks:
        return GRACE_S
    start = step.inputs.get("init_from")
    return how.stop_grace_s or stop_grace_s(volume / step.folder, volume / start.folder if isinstance(start, StepResult) else None)
