"""The share of 500 clicks in the Prefect UI that fail with status 503 while flow runs and workers are busy, and the time per click.

A click is a state-changing request as the UI sends it: once, without a retry. Measured with our server and, as the reference, with `prefect
server start`, each on an empty SQLite database, with two workers and flow runs that log and run tasks continuously. Floor: none fails.
"""

import contextlib
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from http import HTTPStatus
from pathlib import Path

import httpx
from prefect import flow, get_run_logger, task

from benchmarks.report import Measurement, arguments, show
from infra.api import credentials
from infra.prefect_settings import without
from infra.stack import PROCESS_POOL, Stack, queue_name
from tasks.machine import Pools

POOLS = Pools()
"""The default pools."""
BENCHMARK = "server_clicks"
START_TIMEOUT_S = 180


class ReferenceStack(Stack):
    """A stack that starts the server with Prefect's own command."""

    def server_arguments(self, listener: socket.socket) -> list[str]:
        host, port = listener.getsockname()
        listener.close()
        return ["prefect", "server", "start", "--host", host, "--port", str(port)]


STACKS = {"prefect server start": ReferenceStack, "ours": Stack}


@task
def log_a_line(number: int) -> None:
    """A task like a cached step: a few writes and no work."""
    get_run_logger().info("line %d", number)


@flow
def busy(seconds: float) -> None:
    """Run tasks for `seconds`."""
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        log_a_line(number)
        number += 1
        time.sleep(0.2)


def main() -> None:
    options = arguments(__doc__ or "", clicks={"type": int, "default": 500}, runs={"type": int, "default": 2})
    show(measure(options.clicks, options.runs), as_json=options.json)


def measure(clicks: int, runs: int) -> Iterator[Measurement]:
    """Measure the reference, then our server."""
    shares: dict[str, float] = {}
    for name, kind in STACKS.items():
        with _server(kind) as stack, _client(stack) as client:
            _keep_busy(client, stack, runs)
            statuses, seconds = _click(client, clicks)
        shares[name] = statuses.count(HTTPStatus.SERVICE_UNAVAILABLE) / len(statuses)
        other = len([one for one in statuses if one >= HTTPStatus.BAD_REQUEST and one != HTTPStatus.SERVICE_UNAVAILABLE])
        if other:
            raise RuntimeError(f"{other} clicks failed otherwise: {sorted(set(statuses))}")
        word = name.replace(" ", "_")
        yield Measurement(BENCHMARK, f"{word}_unavailable_share", shares[name], "of clicks")
        yield Measurement(BENCHMARK, f"{word}_click_ms", statistics.median(seconds) * 1000, "ms, median")
        yield Measurement(BENCHMARK, f"{word}_slowest_click_ms", max(seconds) * 1000, "ms")


@contextlib.contextmanager
def _server(kind: type[Stack]) -> Generator[Stack]:
    """Run a server with workers on an empty volume."""
    with tempfile.TemporaryDirectory() as folder:
        stack = kind(Path(folder) / "volume", environment=without(os.environ))
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]  # a free port, not a default one that another stack on this machine may use
            stack.start_server(port)
            stack.wait_for_server()
            with _client(stack) as client:
                for pool in (POOLS.cpu.name, POOLS.gpu.name):
                    _made(client, "/work_pools/", {"name": pool, "type": PROCESS_POOL})
                    _made(client, f"/work_pools/{pool}/queues", {"name": queue_name(stack.id)})
            stack.start_workers({POOLS.cpu.name: PROCESS_POOL, POOLS.gpu.name: PROCESS_POOL})
            yield stack
        finally:
            stack.stop()


def _client(stack: Stack) -> httpx.Client:
    """Return a client without keep-alive, because the server silently closes the connection of a failed request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=stack.api_url, headers=credentials(stack.environment()), timeout=120, limits=limits)


def _keep_busy(client: httpx.Client, stack: Stack, runs: int) -> None:
    """Start `runs` flow runs and return when they are running."""
    flow_id = _made(client, "/flows/", {"name": busy.name})
    deployment = {
        "name": "busy",
        "flow_id": flow_id,
        "entrypoint": f"{__spec__.name if __spec__ else __name__}.busy",
        "work_pool_name": POOLS.cpu.name,
        "work_queue_name": queue_name(stack.id),
        "parameters": {"seconds": 3600},
        "job_variables": {"command": "python -m prefect.engine", "working_dir": "."},
    }
    made = _made(client, "/deployments/", deployment)
    for _ in range(runs):
        _made(client, f"/deployments/{made}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    deadline = time.monotonic() + START_TIMEOUT_S
    under_way = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    while (seen := client.post("/flow_runs/count", json=under_way).json()) < runs:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{seen} of {runs} flow runs have started in {START_TIMEOUT_S} s; log: {stack.home / POOLS.cpu.name}.log")
        time.sleep(0.5)


def _click(client: httpx.Client, clicks: int) -> tuple[list[int], list[float]]:
    """Return the status and seconds of each click: create a run, rename it, cancel it, delete it, and update the deployment."""
    deployment = client.post("/deployments/filter", json={"deployments": {"name": {"any_": ["busy"]}}}).json()[0]["id"]
    statuses: list[int] = []
    seconds: list[float] = []
    run = ""

    def request(method: str, path: str, body: dict | None = None) -> httpx.Response:
        began = time.perf_counter()
        reply = client.request(method, path, json=body)
        seconds.append(time.perf_counter() - began)
        statuses.append(reply.status_code)
        return reply

    later = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}}
    while len(statuses) < clicks:
        made = request("POST", f"/deployments/{deployment}/create_flow_run", later)
        if made.is_success:
            run = made.json()["id"]
            request("PATCH", f"/flow_runs/{run}", {"name": "clicked"})
            request("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
            request("DELETE", f"/flow_runs/{run}")
        request("PATCH", f"/deployments/{deployment}", {"description": f"click {len(statuses)}"})
    return statuses[:clicks], seconds[:clicks]


def _made(client: httpx.Client, path: str, body: dict) -> str:
    """Create an object and return its id; retries on 503, as Prefect's own client does."""
    for _ in range(50):
        reply = client.post(path, json=body)
        if reply.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
            break
        time.sleep(0.2)
    reply.raise_for_status()
    return reply.json()["id"]


if __name__ == "__main__":
    main()
