"""RunPod's REST API, version 2: the few calls that this project makes. Version 1 and GraphQL are not spoken; both end.

What every caller would have to think of is done here: waiting when there are too many requests, trying again what failed on the way,
and never creating a second pod because the answer to the first request was lost.
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

from infra.runpod.errors import NotFoundError, RunPodError, TooManyRequestsError, UnavailableError, WrongKeyError, raise_for, retry_after_s
from infra.runpod.models import Billed, CpuType, CreatePod, CreateVolume, DataCenter, GpuType, LogLine, Pod, Reply, Volume

API_URL = "https://api.runpod.io"
USER_AGENT = "fvlm/0.1 python-httpx"
"""Without one, or with urllib's own, RunPod's edge answers 403."""
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
CREATE_TIMEOUT = httpx.Timeout(90.0, connect=10.0)
"""A create waits for a machine to be found."""
LOG_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
ATTEMPTS = 5
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
LOOKS = 4
"""For a pod whose creation was not answered: some 15 s."""
CURSORS = ("nextCursor", "next_cursor", "nextPageToken", "cursor")
"""Fields of a list's reply that lead to its next page. The document has none yet; a pod on a page that nobody read would be billed on."""
PAGES = 1000

Bucket = Literal["hour", "day", "week", "month", "year"]
R = TypeVar("R", bound=Reply)
log = logging.getLogger(__name__)


