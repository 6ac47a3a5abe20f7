"""Plan against bill: what was planned first stands, a phase's bill is divided by its steps' times, and nothing of it is lost."""

import math
from pathlib import Path

import pytest

from fvlm_core.manifest import AnyManifest
from infra.budget import Entry, Position, usd_text
from infra.store import FolderStore
from tasks.bill import UNFINISHED, bill_against_plan, billed_by_step, record_plan, recorded_plan
from tasks.dollars import NOT_KNOWN, SERVES, STARTS, WAITING, DollarPlan, Line, Usd
from tasks.phase import PhaseManifest
from tasks.rented import budget_table
from tasks.steps import StepResult

HOUR = 3600.0


def planned(**usd: float) -> DollarPlan:
    lines = [Line(phase="train", what=name, usd=Usd(low=amount, value=amount, high=amount)) for name, amount in usd.items()]
    return DollarPlan(lines=lines, cap_usd=500, reserve_usd=15)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A phase of an hour's pod: 48 minutes of it for two steps, which took 10 and 30 minutes side by side with others."""
    steps = {}
    for name, minutes in (("stage1", 10), ("stage2", 30)):
        folder = f"steps/{name}-0"
        AnyManifest(name=name, settings_hash="", seconds=minutes * 60.0).write(tmp_path / folder)
        steps[name] = StepResult(name=name, folder=folder, digest="")
    PhaseManifest(name="train", settings_hash="", steps=steps, seconds=0.8 * HOUR).write(tmp_path / "phases" / "train-0")
    return tmp_path


def pod(phase: str, usd_per_hour: float, *, hours: float = 1.0, billed: float | None = None) -> Entry:
    return Entry("a", 0.0, usd_per_hour, pod="p", phase=phase, ended=hours * HOUR, started=True, billed=billed, billed_at=math.inf)


def test_a_phases_bill_is_divided_by_the_time_its_steps_took(volume: Path) -> None:
    hourly = {"train": 4.0, "pipeline": 0.1, "server": 0.2, "evaluate": 2.0}
    paid = {phase: [pod(phase, usd)] for phase, usd in hourly.items()}
    bill = billed_by_step(FolderStore(volume), paid, now=9 * HOUR)
    assert bill.usd["train"] == pytest.approx({STARTS: 0.8, "stage1": 0.8, "stage2": 2.4})
    assert bill.usd["pipeline"] == pytest.approx({WAITING: 0.1})
    assert bill.usd["server"] == pytest.approx({SERVES: 0.2})
    assert bill.usd["evaluate"] == pytest.approx({UNFINISHED: 2.0}), "it has no manifest"
    assert bill.total == pytest.approx(6.3)


def test_helpers_and_lost_pods_have_worked_too(volume: Path) -> None:
    """The two steps' 40 minutes on two pods of half an hour, of which the phase's last run saw 48 minutes at most."""
    pods = [pod("train", 4.0, hours=0.5), pod("train", 4.0, hours=0.5)]
    PhaseManifest.read(volume / "phases" / "train-0").model_copy(update={"seconds": 5.0}).write(volume / "phases" / "train-0")
    bill = billed_by_step(FolderStore(volume), {"train": pods}, now=9 * HOUR)
    assert bill.usd["train"] == pytest.approx({STARTS: 4 / 3, "stage1": 2 / 3, "stage2": 2.0})


def test_what_runpod_billed_is_divided_and_not_what_was_expected(volume: Path) -> None:
    bill = billed_by_step(FolderStore(volume), {"train": [pod("train", 4.0, billed=5.0)]}, now=9 * HOUR)
    assert sum(bill.usd["train"].values()) == pytest.approx(5.0)


def test_a_plan_of_the_rest_does_not_replace_the_first(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert recorded_plan(store) is None
    record_plan(store, planned(), now=0)
    assert recorded_plan(store) is None, "nothing was to run"
    record_plan(store, planned(stage1=4.0, stage2=8.0), now=1)
    record_plan(store, planned(stage2=3.0, dpo=1.0), now=2)
    first = recorded_plan(store)
    assert first is not None
    assert {line.what: line.usd.value for line in first.lines} == {"stage1": 4.0, "stage2": 8.0, "dpo": 1.0}


@pytest.mark.parametrize(("spent", "share"), [(49.0, None), (51.0, "50%"), (81.0, "80%"), (95.5, "95%")])
def test_the_table_of_the_budget_warns(spent: float, share: str | None) -> None:
    note = budget_table(Position(100.0, 5.0, spent=spent, running=0.0, storage=0.0), now=0.0).note
    assert (f"{share} of the budget is spent or reserved: ${spent:.2f} of $100.00." in note) == bool(share)
    assert note.count("% of the budget") == bool(share)


def test_both_stand_side_by_side(volume: Path) -> None:
    bill = billed_by_step(FolderStore(volume), {"train": [pod("train", 4.0)], "other": [pod("other", 1.0)]}, now=9 * HOUR)
    table = bill_against_plan(planned(stage1=1.0, stage2=2.0), bill)
    for row in (
        ["train", "stage1", "$1.00", "$0.80", "-20%"],
        ["train", "stage2", "$2.00", "$2.40", "+20%"],
        ["train", STARTS, "$0.00", "$0.80", ""],
        ["train", "all of it", "$3.00", "$4.00", "+33%"],
        ["other", "all of it", "$0.00", "$1.00", ""],
        ["total", "", "$3.00", "$5.00", "+67%"],
    ):
        assert row in table.rows
    assert [table.rows[number][1] for number in table.marked] == ["all of it", "all of it", ""]
    assert bill_against_plan(planned(stage1=0.02, stage2=2.0), bill).rows[0] == ["train", "stage1", "$0.020", "$0.80", "x 40"]


def test_what_is_not_known_has_no_price_and_its_sums_no_interval(volume: Path) -> None:
    bill = billed_by_step(FolderStore(volume), {"train": [pod("train", 4.0)]}, now=9 * HOUR)
    lines = [
        Line(phase="train", what=STARTS, usd=Usd(low=0.1, value=0.2, high=0.3)),
        Line(phase="train", what="stage1", usd=Usd(low=0.5, value=1.0, high=2.0)),
        Line(phase="train", what="stage2", basis=NOT_KNOWN, complete=False),
    ]
    made = DollarPlan(lines=lines, cap_usd=500, reserve_usd=15)
    assert bill_against_plan(made, bill).rows == [
        ["train", STARTS, "$0.20 [$0.10, $0.30]", "$0.80", "+300%"],
        ["train", "stage1", "$1.00 [$0.50, $2.00]", "$0.80", "-20%"],
        ["train", "stage2", "not known", "$2.40", ""],
        ["train", "all of it", "$1.20 + not known", "$4.00", ""],
        ["total", "", "$1.20 + not known", "$4.00", ""],
    ]
    assert [row[5] for row in made.table().rows] == ["$0.20 [$0.10, $0.30]", "$1.00 [$0.50, $2.00]", "not known"]
    assert [row[5] for row in made.table(steps=False).rows] == ["$1.20 + not known"]
    assert made.table().note is not None
    assert made.table().note.startswith("Total $1.20 + not known of ")


@pytest.mark.parametrize(
    ("usd", "text"), [(0.0, "$0.00"), (12.3, "$12.30"), (0.5, "$0.50"), (0.0998, "$0.100"), (0.00427, "$0.0043"), (-0.02, "$-0.020")]
)
def test_less_than_a_dollar_is_shown_too(usd: float, text: str) -> None:
    assert usd_text(usd) == text
