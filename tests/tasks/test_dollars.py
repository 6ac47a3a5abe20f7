"""A plan in dollars: FLOPs to hours to money, by hand, and what the cap leaves out."""

import pytest

from deployments.checks import load_profile
from flows.registry import PHASES
from fvlm_core.config import Recipe
from fvlm_core.train.expected import expected_cost
from infra.stack import REPOSITORY
from tasks.ablations import baseline_recipe
from tasks.dollars import SERVES, WAITING, Usd, in_dollars, recipes_in_dollars, storage_usd_per_month
from tasks.plan import Plan, StepPlan, plan, plan_recipes
from tasks.recipes import stage_recipe
from tasks.rental import Assumed, Mfu, Rental

RENTAL = Rental(
    gpu_usd_per_hour=4.0,
    gpu_count=2,
    cpu_usd_per_hour=1.0,
    pipeline_usd_per_hour=0.0,
    volume_gb=100,
    days=30.4,
    assumed=Assumed(
        mfu=Mfu(low=0.2, expected=0.25, high=0.5), peak_tflops=250.0, hours={"download": 2.0, "download-big": 5.0}, start_h=0.0
    ),
)
PHASE_LIST = list(PHASES.values())


def made(*steps: StepPlan) -> Plan:
    return Plan(steps=list(steps))


def test_money_follows_from_flops_peak_and_share_of_it() -> None:
    """1e18 FLOPs at 2 x 250 TFLOP/s and 25 %: 8,000 s of a pod for $4 an hour."""
    planned = in_dollars(made(StepPlan(phase="train", step="stage1", state="runs", flops=1e18)), PHASE_LIST, RENTAL)
    assert planned.of("train").value == pytest.approx(8000 / 3600 * 4)
    assert planned.of("train").low == pytest.approx(4000 / 3600 * 4)
    assert planned.of("train").high == pytest.approx(10000 / 3600 * 4)
    assert planned.of("storage").value == pytest.approx(7.0)
    assert planned.total.value == pytest.approx(8000 / 3600 * 4 + 7)


def test_what_was_measured_wins_over_what_is_stated_and_the_longest_name_over_shorter_ones() -> None:
    steps = [
        StepPlan(phase="train", step="stage1", state="runs", flops=1e18, seconds=3600.0),
        StepPlan(phase="precompute", step="download-big-one", state="runs"),
        StepPlan(phase="precompute", step="download-small", state="runs"),
        StepPlan(phase="precompute", step="shards", state="runs"),
        StepPlan(phase="evaluate", step="evaluation", state="cached"),
    ]
    planned = in_dollars(made(*steps), PHASE_LIST, RENTAL)
    assert planned.of("train").value == pytest.approx(4.0)
    assert planned.of("train").high == pytest.approx(4.4)
    assert planned.of("precompute").value == pytest.approx(7.0)
    assert planned.unknown == ["shards"]
    assert [line.what for line in planned.lines if not line.complete] == ["shards", WAITING, SERVES], "these last as long as all steps"
    assert planned.of("evaluate") == Usd(), "what is cached costs nothing"


def test_steps_that_ran_side_by_side_are_planned_as_long_as_they_took_together() -> None:
    steps = [StepPlan(phase="train", step=f"small{number}", state="runs", seconds=1800.0) for number in (1, 2)]
    planned = in_dollars(Plan(steps=steps, overlap={"train": 0.55}), PHASE_LIST, RENTAL)
    assert planned.of("train").value == pytest.approx(0.55 * 4.0)


def test_while_the_grid_decides_it_is_planned_for_the_largest_size() -> None:
    step = StepPlan(phase="train", step="stage1", state="runs", flops=1e17, flops_range=(1e17, 1e18))
    planned = in_dollars(made(step), PHASE_LIST, RENTAL)
    assert planned.of("train").value == pytest.approx(8000 / 3600 * 4)
    assert planned.of("train").low == pytest.approx(400 / 3600 * 4)


def test_the_pod_of_the_server_is_planned_for_as_long_as_the_pipeline_runs() -> None:
    rental = RENTAL.model_copy(update={"pipeline_usd_per_hour": 0.5})
    planned = in_dollars(made(StepPlan(phase="train", step="stage1", state="runs", seconds=7200.0)), PHASE_LIST, rental)
    assert planned.of("server").value == pytest.approx(1.0)
    assert planned.of("pipeline").value == pytest.approx(1.0)


