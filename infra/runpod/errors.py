"""RunPod's error responses as exceptions. Each says what to do, and has the id by which RunPod's support can find the request."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

import httpx

from infra.errors import InfraError

NO_CAPACITY = re.compile(r"no (longer any )?instances|capacity|not available|unavailable|no resources|out of stock", re.IGNORECASE)
"""Matches the text of a status 400 that means no capacity; the API has no separate status for it."""
DEFAULT_RETRY_AFTER_S = 5.0
"""Assumed for a 429 without a valid Retry-After."""


class RunPodError(InfraError):
    """An error response. `status` is 0 if there was no response."""

    def __init__(self, what: str, *, where: str, fix: str, status: int = 0, request_id: str = "") -> None:
        super().__init__(f"{what} (request {request_id})" if request_id else what, where=where, fix=fix)
        self.status, self.request_id = status, request_id


class InvalidRequestError(RunPodError):
    """422 (invalid) or 400 (a rule is broken): the same request will fail again."""


class NoCapacityError(RunPodError):
    """400 whose text says so: another GPU or data centre may have capacity."""


class WrongKeyError(RunPodError):
    """401: the key is missing, wrong or expired."""


class NoBalanceError(RunPodError):
    """402: no request that costs money will succeed."""


class NoAccessError(RunPodError):
    """403: the key may not do this."""


class NotFoundError(RunPodError):
    """404: it does not exist, or no longer exists."""


class WrongStateError(RunPodError):
    """409: not possible in the current state of the pod."""


class TooManyRequestsError(RunPodError):
    """429, also after retries."""

    retry_after_s: float = DEFAULT_RETRY_AFTER_S


class UnavailableError(RunPodError):
    """5xx or no response, also after retries: it is unknown whether the request was carried out."""


class UnreadableError(UnavailableError):
    """A response that is not understood: the request was probably carried out."""


def raise_for(response: httpx.Response) -> NoReturn:
    """Raise the exception for an error response, whose body need not follow the API document."""
    status, request_id = response.status_code, response.headers.get("x-request-id", "")
    problem = _problem(response)
    detail = str(problem.get("detail") or problem.get("title") or problem.get("message") or f"status {status}")
    errors = [str(one) for one in problem.get("errors") or []]
    what = f"RunPod: {detail}" + (f": {'; '.join(errors)}" if errors else "")
    kind, fix = _kind(response, detail)
    where = f"{response.request.method} {response.request.url.copy_with(query=None)}"
    error = kind(what, where=where, fix=fix, status=status, request_id=request_id)
    if isinstance(error, TooManyRequestsError):
        error.retry_after_s = retry_after_s(response)
    raise error


def retry_after_s(response: httpx.Response) -> float:
    """Return the seconds to wait according to Retry-After; this API sends whole seconds."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return DEFAULT_RETRY_AFTER_S


def _problem(response: httpx.Response) -> Mapping[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _kind(response: httpx.Response, detail: str) -> tuple[type[RunPodError], str]:
    status = response.status_code
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return TooManyRequestsError, f"wait {retry_after_s(response):.0f} s; other programs may be using the same account"
    if status == HTTPStatus.BAD_REQUEST and NO_CAPACITY.search(detail):
        return NoCapacityError, "try another GPU or data centre, or again later"
    kinds: dict[int, tuple[type[RunPodError], str]] = {
        HTTPStatus.BAD_REQUEST: (InvalidRequestError, "change what the message names; the same request fails again"),
        HTTPStatus.UNPROCESSABLE_ENTITY: (InvalidRequestError, "change what the message names; the same request fails again"),
        HTTPStatus.UNAUTHORIZED: (WrongKeyError, "set RUNPOD_API_KEY to a key from https://console.runpod.io/user/settings"),
        HTTPStatus.PAYMENT_REQUIRED: (NoBalanceError, "add credit at https://console.runpod.io/user/billing; pods need an hour's worth"),
        HTTPStatus.FORBIDDEN: (NoAccessError, "give the key the missing permission at https://console.runpod.io/user/settings"),
        HTTPStatus.NOT_FOUND: (NotFoundError, "check the id; what was deleted is gone"),
        HTTPStatus.CONFLICT: (WrongStateError, "wait for the pod to change its state, or terminate it"),
    }
    return kinds.get(status, (UnavailableError, "try again later; see https://uptime.runpod.io"))
