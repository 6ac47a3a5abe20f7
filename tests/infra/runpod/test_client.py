"""The client and the emulator, both checked against RunPod's OpenAPI document, through what goes wrong on the way."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from pydantic import ValidationError

from infra.runpod.client import RunPod
from infra.runpod.emulator.faults import Fault
from infra.runpod.emulator.server import Emulator
from infra.runpod.errors import (
    InvalidRequestError,
    NoAccessError,
    NoCapacityError,
    NotFoundError,
    TooManyRequestsError,
    UnavailableError,
    WrongKeyError,
    WrongStateError,
    raise_for,
)
from infra.runpod.models import CpuRequest, CreatePod, CreateVolume, GpuRequest, Mounts, NetworkMount, Pod, Status, Volume
from infra.runpod.poller import Poller
from tests.infra.runpod.conftest import KEY
from tests.infra.runpod.contract import Witness, request_faults
from tests.waiting import wait_until

A100 = "NVIDIA A100 80GB PCIe"
SLEEP = "sleep 600"


def small(name: str = "fvlm-test", args: str = SLEEP, **more: object) -> CreatePod:
    return CreatePod.model_validate(
        {"name": name, "image": "runpod/base:1.0.2", "args": args, "cpu": {"id": "cpu3c", "vcpuCount": 2}} | more
    )


def running(client: RunPod, pod: Pod) -> Pod:
    wait_until(lambda: client.pod(pod.id).status == Status.RUNNING, "the pod to run")
    return client.pod(pod.id)


def test_every_call_and_every_answer_fits_the_document(client: RunPod, witness: Witness, volume: Volume, emulator: Emulator) -> None:
    mount = Mounts(network=[NetworkMount(volumeId=volume.id, path=str(emulator.cloud.volumes[volume.id].folder))])
    gpu = GpuRequest(id=A100, count=2, minCudaVersion="12.8")
    request = CreatePod(name="fvlm-a", image="i", args=SLEEP, env={"A": "1"}, gpu=gpu, mounts=mount, dataCenterIds=["US-KS-2"])
    pod = client.create_pod(request)
    assert (pod.cost, pod.gpu and pod.gpu.count, pod.dataCenterId) == (2 * 1.64, 2, "US-KS-2")
    alive = running(client, pod)
    assert alive.runtime is not None
    assert len(alive.runtime.gpus) == 2
    assert [one.id for one in client.pods()] == [pod.id]
    cpu = client.create_pod(small())
    running(client, cpu)
    with pytest.raises(WrongStateError):
        client.act(cpu.id, "start")
    client.act(cpu.id, "restart")
    stopped = client.act(cpu.id, "stop")
    assert stopped is not None
    assert (stopped.status, stopped.cost) == (Status.EXITED, 0)
    assert client.act(cpu.id, "terminate") is None
    assert client.terminate(pod.id) is True
    assert client.terminate(pod.id) is False, "gone already"
    with pytest.raises(NotFoundError, match=r"request [0-9a-f]{16}"):
        client.pod(pod.id)
    assert {one.id for one in client.gpus(count=2)} >= {A100}
    assert client.cpus(vcpus=4)[0].price.securePerVcpu > 0
    assert client.data_centers()[0].gpuAvailability
    hour = timedelta(hours=1)
    bills = client.billed_pods(datetime.now(UTC) - hour, datetime.now(UTC) + hour)
    assert {one.podId for one in bills} == {pod.id, cpu.id}
    assert all(one.totalAmount > 0 for one in bills)
    assert client.billed_volumes(datetime.now(UTC) - hour, datetime.now(UTC) + hour)[0].networkVolumeId == volume.id
    assert client.create_volume(CreateVolume(name="fvlm", size=100, dataCenter="US-KS-2")).id == volume.id, "found by its name"
    assert client.delete_volume(volume.id) is True
    assert client.delete_volume(volume.id) is False
    assert len(witness.seen) == 13, "all calls but the stream of logs"


def test_requests_of_version_1_are_refused_by_the_document_and_by_us() -> None:
    body = small().model_dump(mode="json", exclude_none=True)
    assert request_faults("POST", "/v2/pods", body) == []
    for wrong in (
        {"gpuTypeIds": [A100]},
        {"interruptible": True},
        {"cpu": {"id": "cpu3c", "vcpuCount": 2, "memory": 4}},
        {"env": {"A": 1}},
    ):
        assert request_faults("POST", "/v2/pods", body | wrong), wrong
        with pytest.raises(ValidationError):
            CreatePod.model_validate(body | wrong)
    with pytest.raises(ValidationError):
        small(env={f"V{number}": "" for number in range(51)})
    with pytest.raises(ValidationError, match="powers of two"):
        CpuRequest(id="cpu3c", vcpuCount=6)
    with pytest.raises(ValidationError, match="exactly one"):
        small(gpu={"id": A100})


def test_a_lost_answer_to_a_create_makes_no_second_pod(client: RunPod, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("create_lost"))
    pod = client.create_pod(small("fvlm-lost"))
    assert [one.id for one in client.pods()] == [pod.id]


def test_a_pod_that_is_listed_only_after_another_was_created_is_ended(client: RunPod, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("create_lost"))
    emulator.cloud.faults.arm(Fault("listed_late", times=2))
    pod = client.create_pod(small("fvlm-late"))
    assert len(emulator.cloud.pods) == 2
    assert [one.id for one in client.pods()] == [pod.id]


@pytest.mark.parametrize(("late", "appears"), [(2, True), (99, False)])
def test_a_refusal_after_a_lost_answer_is_no_proof_that_there_is_no_pod(emulator: Emulator, late: int, appears: bool) -> None:
    """The pod that nobody has seen yet may have been the last machine."""
    emulator.cloud.faults.arm(Fault("create_lost"))
    emulator.cloud.faults.arm(Fault("listed_late", times=late))

    def none_left(_seconds: float) -> None:
        emulator.cloud.faults.arm(Fault("no_capacity", times=99))

    with RunPod(KEY, emulator.url, sleep=none_left) as client:
        if appears:
            assert client.create_pod(small("fvlm-last")).id in emulator.cloud.pods
        else:
            with pytest.raises(UnavailableError, match="unknown whether the pod fvlm-last exists"):
                client.create_pod(small("fvlm-last"))
    assert len(emulator.cloud.pods) == 1


def test_too_many_requests_wait_as_long_as_is_asked(client: RunPod, emulator: Emulator, waits: list[float]) -> None:
    emulator.cloud.faults.arm(Fault("too_many_requests", times=2, seconds=7))
    assert client.pods() == []
    assert waits == [7.0, 7.0]
    emulator.cloud.faults.arm(Fault("too_many_requests", times=99, seconds=3))
    with pytest.raises(TooManyRequestsError) as caught:
        client.pods()
    assert caught.value.retry_after_s == 3.0
    emulator.cloud.faults.clear()


def test_server_errors_are_tried_again_and_then_said(client: RunPod, emulator: Emulator, waits: list[float]) -> None:
    emulator.cloud.faults.arm(Fault("server_error", times=2))
    assert client.pods() == []
    assert 1.0 < sum(waits) < 10.0
    emulator.cloud.faults.arm(Fault("away", seconds=600))
    with pytest.raises(UnavailableError, match="upstream unavailable"):
        client.create_pod(small())
    emulator.cloud.faults.clear()
    assert client.pods() == []


def test_no_capacity_is_distinguished_from_a_broken_rule(client: RunPod, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", where=A100, times=9))
    with pytest.raises(NoCapacityError, match="no longer any instances"):
        client.create_pod(CreatePod(name="a", image="i", gpu=GpuRequest(id=A100)))
    with pytest.raises(InvalidRequestError, match="at most 8"):
        client.create_pod(CreatePod(name="a", image="i", gpu=GpuRequest(id="NVIDIA A100-SXM4-80GB", count=9)))
    assert client.pods() == []


def test_keys(client: RunPod, emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(WrongKeyError, match="RUNPOD_API_KEY"):
        RunPod("  ", emulator.url)
    with RunPod("rpa_wrong", emulator.url) as other, pytest.raises(WrongKeyError, match="invalid bearer token") as caught:
        other.pods()
    assert "rpa_wrong" not in f"{caught.value!r} {other!r} {other.__dict__} {caplog.text}"
    pod = running(client, client.create_pod(small()))
    other_pod = running(client, client.create_pod(small("fvlm-other")))
    with RunPod(emulator.cloud.pods[pod.id].key, emulator.url) as inside:
        with pytest.raises(NoAccessError):
            inside.terminate(other_pod.id)
        assert inside.act(pod.id, "terminate") is None
    assert [one.id for one in client.pods()] == [other_pod.id]


def test_a_program_without_a_user_agent_is_refused_as_by_runpods_edge(emulator: Emulator) -> None:
    reply = httpx.get(f"{emulator.url}/v2/pods", headers={"User-Agent": "Python-urllib/3.11", "Authorization": f"Bearer {emulator.key}"})
    assert reply.status_code == 403


def test_lists_with_pages_are_read_to_their_end() -> None:
    second = {"pods": [], "metadata": {"nextCursor": "c"}}
    pages = {None: {"pods": [], "nextCursor": "b"}, "b": second, "c": {"pods": [], "nextCursor": None}}
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("cursor"))
        return httpx.Response(200, json=pages[asked[-1]])

    client = RunPod("key")
    client._http = httpx.Client(transport=httpx.MockTransport(answer), base_url="https://api.runpod.io")
    assert client.pods() == []
    assert asked == [None, "b", "c"]


@pytest.mark.parametrize("body", [{"pods": None}, {"pods": {}}, {"pods": [None]}, {}, []])
def test_an_answer_without_a_list_of_pods_is_an_error_and_not_an_account_without_pods(body: object) -> None:
    answers = iter([{"pods": []}, body, {"pods": []}])
    client = RunPod("key")
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, json=next(answers)))
    client._http = httpx.Client(transport=transport, base_url="https://api.runpod.io")
    said: list[str] = []

    async def watch() -> None:
        poller = Poller(client, 0.01, said.append)
        looks = poller.looks("a")
        for _ in range(2):
            assert await asyncio.wait_for(anext(looks), 10) == {}
        await looks.aclose()
        poller.close()

    asyncio.run(watch())
    assert ["RunPod does not answer; pods go on" in line for line in said] == [True]


def test_a_pod_whose_create_request_got_an_answer_that_is_not_understood_is_found(client: RunPod, witness: Witness) -> None:
    """Also where it is listed late: no second pod is requested."""
    real, asked = client._http, []

    def answer(request: httpx.Request) -> httpx.Response:
        reply = real.request(request.method, request.url, content=request.content, headers=request.headers)
        asked.append(request.method)
        if request.method == "POST":
            return httpx.Response(201, json={"id": reply.json()["id"]})
        return httpx.Response(200, json=reply.json() if asked.count("GET") > 2 else {"pods": []})

    client._http = httpx.Client(transport=httpx.MockTransport(answer), base_url=client.url, headers=real.headers)
    pod = client.create_pod(small())
    assert asked == ["POST", "GET", "GET", "GET"]
    assert [(one.id, one.name) for one in client.pods()] == [(pod.id, small().name)]
    real.close()


def test_a_rate_limit_of_hours_is_not_slept_through(
    client: RunPod, emulator: Emulator, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    emulator.cloud.faults.arm(Fault("too_many_requests", seconds=7200.0, times=9))
    with pytest.raises(TooManyRequestsError, match="wait 7200 s"):
        client.pods()
    assert waits == [60.0] * 4
    assert "RunPod asks to wait 7200 s; trying again in 60 s" in caplog.text


@pytest.mark.parametrize("body", [b"", b"<html>bad gateway</html>", b"[]", b'{"detail": null}'])
def test_answers_that_nobody_promised_are_errors_with_a_text(body: bytes) -> None:
    reply = httpx.Response(502, content=body, request=httpx.Request("GET", "https://api.runpod.io/v2/pods"))
    with pytest.raises(UnavailableError, match="RunPod: status 502"):
        raise_for(reply)


def test_unknown_fields_and_states_of_a_newer_service_are_no_errors() -> None:
    pod = Pod.model_validate({"id": "a", "name": "b", "status": "MIGRATING", "createdAt": "2026-11-25T00:00:00Z", "new": {"field": 1}})
    assert pod.status == "MIGRATING"


def test_the_balance_is_where_the_live_document_says() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        documents = {"/v2/openapi.json": {"paths": {"/v2/account/balance": {"get": {"operationId": "getBalance"}}}}}
        return httpx.Response(200, json=documents.get(request.url.path, {"balanceAmount": 12.5, "billingMode": "PREPAID"}))

    client = RunPod("key")
    client._http = httpx.Client(transport=httpx.MockTransport(answer), base_url="https://api.runpod.io")
    assert client.balance_usd() == 12.5


def test_a_container_has_its_environment_is_restarted_and_is_read(client: RunPod, emulator: Emulator) -> None:
    command = "bash -c 'echo pod=$RUNPOD_POD_ID given=$GIVEN home=$HOME; exit 3'"
    pod = client.create_pod(small(args=command, env={"GIVEN": "yes"}))
    wait_until(lambda: emulator.cloud.pods[pod.id].container.starts > 2, "restarts")
    lines, last = [], ""
    for line in client.logs(pod.id, tail=100):
        lines.append(line)
        last = line.id
        if len([one for one in lines if one.source == "container"]) == 2:
            break
    first = next(line.line for line in lines if line.source == "container")
    home = emulator.cloud.pods[pod.id].container.root / "root"
    assert first == f"pod={pod.id} given=yes home={home}"
    assert any("ended with status 3" in line.line for line in lines if line.source == "system")
    again = next(iter(client.logs(pod.id, after=last)))
    assert again.id > last
    client.terminate(pod.id)


def test_a_container_that_fills_its_disk_is_ended_and_wiped(client: RunPod, emulator: Emulator) -> None:
    pod = client.create_pod(small(disk=1, args="sh -c 'ls $HOME; truncate -s 2G $HOME/large; sleep 60'"))
    wait_until(lambda: emulator.cloud.pods[pod.id].container.starts > 1, "a restart")
    lines = [line.line for line in emulator.cloud.pods[pod.id].container.log.lines]
    assert "the container's disk of 1 GB is full" in lines
    assert "large" not in lines, "the second start finds an empty disk"
    client.terminate(pod.id)


@pytest.mark.parametrize("kind", ["never_starts", "image_missing"])
def test_pods_that_never_start_are_seen_as_such_and_end(client: RunPod, emulator: Emulator, kind: str) -> None:
    emulator.cloud.faults.arm(Fault(kind))
    pod = client.create_pod(small())
    time.sleep(0.3)
    assert client.pod(pod.id).status in (Status.PROVISIONING, Status.STARTING)
    client.terminate(pod.id)
    assert client.pods() == []


def test_dead_and_deleted_pods(client: RunPod, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("dies"))
    pod = client.create_pod(small())
    wait_until(lambda: client.pod(pod.id).status == Status.ERROR, "the pod to die")
    assert client.pod(pod.id).cost > 0, "billed until it is terminated"
    emulator.cloud.faults.arm(Fault("deleted"))
    gone = client.create_pod(small("fvlm-gone"))
    wait_until(lambda: gone.id not in [one.id for one in client.pods()], "the pod to be gone")
