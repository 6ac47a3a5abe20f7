"""The ledger: no sum passes the cap, whatever is known of pods, bills and volumes."""

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.budget import Budget, BudgetError, warnings_between
from infra.store import FolderStore
from tests.infra.conftest import Clock


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


def test_a_volume_that_has_grown_costs_its_new_price_from_then_on(budget: Budget, clock: Clock) -> None:
    for usd_per_hour in (1.0, 2.0, 1.0):  # the last by a worker that saw the volume before it grew
        budget.storage("vol", usd_per_hour)
        clock.now += 3600
    (entry,) = budget.entries()
    assert (entry.spent(clock.now), entry.since) == (pytest.approx(1.0 + 2 * 2.0), pytest.approx(clock.now - 3 * 3600))


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


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_phase_whose_name_has_an_unusual_line_separator_is_counted(budget: Budget, clock: Clock, separator: str) -> None:
    """JSON leaves these characters as they are, and `str.splitlines` splits at them: the reservation was in no line."""
    phase = f"stage{separator}one"
    budget.reserve("a", usd_per_hour=1.0, until=clock.now + 3600, phase=phase)
    budget.started("a", "pod", usd_per_hour=1.0)
    assert [(entry.name, entry.phase) for entry in budget.entries()] == [("a", phase)]
    assert budget.position().committed == pytest.approx(1.0)


def test_warnings_come_once() -> None:
    assert warnings_between(0, 100, 500) == []
    assert [line[:3] for line in warnings_between(240, 410, 500)] == ["50%", "80%"]
    assert warnings_between(410, 420, 500) == []
