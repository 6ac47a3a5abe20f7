"""From requirements to a pod: what is refused before renting, what is tried, and what ends it."""

import asyncio
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from infra.budget import Budget, BudgetError
from infra.errors import RefusedError
from infra.runpod.account import Account, Place
from infra.runpod.bills import reconcile
from infra.runpod.client import RunPod
from infra.runpod.emulator.faults import Fault
from infra.runpod.emulator.server import Emulator
from infra.runpod.errors import InvalidRequestError, NoBalanceError, UnavailableError
from infra.runpod.models import Pod, Status, Volume
from infra.runpod.naming import PodName, owner
from infra.runpod.poller import Poller, ended
from infra.runpod.pool import RunPodConfiguration
from infra.runpod.reaper import OVERTIME_S, YOUNG_S, reap
from infra.runpod.remote import rent_server
from infra.runpod.rent import NoMachineAvailableError, PodRequirements, PriceError, rent
from infra.s3 import VolumeError
from infra.store import FolderStore
from tests.infra.conftest import Clock

A100, SXM, H100 = "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
SLEEP = "sleep 600"


@pytest.fixture
def rented(client: RunPod, emulator: Emulator, volume: Volume, budget: Budget) -> Iterator[object]:
    def go(requirements: PodRequirements, **more: object) -> tuple[Pod, PodName]:
        path = str(emulator.cloud.volumes[volume.id].folder)
        given = {"run": uuid4(), "volume": volume, "mount_path": path, "max_runtime_s": 3600.0, "sleep": lambda _: None} | more
        return rent(client, requirements, budget, **given)

    return go


def test_the_next_gpu_is_taken_where_the_first_has_none(rented, emulator: Emulator, budget: Budget, volume: Volume) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", where=A100, times=9))
    pod, name = rented(PodRequirements("i", gpus=[A100, SXM], gpu_count=2, args=SLEEP))
    assert (pod.gpu and pod.gpu.id, pod.dataCenterId) == (SXM, volume.dataCenter)
    assert PodName.parse(pod.name) == name
    assert name.owner == owner(volume.id)
    (entry,) = [one for one in budget.entries() if one.running]
    assert (entry.pod, entry.usd_per_hour, entry.until) == (pod.id, 3.78, pytest.approx(name.deadline, abs=2))


def test_after_a_refusal_in_other_words_the_next_gpu_is_tried(rented, emulator: Emulator, client: RunPod, budget: Budget) -> None:
    """Status 400 says no capacity as well as a broken rule, in words that nobody has promised."""
    emulator.cloud.faults.arm(Fault("rule_broken", where=A100))
    pod, _ = rented(PodRequirements("i", gpus=[A100, SXM], args=SLEEP))
    assert pod.gpu is not None
    assert pod.gpu.id == SXM
    for _ in range(2):
        emulator.cloud.faults.arm(Fault("rule_broken"))
    with pytest.raises(InvalidRequestError, match="does not support"):
        rented(PodRequirements("i", gpus=[A100, SXM], args=SLEEP), wait_s=60.0)
    emulator.cloud.faults.arm(Fault("rule_broken", where=A100))
    emulator.cloud.faults.arm(Fault("no_capacity", where=SXM))
    assert rented(PodRequirements("i", gpus=[A100, SXM], args=SLEEP), wait_s=60.0), "waited for"
    assert len(client.pods()) == 2
    assert len([entry for entry in budget.entries() if entry.running]) == 2


def test_what_was_tried_is_said_where_nothing_is_free(rented, emulator: Emulator, budget: Budget) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", times=99))
    with pytest.raises(NoMachineAvailableError) as caught:
        rented(PodRequirements("i", gpus=[A100, H100], args=SLEEP))
    for word in (A100, H100, "US-KS-2", "no longer any instances"):
        assert word in caught.value.what
    assert budget.position().committed == 0


