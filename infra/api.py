"""A minimal Prefect API client for calls that must be quick: Prefect's own client retries for minutes and is slow to import."""

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
"""State types of flow runs in progress. Scheduled runs have not started and are not among them."""
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
ENDING = timedelta(seconds=90)
"""Grace period after the end of a flow run in which its machine may shut down by itself."""


def problem_with(api_url: str) -> str | None:
    """Return why this cannot be the URL of a Prefect API, or None if it can."""
    try:
        url = httpx.URL(api_url)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        return str(error)
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 1 << 16:
        return "it is not of the form http://HOST:PORT/api"
    return None


def healthy(api_url: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Return whether a Prefect API answers at this URL."""
    try:
        reply = _client().get(f"{api_url}/health", timeout=timeout_s)
        return reply.status_code == HTTPStatus.OK and reply.json() is True
    except (httpx.HTTPError, ValueError):
        return False


def refused(api_url: str, environment: Mapping[str, str]) -> bool:
    """Return whether the API requires a password or key other than the one in `environment`."""
    reply = _client().get(f"{api_url}/admin/version", headers=credentials(environment), timeout=TIMEOUT_S)
    return reply.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


def active_runs(api_url: str, environment: Mapping[str, str], tag: str) -> list[str]:
    """Return the names of the flow runs with this tag that are in progress or paused."""
    asked: dict[str, Any] = {"flow_runs": {"tags": {"all_": [tag]}, "state": {"type": {"any_": ACTIVE}}}}
    reply = _client().post(f"{api_url}/flow_runs/filter", json=asked, headers=credentials(environment), timeout=TIMEOUT_S)
    reply.raise_for_status()
    return [run["name"] for run in reply.json()]


def run_over(api_url: str, environment: Mapping[str, str], run: UUID) -> str | None:
    """Return why a flow run is over: it ended more than `ENDING` ago, or the server does not know it.

    Return None if it may still be running, or if the server gives no usable answer.
    """
    try:
        reply = _client().get(f"{api_url}/flow_runs/{run}", headers=credentials(environment), timeout=TIMEOUT_S)
        if reply.status_code == HTTPStatus.NOT_FOUND:
            # a proxy whose server is down, or another site at that address, also answers 404
            of_prefect = "flow run" in str(reply.json()["detail"]).lower()
            return "Prefect does not know its flow run" if of_prefect else None
        state = reply.raise_for_status().json()["state"]
        since = datetime.now(UTC) - datetime.fromisoformat(state["timestamp"])
        return f"its flow run is {state['name']}" if state["type"] in OVER and since > ENDING else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


@cache
def _client() -> httpx.Client:
    """One client per process: creating one reads the machine's certificates, 20 ms. It keeps no connections, because servers may change."""
    return httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that Prefect's client would send with the settings in `environment`."""
    if auth := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"}
    return {"Authorization": f"Bearer {key}"} if (key := environment.get("PREFECT_API_KEY")) else {}
