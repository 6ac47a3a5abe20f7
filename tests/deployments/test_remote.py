"""`fvlm infra up` and `down`: a real Prefect server with its workers on an emulated pod, a flow run on another, what is left of both."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.types.entrypoint import EntrypointType
from pydantic import SecretStr

from deployments.checks import PROFILES
from fvlm_core.errors import is_user_error
from infra.api import healthy
from infra.locks import try_lock
from infra.prefect_settings import without
from infra.runpod.account import Account, Place
from infra.runpod.client import RunPod
from infra.runpod.emulator.s3 import S3Side
from infra.runpod.emulator.server import Emulator
from infra.runpod.naming import owner
from infra.runpod.pod import CODE
from infra.runpod.reaper import reap
from infra.runpod.remote import server_pod
from infra.runpod.server_pod import ADDRESS, DATABASE, ServerPod
from infra.runpod.setup import mark
from infra.stack import REPOSITORY, volume_tag
from infra.store import FolderStore
from infra.volume import HOME, volume_id
from tests.infra.runpod.conftest import KEY, QUICK
from tests.infra.runpod.tiny_flow import tiny
from tests.waiting import wait_until

POOL = "everything"


class Remote:
    """The `fvlm` command with a profile on an emulated RunPod."""

    def __init__(self, folder: Path, cloud: Emulator, s3: str) -> None:
        self.volume, self.cloud = folder / "volume", cloud
        there = cloud.cloud.adopt_volume("fvlm", 100, "US-KS-2", self.volume)
        self.client = RunPod(KEY, cloud.url)
        mark(FolderStore(self.volume), self.client.volumes()[0])
        self.id = there.id
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        here = {"python": sys.executable, "code_folder": str(REPOSITORY), "poll_s": 0.5, "free_volume_gb": 0.0, "max_runtime_h": 1.0}
        self.variables = here | {"cpus": ["cpu3c"], "env": {"OMP_NUM_THREADS": "1"}}
        rental = {"runpod_url": cloud.url, "s3_url": s3, "mount_path": str(self.volume), "server_port": port, "server_days": 0.1}
        rental |= {"server_address": "http://127.0.0.1:{port}"}
        pool = {"name": POOL, "type": "runpod", "job_variables": self.variables}
        values = yaml.safe_load((PROFILES / "ci.yaml").read_text())
        values["machine"] |= {"rental": rental, "pools": dict.fromkeys(("pipeline", "cpu", "gpu"), pool)}
        self.profile = folder / "remote.yaml"
        self.profile.write_text(yaml.safe_dump(values))
        self.deployed = {"volume": there.id, "mount_path": str(self.volume), "runpod_url": cloud.url}

    def __call__(self, *words: str) -> str:
        command = [sys.executable, "-m", "deployments.cli", *words, "--profile", str(self.profile)]
        keys = {"RUNPOD_API_KEY": KEY, "RUNPOD_S3_ACCESS_KEY": "user_a", "RUNPOD_S3_SECRET_KEY": "rps_a"}
        done = subprocess.run(command, cwd=REPOSITORY, env=without(os.environ) | keys, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        lines = [line.line for pod in self.cloud.cloud.pods.values() for line in pod.container.log.lines]
        return "\n".join([*lines, *(path.read_text()[-2000:] for path in self.volume.glob("prefect/*.log"))])


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    with Emulator(tmp_path / "cloud", key=KEY, delays=QUICK) as cloud:
        folders = cloud.cloud.volumes
        with S3Side(lambda: {one.id: one.folder for one in folders.values()}, access_key="user_a", secret_key="rps_a") as s3:
            yield Remote(tmp_path, cloud, s3.url)


@pytest.mark.slow(reason="starts a server twice, workers, and two flow runs")
def test_a_server_on_a_pod_runs_flows_ends_and_goes_on(remote: Remote, tmp_path: Path) -> None:
    shown = remote("infra", "up", "--days", "0.05")
    (pod,) = remote.client.pods()
    assert f"Prefect UI: {remote.address}" in shown
    found = server_pod(Account(Place(remote.id, remote.cloud.url, key=SecretStr(KEY))))
    assert found, "what a second `up` finds"
    assert found.id == pod.id
    assert reap(remote.client, owner(remote.id), over=lambda _: "unknown", young_s=0.0) == [], "the reaper lets it be"
    known = dict(line.removeprefix("export ").split("=", 1) for line in remote("infra", "env").splitlines())
    settings = {PREFECT_API_URL: known["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: known["PREFECT_API_AUTH_STRING"]}
    with temporary_settings(settings):
        made = tiny.to_deployment(
            "remote", work_pool_name=POOL, entrypoint_type=EntrypointType.MODULE_PATH, job_variables=remote.variables | remote.deployed
        ).apply()
        with get_client(sync_client=True) as client:
            run = client.create_flow_run_from_deployment(made, parameters={"folder": str(tmp_path / "work")}).id
            wait_until(lambda: (now := client.read_flow_run(run).state) and now.is_final(), f"the run to end\n{remote.logs()}", poll_s=0.5)
            assert (state := client.read_flow_run(run).state)
            assert state.is_completed(), remote.logs()
            tags = [volume_tag(volume_id(remote.volume))]
            left = client.create_flow_run_from_deployment(made, parameters={"folder": str(tmp_path / "left"), "pieces": 1000}, tags=tags).id
            wait_until((tmp_path / "left" / "piece1").exists, f"another run to work\n{remote.logs()}")
    assert len(list((tmp_path / "work").glob("piece*"))) == 3
    files = [path for path in remote.volume.rglob("*") if path.is_file() and not path.is_relative_to(remote.volume / CODE)]
    everything = "\n".join(path.read_text(errors="replace") for path in files)
    assert KEY not in everything + remote.logs(), "the account's key is in no file and no log"

    remote("infra", "down")
    assert remote.client.pods() == []
    assert not (remote.volume / ADDRESS).exists()
    with closing(sqlite3.connect(remote.volume / DATABASE)) as database:
        known_runs = dict(database.execute("select id, state_type from flow_run where state_type != 'SCHEDULED'").fetchall())
        said = database.execute("select s.message from flow_run_state s join flow_run r on s.id = r.state_id where r.id = ?", [str(left)])
        assert is_user_error(said.fetchone()[0]), "a pipeline does not start it again"
    assert (known_runs[str(run)], known_runs[str(left)]) == ("COMPLETED", "CRASHED"), "nothing goes on in the records that has no pod"

    # what the next pod runs
    port = urlsplit(remote.address).port or 0
    home = ServerPod(remote.volume, tmp_path / "disk", port=port, address=remote.address, pools={}, environment=without(os.environ))
    serving = threading.Thread(target=home.run)
    serving.start()
    try:
        wait_until(lambda: healthy(f"{remote.address}/api"), "the next server")
        with temporary_settings(settings), get_client(sync_client=True) as client:
            assert client.read_flow_run(run).deployment_id == made, "what an earlier server knew, this one knows"
    finally:
        home.over.set()
        serving.join()


def test_a_second_server_that_never_served_leaves_the_first_s_records(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / DATABASE).parent.mkdir(parents=True)
    with closing(sqlite3.connect(volume / DATABASE)) as old:
        old.execute("create table known (a)")
    kept = try_lock(volume / HOME / "stack.lock")
    assert kept is not None
    second = ServerPod(volume, tmp_path / "disk", port=1, address="http://x", pools={}, environment=without(os.environ))
    serving = threading.Thread(target=second.run)
    serving.start()
    wait_until(second.database.exists, "it to begin with the old records")
    (volume / DATABASE).write_bytes(b"new")
    (volume / ADDRESS).write_bytes(b"of the first")
    second.over.set()
    serving.join()
    kept.release()
    assert [(volume / name).read_bytes() for name in (DATABASE, ADDRESS)] == [b"new", b"of the first"]


def test_the_copy_of_the_database_is_complete_while_it_is_written(tmp_path: Path) -> None:
    home = ServerPod(tmp_path / "volume", tmp_path / "disk", port=1, address="http://x", pools={}, environment={})
    home.restore()
    with closing(sqlite3.connect(home.database, isolation_level=None)) as database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table pairs (a, b)")
        database.execute("insert into pairs values (1, 1)")
        database.execute("begin")
        database.execute("insert into pairs values (2, 2)")
        home.save()
        database.execute("commit")
    with closing(sqlite3.connect(tmp_path / "volume" / DATABASE)) as copied:
        assert copied.execute("select * from pairs").fetchall() == [(1, 1)]
    shutil.rmtree(tmp_path / "disk")
    home.restore()
    with closing(sqlite3.connect(home.database)) as restored:
        assert restored.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert restored.execute("select * from pairs").fetchall() == [(1, 1)]
    assert not list((tmp_path / "volume").rglob(".*")), "no temporary file is left"
