"""The doctor's checks of heartbeats: their database, and the listener for pings."""

import os
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

import httpx

from defib.doctor.findings import Finding
from defib.doctor.server import TIMEOUT
from fleet.inventory.heartbeats import HeartbeatSettings
from fleet.inventory.model import Inventory

NAME = "heartbeats"
EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - nothing listens here


async def check_heartbeats(inventory: Inventory) -> Sequence[Finding]:
    """Check that pings can be received and stored on this machine, if there are heartbeats, or jobs may create some."""
    if not inventory.has_heartbeats:
        return []
    settings = inventory.exporter.heartbeats
    return [_check_database(settings), _check_url(settings), await _check_listener(settings)]


def _check_database(settings: HeartbeatSettings) -> Finding:
    path, folder = settings.database, settings.database.parent
    try:
        exists = path.exists()
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        fix = f"install -d -o defib-exporter -m 700 {folder}, or set exporter.heartbeats.database"
        detail = f"{folder} does not exist; the exporter creates it if it can"
        return Finding(NAME, "database", "warn", detail, fix)
    except OSError as error:
        detail = f"{error.filename or path}: {error.strerror}"
        return Finding(NAME, "database", "warn", detail, "run this as the exporter's user")
    writable = os.access(folder, os.W_OK) and (not exists or os.access(path, os.W_OK))
    detail = str(path) if writable else f"{path} is not writable by the current user"
    return Finding(
        NAME, "database", "pass" if writable else "warn", detail, "run this as the exporter's user, or chown it"
    )


def _check_url(settings: HeartbeatSettings) -> Finding:
    """Check that the URLs which jobs get have an address that they can reach."""
    if settings.url is None and settings.listen.rpartition(":")[0] in EVERY_ADDRESS:
        detail = f"URLs of pings begin with {settings.base_url}, which leads nowhere"
        return Finding(NAME, "URLs", "warn", detail, "set exporter.heartbeats.url to an address that jobs reach")
    return Finding(NAME, "URLs", "pass", settings.base_url)


async def _check_listener(settings: HeartbeatSettings) -> Finding:
    """Ask the listener, at its address on this machine, for a path that is no ping."""
    host, _, port = settings.listen.rpartition(":")
    address = f"{EVERY_ADDRESS.get(host, host)}:{port}"
    tls = urlsplit(settings.base_url).scheme == "https"
    problem, fix = "", "start the exporter; if it runs on another machine, run this there with --for exporter"
    async with httpx.AsyncClient(verify=False, trust_env=False) as client:  # noqa: S501 - the certificate has another name
        for scheme in ("https", "http") if tls else ("http", "https"):
            try:
                answer = await client.get(f"{scheme}://{address}/", timeout=TIMEOUT)
            except httpx.HTTPError as error:
                problem = f"{address}: {error or type(error).__name__}"
                continue
            if answer.status_code == HTTPStatus.NOT_FOUND and "Ping-Body-Limit" in answer.headers:
                return Finding(NAME, "listener", "pass", f"{scheme}://{address}")
            problem, fix = f"{address} is another program", "set exporter.heartbeats.listen to a free port"
    return Finding(NAME, "listener", "fail", problem, fix)
