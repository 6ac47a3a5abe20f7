"""`fvlm infra`, `fvlm volume` and `fvlm board` against an emulated RunPod."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
import yaml
from cyclopts import ValidationError
from prefect.client.orchestration import get_client

from deployments.checks import PROFILES, load_profile
from deployments.cli import app
from deployments.remote import refuse_longer
from flows.reap import reap
from flows.registry import PHASES
from fvlm_core.dotted import with_changes
from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest, file_entries
from fvlm_core.tables import Table
from infra.board import Board
from infra.budget import Budget
from infra.errors import InfraError
from infra.runpod.client import RunPod
from infra.runpod.emulator.cloud import Delays
from infra.runpod.emulator.faults import Fault
from infra.runpod.emulator.s3 import S3Side
from infra.runpod.emulator.server import Emulator
from infra.runpod.models import CpuRequest, CreatePod, Mounts, NetworkMount, Pod
from infra.runpod.naming import NO_RUN, PodName
from infra.runpod.smoke import ended
from infra.stack import Stack
from infra.store import FolderStore
from tasks.phase import EarlierResults, PhaseManifest, Shown
from tasks.rented import at_live_prices
from tasks.steps import StepResult
from tests.infra.runpod.conftest import KEY

Fvlm = Callable[..., str]


class EnoughError(Exception):
    """Ends a command that would go on for ever."""


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Emulator]:
    with Emulator(tmp_path / "cloud", key=KEY, delays=Delays(0.05, 0.05, 0.05)) as cloud:
        yield cloud


@pytest.fixture
def fvlm(cloud: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Fvlm]:
    for name, value in (("RUNPOD_API_KEY", KEY), ("RUNPOD_S3_ACCESS_KEY", "user_a"), ("RUNPOD_S3_SECRET_KEY", "rps_a")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with S3Side(lambda: {one.id: one.folder for one in cloud.cloud.volumes.values()}, access_key="user_a", secret_key="rps_a") as s3:
        values = yaml.safe_load((PROFILES / "ci.yaml").read_text())
        rental = {"runpod_url": cloud.url, "s3_url": s3.url, "volume_gb": 100, "data_centers": ["EU-RO-1", "US-KS-2"], "gpu_count": 1}
        gpu = {"name": "g", "type": "runpod", "job_variables": {"gpus": ["NVIDIA A100-SXM4-80GB"]}}
        values["machine"] |= {"rental": rental, "pools": {"gpu": gpu}}
        profile = tmp_path / "rented.yaml"
        profile.write_text(yaml.safe_dump(values))

        def run(*words: str) -> str:
            assert app([*words, "--profile", str(profile)], exit_on_error=False, result_action="return_value") == 0
            return capsys.readouterr().out

        yield run


def test_setting_up_working_and_taking_down(fvlm: Fvlm, cloud: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = fvlm("infra", "setup")
    (volume,) = cloud.cloud.volumes.values()
    assert volume.data_center == "US-KS-2", "where the wanted GPU is in stock, not the first one listed"
    assert "$7.00 a month" in shown
    fvlm("infra", "setup")
    assert len(cloud.cloud.volumes) == 1, "found again"
    assert (volume.folder / "fvlm-volume.json").exists()
    assert len(list((volume.folder / "code").glob("*.tar.gz"))) == 1

    fvlm("board", "is anybody there?")
    assert "LOCAL\nis anybody there?" in fvlm("board")
    (tmp_path / "videos.csv").write_text("url,caption\n")
    fvlm("volume", "put", str(tmp_path / "videos.csv"), "sources/videos.csv")
    assert (volume.folder / "sources" / "videos.csv").read_text() == "url,caption\n"
    for made, text in (("2026-01-01", "old"), ("2026-01-02", "new")):
        folder = volume.folder / "steps" / f"release-{text}"
        folder.mkdir(parents=True)
        (folder / "report.html").write_text(text)
        (folder / "manifest.json").write_text(f'{{"created_at": "{made}"}}')
    fvlm("volume", "get", "report", str(tmp_path / "home"))
    assert [path.read_text() for path in (tmp_path / "home").rglob("report.html")] == ["new"]
    assert "sources/videos.csv" in fvlm("volume", "ls", "sources")
    with pytest.raises(UserError, match="there is no 'nothing' on the volume"):
        fvlm("volume", "get", "nothing")

    name = PodName.new(volume.id, 2_000_000_000, uuid4())
    mounts = Mounts(network=[NetworkMount(volumeId=volume.id, path=str(volume.folder))])
    ledger = Budget(FolderStore(volume.folder), cap_usd=500, reserve_usd=15)
    with RunPod(KEY, cloud.url) as client:
        cpu = CpuRequest(id="cpu3c", vcpuCount=2)
        ledger.reserve(str(name), usd_per_hour=0.06, until=ledger.clock() + 3600, phase="train")
        pod = client.create_pod(CreatePod(name=str(name), image="i", args="sleep 600", cpu=cpu, mounts=mounts))
        ledger.started(str(name), pod.id, usd_per_hour=pod.cost)
        shown = fvlm("infra", "budget")
        assert "train" in shown
        assert "$0.06" in shown
        assert fvlm("infra", "reap") == "", "it is young, and nothing says that its run is over"
        server = PodName.new(volume.id, 2_000_000_000, NO_RUN)
        client.create_pod(CreatePod(name=str(server), image="i", args="sleep 600", cpu=cpu, mounts=mounts))
        monkeypatch.setattr("infra.runpod.remote.STOP_TIMEOUT_S", 0.0)
        shown = " ".join(fvlm("infra", "down").split())
        assert f"pod {pod.id}: ended" in shown
        assert client.pods() == [], "the server's pod too"
        assert re.search(r"train 1 0 \$0[.][0-9]+ \$0[.]00", shown), "what each phase cost"
        assert re.search(r"spent \$0[.][0-9]+ .* of \$485\.00", shown)
        assert "stays, for $7.00 a month" in shown
    assert not any(entry.running for entry in ledger.entries() if entry.kind == "pod")


def test_pods_are_ended_where_the_ledger_cannot_be_reached(
    fvlm: Fvlm, cloud: Emulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fvlm("infra", "setup")
    (volume,) = cloud.cloud.volumes.values()
    mounts = Mounts(network=[NetworkMount(volumeId=volume.id, path=str(volume.folder))])
    cpu = CpuRequest(id="cpu3c", vcpuCount=2)

    def rent(deadline: int, run: UUID) -> Pod:
        name = str(PodName.new(volume.id, deadline, run))
        return client.create_pod(CreatePod(name=name, image="i", args="sleep 600", cpu=cpu, mounts=mounts))

    with RunPod(KEY, cloud.url, sleep=lambda _: None) as client:
        monkeypatch.setenv("RUNPOD_S3_SECRET_KEY", "")
        late = rent(1, uuid4())
        shown = fvlm("infra", "reap")
        assert "the ledger cannot be reached: no key for the volume's S3 API" in shown
        assert f"pod {late.id}: it is" in shown
        rent(2_000_000_000, uuid4())
        rent(2_000_000_000, NO_RUN)
        assert "stays, for $7.00 a month" in fvlm("infra", "down")
        assert client.pods() == []

        late, waits = rent(1, uuid4()), []
        cloud.cloud.faults.arm(Fault("away", seconds=600))
        monkeypatch.setattr(RunPod, "__init__", partialmethod(RunPod.__init__, attempts=1))

        def wait(seconds: float) -> None:
            waits.append(seconds)
            cloud.cloud.faults.clear()
            if len(waits) > 1:
                raise EnoughError

        monkeypatch.setattr("deployments.machines.time", SimpleNamespace(sleep=wait))
        with pytest.raises(EnoughError):
            fvlm("infra", "reap", "--every", "7")
        shown = capsys.readouterr().out
        assert "retrying in 7 s: RunPod: upstream unavailable" in shown, "it outlives an outage"
        assert f"pod {late.id}: it is" in shown
        assert client.pods() == []


@pytest.mark.parametrize("command", ["down", "reap"])
def test_where_there_is_no_such_volume_the_pods_that_may_be_its_own_are_named(fvlm: Fvlm, cloud: Emulator, command: str) -> None:
    name = str(PodName.new("gone", 2_000_000_000, uuid4()))
    with RunPod(KEY, cloud.url) as client:
        pod = client.create_pod(CreatePod(name=name, image="i", args="sleep 600", cpu=CpuRequest(id="cpu3c", vcpuCount=2)))
    with pytest.raises(InfraError, match=rf"nothing was ended, and pods cost on: {pod.id} \({name}\)") as caught:
        fvlm("infra", command)
    assert "console.runpod.io/pods; make it" in caught.value.fix


def test_a_board_that_is_followed_shows_entries_that_come_late(
    fvlm: Fvlm, cloud: Emulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """S3 lists a pod's entry minutes after it was written, and a pod's clock may be behind."""
    fvlm("infra", "setup")
    (volume,) = cloud.cloud.volumes.values()
    fvlm("board", "now")
    late = iter([-3600.0, 0.0])

    def wait(_seconds: float) -> None:
        offset = next(late, None)
        if offset is None:
            raise EnoughError
        Board(FolderStore(volume.folder), "RUNPOD", clock=lambda: time.time() + offset).post(f"written {offset:.0f} s from now")

    monkeypatch.setattr("deployments.machines.time", SimpleNamespace(sleep=wait))
    with pytest.raises(EnoughError):
        fvlm("board", "--follow")
    shown = capsys.readouterr().out
    assert [shown.count(text) for text in ("now\n", "written -3600 s from now", "written 0 s from now")] == [3, 1, 1]


def test_a_volume_is_looked_at_through_s3(fvlm: Fvlm, cloud: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    fvlm("infra", "setup")
    (volume,) = cloud.cloud.volumes.values()
    config, phase = load_profile(str(tmp_path / "rented.yaml")), PHASES["precompute"]
    clips, *_ = phase.steps(config, EarlierResults(volume.folder, {}, {}, {}))
    folder = volume.folder / clips.folder
    folder.mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(b"0" * 2_000_000)
    manifest = Manifest(name=clips.name, settings_hash="", files=file_entries(folder, ["*.mp4"]), seconds=1234.0).write(folder)
    made = {clips.name: StepResult(name=clips.name, folder=clips.folder, digest=manifest.digest)}
    closing = Table(title="Found", head=["share of right answers"], rows=[["42"]])
    shown = Shown(text="eleven videos", closing=[closing], outputs={"report": "steps/x/report.html"})
    PhaseManifest(name=phase.name, settings_hash="", steps=made, shown=shown).write(phase.folder(config, volume.folder))

    for _ in range(2):  # the second time from what was fetched
        seen = fvlm("status")
        for words in ("eleven videos", "Found", "42", "fvlm volume get steps/x/report.html"):
            assert words in seen
    (here,) = (tmp_path / "caches" / "fvlm").glob("*/steps/*/clip.mp4")
    assert here.stat().st_size == 2_000_000
    assert here.stat().st_blocks < 100, "large files are not fetched"
    assert re.search(r"precompute\W+1 of \d steps\W+cached", fvlm("plan"))
    (folder / "clip.mp4").write_bytes(b"0")
    assert "damaged" in fvlm("plan"), "a file that has another size on the volume"
    (folder / "manifest.json").unlink()
    assert "begun, not finished" in fvlm("plan")
    shutil.rmtree(folder)
    assert re.search(rf"{clips.name}\W+will run\W+not made yet", fvlm("plan"))


def test_a_plan_at_the_prices_of_today(fvlm: Fvlm, cloud: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, wanted = tmp_path / "rented.yaml", {"gpus": ["NVIDIA A100-SXM4-80GB"], "gpu_count": 2}
    pools = {"gpu": wanted, "cpu": {"cpus": ["cpu5c"], "vcpus": 8}, "pipeline": {"cpus": ["cpu3c"]}}
    made = {name: {"name": name, "type": "runpod", "job_variables": variables} for name, variables in pools.items()}
    values = with_changes(yaml.safe_load(profile.read_text()), {"machine.pools": made, "machine.rental.gpu_count": 2})
    values["machine"]["ranks"] = 2
    profile.write_text(yaml.safe_dump(values))
    rental = at_live_prices(load_profile(str(profile)))
    assert (rental.gpu_usd_per_hour, rental.cpu_usd_per_hour, rental.pipeline_usd_per_hour) == pytest.approx((3.78, 0.28, 0.06))
    assert "Plan in dollars" in fvlm("plan", "--live")
    monkeypatch.setenv("RUNPOD_API_KEY", "")
    with pytest.raises(InfraError, match="no key for RunPod's API"):
        fvlm("plan", "--live")


def test_the_scheduled_reaper_shows_where_the_money_is(fvlm: Fvlm, prefect_api: Stack, tmp_path: Path) -> None:
    fvlm("infra", "setup")
    reap(config=load_profile(str(tmp_path / "rented.yaml")))
    with get_client(sync_client=True) as client:
        found = {one.key: one for one in client.read_artifacts()}
    assert "of $485.00 (cap $500.00 less a reserve of $15.00)" in (found["budget-table"].description or "")
    assert str(found["budget-plot"].data).startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("size_gb", "data_center", "says"),
    [
        (100, "EUR-IS-1", "the volume fvlm is in EUR-IS-1, and pods are wanted in EU-RO-1, US-KS-2"),
        (50, "US-KS-2", "the volume fvlm has 50 GB, and 100 GB are wanted"),
    ],
)
def test_a_volume_that_is_not_as_wanted_is_refused(
    fvlm: Fvlm, cloud: Emulator, tmp_path: Path, size_gb: int, data_center: str, says: str
) -> None:
    cloud.cloud.adopt_volume("fvlm", size_gb, data_center, tmp_path / "volume")
    with pytest.raises(InfraError, match=says):
        fvlm("infra", "setup")


def test_what_is_wrong_is_said(fvlm: Fvlm, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfraError, match="there is no volume called 'fvlm'; there are: none"):
        fvlm("infra", "budget")
    monkeypatch.delenv("RUNPOD_S3_SECRET_KEY")
    with pytest.raises(InfraError, match="no key for the volume's S3 API"):
        fvlm("infra", "setup")
    monkeypatch.delenv("RUNPOD_API_KEY")
    with pytest.raises(InfraError, match="no key for RunPod's API"):
        fvlm("infra", "setup")
    for words in (("up", "--days", "-1"), ("reap", "--every", "-5")):
        with pytest.raises(ValidationError, match=f"for {words[1]}. Must be > 0"):
            fvlm("infra", *words)
    with pytest.raises(UserError, match="the profile laptop rents no machines"):
        app(["infra", "budget", "--profile", "laptop"], exit_on_error=False, result_action="return_value")


def test_the_first_dollar_answers_what_no_document_settles(
    fvlm: Fvlm, cloud: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fvlm("infra", "setup")
    (volume,) = cloud.cloud.volumes.values()
    pool = {"name": "p", "type": "runpod", "job_variables": {"cpus": ["cpu3c"], "free_volume_gb": 0.0}}
    profile = tmp_path / "rented.yaml"
    values = yaml.safe_load(profile.read_text())
    values["machine"]["pools"]["pipeline"] = pool
    values["machine"]["rental"]["mount_path"] = str(volume.folder)
    profile.write_text(yaml.safe_dump(values))
    monkeypatch.setattr("infra.runpod.smoke.LOOK_S", 0.1)
    cloud.cloud.faults.arm(Fault("pod_key_refused", times=1))
    shown = " ".join(fvlm("infra", "smoke", "--yes").replace("│", " ").split())
    for words in (
        "at most $0.03;",
        "There are no longer any instances available",
        "at most 0 s after it was written",
        "is started again; the pod is RUNNING and costs $0.06/h",
        "a pod ends itself with its own key yes: POST",
        "HTTP Error 403: Forbidden",  # what it says of the way that works may be cut off by its own end
        "credit of the account",
    ):
        assert words in shown, shown
    assert RunPod(KEY, cloud.url).pods() == []
    ledger = Budget(FolderStore(volume.folder), cap_usd=500, reserve_usd=15)
    assert [entry.running for entry in ledger.entries() if entry.phase == "smoke"] == [False, False]


def test_a_server_that_ends_sooner_than_is_asked_for_is_said() -> None:
    name = PodName.new("volume", time.time() + 86_400, NO_RUN)
    pod = Pod.model_validate({"id": "a", "name": str(name), "status": "RUNNING", "createdAt": "2026-11-25T00:00:00Z"})
    for days in (None, 0.5, 1.0):
        refuse_longer(pod, days)
    with pytest.raises(UserError, match="runs already, and ends sooner than in 7 days") as caught:
        refuse_longer(pod, 7)
    assert "fvlm infra up --days 7" in caught.value.fix


def test_a_pod_that_a_first_test_left_is_ended(cloud: Emulator, tmp_path: Path) -> None:
    """One whose creation was interrupted: nobody else knows of it."""
    run, said = uuid4(), []
    budget = Budget(FolderStore(tmp_path), cap_usd=10, reserve_usd=1)
    with RunPod(KEY, cloud.url) as client:
        mine, other = (PodName.new("volume", time.time() + 900, owner) for owner in (run, uuid4()))
        with ended(client, budget, run, said.append):
            for name in (mine, other):
                client.create_pod(CreatePod(name=str(name), image="i", args="sleep 60", cpu=CpuRequest(id="cpu3c", vcpuCount=2)))
        assert [pod.name for pod in client.pods()] == [str(other)]
    assert len(said) == 1


def test_a_deployment_on_rented_machines_runs_this_checkout(
    fvlm: Fvlm, cloud: Emulator, prefect_api: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = prefect_api.client_environment()
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, known[name])
    fvlm("infra", "setup")
    deployed = fvlm("deploy", "--volume", str(tmp_path / "volume")).split()
    (name,) = [name for name in deployed if name.startswith("train/")]
    with get_client(sync_client=True) as client:
        code = client.read_deployment_by_name(name).job_variables["code"]
    (volume,) = cloud.cloud.volumes.values()
    assert (volume.folder / "code" / f"{code}.tar.gz").is_file()
