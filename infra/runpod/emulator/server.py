"""The emulator's HTTP server: API v2 as in RunPod's OpenAPI document, and `/emulator/...` to arm faults and to read the true bill."""

import json
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from infra.runpod.emulator.catalogue import CPUS, DATA_CENTERS, GPUS
from infra.runpod.emulator.cloud import Cloud, Delays, Pod, RuleError, disk_cost
from infra.runpod.emulator.faults import Fault
from infra.runpod.models import CreatePod, CreateVolume

QUOTA = {"RateLimit-Policy": '"minute";q=60;w=60, "hour";q=3000;w=3600', "RateLimit": '"minute";r=59;t=60, "hour";r=2999;t=3600'}
TITLES = {400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found", 409: "Conflict"}
TITLES |= {422: "Unprocessable Entity", 429: "Too Many Requests", 500: "Internal Server Error", 504: "Gateway Timeout"}
DAYS = 30
STREAM_WAIT_S = 0.5
Handler = Callable[[Request], Awaitable[Response]]


class Emulator:
    """The emulator's server, in a thread of this process. Use it as a context manager."""

    def __init__(self, folder: Path, *, key: str, delays: Delays | None = None, port: int = 0) -> None:
        """`key` is the account's API key. `port` 0 selects a free port."""
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.key, self.cloud = key, Cloud(folder, delays=delays)
        self._server = uvicorn.Server(uvicorn.Config(self.app(), log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_error: object) -> None:
        self.cloud.close()
        self._server.should_exit = True
        self._thread.join(5)

    def app(self) -> Starlette:
        """The application."""
        cloud = self.cloud

        def pods(_request: Request) -> Response:
            known = list(cloud.pods.values())
            if known and cloud.faults.strikes("listed_late"):
                known.pop()  # the newest
            return JSONResponse({"pods": [pod.reply() for pod in known if pod.listed]})

        def create_pod(request: Request) -> Response:
            pod = cloud.create_pod(_body(CreatePod, request))
            if cloud.faults.strikes("create_lost"):
                return problem(504, "upstream timed out")
            return JSONResponse(pod.reply(), 201)

        def pod(request: Request) -> Response:
            return JSONResponse(cloud.pod(request.path_params["id"]).reply())

        def delete_pod(request: Request) -> Response:
            cloud.terminate(self._allowed(request, cloud.pod(request.path_params["id"])))
            return Response(status_code=204)

        def act(request: Request) -> Response:
            asked = request.state.json
            if not isinstance(asked, dict) or set(asked) != {"action"} or asked["action"] not in ("start", "stop", "restart", "terminate"):
                return problem(422, "Request validation failed.", ["action: one of start, stop, restart, terminate"])
            found = self._allowed(request, cloud.pod(request.path_params["id"]))
            cloud.act(found, asked["action"])
            return Response(status_code=204) if asked["action"] == "terminate" else JSONResponse(found.reply())

        def logs(request: Request) -> Response:
            log = cloud.pod(request.path_params["id"]).container.log
            number = log.after(request.headers.get("last-event-id"), int(request.query_params.get("tail", 100)))
            wanted = request.query_params.get("source")

            def events() -> Iterator[str]:
                nonlocal number
                while True:
                    line = log.wait(number, STREAM_WAIT_S)
                    if line is None:
                        if log.closed:
                            return
                        yield ": still here\n\n"
                        continue
                    number += 1
                    if wanted in (None, line.source):
                        data = json.dumps({"ts": line.ts, "source": line.source, "line": line.line})
                        yield f"id: {line.id}\ndata: {data}\n\n"

            return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

        def volumes(_request: Request) -> Response:
            return JSONResponse({"networkVolumes": [one.reply() for one in cloud.volumes.values() if not one.deleted]})

        def create_volume(request: Request) -> Response:
            return JSONResponse(cloud.create_volume(_body(CreateVolume, request)).reply(), 201)

        def volume(request: Request) -> Response:
            return JSONResponse(cloud.volume(request.path_params["id"]).reply())

        def delete_volume(request: Request) -> Response:
            cloud.delete_volume(cloud.volume(request.path_params["id"]))
            return Response(status_code=204)

        def gpus(request: Request) -> Response:
            stock = _stocks(request)
            return JSONResponse({"gpus": [_gpu(offer, stock) for offer in GPUS]})

        def cpus(request: Request) -> Response:
            stock = _stocks(request)
            return JSONResponse({"cpus": [_cpu(offer, stock) for offer in CPUS]})

        def data_centers(request: Request) -> Response:
            return JSONResponse({"dataCenters": [_data_center(one, "GPU_AVAILABILITY" in _asked(request)) for one in DATA_CENTERS]})

        def billed_pods(request: Request) -> Response:
            start, end = _period(request)
            records = [_pod_record(pod, hours, usd) for pod, hours, usd in cloud.pod_bills() if pod.created < end]
            if wanted := request.query_params.get("podId"):
                records = [one for one in records if one["podId"] == wanted]
            totals = {name: sum(one[name] for one in records) for name in ("totalAmount", "gpuAmount", "cpuAmount", "diskAmount")}
            count = {"recordCount": len(records), "uniquePodCount": len({one["podId"] for one in records})}
            return JSONResponse({"records": records, "metadata": {"query": _query(request, start, end), **count, "totals": totals}})

        def billed_volumes(request: Request) -> Response:
            start, end = _period(request)
            records = [_volume_record(one.id, one.created, one.deleted, usd) for one, usd in cloud.volume_bills() if one.created < end]
            names = ("totalAmount", "standardAmount", "highPerformanceAmount")
            totals = {name: sum(one[name] for one in records) for name in names}
            count = {"recordCount": len(records), "uniqueNetworkVolumeCount": len(records)}
            return JSONResponse({"records": records, "metadata": {"query": _query(request, start, end), **count, "totals": totals}})

        def arm(request: Request) -> Response:
            cloud.faults.arm(Fault(**request.state.json))
            return Response(status_code=204)

        def clear(_request: Request) -> Response:
            cloud.faults.clear()
            return Response(status_code=204)

        def seen(_request: Request) -> Response:
            """Return every pod and volume that ever existed."""
            found = []
            for one, hours, usd in cloud.pod_bills():
                what = {"id": one.id, "name": one.request.name, "status": one.status, "starts": one.container.starts}
                found.append(what | {"usd": usd + disk_cost(one, hours)})
            return JSONResponse({"pods": found, "volumes": [{"id": one.id, "usd": usd} for one, usd in cloud.volume_bills()]})

        routes = [
            ("/v2/pods", "GET", pods),
            ("/v2/pods", "POST", create_pod),
            ("/v2/pods/{id}", "GET", pod),
            ("/v2/pods/{id}", "DELETE", delete_pod),
            ("/v2/pods/{id}/action", "POST", act),
            ("/v2/pods/{id}/logs", "GET", logs),
            ("/v2/network-volumes", "GET", volumes),
            ("/v2/network-volumes", "POST", create_volume),
            ("/v2/network-volumes/{id}", "GET", volume),
            ("/v2/network-volumes/{id}", "DELETE", delete_volume),
            ("/v2/catalog/gpus", "GET", gpus),
            ("/v2/catalog/cpus", "GET", cpus),
            ("/v2/catalog/datacenters", "GET", data_centers),
            ("/v2/billing/pods", "GET", billed_pods),
            ("/v2/billing/network-volumes", "GET", billed_volumes),
            ("/emulator/faults", "POST", arm),
            ("/emulator/faults", "DELETE", clear),
            ("/emulator/seen", "GET", seen),
        ]
        app = Starlette(routes=[Route(path, self._safely(handler), methods=[method]) for path, method, handler in routes])
        app.add_middleware(BaseHTTPMiddleware, dispatch=self._gate)
        return app

    async def _gate(self, request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Check the key of every request, apply API faults, and add the headers that every response has."""
        refused = self._refused(request)
        reply = refused or await go_on(request)
        reply.headers["x-request-id"] = secrets.token_hex(8)
        for name, value in QUOTA.items():
            reply.headers[name] = value
        return reply

    def _refused(self, request: Request) -> Response | None:
        faults, agent = self.cloud.faults, request.headers.get("user-agent", "")
        if request.url.path.startswith("/emulator/"):
            return None if self._is_account(request) else problem(401, "missing bearer token")
        if not agent or agent.startswith("Python-urllib"):
            return problem(403, "access denied")
        if faults.strikes("away"):
            return problem(503, "upstream unavailable")
        if not self._is_account(request) and self._pod_of(request) is None:
            return problem(401, "missing bearer token" if "authorization" not in request.headers else "invalid bearer token")
        if fault := faults.strikes("too_many_requests"):
            reply = problem(429, "rate limit exceeded")
            reply.headers["Retry-After"] = str(int(fault.seconds))
            return reply
        return problem(500, "internal error") if faults.strikes("server_error") else None

    def _safely(self, handler: Callable[[Request], Response]) -> Handler:
        """Wrap a handler: read the request's body, run the handler in a thread, and turn its exceptions into error responses."""

        async def handle(request: Request) -> Response:
            content = await request.body()
            try:
                request.state.json = json.loads(content) if content else None
                return await run_in_threadpool(handler, request)
            except RuleError as error:
                return problem(error.status, error.detail)
            except ValidationError as error:
                lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False)]
                return problem(422, "Request validation failed.", lines)
            except (ValueError, TypeError) as error:
                return problem(400, str(error))

        return handle

    def _is_account(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.key}"

    def _pod_of(self, request: Request) -> Pod | None:
        """Return the pod whose key the request has, or None."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return next((pod for pod in list(self.cloud.pods.values()) if pod.key == given), None)

    def _allowed(self, request: Request, pod: Pod) -> Pod:
        """Return the pod if the request may change it. Raises RuleError if it may not."""
        own = self._pod_of(request)
        if own and (own is not pod or self.cloud.faults.strikes("pod_key_refused")):
            raise RuleError(403, "access denied")
        return pod


def problem(status: int, detail: str, errors: list[str] | None = None) -> JSONResponse:
    """Return an error response (RFC 9457)."""
    body = {"title": TITLES.get(status, "Error"), "status": status, "detail": detail, **({"errors": errors} if errors else {})}
    return JSONResponse(body, status, media_type="application/problem+json")


def _body(kind: type[BaseModel], request: Request) -> Any:
    return kind.model_validate(request.state.json)


def _asked(request: Request) -> list[str]:
    return request.query_params.get("include", "").split(",")


def _stocks(request: Request) -> bool:
    """Return whether the request asks for stock."""
    include, product = "AVAILABILITY" in _asked(request), request.query_params.get("product")
    if include and not product:
        raise RuleError(400, "include=AVAILABILITY requires product")
    return include


def _gpu(offer: Any, stock: bool) -> dict[str, Any]:
    available = {"availability": "HIGH", "dataCenters": [_place(one) for one in offer.data_centers]} if stock else {}
    return {
        "id": offer.id,
        "name": offer.name,
        "pool": None,
        "manufacturer": "NVIDIA",
        "memory": offer.memory_gb,
        "secure": True,
        "community": False,
        "price": {"secure": offer.usd_per_hour, "community": 0.0},
        "maxCount": {"secure": offer.max_count, "community": 0},
        **available,
    }


def _cpu(offer: Any, stock: bool) -> dict[str, Any]:
    available = {"availability": "HIGH", "dataCenters": [_place(one) for one in offer.data_centers]} if stock else {}
    return {
        "id": offer.id,
        "name": offer.name,
        "group": offer.group,
        "vcpu": {"min": 2, "max": offer.max_vcpus},
        "ramGbPerVcpu": offer.ram_gb_per_vcpu,
        "price": {"securePerVcpu": offer.usd_per_vcpu_hour, "serverlessPerVcpu": offer.usd_per_vcpu_hour},
        **available,
    }


def _place(name: str) -> dict[str, str]:
    return {"id": name, "name": DATA_CENTERS[name][0], "availability": "HIGH"}


def _data_center(name: str, stock: bool) -> dict[str, Any]:
    title, region = DATA_CENTERS[name]
    there = [{"id": one.id, "name": one.name, "availability": "HIGH"} for one in GPUS if name in one.data_centers]
    what = {"id": name, "name": title, "region": region, "globalNetwork": True, "networkVolumeTypes": ["STANDARD"], "compliance": []}
    return what | ({"gpuAvailability": there} if stock else {})


def _period(request: Request) -> tuple[datetime, datetime]:
    now = datetime.now(UTC)
    start, end = request.query_params.get("startTime"), request.query_params.get("endTime")
    return (datetime.fromisoformat(start) if start else now - timedelta(days=DAYS)), (datetime.fromisoformat(end) if end else now)


def _query(request: Request, start: datetime, end: datetime) -> dict[str, str]:
    return {"startTime": start.isoformat(), "endTime": end.isoformat(), "bucketSize": request.query_params.get("bucketSize", "day")}


def _pod_record(pod: Pod, hours: float, usd: float) -> dict[str, Any]:
    disk = disk_cost(pod, hours)
    amounts = {"totalAmount": usd + disk, "gpuAmount": usd if pod.request.gpu else 0.0, "cpuAmount": usd if pod.request.cpu else 0.0}
    ends = (pod.ended or datetime.now(UTC)).isoformat()
    return {"startTime": pod.created.isoformat(), "endTime": ends, "podId": pod.id, "diskAmount": disk, **amounts}


def _volume_record(volume: str, created: datetime, deleted: datetime | None, usd: float) -> dict[str, Any]:
    times = {"startTime": created.isoformat(), "endTime": (deleted or datetime.now(UTC)).isoformat()}
    return {**times, "networkVolumeId": volume, "totalAmount": usd, "standardAmount": usd, "highPerformanceAmount": 0.0}
