"""Deployments on a real server: made once, made again without undoing what users have set, and run from wherever a worker is."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.schedules import CronSchedule

from deployments.register import FLOWS, flow_named, make_pools, new_pool, register
from flows import evaluate
from flows.registry import PHASES
from fvlm_core.errors import UserError
from infra.prefect_settings import without
from infra.stack import REPOSITORY, Stack, queue_name, volume_tag
from infra.volume import volume_id
from tasks.config import PipelineConfig
from tasks.machine import Pool
from tests.tiny import PROFILE

PACKAGES = ("deployments", "flows", "fvlm_core", "infra", "tasks", "tests")
TESTS = PipelineConfig.from_yaml(PROFILE)
RUN_ONE = """
import asyncio, os, sys, time
from pathlib import Path
from infra.stack import REPOSITORY, Stack
assert " " in str(REPOSITORY) and " " in sys.executable
stack = Stack(Path(sys.argv[1]), environment=os.environ)
try:
    stack.start_server()
    os.environ.update(stack.client_environment())
    from deployments.checks import load_profile
    from deployments.register import register
    from prefect.client.orchestration import get_client
    stack.wait_for_server()
    registered = asyncio.run(register(load_profile("ci"), stack.volume))
    stack.start_workers(registered.pool_types)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name(f"release/{registered.deployment}").id)
        while not run.state.is_final():
            time.sleep(0.5)
            run = client.read_flow_run(run.id)
    print(run.state.name, run.state.message)
finally:
    stack.stop()
"""


def volume(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_registering_again_leaves_schedules_as_users_set_them(prefect_api: Stack, tmp_path: Path) -> None:
    mine = volume(tmp_path / "mine")
    registered = asyncio.run(register(TESTS, mine))
    assert registered.pool_types == {"fvlm-cpu": "process", "fvlm-gpu": "process"}
    with get_client(sync_client=True) as client:
        made = {name: client.read_deployment_by_name(f"{name}/{registered.deployment}") for name in FLOWS}
        (nightly,) = made["precompute"].schedules
        assert (nightly.schedule, nightly.active) == (CronSchedule(cron="0 3 * * *"), False)
        assert not any(one.schedules for name, one in made.items() if name != "precompute")
        client.update_deployment_schedule(made["precompute"].id, nightly.id, active=True, schedule=CronSchedule(cron="0 5 * * 1"))
        client.create_deployment_schedules(made["train"].id, [(CronSchedule(cron="0 6 * * *"), True)])
        before = {name: client.read_deployment_by_name(f"{name}/{registered.deployment}") for name in FLOWS}
        assert asyncio.run(register(TESTS, mine)) == registered
        again = {name: client.read_deployment_by_name(f"{name}/{registered.deployment}") for name in FLOWS}
        assert [again[name].updated for name in FLOWS] == [before[name].updated for name in FLOWS], "not even written anew"
        assert asyncio.run(register(TESTS.with_changes({"stages.stage2.run.steps": 11}), mine)) == registered
        changed = client.read_deployment_by_name(f"train/{registered.deployment}")
        assert changed.parameters["config"]["stages"]["stage2"]["run"]["steps"] == 11
        assert changed.schedules == again["train"].schedules
        limits = []
        for limit in (3, None, 1):
            asyncio.run(make_pools(TESTS.with_changes({"machine.pools.gpu.limit": limit}), mine))
            limits.append(client.read_work_pool("fvlm-gpu").concurrency_limit)
        assert limits == [3, 3, 1], "the profile's, where it has one"
    seen = {name: [(one.schedule, one.active) for one in deployment.schedules] for name, deployment in again.items()}
    seen = {name: schedules for name, schedules in seen.items() if schedules}
    assert seen == {"precompute": [(CronSchedule(cron="0 5 * * 1"), True)], "train": [(CronSchedule(cron="0 6 * * *"), True)]}


def test_a_pool_of_any_type_that_prefect_knows_is_made_and_others_are_refused(prefect_api: Stack) -> None:
    """Docker's library is not installed here: its template comes from the server."""

    async def made(pool: Pool) -> WorkPool:
        async with get_client() as client:
            await new_pool(client, pool)
            return await client.read_work_pool(pool.name)

    assert "image" in asyncio.run(made(Pool(name="containers", type="docker"))).base_job_template["variables"]["properties"]
    with pytest.raises(UserError, match="no work-pool type 'dokcer'") as refused:
        asyncio.run(made(Pool(name="others", type="dokcer")))
    assert "docker" in refused.value.fix
    assert "runpod" in refused.value.fix


