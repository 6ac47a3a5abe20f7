"""Kills parts of running pipelines at random, again and again, and compares what they end with: `python -m tests.campaign.kill_campaign`.

One pipeline runs undisturbed. Copies of its volume lose their training and do it again under kills (SIGKILL): of a training process, of
torchrun, of the job's guard, of the server it is forked off, of the phase's or the pipeline's flow run, of a worker, of Prefect's
server, or of the command itself. The same command is started again whenever it has ended. At the end every stage must have the same
weights, and must have read the same samples in the same order (`metrics.csv`: the running counts of samples, frames and labelled
tokens, and every loss to the last digit).
"""

import argparse
import csv
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.report import Measurement, show
from fvlm_core.manifest import sha256_file
from fvlm_core.settings import hash_json
from fvlm_core.train.jobs import METRICS_FILE, MODEL_FOLDER
from infra import guard
from tests.e2e.volume import Command, Volume, lengthen, of_job, progress

STAGES = ("stage1", "stage2", "stage3")
STAGE_STEPS = 300
TIMINGS = {"samples_per_s", "frames_per_s", "tokens_per_s", "mfu", "data_wait_share", "peak_memory_gb"}
"""Columns of `metrics.csv` that differ from run to run."""
VICTIMS = ("rank", "torchrun", "guard", "fork server", "phase's run", "pipeline's run", "worker", "server", "command")
EARLIEST, LATEST = 0.05, 0.85
"""Of a run's steps: where kills are placed; what follows the last one is the proof."""
POLL_S = 0.05


class CampaignError(RuntimeError):
    """The campaign could not be carried out: out of time, or a pipeline that does not complete."""


@dataclass(frozen=True)
class Kill:
    """One kill: of what, when the run has done how many steps of a stage."""

    stage: str
    step: int
    victim: str


@dataclass(frozen=True)
class Ended:
    """What a pipeline ended with: a digest for each stage."""

    weights: dict[str, str]
    order: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What the campaign showed."""

    kills: int
    undisturbed: Ended
    volumes: list[Ended]

    @property
    def weights_equal(self) -> bool:
        return all(ended.weights == self.undisturbed.weights for ended in self.volumes)

    @property
    def order_equal(self) -> bool:
        return all(ended.order == self.undisturbed.order for ended in self.volumes)


def campaign(undisturbed: Volume, folder: Path, *, kills: int, volumes: int, seed: int, time_limit_s: float) -> Outcome:
    """Kill `kills` times, spread over copies of a finished volume, whose training is done again. Prints a line per kill.

    Raises CampaignError when the time is up, or where a command fails with nothing killed.
    """
    rng = random.Random(seed)
    deadline = time.monotonic() + time_limit_s
    expected, seen, landed = ended_with(undisturbed), [], 0
    for number in range(volumes):
        volume = without_training(undisturbed, folder / f"volume{number + 1}")
        plan = planned(volume, kills // volumes + (number < kills % volumes), rng)
        try:
            for kill in batter(volume, plan, deadline):
                landed += 1
                print(f"kill {landed}/{kills}: volume {number + 1}, {kill.victim} at step {kill.step} of {kill.stage}", flush=True)
        finally:
            volume.end()
        seen.append(ended_with(volume))
    return Outcome(landed, expected, seen)


def without_training(volume: Volume, path: Path) -> Volume:
    """A copy of the volume that has to train again."""
    shutil.copytree(volume.path, path, symlinks=True)
    for stage in STAGES:
        for made in path.glob(f"steps/{stage}-*"):
            shutil.rmtree(made)
    return Volume(path, volume.values)


def planned(volume: Volume, kills: int, rng: random.Random) -> list[Kill]:
    """Random moments, in order, and random victims."""
    lengths = [volume.values["stages"][stage]["run"]["steps"] for stage in STAGES]
    moments = sorted(rng.randrange(int(sum(lengths) * EARLIEST), int(sum(lengths) * LATEST)) for _ in range(kills))
    plan = []
    for moment in moments:
        stage = next(index for index in range(len(STAGES)) if moment < sum(lengths[: index + 1]))
        plan.append(Kill(STAGES[stage], max(1, moment - sum(lengths[:stage])), rng.choice(VICTIMS)))
    return plan


def batter(volume: Volume, plan: Sequence[Kill], deadline: float) -> Iterator[Kill]:
    """Run the pipeline to its end through every kill, each yielded when it was done."""
    command, struck, quiet = volume.start(), 0.0, False
    for kill in plan:
        while not (victims := _victims(volume, kill, command, since=struck)):
            command, quiet = _going(volume, command, quiet, deadline)
            if quiet and command.process.poll() == 0:
                raise CampaignError(f"the pipeline completed before {kill} was done")
            time.sleep(POLL_S)
        struck, quiet = time.time(), False
        for victim in victims:
            victim.kill()
        yield kill
    while command.process.poll() != 0:
        command, quiet = _going(volume, command, quiet, deadline)
        time.sleep(POLL_S)


def _going(volume: Volume, command: Command, quiet: bool, deadline: float) -> tuple[Command, bool]:
    """The command, or the same started again where it failed because of a kill; and whether nothing was killed since its start."""
    if time.monotonic() > deadline:
        raise CampaignError(f"out of time; the end of the command's output:\n{command.log.read_text()[-2000:]}")
    status = command.process.poll()
    if status is None or status == 0:
        return command, quiet or status == 0
    if quiet:
        raise CampaignError(f"ended with status {status} though nothing was killed:\n{command.log.read_text()[-2000:]}")
    return volume.start(), True


def _victims(volume: Volume, kill: Kill, command: Command, *, since: float) -> list[psutil.Process]:
    """What is to be killed now; empty while the moment has not come. A stage that has gone past it is as good."""
    for folder in volume.path.glob(f"steps/{kill.stage}-*"):
        job = of_job(folder)
        if job and progress(folder, since=since) >= kill.step:
            return processes_of(volume, kill.victim, command, job)
    return []


def processes_of(volume: Volume, victim: str, command: Command, job: list[psutil.Process]) -> list[psutil.Process]:
    """Processes of the stack, of the `command` itself or of its `job`, by one of the names in VICTIMS."""
    if victim == "command":
        return [psutil.Process(command.process.pid)] if command.process.poll() is None else []
    if victim == "worker":
        return volume.processes("worker", "fvlm-gpu")
    if victim == "fork server":
        return [process for process in volume.processes("infra.fork_server") if not process.name().startswith("fvlm-")]
    if victim == "server":
        return volume.processes("infra.server")
    if victim in ("pipeline's run", "phase's run"):
        runs = sorted(volume.processes("prefect.engine"), key=lambda process: process.create_time())
        return runs[:1] if victim == "pipeline's run" else runs[-1:]
    guards = [process for process in job if process.name() == guard.NAME]
    launchers = [child for one in guards for child in one.children()]
    return {"guard": guards, "torchrun": launchers, "rank": [one for one in job if one not in (*guards, *launchers)]}[victim]


def ended_with(volume: Volume) -> Ended:
    """Digests of a finished volume's stages."""
    folders = {stage: volume.step("train", stage) for stage in STAGES}
    return Ended(
        weights={stage: sha256_file(folder / MODEL_FOLDER / "model.safetensors") for stage, folder in folders.items()},
        order={stage: order_of(folder / METRICS_FILE) for stage, folder in folders.items()},
    )


