"""`make image-digests`, with a registry that wants a token for each repository, as Docker Hub does."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from defib.demo.stack import reserve_ports

ROOT = Path(__file__).parents[2]
SERVICE = "registry.test"
INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE = re.compile(r"docker\.io\}/([a-z/-]+):([\w.-]+)(?:@(sha256:[0-9a-f]{64}))?$", re.MULTILINE)


class Registry:
    """The pull side of the distribution specification: tokens, manifests by `Accept`, and their digests."""

    def __init__(self) -> None:
        self.private: set[str] = set()
        self.missing: set[str] = set()
        self.announced = ""  # a wrong digest
        app = web.Application()
        app.router.add_get("/token", self._issue)
        app.router.add_get("/v2/{name:.+}/manifests/{tag}", self._manifest)
        self.server = TestServer(app)

    def manifest(self, name: str, tag: str, kind: str = INDEX) -> bytes:
        return json.dumps({"schemaVersion": 2, "mediaType": kind, "annotations": {"of": f"{name}:{tag}"}}).encode()

    def digest(self, name: str, tag: str) -> str:
        return f"sha256:{hashlib.sha256(self.manifest(name, tag)).hexdigest()}"

    async def _issue(self, request: web.Request) -> web.Response:
        scope = request.query["scope"]
        if request.query["service"] != SERVICE or scope.split(":")[1] in self.private:
            return web.json_response({"errors": [{"code": "DENIED"}]}, status=401)
        return web.json_response({"access_token": f"token of {scope}", "expires_in": 300})

    async def _manifest(self, request: web.Request) -> web.Response:
        name, tag = request.match_info["name"], request.match_info["tag"]
        scope = f"repository:{name}:pull"
        if request.headers.get("Authorization") != f"Bearer token of {scope}":
            realm = self.server.make_url("/token")
            challenge = f'Bearer realm="{realm}",service="{SERVICE}",scope="{scope}"'
            return web.json_response({"errors": []}, status=401, headers={"WWW-Authenticate": challenge})
        if name in self.missing:
            return web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN"}]}, status=404)
        # Without the type of an index in `Accept`, the manifest of one platform is served.
        kind = INDEX if INDEX in request.headers.get("Accept", "") else "application/vnd.oci.image.manifest.v1+json"
        body = self.manifest(name, tag, kind)
        digest = self.announced or f"sha256:{hashlib.sha256(body).hexdigest()}"
        return web.Response(body=body, headers={"Content-Type": kind, "Docker-Content-Digest": digest})


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    made = Registry()
    async with made.server:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(ROOT / name, tmp_path / name)) for name in ("docker-compose.yml", "Dockerfile")]


async def write_digests(files: list[Path], registry: str) -> tuple[int, str]:
    environment = {**os.environ, "REGISTRY": registry, "no_proxy": "*"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "deploy.image_digests", *map(str, files),
        cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


def images(files: list[Path]) -> set[tuple[str, str, str]]:
    """Return name, tag and digest of each image."""
    text = "".join(path.read_text() for path in files).replace("BASE_IMAGE=python", "docker.io}/library/python")
    return set(IMAGE.findall(text))


async def test_digests_are_written_and_replaced(registry: Registry, files: list[Path]) -> None:
    address = f"127.0.0.1:{registry.server.port}"
    wanted = {(name, tag) for name, tag, digest in images(files)}
    assert ("prom/prometheus", "v3.5.0") in wanted
    assert any(name == "library/python" for name, _tag in wanted)
    before = [path.read_text() for path in files]
    status, output = await write_digests(files, address)
    assert status == 0, output
    assert images(files) == {(name, tag, registry.digest(name, tag)) for name, tag in wanted}
    assert all(registry.digest(name, tag) in output for name, tag in wanted)
    # Nothing else changes, and digests that are there are replaced.
    written = [path.read_text() for path in files]
    assert [re.sub(r"@sha256:[0-9a-f]{64}", "", text) for text in written] == before
    for path in files:
        path.write_text(re.sub(r"@sha256:[0-9a-f]{64}", f"@sha256:{'0' * 64}", path.read_text()))
    assert (await write_digests(files, address))[0] == 0
    assert [path.read_text() for path in files] == written


async def test_a_mirror_with_a_folder(registry: Registry, files: list[Path]) -> None:
    status, output = await write_digests(files, f"127.0.0.1:{registry.server.port}/hub")
    assert status == 0, output
    assert ("prom/prometheus", "v3.5.0", registry.digest("hub/prom/prometheus", "v3.5.0")) in images(files)


@pytest.mark.parametrize("what", ["unreachable", "private", "missing", "announced"])
async def test_without_all_digests_nothing_is_written(registry: Registry, files: list[Path], what: str) -> None:
    address, before = f"127.0.0.1:{registry.server.port}", [path.read_text() for path in files]
    if what == "unreachable":
        address = f"127.0.0.1:{reserve_ports(1)[0]}"
    elif what == "announced":
        registry.announced = f"sha256:{'1' * 64}"
    else:
        getattr(registry, what).add("prom/node-exporter")
    status, output = await write_digests(files, address)
    said = {
        "unreachable": f"cannot reach {address}: ", "private": f"{address} issues no token without credentials",
        "missing": f"{address} has no manifest of prom/node-exporter:v1.9.1",
        "announced": "as announced",
    }  # fmt: skip
    assert status == 1
    assert said[what] in output
    assert output.endswith("; no file was changed\n")
    assert [path.read_text() for path in files] == before
