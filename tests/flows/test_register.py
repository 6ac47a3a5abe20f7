"""Deployments on a real server: made once, and made again without undoing what users have set."""

import asyncio
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.testing.utilities import prefect_test_harness

from deployments.register import ALL_FLOWS, register
from tasks.config import PipelineConfig
from tests.tiny import PROFILE

pytestmark = pytest.mark.slow(reason="a Prefect server of its own")


def test_registering_again_leaves_schedules_as_users_set_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    profile = PipelineConfig.from_yaml(PROFILE)
    with prefect_test_harness(server_startup_timeout=120):
        assert asyncio.run(register(profile, tmp_path)) == {"fvlm-cpu": "process", "fvlm-gpu": "process"}
        with get_client(sync_client=True) as client:
            made = {name: client.read_deployment_by_name(f"{name}/tests") for name in ALL_FLOWS}
            (nightly,) = made["precompute"].schedules
            assert (nightly.schedule, nightly.active) == (CronSchedule(cron="0 3 * * *"), False)
            assert not any(one.schedules for name, one in made.items() if name != "precompute")
            client.update_deployment_schedule(made["precompute"].id, nightly.id, active=True, schedule=CronSchedule(cron="0 5 * * 1"))
            client.create_deployment_schedules(made["train"].id, [(CronSchedule(cron="0 6 * * *"), True)])
            asyncio.run(register(profile, tmp_path))
            again = {name: client.read_deployment_by_name(f"{name}/tests") for name in ALL_FLOWS}
    seen = {name: [(one.schedule, one.active) for one in deployment.schedules] for name, deployment in again.items()}
    seen = {name: schedules for name, schedules in seen.items() if schedules}
    assert seen == {"precompute": [(CronSchedule(cron="0 5 * * 1"), True)], "train": [(CronSchedule(cron="0 6 * * *"), True)]}


def test_the_form_begins_with_the_small_field_of_changes() -> None:
    for name, flow in ALL_FLOWS.items():
        properties = flow.parameters.properties
        first = min(properties, key=lambda field: properties[field]["position"])
        assert first == "changes", name
        assert "by dotted path" in properties["changes"]["description"]
        assert set(flow.parameters.required) == {"config", "volume"}