def order_of(metrics: Path) -> str:
    """Digest of everything that a run reported but its timings."""
    with metrics.open(newline="") as stream:
        rows = [{name: value for name, value in row.items() if name not in TIMINGS} for row in csv.DictReader(stream)]
    if not rows:
        raise CampaignError(f"{metrics} is empty")
    return hash_json(rows)


def measurements(outcome: Outcome) -> list[Measurement]:
    """The outcome in the benchmarks' form."""
    never = "a run that was never stopped"
    return [
        Measurement("resume", "kills", outcome.kills, "SIGKILLs"),
        Measurement("resume", "weights_equal", float(outcome.weights_equal), "1 or 0", reference=never),
        Measurement("resume", "order_equal", float(outcome.order_equal), "1 or 0", reference=never),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The campaign on fresh volumes; 1 where weights or order differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--volumes", type=int, default=3, help="pipelines that the kills are spread over")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--time-limit-s", type=float, default=3600, help="of the kills; the undisturbed run comes before")
    parser.add_argument("--json", action="store_true", help="end with one JSON object a line")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fvlm-kills-") as folder:
        undisturbed = Volume(Path(folder) / "undisturbed")
        lengthen(undisturbed.values, **dict.fromkeys(STAGES, STAGE_STEPS))
        print("the undisturbed pipeline runs", flush=True)
        try:
            first = undisturbed.run()
            if first.status:
                raise CampaignError("the undisturbed pipeline failed: see its output above")
            outcome = campaign(
                undisturbed,
                Path(folder),
                kills=options.kills,
                volumes=options.volumes,
                seed=options.seed,
                time_limit_s=options.time_limit_s,
            )
        except CampaignError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            undisturbed.end()
    for name, ended in {"undisturbed": outcome.undisturbed, **{f"volume {n}": one for n, one in enumerate(outcome.volumes, 1)}}.items():
        for stage in STAGES:
            print(f"{name}: {stage}: weights {ended.weights[stage][:16]}, order {ended.order[stage][:16]}")
    show(measurements(outcome), as_json=options.json)
    return 0 if outcome.weights_equal and outcome.order_equal and outcome.kills == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
