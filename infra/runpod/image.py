"""Whether a container image can be pulled, asked of its registry before a machine is rented for it: a pod that cannot pull its image never
starts, and says so in its log only.

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
"""Registries answer so for what is private, and most of them for what is not there."""


def check_image(image: str) -> None:
    """Raises RefusedError where there is no such image, or none that everybody may pull. A registry that does not answer proves nothing."""
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
            fix="correct its name; of a private one give the id of RunPod's credentials as `registry`",
        )


def parts(image: str) -> tuple[str, str, str]:
    """Registry, name and tag (or digest) of an image as Docker reads it."""
    image, _, digest = image.partition("@")
    first, slash, rest = image.partition("/")
    host, name = (first, rest) if slash and (set(first) & set(".:") or first == "localhost") else (HUB, image)
    name, _, tag = name.partition(":")
    return host, name if "/" in name or host != HUB else f"library/{name}", digest or tag or "latest"


def _status(client: httpx.Client, url: str) -> int:
    """Of the manifest, with a token that the registry gives to everybody where it wants one."""
    reply = client.head(url)
    if reply.status_code != HTTPStatus.UNAUTHORIZED or not reply.headers.get("www-authenticate", "").lower().startswith("bearer"):
        return reply.status_code
    asked = dict(CHALLENGE.findall(reply.headers["www-authenticate"]))
    given = client.get(asked.pop("realm"), params=asked)
    if given.status_code in HIDDEN:
        return given.status_code
    known = given.raise_for_status().json()
    return client.head(url, headers={"Authorization": f"Bearer {known.get('token') or known['access_token']}"}).status_code