def test_what_the_cap_leaves_out_is_said() -> None:
    steps = [StepPlan(phase="train", step=f"stage{number}", state="runs", flops=1e18) for number in (1, 2, 3)]
    poor = RENTAL.model_copy(update={"cap_usd": 35.0, "reserve_usd": 3.0})
    planned = in_dollars(made(*steps), PHASE_LIST, poor)
    assert planned.dropped == ["stage3", "the flow that waits for the phases", "the Prefect server's pod"]
    assert "The cap binds; these would not start: stage3" in planned.table().note
    assert in_dollars(made(*steps), PHASE_LIST, RENTAL).dropped == []


@pytest.mark.parametrize(("size_gb", "usd"), [(500, 35.0), (1000, 70.0), (2000, 120.0)])
def test_storage(size_gb: int, usd: float) -> None:
    assert storage_usd_per_month(size_gb) == pytest.approx(usd)


def test_the_production_plan_agrees_with_the_budget(tmp_path) -> None:
    """SPEC, section 7: volume about $35, CPU $5 to 15, GPU about $256; in all no more than these."""
    config = load_profile("runpod")
    assert config.machine.rental is not None
    planned = in_dollars(plan(PHASE_LIST, config, tmp_path), PHASE_LIST, config.machine.rental)
    assert planned.unknown == []
    assert planned.dropped == planned.at_risk == []
    assert planned.of("storage").value == pytest.approx(35, abs=1)
    assert 5 <= planned.of("precompute").value + planned.of("release").value <= 17
    gpu = sum(planned.of(phase).value for phase in ("speed", "ablations", "scaling", "train", "evaluate"))
    assert 150 <= gpu <= 260
    assert planned.total.value <= 35 + 15 + 256
    assert planned.total.high <= config.machine.rental.cap_usd - config.machine.rental.reserve_usd


def test_recipes_by_themselves_are_priced_as_the_steps_of_a_phase_are(tmp_path) -> None:
    """The baseline's own recipe costs what its step does; the pod's start is paid once, and neither storage nor a waiting flow."""
    config = load_profile("runpod")
    rental = config.machine.rental
    assert rental is not None
    pipeline = in_dollars(plan(PHASE_LIST, config, tmp_path), PHASE_LIST, rental)
    step = next(line for line in pipeline.lines if line.what == "ablation-baseline")
    glances = [Recipe.from_yaml(REPOSITORY / f"deployments/recipes/glance_{name}.yaml") for name in ("all", "chosen")]
    planned = recipes_in_dollars(plan_recipes([baseline_recipe(config.model, config.base, 0, {}), *glances], config, tmp_path), rental)
    start, baseline, every, chosen = planned.lines
    assert (baseline.flops, baseline.usd, baseline.basis) == (step.flops, step.usd, step.basis)
    assert start.usd.value == pytest.approx(rental.assumed.start_h * rental.gpu_usd_per_hour)
    flops = [line.flops or 0.0 for line in (chosen, baseline, every)]
    per_step = [flops[0] / 400, flops[1] / 1407, flops[2] / 1407]
    assert 0 < per_step[0] < per_step[1] < per_step[2], "chosen patches; the frame in full; the glance beside it"
    assert planned.unknown == []


def test_assumed_samples_cost_what_the_flop_counter_says() -> None:
    """Published shapes, no hub: 6 FLOPs per parameter and token of the language model, about, and the encoder's share."""
    config = load_profile("runpod")
    assert config.machine.rental is not None
    recipe: Recipe = stage_recipe(config.model, config.base, config.stages, "stage2", changes={}, start=False)
    cost = expected_cost(recipe, None, config.machine.rental.assumed.samples)
    assert cost.samples == recipe.run.steps * recipe.run.batch_samples
    assert cost.flops is not None
    tokens = 0.86 * (160 + 8) + 0.14 * 700
    passes = 2.2  # text is read once, pictures by the coarse pass and two fine ones up to their last query
    language = 6 * 134.5e6 * tokens * passes
    encoder = 0.86 * 3 * 2 * 257 * 21.3e6
    assert cost.flops / cost.samples == pytest.approx(language + encoder, rel=0.5)