def test_the_form_begins_with_the_small_field_of_changes() -> None:
    for name in FLOWS:
        flow = flow_named(name)
        properties = flow.parameters.properties
        first = min(properties, key=lambda field: properties[field]["position"])
        assert first == "changes", name
        assert "by dotted path" in properties["changes"]["description"]
        assert set(flow.parameters.required) == {"config", "volume"}
        if name in PHASES:  # what is registered of one is compared with what another has
            assert flow.parameters == flow_named(next(iter(PHASES))).parameters


def test_a_module_of_a_phase_has_its_flow_and_nothing_else_that_is_asked_for() -> None:
    assert evaluate.evaluate is evaluate.evaluate is flow_named("evaluate")
    assert not hasattr(evaluate, "train")


def test_two_volumes_on_one_server_share_neither_deployments_nor_queues(prefect_api: Stack, tmp_path: Path) -> None:
    one, two = volume(tmp_path / "one"), volume(tmp_path / "two")
    names = [asyncio.run(register(TESTS, each)).deployment for each in (one, two)]
    assert len(set(names)) == 2
    assert asyncio.run(register(TESTS, one)).deployment == names[0], "as before"
    with get_client(sync_client=True) as client:
        for name, each in zip(names, (one, two), strict=True):
            known = volume_id(each)
            for flow in FLOWS:
                deployment = client.read_deployment_by_name(f"{flow}/{name}")
                assert deployment.parameters["volume"] == str(each)
                assert deployment.work_queue_name == queue_name(known)
                assert volume_tag(known) in deployment.tags


def test_a_deployment_says_nothing_of_the_host_that_registered_it(prefect_api: Stack, tmp_path: Path) -> None:
    registered = asyncio.run(register(TESTS, volume(tmp_path / "volume")))
    with get_client(sync_client=True) as client:
        for flow in FLOWS:
            deployment = client.read_deployment_by_name(f"{flow}/{registered.deployment}")
            text = json.dumps([deployment.job_variables, deployment.path, deployment.entrypoint, deployment.pull_steps])
            assert str(REPOSITORY) not in text
            assert str(Path(sys.executable).parent) not in text


@pytest.mark.timeout(400)
def test_a_flow_runs_from_a_checkout_whose_path_has_a_space(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, checkout / package)
    (checkout / ".venv").symlink_to(Path(sys.executable).parents[1])
    outside = without(os.environ)
    command = [str(checkout / ".venv" / "bin" / "python"), "-c", RUN_ONE, str(tmp_path / "a volume")]
    done = subprocess.run(command, cwd=checkout, env=outside, capture_output=True, text=True, check=True)
    assert "Failed" in done.stdout, "the flow has run, and"
    assert "release needs the results of precompute, which are not there" in done.stdout


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        (None, 2, "no Prefect server is named"),
        ("", 2, "no Prefect server is named"),
        ("garbage", 2, "it is not of the form"),
        ("http://127.0.0.1:9/api", 1, "no answer from the Prefect API at http://127.0.0.1:9/api"),
        ("ours, without its password", 2, "refuses access; set PREFECT_API_AUTH_STRING"),
    ],
)
def test_deploy_needs_a_server_that_it_can_use(stack: Stack, tmp_path: Path, address: str | None, status: int, words: str) -> None:
    outside = without(os.environ)
    if address is not None:
        outside["PREFECT_API_URL"] = stack.api_url if address.startswith("ours") else address
    began = time.monotonic()
    command = [str(Path(sys.executable).with_name("fvlm")), "deploy", "--profile", "ci", "--volume", str(tmp_path)]
    done = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert words in done.stderr
    assert done.stdout == "", "nothing was registered"
    assert time.monotonic() - began < 60
