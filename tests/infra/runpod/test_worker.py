"""Flow runs on emulated pods, through a real Prefect server and a real worker."""

import pytest

from infra.runpod.emulator.server import Emulator
from infra.stack import Stack
from tests.infra.runpod.rig import PLANTED, Rig, working

pytestmark = pytest.mark.slow(reason="every flow run starts a process with Prefect")


def test_a_flow_run_is_a_pod_that_ends_with_it(prefect_api: Stack, emulator: Emulator) -> None:
    with working(Rig(prefect_api, emulator)) as rig:
        run = rig.submit("one")
        state = rig.finish(run.id)
        assert state.is_completed(), rig.tail()
        rig.wait_for_no_pods()
        print(rig.tail())
        print(rig.run_logs(run.id))
        assert PLANTED not in rig.tail()
