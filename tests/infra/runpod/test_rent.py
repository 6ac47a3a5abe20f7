"""From wishes to a pod: what is refused before renting, what is tried, and that no sum passes the cap."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from infra.budget import Budget, BudgetError, warnings_between
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
from infra.runpod.rent import NothingFreeError, PriceError, Wish, rent
from infra.runpod.watch import Watch
from infra.s3 import VolumeError
from infra.store import FolderStore

A100, SXM, H100 = "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
SLEEP = "sleep 600"


class MemoryStore:
    """A store without a disk, for property tests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def read(self, key: str) -> bytes | None:
        return self.files.get(key)

    def write(self, key: str, content: bytes) -> None:
        self.files[key] = content

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.files if key.startswith(prefix))


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(tmp_path: Path, clock: Clock) -> Budget:
    return Budget(FolderStore(tmp_path / "ledger"), cap_usd=20, reserve_usd=5, clock=clock)


@pytest.fixture
def rented(client: RunPod, emulator: Emulator, volume: Volume, budget: Budget) -> Iterator[object]:
    def go(wish: Wish, **more: object) -> tuple[Pod, PodName]:
        path = str(emulator.cloud.volumes[volume.id].folder)
        given = {"run": uuid4(), "volume": volume, "mount_path": path, "max_runtime_s": 3600.0, "sleep": lambda _: None} | more
        return rent(client, wish, budget, **given)

    return go


def test_the_next_gpu_is_taken_where_the_first_has_none(rented, emulator: Emulator, budget: Budget, volume: Volume) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", where=A100, times=9))
    pod, name = rented(Wish("i", gpus=[A100, SXM], gpu_count=2, args=SLEEP))
    assert (pod.gpu and pod.gpu.id, pod.dataCenterId) == (SXM, volume.dataCenter)
    assert PodName.parse(pod.name) == name
    assert name.owner == owner(volume.id)
    (entry,) = [one for one in budget.entries() if one.running]
    assert (entry.pod, entry.usd_per_hour, entry.until) == (pod.id, 3.78, pytest.approx(name.deadline, abs=2))


def test_after_a_refusal_in_other_words_the_next_gpu_is_tried(rented, emulator: Emulator, client: RunPod, budget: Budget) -> None:
    """Status 400 says no capacity as well as a broken rule, in words that nobody has promised."""
    emulator.cloud.faults.arm(Fault("rule_broken", where=A100))
    pod, _ = rented(Wish("i", gpus=[A100, SXM], args=SLEEP))
    assert pod.gpu is not None
    assert pod.gpu.id == SXM
    for _ in range(2):
        emulator.cloud.faults.arm(Fault("rule_broken"))
    with pytest.raises(InvalidRequestError, match="does not support"):
        rented(Wish("i", gpus=[A100, SXM], args=SLEEP), wait_s=60.0)
    emulator.cloud.faults.arm(Fault("rule_broken", where=A100))
    emulator.cloud.faults.arm(Fault("no_capacity", where=SXM))
    assert rented(Wish("i", gpus=[A100, SXM], args=SLEEP), wait_s=60.0), "waited for"
    assert len(client.pods()) == 2
    assert len([entry for entry in budget.entries() if entry.running]) == 2


def test_what_was_tried_is_said_where_nothing_is_free(rented, emulator: Emulator, budget: Budget) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", times=99))
    with pytest.raises(NothingFreeError) as caught:
        rented(Wish("i", gpus=[A100, H100], args=SLEEP))
    for word in (A100, H100, "US-KS-2", "no longer any instances"):
        assert word in caught.value.what
    assert budget.position().committed == 0


def test_a_machine_that_becomes_free_is_waited_for(rented, emulator: Emulator) -> None:
    emulator.cloud.faults.arm(Fault("no_capacity", times=2))
    pod, _ = rented(Wish("i", gpus=[A100], args=SLEEP), wait_s=60.0)
    assert pod.gpu is not None


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish("i", gpus=["NVIDIA A100 80GB"]), ["has no 'NVIDIA A100 80GB'", A100]),
        (Wish("i", gpus=["A100"]), [A100, SXM]),
        (Wish("i", cpus=["cpu9z"]), ["cpu3c"]),
        (Wish("i", gpus=[H100], gpu_count=8, max_usd_per_hour=10), ["ceiling of $10.00", "$23.92/h"]),
        (Wish("i", gpus=[A100], data_centers=["EU-RO-1"]), ["volume fvlm is in US-KS-2"]),
        (Wish("i", gpus=[A100], cpus=["cpu3c"]), ["not both"]),
        (Wish("i"), ["not both"]),
    ],
)
def test_what_can_never_be_is_refused_before_anything_is_rented(
    rented, client: RunPod, budget: Budget, wish: Wish, words: list[str]
) -> None:
    with pytest.raises(RefusedError) as caught:
        rented(wish)
    for word in words:
        assert word in str(caught.value)
    assert (client.pods(), budget.entries()) == ([], ())


