"""`make image-digests`: write the digests of the pinned images into docker-compose.yml and Dockerfile.

`python -m deploy.image_digests FILE…` asks the registry of each `name:tag` for the digest of its manifest, for all
platforms, and replaces it with `name:tag@sha256:…`. Nothing is written unless all digests are known. `$REGISTRY` is a
mirror, as for docker-compose.yml. Protocol: https://github.com/opencontainers/distribution-spec/blob/main/spec.md, with
the tokens of https://distribution.github.io/distribution/spec/auth/token/.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

DOCKER_HUB = "docker.io"
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
# `${REGISTRY:-docker.io}/name:1.2` of docker-compose.yml, and `name:1.2` of the Dockerfile.
_IMAGE = re.compile(
    r"(?P<reference>(?:\$\{REGISTRY:-docker\.io\}/|ARG BASE_IMAGE=)(?P<name>[a-z0-9._/-]+):(?P<tag>[\w.-]+))"
    r"(?:@sha256:[0-9a-f]{64})?"
)
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')


class DigestError(Exception):
    """The digest of an image cannot be determined."""


def main(files: Sequence[str]) -> int:
    """Rewrite the files, or print why not and return 1."""
    texts = {Path(file): Path(file).read_text(encoding="utf-8") for file in files}
    images = {(match["name"], match["tag"]) for text in texts.values() for match in _IMAGE.finditer(text)}
    registry = os.environ.get("REGISTRY", DOCKER_HUB)
    try:
        with httpx.Client(timeout=20, follow_redirects=True) as client:
            digests = {(name, tag): find_digest(client, registry, name, tag) for name, tag in sorted(images)}
    except DigestError as error:
        print(f"{error}; no file was changed", file=sys.stderr)
        return 1
    for path, text in texts.items():
        path.write_text(
            _IMAGE.sub(lambda match: f"{match['reference']}@{digests[match['name'], match['tag']]}", text),
            encoding="utf-8",
        )
    for (name, tag), digest in digests.items():
        print(f"{name}:{tag}@{digest}")
    return 0


def find_digest(client: httpx.Client, registry: str, name: str, tag: str) -> str:
    """Return `sha256:…` of the manifest that a registry has under a tag. Raises DigestError."""
    host, _, folder = registry.partition("/")
    path = f"{folder}/{name}" if folder else name if "/" in name else f"library/{name}"
    host = "registry-1.docker.io" if host == DOCKER_HUB else host
    local = urlsplit(f"//{host}").hostname in ("localhost", "127.0.0.1", "::1")
    url = f"{'http' if local else 'https'}://{host}/v2/{path}/manifests/{tag}"
    headers = {"Accept": ", ".join(MANIFESTS)}
    try:
        response = client.get(url, headers=headers)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            token = _request_token(client, response.headers.get("WWW-Authenticate", ""), secure=not local)
            response = client.get(url, headers={**headers, "Authorization": f"Bearer {token}"})
    except httpx.HTTPError as error:
        raise DigestError(f"cannot reach {host}: {error or type(error).__name__}") from error
    if not response.is_success:
        raise DigestError(f"{host} has no manifest of {path}:{tag} for everybody: HTTP {response.status_code}")
    digest = f"sha256:{hashlib.sha256(response.content).hexdigest()}"
    announced = response.headers.get("Docker-Content-Digest", digest)
    if announced != digest:
        raise DigestError(f"{host}: the manifest of {path}:{tag} has the digest {digest}, not {announced} as announced")
    return digest


def _request_token(client: httpx.Client, challenge: str, *, secure: bool) -> str:
    """Return an anonymous token, as a challenge `Bearer realm="…",service="…",scope="…"` asks."""
    scheme, _, rest = challenge.partition(" ")
    parameters = dict(_PARAMETER.findall(rest))
    realm = parameters.pop("realm", "")
    if scheme.lower() != "bearer" or urlsplit(realm).scheme not in (("https",) if secure else ("http", "https")):
        raise DigestError(f"the registry asks for credentials in a way that is not supported: {challenge[:200]}")
    response = client.get(realm, params=parameters)
    if not response.is_success:
        raise DigestError(f"{urlsplit(realm).netloc} issues no token without credentials: HTTP {response.status_code}")
    body = response.json()
    return str(body.get("token") or body.get("access_token"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
