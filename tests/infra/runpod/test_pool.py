"""What is found of a pool's settings before anything is rented: a server that no pod reaches, an image that no pod can pull."""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest

from infra.errors import RefusedError
from infra.runpod.image import HUB, check_image, parts
from infra.runpod.models import GpuRequest, Volume
from infra.runpod.pool import RunPodConfiguration
from infra.runpod.rent import Candidate

DIGEST = f"sha256:{'0' * 64}"
PUBLIC, PRIVATE, TOKEN = "ours/fvlm", "ours/secret", "everybodys"
PAGES = {"/v2/open/fvlm/manifests/1.0": 200, f"/v2/{PUBLIC}/manifests/1.0": 200, f"/v2/{PUBLIC}/manifests/{DIGEST}": 200}


class Registry(BaseHTTPRequestHandler):
    """As far as the OCI distribution specification is needed: `open/` needs no token, everything else one for its own name."""

    def do_HEAD(self) -> None:
        name = self.path.removeprefix("/v2/").partition("/manifests/")[0]
        if not name.startswith("open/") and self.headers.get("Authorization") != f"Bearer {TOKEN}-{name}":
            self.send_response(401)
            host, port = self.server.server_address[:2]
            self.send_header("WWW-Authenticate", f'Bearer realm="http://{host}:{port}/token",service="test",scope="repository:{name}:pull"')
        elif name == "ours/busy":
            self.send_response(429)
        else:
            self.send_response(401 if name == PRIVATE else PAGES.get(self.path, 404))
        self.end_headers()

    def do_GET(self) -> None:
        name = parse_qs(urlsplit(self.path).query)["scope"][0].split(":")[1]
        content = f'{{"token": "{TOKEN}-{name}"}}'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("image", ["open/fvlm:1.0", f"{PUBLIC}:1.0", f"{PUBLIC}@{DIGEST}", f"{PUBLIC}:gone@{DIGEST}"])
def test_an_image_that_is_there_is_let_pass(registry: str, image: str) -> None:
    check_image(f"{registry}/{image}")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (f"{PUBLIC}:2.0", "there is no image 127.0.0.1:.*/ours/fvlm:2.0\\n.*\\n.*with its tag"),
        (PUBLIC, "there is no image"),
        ("open/other:1.0", "there is no image"),
        (f"{PRIVATE}:1.0", "is not there, or private\\n.*\\n.*`registry`"),
    ],
)
def test_an_image_that_nobody_can_pull_is_refused(registry: str, image: str, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_image(f"{registry}/{image}")
    assert re.search(says, str(caught.value))


def test_a_registry_that_does_not_answer_proves_nothing(registry: str) -> None:
    check_image(f"{registry}/ours/busy:1.0")
    check_image("127.0.0.1:9/ours/fvlm:1.0")
    check_image("127.0.0.1:9/not a name at all")


@pytest.mark.parametrize(
    ("image", "read"),
    [
        ("ubuntu", (HUB, "library/ubuntu", "latest")),
        ("runpod/pytorch:1.0.2-cu1281", (HUB, "runpod/pytorch", "1.0.2-cu1281")),
        ("ghcr.io/ours/fvlm:1", ("ghcr.io", "ours/fvlm", "1")),
        ("localhost:5000/fvlm", ("localhost:5000", "fvlm", "latest")),
        (f"runpod/base:1@{DIGEST}", (HUB, "runpod/base", DIGEST)),
    ],
)
def test_names_are_read_as_docker_reads_them(image: str, read: tuple[str, str, str]) -> None:
    assert parts(image) == read


@pytest.mark.parametrize(
    ("host", "reachable"),
    [
        ("localhost:4200", False),
        ("127.0.0.1:4200", False),
        ("[::1]:4200", False),
        ("10.1.2.3", False),
        ("172.20.0.5:4200", False),
        ("192.168.1.10:4200", False),
        ("169.254.1.1", False),
        ("host.docker.internal:4200", False),
        ("mine.local", False),
        ("gpubox:4200", False),
        ("8.8.8.8:4200", True),
        ("api.prefect.cloud", True),
        ("abc-4200.proxy.runpod.net", True),
    ],
)
def test_a_server_that_no_pod_reaches_is_refused(host: str, reachable: bool) -> None:
    configuration = RunPodConfiguration.model_validate({"env": {"PREFECT_API_URL": f"http://{host}/api"}})
    if reachable:
        configuration.check_reachable()
    else:
        with pytest.raises(RefusedError, match="cannot be reached from a pod") as caught:
            configuration.check_reachable()
        assert "fvlm infra up" in caught.value.fix
    configuration.model_copy(update={"runpod_url": "http://127.0.0.1:1"}).check_reachable()  # an emulator's pods are here


@pytest.mark.parametrize(("hours", "grace_s"), [(48.0, 600.0), (0.25, 90.0)])
def test_a_job_has_time_to_save_before_its_pod_ends(hours: float, grace_s: float) -> None:
    """A checkpoint of 1.7B takes 440 s; a pod of a quarter of an hour works for most of it."""
    volume = Volume(id="v", name="fvlm", size=100, dataCenter="US-KS-2")
    machine = Candidate(GpuRequest(id="NVIDIA L40S", count=1), "US-KS-2", 0.8, "HIGH")
    job = json.loads(RunPodConfiguration.model_validate({}).job(uuid4(), volume, time.time() + hours * 3600, machine))
    assert job["grace_s"] == pytest.approx(grace_s, abs=1.0)
