"""The local Prefect server against web pages of others, and under many writers."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from uuid import uuid4

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from websockets import ConnectionClosed, Subprotocol
from websockets.sync.client import connect

from infra.api import credentials, run_over
from infra.stack import Stack

CHROMIUM = "/usr/bin/chromium"
SLOW_MS = 60_000
NEW_POOL = {"name": "evil", "type": "process", "base_job_template": {}}
ATTACK = """
async ([url, body, headers]) => {
    const tries = [
        {method: "POST", body, headers: {"content-type": "application/json"}},
        {method: "POST", body, headers: {"content-type": "application/json", ...headers}},
        {method: "POST", body, mode: "no-cors"},
        {method: "POST", body, mode: "no-cors", credentials: "include"},
    ];
    const seen = [];
    for (const options of tries) {
        try { seen.push((await fetch(url, options)).status) } catch (error) { seen.push("blocked") }
    }
    return seen;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    page.set_default_timeout(SLOW_MS)
    yield page
    page.close()


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Address of a page on another origin."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_without_the_password_the_api_answers_nothing_but_that_it_is_healthy(stack: Stack) -> None:
    assert httpx.get(f"{stack.api_url}/health").json() is True
    assert httpx.post(f"{stack.api_url}/work_pools/", json=NEW_POOL).status_code == 401
    assert httpx.post(f"{stack.api_url}/flow_runs/filter", json={}).status_code == 401
    assert httpx.post(f"{stack.api_url}/flow_runs/filter", json={}, headers={"Authorization": "Basic Zm9vOmJhcg=="}).status_code == 401
    assert httpx.post(f"{stack.api_url}/flow_runs/filter", json={}, headers=credentials(stack.environment())).status_code == 200


def test_the_password_is_the_user_s_alone_and_on_no_command_line_and_in_no_log(stack: Stack) -> None:
    secret = stack.password_file.read_text()
    assert stack.password_file.stat().st_mode & 0o777 == 0o600
    assert secret.partition(":")[2] not in str(stack.children["server"].args)
    httpx.get(f"{stack.ui_url}/open")
    assert secret.partition(":")[2] not in (stack.home / "server.log").read_text()


def test_a_page_on_another_origin_can_start_nothing(stack: Stack, page: Page, elsewhere: str) -> None:
    page.goto(elsewhere)
    pools, runs = f"{stack.api_url}/work_pools/", f"{stack.api_url}/flow_runs/"
    known = credentials(stack.environment())  # the browser refuses even those who know the password: their page may not ask
    for url, body in ((pools, '{"name": "evil", "type": "process"}'), (runs, '{"name": "evil", "flow_id": "0"}')):
        assert page.evaluate(ATTACK, [url, body, known]) == ["blocked", "blocked", 0, 0], "0: sent, and the answer kept from the page"
    names = [pool["name"] for pool in httpx.post(f"{pools}filter", json={}, headers=known).json()]
    assert "evil" not in names, "what was sent came without the password, and was refused by the server"


def test_the_ui_opens_with_the_link_and_with_the_password_typed_in(stack: Stack, browser: Browser, page: Page) -> None:
    link = stack.opening_link()
    assert link is not None
    shown = {"name": "shown", "type": "process"}
    httpx.post(f"{stack.api_url}/work_pools/", json=shown, headers=credentials(stack.environment())).raise_for_status()
    with page.expect_response(lambda reply: "/api/" in reply.url and reply.ok, timeout=SLOW_MS):
        page.goto(link)
    page.goto(f"{stack.ui_url}/work-pools")
    expect(page.get_by_text("shown").first).to_be_visible(timeout=SLOW_MS)

    stranger = browser.new_context().new_page()
    stranger.goto(f"{stack.ui_url}/login")
    stranger.get_by_placeholder("admin:pass").fill(stack.password_file.read_text())
    with stranger.expect_response(lambda reply: "/api/" in reply.url and reply.ok, timeout=SLOW_MS):
        stranger.get_by_role("button", name="Login").click()
    stranger.goto(f"{stack.ui_url}/work-pools")
    expect(stranger.get_by_text("shown").first).to_be_visible(timeout=SLOW_MS)


def test_many_writers_at_once_wait_for_their_turn(stack: Stack) -> None:
    """As the UI's clicks: no second try by the client. Each reads and writes in one transaction."""
    with httpx.Client(base_url=stack.api_url, headers=credentials(stack.environment()), timeout=120) as client:
        flow = client.post("/flows/", json={"name": "clicked"}).json()["id"]

        def click(number: int) -> list[int]:
            made = client.post("/flow_runs/", json={"flow_id": flow, "state": {"type": "SCHEDULED"}})
            if not made.is_success:
                return [made.status_code]
            run = made.json()["id"]
            state = {"state": {"type": "RUNNING"}, "force": True}
            replies = [
                client.patch(f"/flow_runs/{run}", json={"name": f"run-{number}"}),
                client.post(f"/flow_runs/{run}/set_state", json=state),
                client.post("/work_queues/", json={"name": f"queue-{number}"}),
                client.delete(f"/flow_runs/{run}"),
            ]
            return [made.status_code, *(reply.status_code for reply in replies)]

        with ThreadPoolExecutor(8) as pool:
            seen = [status for statuses in pool.map(click, range(40)) for status in statuses]
    assert len(seen) == 200
    assert all(status < 300 for status in seen), sorted(set(seen))


def test_workers_that_greet_the_server_at_once_are_all_heard(stack: Stack) -> None:
    """Each greeting reads and then writes, in one transaction: begun as a reader, it is refused where another has written meanwhile."""
    known = stack.environment()
    with httpx.Client(base_url=stack.api_url, headers=credentials(known), timeout=120) as client:
        client.post("/work_pools/", json={"name": "greeted", "type": "process"}).raise_for_status()

        def greet(number: int) -> str:
            payload = {
                "consumer_id": str(uuid4()),
                "worker_name": f"worker-{number}",
                "worker_type": "process",
                "heartbeat_interval_seconds": 30,
                "supported_channel_versions": ["work_pool_worker_channel.v1"],
                "requested_capabilities": ["worker_heartbeat.v1", "work_pool_snapshot.v1"],
            }
            url = f"{stack.api_url.replace('http', 'ws', 1)}/work_pools/greeted/workers/connect"
            try:
                with connect(url, subprotocols=[Subprotocol("prefect")]) as channel:
                    channel.send(json.dumps({"type": "auth", "token": known["PREFECT_API_AUTH_STRING"]}))
                    channel.recv()
                    hello = {"type": "worker.hello.v1", "id": str(uuid4()), "sent_at": datetime.now(UTC).isoformat(), "payload": payload}
                    channel.send(json.dumps(hello))
                    return json.loads(channel.recv())["type"]
            except ConnectionClosed as closed:
                return str(closed)

        def write(number: int) -> str:
            return "written" if client.post("/flows/", json={"name": f"flow-{number}"}).is_success else "not written"

        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(lambda number: (greet if number % 2 else write)(number), range(100)))
    assert set(said) == {"worker.ready.v1", "written"}


def test_the_user_s_own_password_and_port_are_taken(stack: Stack) -> None:
    given = {"PATH": os.environ["PATH"], "PREFECT_SERVER_API_AUTH_STRING": "me:mine"}
    mine = Stack(stack.volume, environment=given)
    mine.state = stack.state
    assert mine.environment()["PREFECT_API_AUTH_STRING"] == "me:mine"
    assert mine.opening_link() is None, "the user's own password is not printed"


def test_only_prefect_says_that_it_does_not_know_a_run(stack: Stack) -> None:
    """A proxy whose server is gone says 404 too, in words of its own."""
    environment = stack.client_environment()
    assert run_over(stack.api_url, environment, uuid4()) == "Prefect does not know its flow run"
    assert run_over(f"{stack.api_url}/elsewhere", environment, uuid4()) is None
    assert run_over(stack.ui_url, environment, uuid4()) is None
