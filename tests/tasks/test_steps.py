"""Steps on a real volume with a real job: keys, finding, damage, locks, resuming."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.errors import UserError
from fvlm_core.manifest import AnyManifest
from fvlm_core.progress import ProgressReport
from infra.launch import JobError, JobStoppedError
from tasks.make import MakeOptions, Reporter, make
from tasks.steps import ExternalInput, File, OnCodeChange, Step, StepResult, in_dependency_order

MODULE = "tests.jobs.count"
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


class Log(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reports: list[ProgressReport] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def progress(self, step: str, report: ProgressReport) -> None:
        self.reports.append(report)


def step(name: str = "count", **settings: object) -> Step:
    return Step(name=name, module=MODULE, settings={"value": 1} | settings)


def after(made: StepResult, **settings: object) -> Step:
    return Step(name="after", module=MODULE, settings={"value": 2} | settings, inputs={"reads": [made]})


def runs(volume: Path, one: Step) -> int:
    path = volume / f"{one.folder}.runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_made_once_and_then_found(tmp_path: Path) -> None:
    first, second = make(step(), tmp_path), make(step(), tmp_path)
    assert first == second
    assert runs(tmp_path, step()) == 1
    assert (tmp_path / first.folder / "value.txt").read_text() == "1"


def test_inputs_reach_the_job_and_the_folder_does_not_depend_on_where_the_volume_is(tmp_path: Path) -> None:
    first = make(step(), tmp_path / "a")
    second = make(after(first), tmp_path / "a")
    assert (tmp_path / "a" / second.folder / "value.txt").read_text() == "2 1"
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert make(after(make(step(), tmp_path / "b")), tmp_path / "b") == second
    assert runs(tmp_path / "b", after(first)) == 1


@given(DIGESTS, DIGESTS, st.integers(), st.integers())
def test_key_follows_settings_and_input_digests_and_nothing_else(one: str, other: str, value: int, ranks: int) -> None:
    def keyed(digest: str, value: int, **more: int) -> str:
        made = StepResult(name="first", folder="steps/somewhere", digest=digest)
        return Step(name="s", module=MODULE, settings={"value": value}, inputs={"reads": [made]}, **more).key

    assert keyed(one, value) == keyed(one, value, ranks=ranks, threads=3)
    assert (keyed(one, value) == keyed(other, value)) == (one == other)
    assert keyed(one, value) != keyed(one, value + 1)


def test_what_only_says_how_the_job_is_done_is_no_part_of_the_key(tmp_path: Path) -> None:
    def outside(digest: str) -> Step:
        return Step(name="s", module=MODULE, settings={"value": 1}, inputs={"reads.0": ExternalInput(tmp_path, digest)})

    one = Step("s", MODULE, {"value": 1, "seconds": 0.0}, identity={"value": 1})
    assert one.key == Step("s", MODULE, {"value": 1, "seconds": 9.0}, identity={"value": 1}).key
    assert outside("").key == Step("s", MODULE, {"value": 1}).key, "a program's place"
    assert outside("1").key != outside("2").key


def test_a_step_holds_steps_that_are_not_made_yet_and_a_file_in_a_folder(tmp_path: Path) -> None:
    first = step()
    second = Step("second", MODULE, {"value": 2, "reads": [None]}, inputs={"reads.0": first})
    third = Step("third", MODULE, {"value": 3}, inputs={"reads": [File(second, "deeper"), first]})
    assert [[one.name for one in wave] for wave in in_dependency_order([third, second, first])] == [["count"], ["second"], ["third"]]
    assert third.needs == [second, first]
    with pytest.raises(RuntimeError, match="third needs second"):
        _ = third.key
    made = {"count": make(first, tmp_path)}
    made["second"] = make(second.bound(made), tmp_path)
    bound = third.bound(made)
    assert not bound.needs
    assert bound.job_settings(tmp_path)["reads"] == [f"{tmp_path}/{made['second'].folder}/deeper", f"{tmp_path}/{made['count'].folder}"]
    loop = Step("a", MODULE, {}, inputs={"reads": [Step("b", MODULE, {}, inputs={"reads": [Step("a", MODULE, {})]})]})
    with pytest.raises(ValueError, match="wait for each other"):
        list(in_dependency_order([loop, Step("b", MODULE, {}, inputs={"reads": [loop]})]))


@pytest.mark.parametrize("policy", ["warn", "rerun", "ignore"])
def test_a_result_of_other_code_is_reported_or_made_again(tmp_path: Path, policy: OnCodeChange) -> None:
    made = make(step(), tmp_path)
    manifest = AnyManifest.read(tmp_path / made.folder)
    assert manifest.code == {}, "the job of this test is no part of the package"
    manifest.model_copy(update={"code": {"fvlm_core/cli.py": "of another time"}}).write(tmp_path / made.folder)
    found = step().find(tmp_path, "sha256", policy)
    log = Log()
    assert make(step(), tmp_path, how=MakeOptions(on_code_change=policy), reporter=log).digest == made.digest
    said = "fvlm_core/cli.py has changed"
    match policy:
        case "warn":
            assert (found.made, found.other_code, runs(tmp_path, step())) == (made, (said,), 1)
        case "rerun":
            assert (found.made, found.reason, runs(tmp_path, step())) == (None, f"made by other code: {said}", 2)
            assert any(said in line for line in log.lines)
        case "ignore":
            assert (found.made, found.other_code, runs(tmp_path, step())) == (made, (), 1)


@pytest.mark.parametrize("damage", ["delete", "same size", "truncate", "manifest", "no text"])
def test_damage_is_noticed_and_made_good(tmp_path: Path, damage: str) -> None:
    made = make(step(value=7), tmp_path)
    target = tmp_path / made.folder / ("manifest.json" if damage in ("manifest", "no text") else "value.txt")
    match damage:
        case "delete":
            target.unlink()
        case "same size":
            target.write_text("8")
        case "no text":
            target.write_bytes(b"\xff\xfe" + bytes(range(256)))
        case _:
            target.write_text(target.read_text()[:-1])
    assert made.problems(tmp_path, "sha256")
    log = Log()
    assert make(step(value=7), tmp_path, reporter=log) == made
    assert not made.problems(tmp_path, "sha256")
    assert any("damaged" in line for line in log.lines)
    assert runs(tmp_path, step(value=7)) == 2


def test_sizes_only_verification_sees_missing_files(tmp_path: Path) -> None:
    made = make(step(), tmp_path)
    assert not made.problems(tmp_path, "sizes")
    (tmp_path / made.folder / "value.txt").unlink()
    assert made.problems(tmp_path, "sizes") == [f"{made.folder}/value.txt: missing"]


def test_refused_input_is_a_user_error_with_its_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(step(refuse=True), tmp_path)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("the value is bad", "value", "give a good one")


def test_unknown_setting_is_a_user_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'valu'"):
        make(Step(name="count", module=MODULE, settings={"valu": 1}), tmp_path)


def test_failed_job_leaves_no_manifest_and_a_second_try_succeeds(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="failing on purpose"):
        make(step(fail_first=1), tmp_path)
    assert step(fail_first=1).find(tmp_path, "sha256").reason == "begun, not finished"
    assert make(step(fail_first=1), tmp_path).name == "count"


def test_a_job_that_succeeds_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no manifest\.json"):
        make(Step(name="nothing", module="this", settings={}), tmp_path)


def test_stop_leaves_the_folder_for_the_next_run_to_go_on_from(tmp_path: Path) -> None:
    slow, stop, log = step(seconds=4.0), threading.Event(), Log()
    counted = tmp_path / slow.folder / "done.txt"

    def stop_when_begun() -> None:
        while not (counted.exists() and counted.stat().st_size):
            time.sleep(0.02)
        stop.set()

    threading.Thread(target=stop_when_begun, daemon=True).start()
    with pytest.raises(JobStoppedError):
        make(slow, tmp_path, stop=stop)
    done = int(counted.read_text())
    assert 0 < done < 40
    make(slow, tmp_path, reporter=log)
    assert all(report.step >= done for report in log.reports), "the first may still be the stopped run's last"
    assert log.reports[-1].step == 40


def _make(one: Step, volume: Path) -> None:
    make(one, volume)


def test_two_processes_make_a_step_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_make, args=(step(seconds=1.0), tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert runs(tmp_path, step(seconds=1.0)) == 1


def test_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    slow = step(seconds=1.5)
    owner = multiprocessing.get_context("spawn").Process(target=_make, args=(slow, tmp_path))
    owner.start()
    while not (tmp_path / slow.folder / "done.txt").exists():
        time.sleep(0.02)
    os.kill(owner.pid or 0, signal.SIGKILL)
    made = make(slow, tmp_path)
    assert AnyManifest.read(tmp_path / made.folder).counts == {"value": 1}
