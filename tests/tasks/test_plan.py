"""The plan says what would run and because of what, and running does just that."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.checks import load_profile
from deployments.status import status_table
from fvlm_core import dotted
from fvlm_core.errors import UserError
from fvlm_core.manifest import AnyManifest, Manifest
from infra.locks import try_lock
from tasks.adopt import adopt
from tasks.config import PipelineConfig
from tasks.direct import run_directly
from tasks.make import make
from tasks.phase import Phase, Shown
from tasks.plan import Plan, inspect_steps, plan
from tasks.steps import ExternalInput, Step
from tests.tiny import PROFILE

TESTS = PipelineConfig.from_yaml(PROFILE)
MODULE = "tests.jobs.count"


def phases(**values: Any) -> list[Phase]:
    """Two phases: `one` and `two`; then `three`, which reads both and follows what the first phase decides."""
    settings = {name: {"value": 1} | values.get(name, {}) for name in ("one", "two", "three")}
    one = Step("one", MODULE, settings["one"])
    first = Phase(
        name="first",
        purpose="Count.",
        pool="cpu",
        reads=("precompute",),
        steps=lambda config, before: [one, Step("two", MODULE, settings["two"], inputs={"reads": [one]})],
        decide=lambda config, results: {"value": int((results.folder("one") / "value.txt").read_text())},
        show=lambda config, results: Shown(),
    )
    second = Phase(
        name="second",
        purpose="Count on.",
        pool="cpu",
        after=(first,),
        reads=("precompute",),
        steps=lambda config, before: [
            Step("three", MODULE, settings["three"] | before.changes, inputs={"reads": [before.step("first", "two")]})
        ],
        show=lambda config, results: Shown(),
    )
    return [first, second]


def run(volume: Path, phases: list[Phase]) -> None:
    run_directly(phases, TESTS, volume)


def reasons(planned: Plan) -> dict[str, str]:
    return {one.step: one.because if one.state == "runs" else "cached" for one in planned.steps}


def test_an_empty_volume(tmp_path: Path) -> None:
    planned = plan(phases(), TESTS, tmp_path)
    assert reasons(planned) == {"one": "not made yet", "two": "it reads one that will run", "three": "it reads two that will run"}
    assert planned.summary().rows[0][:3] == ["first", "2 of 2 steps", "will run"]


def test_everything_done(tmp_path: Path) -> None:
    run(tmp_path, phases())
    planned = plan(phases(), TESTS, tmp_path)
    assert set(reasons(planned).values()) == {"cached"}
    assert "Nothing to do" in planned.table().note
    assert planned.summary().rows[0][:3] == ["first", "2 of 2 steps", "cached"]
    assert [row[0] for row in planned.of("second").summary().rows] == ["second"]
    assert planned.of(None) == planned


def test_status_of_phases_that_have_nothing_to_say(tmp_path: Path) -> None:
    run(tmp_path, phases())
    assert [row[:3] for row in status_table(phases(), TESTS, tmp_path).rows] == [
        ["first", "done", "2 steps"],
        ["second", "done", "1 steps"],
    ]


def test_a_changed_setting_is_named_with_its_values(tmp_path: Path) -> None:
    run(tmp_path, phases())
    planned = plan(phases(two={"value": 5}), TESTS, tmp_path)
    assert reasons(planned) == {"one": "cached", "two": "value: 1 -> 5", "three": "it reads two that will run"}
    run(tmp_path, phases(two={"value": 5}))
    assert set(reasons(plan(phases(two={"value": 5}), TESTS, tmp_path)).values()) == {"cached"}


def test_a_changed_input_is_named(tmp_path: Path) -> None:
    run(tmp_path, phases())
    make(Step("one", MODULE, {"value": 7}), tmp_path)
    planned = plan(phases(one={"value": 7}), TESTS, tmp_path)
    assert reasons(planned) == {"one": "cached", "two": "reads.0 has changed", "three": "it reads two that will run"}


def test_damage_is_named(tmp_path: Path) -> None:
    run(tmp_path, phases())
    (tmp_path / phases()[0].steps(TESTS, None)[0].folder / "value.txt").unlink()
    assert reasons(plan(phases(), TESTS, tmp_path))["one"].startswith("damaged: ")


def test_a_decision_that_is_open_is_a_condition(tmp_path: Path) -> None:
    run(tmp_path, phases())
    first, second = phases()
    again = Step("again", MODULE, {"value": 3})
    more = Phase(
        name="first",
        purpose="Count.",
        pool="cpu",
        reads=("precompute",),
        steps=lambda config, before: [*first.steps(config, before), again],
        decide=first.decide,
        show=first.show,
    )
    steps = {one.step: one for one in plan([more, second], TESTS, tmp_path).steps}
    assert (steps["again"].state, steps["again"].because) == ("runs", "not made yet")
    assert (steps["three"].state, steps["three"].because) == ("cached", "unless first decides otherwise")


def test_a_result_from_elsewhere_is_adopted_where_it_fits(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    run(there, phases())
    theirs = {one.step.name: there / one.step.folder for one in inspect_steps(phases(), TESTS, there)}

    def wanted(**values: Any) -> dict[str, Step]:
        return {one.step.name: one.step for one in inspect_steps(phases(**values), TESTS, here)}

    with pytest.raises(UserError, match="two reads one, which is not there yet"):
        adopt(wanted()["two"], theirs["two"], here)
    with pytest.raises(UserError, match="value is 1, not 2"):
        adopt(wanted(one={"value": 2})["one"], theirs["one"], here)
    with ThreadPoolExecutor(1) as elsewhere:
        busy = elsewhere.submit(try_lock, wanted()["one"].lock(here)).result()
    assert busy
    with pytest.raises(UserError, match="one is being made by another process"):
        adopt(wanted()["one"], theirs["one"], here)
    busy.release()
    made = adopt(wanted()["one"], theirs["one"], here)
    assert not made.problems(here, "sha256")
    assert reasons(plan(phases(), TESTS, here)) == {"one": "cached", "two": "not made yet", "three": "it reads two that will run"}
    with pytest.raises(UserError, match="one is done already"):
        adopt(wanted()["one"], theirs["one"], here)

    (theirs["two"] / "value.txt").write_text("damage")
    with pytest.raises(UserError, match="the result is damaged"):
        adopt(wanted()["two"], theirs["two"], here)
    run(there, phases())
    adopt(wanted()["two"], theirs["two"], here)
    assert AnyManifest.read(here / wanted()["two"].folder).digest == AnyManifest.read(theirs["two"]).digest


@pytest.mark.parametrize(
    ("inputs", "why"),
    [({"vision": "same"}, ""), ({"vision": "other"}, "made from another model.vision.checkpoint"), ({}, "does not say from which")],
)
def test_a_training_by_hand_is_adopted_if_its_encoder_is_the_same_wherever_it_lay(tmp_path: Path, inputs: dict[str, str], why: str) -> None:
    place = "model.vision.checkpoint"
    settings: Any = {"value": 1, "model": {"vision": {"checkpoint": "input"}}}
    step = Step("stage1", MODULE, settings, inputs={place: ExternalInput(tmp_path / "here", "same")})
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(dotted.with_changes(settings, {place: "/elsewhere/vision"})))
    Manifest(name="stage1", settings_hash="", inputs=inputs).write(run)
    if why:
        with pytest.raises(UserError, match=why):
            adopt(step, run, tmp_path / "volume")
    else:
        assert adopt(step, run, tmp_path / "volume").folder == step.folder


def test_the_shipped_profiles_can_be_planned_before_anything_is_there(tmp_path: Path) -> None:
    from flows.registry import PHASES

    for profile in ("ci", "laptop"):
        config = load_profile(profile)
        planned = plan(list(PHASES.values()), config, tmp_path)
        steps = {one.step: one for one in planned.steps}
        stage = config.stages.stage2.run
        assert steps["stage2"].samples == (stage.steps or 0) * stage.batch_samples
        assert sum(one.phase == "scaling" for one in planned.steps) == 2 * len(config.scaling.sizes) * len(config.scaling.budgets_flops) + 1


def test_parts_are_one_line_of_the_table_and_take_as_long_as_each_other(tmp_path: Path) -> None:
    parts = [Step(f"part-{number:05d}", MODULE, {"value": number}) for number in range(4)]
    first = Phase("first", "Count.", "cpu", ("precompute",), lambda config, before: parts, lambda config, results: Shown())
    make(parts[2], tmp_path)
    planned = plan([first], TESTS, tmp_path)
    seconds = AnyManifest.read(tmp_path / parts[2].folder).seconds
    assert [one.seconds for one in planned.steps if one.state == "runs"] == [seconds or None] * 3
    rows = [row[:3] for row in planned.table().rows]
    assert rows == [["first", "1 of 4 steps", "cached"], ["first", "part (3 parts)", "will run"]]
