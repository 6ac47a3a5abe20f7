"""RunPod's OpenAPI document as a judge of what is sent and of what comes back.

`openapi.json` is the published document (api.runpod.io/v2/openapi.json, service 2.9.0 of 18 Aug 2026) without its texts and without the
paths that this project does not use.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator

DOCUMENT = json.loads(Path(__file__).with_name("openapi.json").read_text())
JSON, PROBLEM = "application/json", "application/problem+json"


def faults(pointer: str, instance: object) -> list[str]:
    """What does not fit the schema at a pointer into the document."""
    validator = Draft202012Validator({**DOCUMENT, "$ref": f"#/{pointer}"})
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(instance)]


def operation(method: str, path: str) -> str | None:
    """The document's path for a request's path, where it has the method."""
    for template, operations in DOCUMENT["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method.lower() in operations:
            return template
    return None


def request_faults(method: str, path: str, body: object) -> list[str]:
    """What of a request the document does not allow."""
    template = operation(method, path)
    if template is None:
        return [f"no operation {method} {path}"]
    if body is None:
        return []
    return faults(f"paths/{_escaped(template)}/{method.lower()}/requestBody/content/{_escaped(JSON)}/schema", body)


def unknown_parameters(method: str, path: str, names: set[str]) -> set[str]:
    """Query parameters that the operation does not have."""
    template = operation(method, path)
    assert template is not None
    given = DOCUMENT["paths"][template][method.lower()].get("parameters", []) + DOCUMENT["paths"][template].get("parameters", [])
    known = {(_resolved(one))["name"] for one in given}
    return names - known


def reply_faults(method: str, path: str, reply: httpx.Response) -> list[str]:
    """What of a reply the document does not promise."""
    template = operation(method, path)
    if template is None:
        return [f"no operation {method} {path}"]
    promised = DOCUMENT["paths"][template][method.lower()]["responses"]
    status = str(reply.status_code) if str(reply.status_code) in promised else "default"
    if status == "default" and reply.is_success:
        return [f"{method} {path} never answers {reply.status_code}"]
    if reply.status_code == 204:
        return ["a body"] if reply.content else []
    kind = JSON if reply.is_success else PROBLEM
    if not reply.headers["content-type"].startswith(kind):
        return [f"content type {reply.headers['content-type']}"]
    missing = [] if "x-request-id" in reply.headers else ["no x-request-id"]
    promise = promised[status]
    pointer = promise["$ref"].removeprefix("#/") if "$ref" in promise else f"paths/{_escaped(template)}/{method.lower()}/responses/{status}"
    return missing + faults(f"{pointer}/content/{_escaped(kind)}/schema", reply.json())


@dataclass
class Witness:
    """Hears every request of a client and its reply; use `hooks` as the event hooks of an httpx client."""

    problems: list[str] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)

    @property
    def hooks(self) -> dict[str, list[Any]]:
        return {"response": [self._hear]}

    def _hear(self, reply: httpx.Response) -> None:
        request = reply.request
        path = request.url.path
        if not path.startswith("/v2/") or path.endswith(("/logs", "openapi.json")):
            return
        reply.read()
        self.seen.add((request.method, operation(request.method, path) or path))
        body = json.loads(request.content) if request.content else None
        if reply.is_success:
            self.problems += request_faults(request.method, path, body)
            self.problems += sorted(unknown_parameters(request.method, path, set(request.url.params)))
        self.problems += reply_faults(request.method, path, reply)


def _resolved(parameter: dict[str, Any]) -> dict[str, Any]:
    found: Any = DOCUMENT
    if "$ref" not in parameter:
        return parameter
    for part in parameter["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1").replace("{", "%7B").replace("}", "%7D")