def test_a_machine_that_becomes_free_is_waited_for(rented, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", times=2))
    pod, _ = rented(PodRequirements("i", gpus=[A100], args=SLEEP), wait_s=60.0)
    assert pod.gpu is not None


@pytest.mark.parametrize(
    ("requirements", "words"),
    [
        (PodRequirements("i", gpus=["NVIDIA A100 80GB"]), ["has no 'NVIDIA A100 80GB'", A100]),
        (PodRequirements("i", gpus=["A100"]), [A100, SXM]),
        (PodRequirements("i", cpus=["cpu9z"]), ["cpu3c"]),
        (PodRequirements("i", gpus=[H100], gpu_count=8, max_usd_per_hour=10), ["ceiling of $10.00", "$23.92/h"]),
        (PodRequirements("i", gpus=[A100], data_centers=["EU-RO-1"]), ["volume fvlm is in US-KS-2"]),
        (PodRequirements("i", gpus=[A100], cpus=["cpu3c"]), ["not both"]),
        (PodRequirements("i"), ["not both"]),
    ],
)
def test_what_can_never_be_is_refused_before_anything_is_rented(
    rented, client: RunPod, budget: Budget, requirements: PodRequirements, words: list[str]
) -> None:
    with pytest.raises(RefusedError) as caught:
        rented(requirements)
    for word in words:
        assert word in str(caught.value)
    assert (client.pods(), budget.entries()) == ([], ())


def test_an_account_without_credit_rents_nothing(rented, emulator: Emulator, client: RunPod, budget: Budget) -> None:
    emulator.cloud.faults.arm(Fault("no_balance"))
    with pytest.raises(NoBalanceError, match="add credit at"):
        rented(PodRequirements("i", gpus=[A100, SXM], args=SLEEP))
    assert client.pods() == [], "the next GPU is not tried"
    assert budget.position().committed == 0


def test_a_pod_that_costs_more_than_its_offer_is_ended_at_once(rented, emulator: Emulator, client: RunPod, budget: Budget) -> None:
    emulator.cloud.faults.arm(Fault("wrong_price"))
    with pytest.raises(PriceError, match=r"costs \$2.54/h and not \$1.64/h"):
        rented(PodRequirements("i", gpus=[A100], args=SLEEP))
    assert client.pods() == []
    assert not any(entry.running for entry in budget.entries())


def test_an_answer_without_a_price_is_counted_at_the_offers(rented, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    create = RunPod.create_pod
    monkeypatch.setattr(RunPod, "create_pod", lambda client, request: create(client, request).model_copy(update={"cost": 0.0}))
    rented(PodRequirements("i", gpus=[A100], args=SLEEP), max_runtime_s=3600.0)
    assert budget.position().running == pytest.approx(1.64)


def test_a_pod_that_cannot_be_written_down_is_ended(rented, client: RunPod, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FolderStore.write

    def fails(store: FolderStore, key: str, content: bytes) -> None:
        if b'"started"' in content:
            raise VolumeError("the volume's S3 API: 502", where="s3", fix="try again")
        write(store, key, content)

    monkeypatch.setattr(FolderStore, "write", fails)
    with pytest.raises(VolumeError):
        rented(PodRequirements("i", cpus=["cpu3c"], args=SLEEP))
    assert client.pods() == []
    assert [entry.started for entry in budget.entries()] == [False], "it counts to its deadline until the reaper has looked"


def test_shares_of_the_cap_that_a_pod_passes_are_said_once(rented, client: RunPod) -> None:
    """Of $20 a pod for an hour takes $3.28."""
    said: list[str] = []
    requirements = PodRequirements("i", gpus=[A100], gpu_count=2, args=SLEEP)
    for _ in range(4):
        rented(requirements, warn=said.append)
    assert [line.partition(" of the budget")[0] for line in said] == ["50%"]
    assert "$13.12 of $20.00" in said[0]
    assert len(client.pods()) == 4


def test_nothing_starts_that_does_not_fit_and_the_sum_is_shown(
    rented, client: RunPod, budget: Budget, clock: Clock, volume: Volume
) -> None:
    budget.storage(volume.id, volume.usd_per_hour)
    requirements = PodRequirements("i", gpus=[A100], gpu_count=2, args=SLEEP)
    rented(requirements, max_runtime_s=3 * 3600.0)
    clock.now += 3600
    with pytest.raises(BudgetError) as caught:
        rented(requirements, max_runtime_s=2 * 3600.0)
    text = caught.value.what
    for part in (
        "spent $3.28",
        "running pods to their deadlines $6.56",
        "this pod to its deadline",
        "of $15.00 (cap $20.00 less a reserve of $5.00)",
    ):
        assert part in text, text
    assert len(client.pods()) == 1
    rented(requirements, max_runtime_s=1800.0)


def test_a_reservation_of_an_unknown_pod_stands_until_somebody_has_looked(
    rented, emulator: Emulator, client: RunPod, budget: Budget, clock: Clock, volume: Volume
) -> None:
    emulator.cloud.faults.arm(Fault("away", seconds=600))
    with pytest.raises(UnavailableError):
        rented(PodRequirements("i", cpus=["cpu3c"], args=SLEEP))
    emulator.cloud.faults.clear()
    assert budget.entries() == (), "it was not even asked for the catalogue"
    budget.reserve("fvlm-unknown", usd_per_hour=1.0, until=clock.now + 3600)
    reap(client, owner(volume.id), budget=budget, now=clock.now + YOUNG_S - 1)
    assert budget.position().running > 0
    reap(client, owner(volume.id), budget=budget, now=clock.now + YOUNG_S + 1)
    assert budget.position().committed == 0


def test_the_reaper_ends_what_is_over_time_or_unknown_and_nothing_else(
    rented, client: RunPod, emulator: Emulator, budget: Budget, volume: Volume
) -> None:
    requirements = PodRequirements("i", cpus=["cpu3c"], args=SLEEP)
    kept, _ = rented(requirements)
    unknown, name = rented(requirements)
    late, _ = rented(requirements, max_runtime_s=-OVERTIME_S - 10)
    emulator.cloud.faults.arm(Fault("dies"))
    dead, _ = rented(requirements)
    other = client.create_pod(emulator.cloud.pods[kept.id].request.model_copy(update={"name": "someone-elses"}))
    while client.pod(dead.id).status != Status.ERROR:
        time.sleep(0.02)
    assert {one.pod.id for one in reap(client, owner(volume.id), over=lambda _: "unknown")} == {late.id, dead.id}, "young pods are let be"
    later = time.time() + YOUNG_S + 1
    ended = reap(client, owner(volume.id), over=lambda run: "its run is over" if run == name.run else None, budget=budget, now=later)
    assert [(one.pod.id, one.reason) for one in ended] == [(unknown.id, "its run is over")]
    assert {one.id for one in client.pods()} == {kept.id, other.id}
    assert {entry.pod for entry in budget.entries() if entry.running} == {kept.id}


def test_a_second_pod_of_a_watched_ones_name_is_ended_whenever_it_is_listed(rented, client: RunPod, emulator: Emulator) -> None:
    (watched, _), (other, _) = (rented(PodRequirements("i", cpus=["cpu3c"], args=SLEEP)) for _ in range(2))
    client.create_pod(emulator.cloud.pods[watched.id].request)
    said: list[str] = []

    async def watch() -> None:
        poller = Poller(client, 0.01, said.append)
        emulator.cloud.faults.arm(Fault("listed_late", times=2))
        looks = poller.looks(watched.id)
        for _ in range(5):
            await anext(looks)
        await looks.aclose()
        poller.close()

    asyncio.run(watch())
    assert {pod.id for pod in client.pods()} == {watched.id, other.id}
    assert [f"a second one of the name {watched.name}" in line for line in said] == [True]


def test_two_who_start_the_server_at_once_pay_for_one_pod(client: RunPod, emulator: Emulator, budget: Budget, volume: Volume) -> None:
    for _ in range(2):
        emulator.cloud.faults.arm(Fault("never_starts"))
    folder, key = str(emulator.cloud.volumes[volume.id].folder), SecretStr(emulator.key)
    account = Account(Place(volume.id, emulator.url, folder=folder, key=key))
    given = {"cpus": ["cpu3c"], "volume": volume.id, "runpod_url": emulator.url, "mount_path": folder, "api_key": key}
    configuration, said = RunPodConfiguration.model_validate(given), []
    more = {"pools": {}, "port": 4200, "address": "http://x", "days": 0.1, "say": said.append}
    first, second = (rent_server(account, budget, configuration, **more) for _ in range(2))  # nobody looked before
    assert (second.id, [pod.id for pod in client.pods()]) == (first.id, [first.id])
    assert [entry.pod for entry in budget.entries() if entry.kind == "pod" and entry.running] == [first.id]
    assert f"pod {first.id} was rented for the server at the same time" in said[-1]
    assert emulator.key not in "".join(said)


def test_a_volume_that_is_away_holds_up_neither_the_end_of_a_pod_nor_the_reaper(
    rented, client: RunPod, emulator: Emulator, budget: Budget, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = PodRequirements("i", cpus=["cpu3c"], args=SLEEP)
    pod, name = rented(requirements)
    late, _ = rented(requirements, max_runtime_s=-OVERTIME_S - 10)
    account = Account(Place(volume.id, emulator.url, folder=str(emulator.cloud.volumes[volume.id].folder), key=SecretStr(emulator.key)))

    def away(*_arguments: object) -> None:
        raise VolumeError("the volume's S3 API: 502", where="s3", fix="try again")

    monkeypatch.setattr(FolderStore, "write", away)
    warned: list[str] = []
    asyncio.run(ended(account, budget, pod.id, str(name), warned.append))
    assert [one.pod.id for one in reap(client, owner(volume.id), budget=budget)] == [late.id]
    assert client.pods() == []
    assert [f"the end of the pod {pod.id} is not in the ledger yet" in line for line in warned] == [True]
    monkeypatch.setattr(FolderStore, "read", away)
    assert account.outcome(pod.id) == ""
    monkeypatch.undo()
    reap(client, owner(volume.id), budget=budget, now=budget.clock() + YOUNG_S + 1)
    assert not any(entry.running for entry in budget.entries()), "it is when the volume is there again"


def test_the_bill_replaces_the_ledgers_own_sum(rented, client: RunPod, emulator: Emulator, budget: Budget, clock: Clock) -> None:
    emulator.cloud.faults.arm(Fault("billed_on"))
    pod, name = rented(PodRequirements("i", gpus=[H100], gpu_count=8, args=SLEEP, max_usd_per_hour=30), max_runtime_s=600.0)
    client.terminate(pod.id)
    budget.ended(str(name))
    time.sleep(2)  # a cent is 1.5 s
    assert reconcile(client, budget) == [], "not complete yet"
    clock.now += 3 * 3600
    assert [line for line in reconcile(client, budget) if str(name) in line], "billed on after its end"
    true = sum(usd for _, _, usd in emulator.cloud.pod_bills())
    assert budget.position().spent == pytest.approx(true, abs=0.01)
    assert reconcile(client, budget) == []


@given(run=st.uuids(), deadline=st.integers(0, 2**32 - 1), volume=st.text(st.sampled_from("abcdefghij0123456789"), min_size=1, max_size=12))
def test_names_carry_what_they_say(run, deadline: int, volume: str) -> None:
    name = PodName.new(volume, deadline, run)
    assert PodName.parse(str(name)) == name
    assert len(str(name)) <= 80
    assert PodName.parse(f"x{name}") is None