def test_an_account_without_credit_rents_nothing(rented, emulator: Emulator, client: RunPod, budget: Budget) -> None:
    emulator.cloud.faults.arm(Fault("no_balance"))
    with pytest.raises(NoBalanceError, match="add credit at"):
        rented(Wish("i", gpus=[A100, SXM], args=SLEEP))
    assert client.pods() == [], "the next GPU is not tried"
    assert budget.position().committed == 0


def test_a_pod_that_costs_more_than_its_offer_is_ended_at_once(rented, emulator: Emulator, client: RunPod, budget: Budget) -> None:
    emulator.cloud.faults.arm(Fault("wrong_price"))
    with pytest.raises(PriceError, match=r"costs \$2.54/h and not \$1.64/h"):
        rented(Wish("i", gpus=[A100], args=SLEEP))
    assert client.pods() == []
    assert not any(entry.running for entry in budget.entries())


def test_an_answer_without_a_price_is_counted_at_the_offers(rented, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    create = RunPod.create_pod
    monkeypatch.setattr(RunPod, "create_pod", lambda client, request: create(client, request).model_copy(update={"cost": 0.0}))
    rented(Wish("i", gpus=[A100], args=SLEEP), max_runtime_s=3600.0)
    assert budget.position().running == pytest.approx(1.64)


def test_a_pod_that_cannot_be_written_down_is_ended(rented, client: RunPod, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FolderStore.write

    def fails(store: FolderStore, key: str, content: bytes) -> None:
        if b'"started"' in content:
            raise VolumeError("the volume's S3 side: 502", where="s3", fix="try again")
        write(store, key, content)

    monkeypatch.setattr(FolderStore, "write", fails)
    with pytest.raises(VolumeError):
        rented(Wish("i", cpus=["cpu3c"], args=SLEEP))
    assert client.pods() == []
    assert [entry.started for entry in budget.entries()] == [False], "it counts to its deadline until the reaper has looked"


def test_shares_of_the_cap_that_a_pod_passes_are_said_once(rented, client: RunPod) -> None:
    """Of $20 a pod for an hour takes $3.28."""
    said: list[str] = []
    wish = Wish("i", gpus=[A100], gpu_count=2, args=SLEEP)
    for _ in range(4):
        rented(wish, warn=said.append)
    assert [line.partition(" of the budget")[0] for line in said] == ["50%"]
    assert "$13.12 of $20.00" in said[0]
    assert len(client.pods()) == 4


def test_nothing_starts_that_does_not_fit_and_the_sum_is_shown(
    rented, client: RunPod, budget: Budget, clock: Clock, volume: Volume
) -> None:
    budget.storage(volume.id, volume.usd_per_hour)
    wish = Wish("i", gpus=[A100], gpu_count=2, args=SLEEP)
    rented(wish, max_runtime_s=3 * 3600.0)
    clock.now += 3600
    with pytest.raises(BudgetError) as caught:
        rented(wish, max_runtime_s=2 * 3600.0)
    text = caught.value.what
    for part in (
        "spent $3.28",
        "running pods to their deadlines $6.56",
        "this pod to its deadline",
        "of $15.00 (cap $20.00 less a reserve of $5.00)",
    ):
        assert part in text, text
    assert len(client.pods()) == 1
    rented(wish, max_runtime_s=1800.0)


def test_a_volume_that_has_grown_costs_its_new_price_from_then_on(budget: Budget, clock: Clock) -> None:
    for usd_per_hour in (1.0, 2.0, 1.0):  # the last by a worker that saw the volume before it grew
        budget.storage("vol", usd_per_hour)
        clock.now += 3600
    (entry,) = budget.entries()
    assert (entry.spent(clock.now), entry.since) == (pytest.approx(1.0 + 2 * 2.0), pytest.approx(clock.now - 3 * 3600))


def test_a_reservation_of_an_unknown_pod_stands_until_somebody_has_looked(
    rented, emulator: Emulator, client: RunPod, budget: Budget, clock: Clock, volume: Volume
) -> None:
    emulator.cloud.faults.arm(Fault("away", seconds=600))
    with pytest.raises(UnavailableError):
        rented(Wish("i", cpus=["cpu3c"], args=SLEEP))
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
    wish = Wish("i", cpus=["cpu3c"], args=SLEEP)
    kept, _ = rented(wish)
    unknown, name = rented(wish)
    late, _ = rented(wish, max_runtime_s=-OVERTIME_S - 10)
    emulator.cloud.faults.arm(Fault("dies"))
    dead, _ = rented(wish)
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
    (watched, _), (other, _) = (rented(Wish("i", cpus=["cpu3c"], args=SLEEP)) for _ in range(2))
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
    wish = Wish("i", cpus=["cpu3c"], args=SLEEP)
    pod, name = rented(wish)
    late, _ = rented(wish, max_runtime_s=-OVERTIME_S - 10)
    account = Account(Place(volume.id, emulator.url, folder=str(emulator.cloud.volumes[volume.id].folder), key=SecretStr(emulator.key)))

    def away(*_arguments: object) -> None:
        raise VolumeError("the volume's S3 side: 502", where="s3", fix="try again")

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
    pod, name = rented(Wish("i", gpus=[H100], gpu_count=8, args=SLEEP, max_usd_per_hour=30), max_runtime_s=600.0)
    client.terminate(pod.id)
    budget.ended(str(name))
    time.sleep(2)  # a cent is 1.5 s
    assert reconcile(client, budget) == [], "not complete yet"
    clock.now += 3 * 3600
    assert [line for line in reconcile(client, budget) if str(name) in line], "billed on after its end"
    true = sum(usd for _, _, usd in emulator.cloud.pod_bills())
    assert budget.position().spent == pytest.approx(true, abs=0.01)
    assert reconcile(client, budget) == []


@settings(max_examples=40)
@given(data=st.data())
def test_the_cap_holds_whatever_pods_come_and_go(data: st.DataObject) -> None:
    """Pods of any price and length, on any number of writers, that end early, in time, or never: spending never passes the cap."""
    clock = Clock()
    began = clock.now
    store = MemoryStore()
    writers = [Budget(store, cap_usd=100, reserve_usd=10, clock=clock) for _ in range(3)]
    alive: dict[str, tuple[float, float, float]] = {}
    true = 0.0
    for number in range(data.draw(st.integers(5, 25))):
        writer = writers[data.draw(st.integers(0, 2))]
        what = data.draw(st.sampled_from(["reserve", "reserve", "end", "wait", "bill"]))
        if what == "reserve":
            rate, hours = data.draw(st.floats(0.1, 30)), data.draw(st.floats(0.1, 10))
            name = f"pod{number}"
            try:
                writer.reserve(name, usd_per_hour=rate, until=clock.now + hours * 3600)
            except BudgetError:
                continue
            writer.started(name, name, usd_per_hour=rate)
            alive[name] = (clock.now, rate, clock.now + hours * 3600)
        elif what == "wait":
            clock.now += data.draw(st.floats(60, 7200))
        elif what == "end" and alive:
            name = data.draw(st.sampled_from(sorted(alive)))
            since, rate, until = alive.pop(name)
            clock.now = max(clock.now, since)
            end = min(clock.now, until)
            true += (end - since) / 3600 * rate
            writer.ended(name, at=end)
        for name, (since, rate, until) in list(alive.items()):
            if clock.now > until:  # its own watchdog ends it
                true += (until - since) / 3600 * rate
                del alive[name]
                writer.ended(name, at=until)
    if alive:
        true += sum((until - since) / 3600 * rate for since, rate, until in alive.values())
    assert true <= 90 + 1e-6
    assert writers[0].position().committed == pytest.approx(true, abs=1e-6)
    assert clock.now >= began


def test_a_bill_that_is_not_complete_makes_nothing_cheaper(budget: Budget, clock: Clock) -> None:
    began = clock.now
    budget.reserve("a", usd_per_hour=3.0, until=began + 4 * 3600)
    budget.started("a", "pod", usd_per_hour=3.0)
    clock.now += 1.5 * 3600
    budget.billed("a", 3.0)
    clock.now += 0.5 * 3600
    budget.ended("a")
    assert budget.position().spent == pytest.approx(6.0)
    clock.now += 3 * 3600
    budget.billed("a", 5.5)
    assert budget.position().spent == pytest.approx(5.5)


def test_a_pod_whose_end_nobody_wrote_down_does_not_cost_for_ever(budget: Budget, clock: Clock) -> None:
    budget.reserve("a", usd_per_hour=1.0, until=clock.now + 2 * 3600)
    clock.now += 7 * 24 * 3600
    assert budget.position().committed == pytest.approx(3.0)
    budget.billed("a", 4.0)
    assert budget.position().committed == pytest.approx(4.0)


def test_two_who_reserve_at_once_do_not_both_pass(tmp_path: Path, clock: Clock) -> None:
    store = FolderStore(tmp_path)
    passed, lock = [], threading.Barrier(4)

    def go(number: int) -> None:
        mine = Budget(store, cap_usd=100, reserve_usd=0, clock=clock)
        lock.wait()
        try:
            mine.reserve(f"pod{number}", usd_per_hour=60.0, until=clock.now + 3600)
            passed.append(number)
        except BudgetError:
            pass

    threads = [threading.Thread(target=go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) <= 1


def test_a_ledger_with_a_broken_line_is_still_a_ledger(budget: Budget, tmp_path: Path, clock: Clock) -> None:
    budget.reserve("a", usd_per_hour=1.0, until=clock.now + 3600)
    (tmp_path / "ledger" / "budget" / "ledger" / "killed.jsonl").write_text('{"what": "reserved", "na')
    assert [entry.name for entry in budget.entries()] == ["a"]


def test_warnings_come_once() -> None:
    assert warnings_between(0, 100, 500) == []
    assert [line[:3] for line in warnings_between(240, 410, 500)] == ["50%", "80%"]
    assert warnings_between(410, 420, 500) == []


def seen(status: str, **more: object) -> Pod:
    return Pod.model_validate({"id": "a", "name": "b", "status": status, "createdAt": "2026-11-25T00:00:00Z"} | more)


def test_a_command_that_ends_at_once_is_seen_although_every_look_sees_the_same_uptime() -> None:
    """dstack 1142. A service whose uptime stands still is no such case once the pod's program has been read in its log."""
    for speaks in (False, True):
        watch = Watch(deadline=1e9, began=0, start_timeout_s=100, speaks=speaks)
        looks = [watch.look(seen("RUNNING", runtime={"uptime": 1}), now) for now in range(0, 600, 15)]
        assert [look for look in looks if look][:1] == ([] if speaks else ["the container was started 4 times"])
    watch = Watch(deadline=1e9, began=0, start_timeout_s=100)
    late = [watch.look(seen("RUNNING", runtime={"uptime": now - now % 60}), now) for now in range(0, 3600, 15)]
    assert late == [None] * len(late), "an uptime that comes a minute late"


def test_what_looks_at_a_pod_mean() -> None:
    def fresh() -> Watch:
        return Watch(deadline=10_000, began=0, start_timeout_s=100, idle_s=600, speaks=True)

    busy, idle = ({"runtime": {"uptime": 5, "gpus": [{"util": use}]}} for use in (50, 0))
    watch = fresh()
    assert watch.look(seen("PROVISIONING"), 50) is None
    assert watch.look(seen("STARTING"), 101) == "the pod did not start in 100 s; it is STARTING"
    watch = fresh()
    looks = [watch.look(pod, number) for number, pod in enumerate((None, seen("RUNNING"), None, None))]
    assert looks == [None, None, None, "the pod is gone"]
    for status in ("EXITED", "ERROR", "TERMINATED"):
        assert fresh().look(seen(status), 1) == f"the pod is {status}"
    assert fresh().look(seen("MIGRATING"), 1) is None
    watch = fresh()
    assert watch.look(seen("RUNNING", **idle), 0) is None
    assert watch.look(seen("RUNNING", **busy), 500) is None
    assert [watch.look(seen("RUNNING", **idle), now) for now in range(900, 1500, 100)] == [None] * 6
    assert watch.look(seen("RUNNING", **idle), 1500) == "no GPU of the pod has done anything for 10 min"
    assert watch.look(seen("RUNNING", **idle), 5000) is None, "what the GPUs did while the service was away is not known"
    assert fresh().look(seen("RUNNING"), 10_121) == "the pod is past its deadline and did not end itself"
    watch = fresh()
    uptimes = [watch.look(seen("RUNNING", runtime={"uptime": uptime}), 1) for uptime in (500, 3, 500, 2, 500, 1)]
    assert uptimes[:5] == [None] * 5
    assert uptimes[5] == "the container was started 4 times"
    watch = fresh()
    assert [watch.look(seen("RUNNING", runtime={"uptime": now - now % 40}), 3000 + now % 20) for now in range(0, 900, 10)] == [None] * 90


@given(run=st.uuids(), deadline=st.integers(0, 2**32 - 1), volume=st.text(st.sampled_from("abcdefghij0123456789"), min_size=1, max_size=12))
def test_names_carry_what_they_say(run, deadline: int, volume: str) -> None:
    name = PodName.new(volume, deadline, run)
    assert PodName.parse(str(name)) == name
    assert len(str(name)) <= 80
    assert PodName.parse(f"x{name}") is None