class RunPod:
    """A client. Its methods may be called by several threads; they raise RunPodError. Use it as a context manager, or `close` it."""

    def __init__(self, key: str, url: str = API_URL, *, sleep: Callable[[float], None] = time.sleep, attempts: int = ATTEMPTS) -> None:
        """`sleep` is what waiting is done with."""
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
        """Let the connections go."""
        self._http.close()

    def create_pod(self, request: CreatePod) -> Pod:
        """Rent a pod. Its name must be new: by it a pod is found whose answer was lost.

        Raises NoCapacityError, NoBalanceError, InvalidRequestError; UnavailableError where it is not known whether there is a pod now.
        """
        body = request.model_dump(mode="json", exclude_none=True)
        for attempt in range(self._attempts):
            try:
                pod = _parsed(Pod, self._send("POST", "/v2/pods", json=body, timeout=CREATE_TIMEOUT, attempts=1))
                if attempt:
                    self._end_twins(pod)
                return pod
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
                # the request that was not answered may have made the pod, and taken the last machine for it
                if found := self._appears(request.name):
                    return found
                what = f"RunPod: whether there is a pod {request.name} is not known: the first request for it was not answered, and then"
                fix = "look at the console; the reaper ends such a pod"
                raise UnavailableError(f"{what} {error.what.removeprefix('RunPod: ')}", where=error.where or self.url, fix=fix) from error
        raise AssertionError

    def _appears(self, name: str) -> Pod | None:
        """The pod of that name, which may be listed late."""
        for look in range(LOOKS):
            if found := self.pod_named(name):
                return found
            self._sleep(_delay_s(look))
        return None

    def _end_twins(self, pod: Pod) -> None:
        """End pods of the same name: one whose creation was not answered may be listed late."""
        try:
            for twin in self.pods():
                if twin.name == pod.name and twin.id != pod.id:
                    log.warning("%s had been created before as pod %s, which is ended", pod.name, twin.id)
                    self.terminate(twin.id)
        except RunPodError as error:  # the poller ends it
            log.warning("a second pod of the name %s was not looked for: %s", pod.name, error.what)

    def pods(self) -> list[Pod]:
        """All pods of the account, on all pages; terminated ones are not listed."""
        return [_parsed(Pod, one) for one in self._list("/v2/pods", "pods")]

    def pod(self, pod: str) -> Pod:
        """A pod by its id."""
        return _parsed(Pod, self._send("GET", f"/v2/pods/{pod}"))

    def pod_named(self, name: str) -> Pod | None:
        """The pod of that name."""
        return next((pod for pod in self.pods() if pod.name == name), None)

    def terminate(self, pod: str) -> bool:
        """End a pod and what it costs, in whatever state it is; False where it was gone already."""
        try:
            self._send("DELETE", f"/v2/pods/{pod}")
        except NotFoundError:
            return False
        return True

    def act(self, pod: str, action: Literal["start", "stop", "restart", "terminate"]) -> Pod | None:
        """Change a pod's state. Raises WrongStateError where its state does not allow that."""
        reply = self._send("POST", f"/v2/pods/{pod}/action", json={"action": action})
        return _parsed(Pod, reply) if reply else None

    def logs(self, pod: str, *, after: str | None = None, tail: int = 0) -> Iterator[LogLine]:
        """The lines of a pod's log: those after the event `after`, or the last `tail`; then as they come, until the stream ends."""
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
        """Make a network volume, unless one of that name is there: it is found again where the answer was lost."""
        if found := next((one for one in self.volumes() if one.name == request.name), None):
            return found
        try:
            return _parsed(Volume, self._send("POST", "/v2/network-volumes", json=request.model_dump(mode="json"), attempts=1))
        except UnavailableError:
            if found := next((one for one in self.volumes() if one.name == request.name), None):
                return found
            raise

    def delete_volume(self, volume: str) -> bool:
        """Delete a volume with everything on it; False where it was gone already."""
        try:
            self._send("DELETE", f"/v2/network-volumes/{volume}")
        except NotFoundError:
            return False
        return True

    def gpus(self, *, count: int = 1) -> list[GpuType]:
        """The GPUs on offer, with prices of one and stock for `count` per data centre."""
        asked = {"include": "AVAILABILITY", "product": "POD", "count": count, "cloud": "SECURE"}
        return [_parsed(GpuType, one) for one in self._list("/v2/catalog/gpus", "gpus", asked)]

    def cpus(self, *, vcpus: int = 2) -> list[CpuType]:
        """The CPU flavours on offer, with stock for `vcpus` per data centre."""
        asked = {"include": "AVAILABILITY", "product": "POD", "vcpuCount": vcpus}
        return [_parsed(CpuType, one) for one in self._list("/v2/catalog/cpus", "cpus", asked)]

    def data_centers(self) -> list[DataCenter]:
        """The data centres, with the stock of GPUs in each."""
        return [_parsed(DataCenter, one) for one in self._list("/v2/catalog/datacenters", "dataCenters", {"include": "GPU_AVAILABILITY"})]

    def billed_pods(self, start: datetime, end: datetime, *, bucket: Bucket = "hour") -> list[Billed]:
        """What each pod cost, per period."""
        return self._billed("/v2/billing/pods", start, end, bucket)

    def billed_volumes(self, start: datetime, end: datetime, *, bucket: Bucket = "hour") -> list[Billed]:
        """What each network volume cost, per period."""
        return self._billed("/v2/billing/network-volumes", start, end, bucket)

    def balance_usd(self) -> float | None:
        """The account's credit; None where the service offers no such call.

        The call is newer than the OpenAPI document that this client is tested against, so the service's own document is asked for its path.
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
        """All entries of a list, following its pages."""
        entries: list[dict[str, Any]] = []
        page: dict[str, str] = {}
        seen: set[str] = set()
        for _ in range(PAGES):
            reply = self._send("GET", path, params={**(asked or {}), **page})
            entries += reply.get(field, [])
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
        """A request's reply as JSON. Tries again after 429, and `attempts` times in all after 5xx or where no answer came."""
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
                self._sleep(retry_after_s(reply))
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
        raise RunPodError(f"RunPod: a {kind.__name__} that is not understood: {fields}", where="its reply", fix="report this") from None


def _unavailable(method: str, where: str, error: Exception) -> UnavailableError:
    reason = str(error) or type(error).__name__
    return UnavailableError(
        f"RunPod: no answer: {reason}", where=f"{method} {where}", fix="check the network; see https://uptime.runpod.io"
    )


def _delay_s(attempt: int) -> float:
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt) * random.uniform(0.5, 1.5)
