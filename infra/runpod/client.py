"""A client for RunPod's REST API v2, with the few calls that this project makes. It does not use v1 or GraphQL, which RunPod is retiring.

It does what every caller would otherwise have to do: respect the rate limit, retry after transient errors, and never create a second pod
because the response to the first request was lost.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http import HTTPStatus
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import ValidationError

from infra.runpod.errors import (
    NotFoundError,
    RunPodError,
    TooManyRequestsError,
    UnavailableError,
    UnreadableError,
    WrongKeyError,
    raise_for,
    retry_after_s,
)
from infra.runpod.models import Billed, CpuType, CreatePod, CreateVolume, DataCenter, GpuType, LogLine, Pod, Reply, Volume

API_URL = "https://api.runpod.io"
USER_AGENT = "fvlm/0.1 python-httpx"
"""Without one, or with urllib's own, RunPod's edge answers 403."""
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
CREATE_TIMEOUT = httpx.Timeout(90.0, connect=10.0)
"""A create request waits until a machine is found."""
LOG_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
ATTEMPTS = 5
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
LONGEST_RETRY_AFTER_S = 60.0
"""Longest wait after a 429, even if RunPod, which also has an hourly limit, asks for more: a caller that sleeps watches no pods."""
LOOKS = 4
"""Attempts to find a pod whose create request got no response; about 15 s in all."""
CURSORS = ("nextCursor", "next_cursor", "nextPageToken", "cursor")
"""Fields of a list response that may hold the cursor of the next page. The API document has none yet, but a pod on an unread page would
go on being billed."""
PAGES = 1000

Bucket = Literal["hour", "day", "week", "month", "year"]
R = TypeVar("R", bound=Reply)
log = logging.getLogger(__name__)


class RunPod:
    """A client for RunPod's API. Thread-safe; its methods raise RunPodError. Use it as a context manager, or `close` it."""

    def __init__(self, key: str, url: str = API_URL, *, sleep: Callable[[float], None] = time.sleep, attempts: int = ATTEMPTS) -> None:
        """`sleep` is the function that is called to wait."""
        if not key.strip():
            raise WrongKeyError(
                "no key for RunPod's API", where="RUNPOD_API_KEY", fix="set it to a key from https://console.runpod.io/user/settings"
            )
        self.url, self._sleep, self._attempts = url.rstrip("/"), sleep, attempts
        headers = {"Authorization": f"Bearer {key.strip()}", "User-Agent": USER_AGENT}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def create_pod(self, request: CreatePod) -> Pod:
        """Rent a pod. Its name must be unique: if the response is lost, the pod is found by its name.

        Raises NoCapacityError, NoBalanceError or InvalidRequestError; UnavailableError if it is unknown whether the pod was created.
        """
        body = request.model_dump(mode="json", exclude_none=True)
        for attempt in range(self._attempts):
            try:
                pod = _parsed(Pod, self._send("POST", "/v2/pods", json=body, timeout=CREATE_TIMEOUT, attempts=1))
                if attempt:
                    self._end_twins(pod)
                return pod
            except UnreadableError:  # the pod probably exists: no second one is requested
                if found := self._appears(request.name):
                    return found
                raise
            except UnavailableError as error:
                log.warning("the answer to the creation of %s was lost: %s", request.name, error.what)
                if found := self.pod_named(request.name):
                    return found
                if attempt + 1 == self._attempts:
                    raise
                self._sleep(_delay_s(attempt))
                if found := self.pod_named(request.name):  # it may take a moment to appear
                    return found
            except RunPodError as error:
                if attempt == 0:
                    raise
                # the request without a response may have created the pod on the last free machine
                if found := self._appears(request.name):
                    return found
                what = f"RunPod: it is unknown whether the pod {request.name} exists: the first request for it was not answered, and then"
                fix = "look at the console; the reaper ends such a pod"
                raise UnavailableError(f"{what} {error.what.removeprefix('RunPod: ')}", where=error.where or self.url, fix=fix) from error
        raise AssertionError

    def _appears(self, name: str) -> Pod | None:
        """Return the pod of this name, which may be listed late; None if it does not appear."""
        for look in range(LOOKS):
            if found := self.pod_named(name):
                return found
            self._sleep(_delay_s(look))
        return None

    def _end_twins(self, pod: Pod) -> None:
        """End other pods of the same name: a pod whose create request got no response may be listed late."""
        try:
            for twin in self.pods():
                if twin.name == pod.name and twin.id != pod.id:
                    log.warning("%s had been created before as pod %s, which is ended", pod.name, twin.id)
                    self.terminate(twin.id)
        except RunPodError as error:  # if there is one, the poller ends it
            log.warning("it was not checked whether there is a second pod of the name %s: %s", pod.name, error.what)

    def pods(self) -> list[Pod]:
        """Return all pods of the account. Terminated pods are not listed."""
        return [_parsed(Pod, one) for one in self._list("/v2/pods", "pods")]

    def pod(self, pod: str) -> Pod:
        """Return a pod by id. Raises NotFoundError if there is none."""
        return _parsed(Pod, self._send("GET", f"/v2/pods/{pod}"))

    def pod_named(self, name: str) -> Pod | None:
        """Return the pod of this name, or None."""
        return next((pod for pod in self.pods() if pod.name == name), None)

    def terminate(self, pod: str) -> bool:
        """Terminate a pod in any state, which ends its cost. Returns False if it is already gone."""
        try:
            self._send("DELETE", f"/v2/pods/{pod}")
        except NotFoundError:
            return False
        return True

    def act(self, pod: str, action: Literal["start", "stop", "restart", "terminate"]) -> Pod | None:
        """Change a pod's state. Raises WrongStateError if its current state does not allow that."""
        reply = self._send("POST", f"/v2/pods/{pod}/action", json={"action": action})
        return _parsed(Pod, reply) if reply else None

    def logs(self, pod: str, *, after: str | None = None, tail: int = 0) -> Iterator[LogLine]:
        """Yield the lines of a pod's log: those after the event `after`, or the last `tail`, then new lines until the stream ends."""
        headers = {"Last-Event-ID": after} if after else {}
        try:
            with self._http.stream("GET", f"/v2/pods/{pod}/logs", params={"tail": tail}, headers=headers, timeout=LOG_TIMEOUT) as reply:
                if reply.status_code != HTTPStatus.OK:
                    reply.read()
                    raise_for(reply)
                event = ""
                for line in reply.iter_lines():
                    name, _, value = line.partition(":")
                    if name == "id":
                        event = value.strip()
                    elif name == "data":
                        yield _parsed(LogLine, json.loads(value) | {"id": event})
        except (httpx.HTTPError, ValueError) as error:
            raise _unavailable("GET", f"{self.url}/v2/pods/{pod}/logs", error) from error

    def volumes(self) -> list[Volume]:
        """All network volumes of the account."""
        return [_parsed(Volume, one) for one in self._list("/v2/network-volumes", "networkVolumes")]

    def create_volume(self, request: CreateVolume) -> Volume:
        """Create a network volume, or return the one of this name. If the response is lost, the volume is found by its name."""
        if found := next((one for one in self.volumes() if one.name == request.name), None):
            return found
        try:
            return _parsed(Volume, self._send("POST", "/v2/network-volumes", json=request.model_dump(mode="json"), attempts=1))
        except UnavailableError:
            if found := next((one for one in self.volumes() if one.name == request.name), None):
                return found
            raise

    def delete_volume(self, volume: str) -> bool:
        """Delete a volume with everything on it. Returns False if it is already gone."""
        try:
            self._send("DELETE", f"/v2/network-volumes/{volume}")
        except NotFoundError:
            return False
        return True

    def gpus(self, *, count: int = 1) -> list[GpuType]:
        """Return the GPUs on offer, with the price of a single one and, per data centre, the stock for `count` of them."""
        asked = {"include": "AVAILABILITY", "product": "POD", "count": count, "cloud": "SECURE"}
        return [_parsed(GpuType, one) for one in self._list("/v2/catalog/gpus", "gpus", asked)]

    def cpus(self, *, vcpus: int = 2) -> list[CpuType]:
        """Return the CPU flavours on offer, with the stock for `vcpus` vCPUs per data centre."""
        asked = {"include": "AVAILABILITY", "product": "POD", "vcpuCount": vcpus}
        return [_parsed(CpuType, one) for one in self._list("/v2/catalog/cpus", "cpus", asked)]

    def data_centers(self) -> list[DataCenter]:
        """The data centres, with the stock of GPUs in each."""
        return [_parsed(DataCenter, one) for one in self._list("/v2/catalog/datacenters", "dataCenters", {"include": "GPU_AVAILABILITY"})]

    def billed_pods(self, start: datetime, end: datetime, *, bucket: Bucket = "hour") -> list[Billed]:
        """Return what each pod cost per `bucket` of time."""
        return self._billed("/v2/billing/pods", start, end, bucket)

    def billed_volumes(self, start: datetime, end: datetime, *, bucket: Bucket = "hour") -> list[Billed]:
        """Return what each network volume cost per `bucket` of time."""
        return self._billed("/v2/billing/network-volumes", start, end, bucket)

    def balance_usd(self) -> float | None:
        """Return the account's balance, or None if the service offers no such call.

        The call is newer than the OpenAPI document that this client is tested against, so its path is read from the service's own document.
        """
        document = self._send("GET", "/v2/openapi.json")
        for path, operations in document.get("paths", {}).items():
            if "balance" in str(operations.get("get", {}).get("operationId", "")).lower() and "{" not in path:
                amount = self._send("GET", path).get("balanceAmount")
                return None if amount is None else float(amount)
        return None

    def _billed(self, path: str, start: datetime, end: datetime, bucket: Bucket) -> list[Billed]:
        asked = {"startTime": start.isoformat(), "endTime": end.isoformat(), "bucketSize": bucket}
        return [_parsed(Billed, one) for one in self._list(path, "records", asked)]

    def _list(self, path: str, field: str, asked: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return all entries of a list, from all of its pages."""
        entries: list[dict[str, Any]] = []
        page: dict[str, str] = {}
        seen: set[str] = set()
        for _ in range(PAGES):
            reply = self._send("GET", path, params={**(asked or {}), **page})
            found = reply.get(field)
            if not isinstance(found, list):  # not an empty list, or all pods would look gone
                raise UnreadableError(
                    f"RunPod: {path} has no list of {field}", where=self.url, fix="try again; if it persists, report this"
                )
            entries += found
            places = [reply, *(value for name in ("metadata", "pagination") if isinstance(value := reply.get(name), dict))]
            cursor = next((str(place[name]) for place in places for name in CURSORS if place.get(name)), None)
            if cursor is None or cursor in seen:
                return entries
            seen.add(cursor)
            page = {"cursor": cursor}
        raise UnavailableError(f"RunPod: {path} has more than {PAGES} pages", where=self.url, fix="report this")

    def _send(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        params: dict[str, Any] | None = None,
        timeout: httpx.Timeout = TIMEOUT,
        attempts: int | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the JSON response. Retries after 429; makes up to `attempts` attempts after 5xx or no response."""
        left = self._attempts if attempts is None else attempts
        for attempt in range(self._attempts):
            try:
                reply = self._http.request(method, path, json=json, params=params, timeout=timeout)
            except httpx.HTTPError as error:
                left -= 1
                if left <= 0:
                    raise _unavailable(method, self.url + path, error) from error
                self._sleep(_delay_s(attempt))
                continue
            log.debug("%s %s: %d (request %s)", method, path, reply.status_code, reply.headers.get("x-request-id"))
            if reply.is_success:
                return _json(reply)
            if reply.status_code == HTTPStatus.TOO_MANY_REQUESTS and attempt + 1 < self._attempts:
                asked_s = retry_after_s(reply)
                if asked_s > LONGEST_RETRY_AFTER_S:
                    log.warning("RunPod asks to wait %.0f s; trying again in %.0f s", asked_s, LONGEST_RETRY_AFTER_S)
                self._sleep(min(asked_s, LONGEST_RETRY_AFTER_S))
                continue
            left -= 1
            if reply.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR and left > 0:
                self._sleep(_delay_s(attempt))
                continue
            raise_for(reply)
        raise TooManyRequestsError("RunPod: too many requests", where=self.url + path, fix="wait", status=429)


def _json(reply: httpx.Response) -> dict[str, Any]:
    if not reply.content:
        return {}
    try:
        body = reply.json()
    except ValueError as error:
        raise _unavailable(reply.request.method, str(reply.request.url), error) from error
    return body if isinstance(body, dict) else {}


def _parsed(kind: type[R], entry: dict[str, Any]) -> R:
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False))
        # not RunPodError, which means refused: after such a reply to a create request there may be a pod
        raise UnreadableError(f"RunPod: a {kind.__name__} that is not understood: {fields}", where="its reply", fix="report this") from None


def _unavailable(method: str, where: str, error: Exception) -> UnavailableError:
    reason = str(error) or type(error).__name__
    return UnavailableError(
        f"RunPod: no answer: {reason}", where=f"{method} {where}", fix="check the network; see https://uptime.runpod.io"
    )


def _delay_s(attempt: int) -> float:
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt) * random.uniform(0.5, 1.5)
