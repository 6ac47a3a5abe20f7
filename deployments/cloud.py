"""`--cloud emulator`: rehearse a run on rented machines. The work pools become pools of pods on a RunPod emulator in this process."""

import contextlib
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from infra.runpod.account import KEY_VARIABLE, S3_ACCESS_VARIABLE, S3_SECRET_VARIABLE
from infra.runpod.bills import reconcile
from infra.runpod.client import RunPod
from infra.runpod.emulator.cloud import Delays
from infra.runpod.emulator.s3 import S3Side
from infra.runpod.emulator.server import Emulator
from infra.runpod.naming import owner
from infra.runpod.reaper import reap
from infra.runpod.setup import mark
from infra.stack import REPOSITORY
from infra.store import FolderStore
from infra.volume import HOME
from tasks.config import PipelineConfig
from tasks.machine import Pool, Pools
from tasks.rental import Assumed, Rental
from tasks.rented import bill_table, budget_of, budget_table

KEY, S3_ACCESS, S3_SECRET = "emulated", "user_emulated", "rps_emulated"
"""Keys of the emulated account."""
DATA_CENTER = "US-KS-2"
VOLUME_GB = 100
GPUS = ["NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"]
GPU_USD_PER_HOUR = 1.64
"""Price of the first GPU."""
CPUS = ["cpu3c"]
START_S = 6.0
"""Start and stop overhead of an emulated pod around its flow run; measured on two idle cores, see docs/log.md."""


@dataclass(frozen=True)
class Rehearsal:
    """An emulated RunPod with one volume."""

    config: PipelineConfig
    environment: dict[str, str]
    """Environment variables with which the workers reach the emulator."""
    emulator: Emulator
    rental: Rental

    def print_bill(self, console: Console) -> None:
        """End all pods, compare the ledger with the emulator's bill, and print both."""
        ledger = budget_of(self.rental, FolderStore(Path(self.rental.mount_path)))
        with RunPod(KEY, self.emulator.url) as client:
            # the workers ended with the server, possibly before the last pod
            reap(client, owner(self.rental.volume), over=lambda run: "the rehearsal is over", budget=ledger, young_s=0.0)
            for line in reconcile(client, ledger):
                console.print(line, highlight=False, soft_wrap=True)
        position, now = ledger.position(), ledger.clock()
        console.print(budget_table(position, now).terminal())
        if table := bill_table(FolderStore(Path(self.rental.mount_path)), position, now):
            console.print(table.terminal())


@contextlib.contextmanager
def rehearsal(config: PipelineConfig, volume: Path, *, delays: Delays | None = None) -> Generator[Rehearsal]:
    """Run the emulator with the folder `volume` as its network volume; yields it with the adapted profile."""
    cloud = volume / HOME / "emulator"
    with Emulator(cloud, key=KEY, delays=delays) as emulator:
        there = emulator.cloud.adopt_volume("fvlm", VOLUME_GB, DATA_CENTER, volume)
        folders = {there.id: there.folder}
        with S3Side(lambda: folders, access_key=S3_ACCESS, secret_key=S3_SECRET) as s3, RunPod(KEY, emulator.url) as client:
            mark(FolderStore(volume), client.volumes()[0])
            rental = Rental(
                volume=there.id,
                volume_gb=VOLUME_GB,
                data_centers=[DATA_CENTER],
                mount_path=str(volume),
                runpod_url=emulator.url,
                s3_url=s3.url,
                gpu_count=config.machine.ranks,
                gpu_usd_per_hour=GPU_USD_PER_HOUR * config.machine.ranks,
                cpu_usd_per_hour=0.24,
                days=0.005,
                assumed=Assumed(start_h=START_S / 3600),
            )
            machine = config.machine.model_copy(update={"pools": pools(config.machine.ranks), "rental": rental, "crash_retries": 2})
            environment = {
                KEY_VARIABLE: KEY,
                S3_ACCESS_VARIABLE: S3_ACCESS,
                S3_SECRET_VARIABLE: S3_SECRET,
            }
            yield Rehearsal(config.model_copy(update={"machine": machine}), environment, emulator, rental)


def pools(gpu_count: int) -> Pools:
    """Work pools of emulated pods, which use this machine's Python environment."""
    here = {"python": sys.executable, "code_folder": str(REPOSITORY), "poll_s": 1.0, "free_volume_gb": 0.5, "max_runtime_h": 6.0}
    cpu = here | {"cpus": CPUS, "max_usd_per_hour": 1.0}
    gpu = here | {"gpus": GPUS, "gpu_count": gpu_count, "max_usd_per_hour": 2.0 * gpu_count}
    return Pools(
        cpu=Pool(name="fvlm-emulated-cpu", type="runpod", job_variables=cpu | {"vcpus": 8}),
        gpu=Pool(name="fvlm-emulated-gpu", type="runpod", limit=1, job_variables=gpu),
        pipeline=Pool(name="fvlm-emulated-pipeline", type="runpod", job_variables=cpu | {"vcpus": 2}),
    )
