"""The client against Prism, which serves RunPod's OpenAPI document: every call is accepted and every example is understood.

Prism comes from npm (two hundred packages, half a minute), so this runs only where FVLM_PRISM is set:
`FVLM_PRISM=1 python -m pytest tests/infra/runpod/test_prism.py`.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from infra.runpod.client import RunPod
from infra.runpod.errors import InvalidRequestError, TooManyRequestsError, WrongKeyError
from infra.runpod.models import CreatePod, CreateVolume, GpuRequest, Mounts, NetworkMount

PRISM = "@stoplight/prism-cli@5.16.0"
START_S = 240

pytestmark = [
    pytest.mark.skipif(not os.environ.get("FVLM_PRISM"), reason="FVLM_PRISM is not set"),
    pytest.mark.slow(reason="installs and starts Prism"),
]


@pytest.fixture(scope="module")
def prism() -> Iterator[str]:
    npx = shutil.which("npx")
    assert npx, "npx is needed"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    document = Path(__file__).with_name("openapi.json")
    command = [npx, "--yes", PRISM, "mock", "-h", "127.0.0.1", "-p", str(port), str(document)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while True:
            try:
                httpx.get(f"{url}/v2/pods", timeout=10)
                break
            except httpx.HTTPError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield url
        os.killpg(process.pid, 15)


def test_every_call_is_accepted(prism: str) -> None:
    now, day = datetime.now(UTC), timedelta(days=1)
    with RunPod("key", prism) as client:
        mounts = Mounts(network=[NetworkMount(volumeId="a", path="/workspace")])
        gpu = GpuRequest(id="NVIDIA A100 80GB PCIe", count=2, minCudaVersion="12.8")
        request = CreatePod(name="fvlm-a", image="i", args="true", env={"A": "1"}, gpu=gpu, mounts=mounts, dataCenterIds=["US-KS-2"])
        assert client.create_pod(request).id
        assert client.pods()
        assert client.pod("a").id
        assert client.act("a", "stop") is not None
        assert client.terminate("a") is True
        assert client.volumes()
        assert client.create_volume(CreateVolume(name="fvlm-new", size=500, dataCenter="US-KS-2")).id
        assert client.delete_volume("a") is True
        assert client.gpus(count=2)
        assert client.cpus(vcpus=4)
        assert client.data_centers()
        assert client.billed_pods(now - day, now)
        assert client.billed_volumes(now - day, now)
        assert next(client.logs("a", tail=10)).line == "Model loaded."


def test_refusals_are_understood(prism: str) -> None:
    with RunPod("key", prism, sleep=lambda _: None) as client:
        client._http.headers["Prefer"] = "code=429"
        with pytest.raises(TooManyRequestsError):
            client.pods()
        client._http.headers["Prefer"] = "code=422"
        with pytest.raises(InvalidRequestError):
            client.create_pod(CreatePod(name="a", image="i", gpu=GpuRequest(id="b")))
        client._http.headers["Prefer"] = "code=401"
        with pytest.raises(WrongKeyError):
            client.pods()
