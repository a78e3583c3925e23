"""The doctor's checks of the gateway, if it is configured."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

from defib.doctor.findings import Finding
from defib.doctor.programs import LISTED, check_access, read_token
from defib.doctor.server import TIMEOUT, Server
from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.model import Inventory

MIN_TOKEN = 16  # characters that nobody guesses
_LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


async def check_gateway(inventory: Inventory) -> Sequence[Finding]:
    """Check that the gateway runs, takes requests, survives a restart, and knows its clients."""
    settings = inventory.gateway
    if not settings.upstreams:
        return []
    token = inventory.local_token("gateway")
    server = Server("gateway", settings.url, read_token(token))
    _check_clients(server, settings)
    async with server.client:
        is_running = await server.get("/-/healthy") is not None
        _check_state_file(server, settings, is_running=is_running)
        if is_running:
            await _check_readiness(server)
            await check_access(server, token)
            await _check_upstreams(server, settings)
    return server.findings


def _check_state_file(server: Server, settings: GatewaySettings, *, is_running: bool) -> None:
    fix = "set gateway.state_file to a file in a folder of the gateway's, such as /var/lib/defib-gateway/state"
    problem = "" if settings.state_file is not None else "it is not set: a restart may exceed the rate for a minute"
    if settings.state_file is not None and not is_running and _is_missing(settings.state_file.parent):
        problem = f"there is no folder {settings.state_file.parent}: the gateway cannot start here"
        fix = "create it for the gateway's user, or correct gateway.state_file"
    server.add("state_file", problem, fix, detail=str(settings.state_file), severe=False)


def _is_missing(folder: Path) -> bool:
    """Whether a folder does not exist, as far as this user can see."""
    try:
        folder.stat()
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    return False


def _check_clients(server: Server, settings: GatewaySettings) -> None:
    """Check that not everybody may use the keys, and that nobody guesses a client's token."""
    is_local = settings.listen.rpartition(":")[0] in _LOOPBACK
    problem = "" if settings.clients or is_local else "there are none: whoever reaches its port uses the keys"
    short = [
        name
        for name, client in settings.clients.items()
        if isinstance(client.token, SecretStr) and len(client.token.get_secret_value()) < MIN_TOKEN
    ]
    if short:
        problem = f"the tokens of {', '.join(short[:LISTED])} have less than {MIN_TOKEN} characters"
    fix = "give each client a token of its own, for example from `openssl rand -hex 24`"
    server.add("clients", problem, fix, severe=False)


async def _check_readiness(server: Server) -> None:
    response = await server.client.get("/health/ready", timeout=TIMEOUT)
    health = response.json()
    reason = "its queue is nearly full" if health["upstream"] else "all upstreams fail"
    problem = "" if health["status"] == "ready" else reason
    server.add("ready", problem, "see its log, and GET /api/v1/status")


async def _check_upstreams(server: Server, settings: GatewaySettings) -> None:
    """Check that it has this configuration, and that its upstreams work."""
    response = await server.get("/api/v1/status")
    if response is None:
        return
    status = response.json()
    upstreams = status["upstreams"]
    different = sorted(settings.upstreams.keys() ^ upstreams.keys())
    problem = f"it has other upstreams: {', '.join(different[:LISTED])}" if different else ""
    server.add("configuration", problem, "reload it with SIGHUP or POST /-/reload", severe=False)
    failing = [name for name, each in upstreams.items() if each["failing"]]
    limited = [name for name, each in upstreams.items() if each["retreat"] == "floor"]
    problem = f"no answers from {', '.join(failing)}" if failing else ""
    if limited and not problem:
        problem = f"{', '.join(limited)} refuses many requests: the rate is at its floor"
    server.add("upstreams", problem, "see its log: docs/gateway.md, Retreat", severe=False)
    if settings.shared is not None:
        alone = status.get("shared_limits_available") is False
        problem = "it cannot count together with the others: it uses its part of the rates" if alone else ""
        server.add("shared limits", problem, "see gateway.shared, its log, and whether Redis runs", severe=False)
