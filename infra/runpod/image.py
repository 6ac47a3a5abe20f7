"""Asks the registry whether a container image can be pulled before a machine is rented for it: a pod that cannot pull its image never
starts, and only its log says so.

Source of the protocol: the OCI distribution specification 1.1 (`HEAD /v2/NAME/manifests/REFERENCE`, and a token for public images).
"""

import re
from http import HTTPStatus

import httpx

from infra.errors import RefusedError

HUB = "registry-1.docker.io"
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
TIMEOUT_S = 10.0
HIDDEN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
"""Registries give these answers for private images, and most of them also for missing ones."""


def check_image(image: str) -> None:
    """Raise RefusedError if the image does not exist or is not public. A registry that does not answer is not an error."""
    host, name, reference = parts(image)
    scheme = "http" if host.split(":")[0] in ("localhost", "127.0.0.1") else "https"  # as Docker does
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=True, headers={"Accept": ACCEPT}) as client:
            status = _status(client, f"{scheme}://{host}/v2/{name}/manifests/{reference}")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError):
        return
    if status == HTTPStatus.NOT_FOUND:
        raise RefusedError(f"there is no image {image}", where=f"image, asked of {host}", fix="give one that is there, with its tag")
    if status in HIDDEN:
        raise RefusedError(
            f"the image {image} is not there, or private",
            where=f"image, asked of {host}",
            fix="correct its name; for a private image, give the id of RunPod's credentials as `registry`",
        )


def parts(image: str) -> tuple[str, str, str]:
    """Split the reference of an image into registry, name and tag (or digest), as Docker does."""
    image, _, digest = image.partition("@")
    first, slash, rest = image.partition("/")
    host, name = (first, rest) if slash and (set(first) & set(".:") or first == "localhost") else (HUB, image)
    name, _, tag = name.partition(":")
    return host, name if "/" in name or host != HUB else f"library/{name}", digest or tag or "latest"


def _status(client: httpx.Client, url: str) -> int:
    """Return the HTTP status of the manifest, with an anonymous token if the registry requires one."""
    reply = client.head(url)
    if reply.status_code != HTTPStatus.UNAUTHORIZED or not reply.headers.get("www-authenticate", "").lower().startswith("bearer"):
        return reply.status_code
    asked = dict(CHALLENGE.findall(reply.headers["www-authenticate"]))
    given = client.get(asked.pop("realm"), params=asked)
    if given.status_code in HIDDEN:
        return given.status_code
    known = given.raise_for_status().json()
    return client.head(url, headers={"Authorization": f"Bearer {known.get('token') or known['access_token']}"}).status_code
