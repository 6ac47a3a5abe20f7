"""The few questions that are asked of a Prefect API without Prefect's client, which retries for minutes and is slow to import."""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from http import HTTPStatus
from typing import Any
from uuid import UUID

import httpx

TIMEOUT_S = 5.0
ACTIVE = ("RUNNING", "PENDING", "CANCELLING", "PAUSED")
"""State types of flow runs that somebody waits for; scheduled ones have not begun."""
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
ENDING = timedelta(seconds=90)
"""For what a flow run ran on to end by itself."""


def problem_with(api_url: str) -> str | None:
    """Why this cannot be the address of a Prefect API; None where it can."""
    try:
        url = httpx.URL(api_url)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        return str(error)
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 1 << 16:
        return "it is not of the form http://HOST:PORT/api"
    return None


def healthy(api_url: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a Prefect API answers there."""
    try:
        reply = _client().get(f"{api_url}/health", timeout=timeout_s)
        return reply.status_code == HTTPStatus.OK and reply.json() is True
    except (httpx.HTTPError, ValueError):
        return False


def refused(api_url: str, environment: Mapping[str, str]) -> bool:
    """Whether the API wants a password or key, and not the one in `environment`."""
    reply = _client().get(f"{api_url}/admin/version", headers=credentials(environment), timeout=TIMEOUT_S)
    return reply.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


def active_runs(api_url: str, environment: Mapping[str, str], tag: str) -> list[str]:
    """Names of the flow runs with this tag that are under way, or have paused."""
    asked: dict[str, Any] = {"flow_runs": {"tags": {"all_": [tag]}, "state": {"type": {"any_": ACTIVE}}}}
    reply = _client().post(f"{api_url}/flow_runs/filter", json=asked, headers=credentials(environment), timeout=TIMEOUT_S)
    reply.raise_for_status()
    return [run["name"] for run in reply.json()]


def run_over(api_url: str, environment: Mapping[str, str], run: UUID) -> str | None:
    """Why nobody works on a flow run any more: it has ended some time ago, or the server does not know it; None where it may go on.

    None too where the server does not say.
    """
    try:
        reply = _client().get(f"{api_url}/flow_runs/{run}", headers=credentials(environment), timeout=TIMEOUT_S)
        if reply.status_code == HTTPStatus.NOT_FOUND:
            # a proxy without its server, or another site at that address, says 404 too
            of_prefect = "flow run" in str(reply.json()["detail"]).lower()
            return "Prefect does not know its flow run" if of_prefect else None
        state = reply.raise_for_status().json()["state"]
        since = datetime.now(UTC) - datetime.fromisoformat(state["timestamp"])
        return f"its flow run is {state['name']}" if state["type"] in OVER and since > ENDING else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


@cache
def _client() -> httpx.Client:
    """One for the process: each reads the machine's certificates, 20 ms. Connections are not kept: the server may be another next time."""
    return httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Headers that Prefect's client would send, by its settings in `environment`."""
    if auth := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"}
    return {"Authorization": f"Bearer {key}"} if (key := environment.get("PREFECT_API_KEY")) else {}
