"""What clients request: their access, their budgets, and the upstreams of their models."""

import asyncio
import re
from typing import cast
from urllib.parse import unquote

from aiohttp import web

from gateway.admission import RETRY_AFTER_STOP
from gateway.bodies import Body, BodyMemory
from gateway.clients import ANONYMOUS, Client, Clients, find_priority
from gateway.errors import GatewayError
from gateway.handling import SHOWN_MODEL, Handling, Task
from gateway.headers import PRIORITY, UPSTREAM
from gateway.metrics import GatewayMetrics
from gateway.models import ModelList
from gateway.routing import PREFIX, Route, UnknownUpstreamError
from gateway.upstreams import Upstreams
from runtime.access.browser import check_fetch_metadata
from runtime.access.control import AccessControl, set_identity
from runtime.access.roles import Identity, Role
from runtime.errors import ApiError
from runtime.lifecycle import DRAIN_TIMEOUT
from runtime.suspension import RESUMED

# A path that is passed on. The gateway's own paths are not, with all below them; browsers request the icon unasked.
PATH = r"/{path:(?!/*(?:-|api/v1|favicon\.ico|health|metrics|status)(?:/|\Z))[\s\S]+}"
# Seconds for which requests wait on while the gateway stops; in the others, all of them get their answers.
WAITING_TIMEOUT = DRAIN_TIMEOUT - 5.0
ANSWERED = 500  # requests in a second, on a busy machine
_MODELS, _MODEL = f"{PREFIX}/models", re.compile(rf"{PREFIX}/models/(.+)")
_NO_CLIENT = "not the token of a client: send it as the API key (Authorization: Bearer TOKEN)"
# A part . or .. of a decoded path: some upstreams remove what follows it in the part, or the blanks and control
# characters around its dots.
_LEAVES = re.compile(r"(?:^|[/\\])[\0-\x20]*\.[\0-\x20]*\.?(?:$|[/\\;?#\0-\x20\x7f])")
_MAX_DECODED = 3  # times; some upstreams decode more than once


class Proxy:
    """Answers all requests that are not for the gateway itself. After `drain`, it takes no more."""

    def __init__(
        self,
        upstreams: Upstreams,
        clients: Clients,
        bodies: BodyMemory,
        metrics: GatewayMetrics,
        access: AccessControl,
    ) -> None:
        self._upstreams, self._clients, self._bodies = upstreams, clients, bodies
        self._metrics, self._access = metrics, access
        self._models = ModelList(upstreams)
        self._is_draining = False
        self._handled = 0  # requests in progress
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def drain(self) -> None:
        """Take no more requests, and wait for those in progress; those that wait for too long are refused."""
        self._is_draining = True
        waiting = sum(sum(each.admission.depths) for each in self._upstreams)
        try:
            async with asyncio.timeout(WAITING_TIMEOUT - waiting / ANSWERED):
                await self._is_idle.wait()
        except TimeoutError:
            self._upstreams.stop()
            await self._is_idle.wait()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request with an upstream's response, or with an error in OpenAI's format."""
        resumed = request.get(RESUMED)
        if resumed is not None:
            handling = cast("Handling", resumed)
            self._note_client(request, handling.task.client)
            return await self._answer(request, handling)
        client = Client(ANONYMOUS)
        self._begin()
        try:
            client = await self._identify(request)
            self._check(request)
            path = _find_path(request)
            self._clients.check_budget(client)
            # The models of all upstreams.
            if path == _MODELS and request.method == "GET" and UPSTREAM not in request.headers:
                return web.Response(body=await self._models.read(), content_type="application/json", charset="utf-8")
            handling = await self._create_handling(request, client, path)
        except GatewayError as error:
            return self._refuse(client, error)
        finally:
            self._end()
        return await self._answer(request, handling)

    async def _answer(self, request: web.Request, handling: Handling) -> web.StreamResponse:
        client = handling.task.client
        try:
            return await handling.answer(request)
        except GatewayError as error:
            return self._refuse(client, error)

    def _refuse(self, client: Client, error: GatewayError) -> web.Response:
        self._metrics.refused.labels(client.name, error.code).inc()
        return error.respond()

    def _begin(self) -> None:
        self._handled += 1
        self._is_idle.clear()

    def _end(self) -> None:
        self._handled -= 1
        if not self._handled:
            self._is_idle.set()

    async def _identify(self, request: web.Request) -> Client:
        """Return the client. Raises GatewayError."""
        try:
            if not self._clients.are_named:  # a page of another site must not use the key
                self._access.settings.hosts.check_host(request)
                self._access.settings.hosts.check_origin(request)
                check_fetch_metadata(request)
                return Client(ANONYMOUS)
            client = self._clients.find(_find_token(request))
            if client is None:
                refusal = await self._access.refuse(request, "", "unknown token of a client")
                raise GatewayError(401, "invalid_api_key", _NO_CLIENT) from refusal
        except ApiError as error:
            raise GatewayError(error.status, error.code, error.message) from error
        self._note_client(request, client)
        return client

    def _note_client(self, request: web.Request, client: Client) -> None:
        """Note who the client is, so that its connection is kept when there are too many."""
        if self._clients.are_named:
            set_identity(request, Identity(client.name, Role.CLIENT, "token", self._access.find_address(request)))

    def _check(self, request: web.Request) -> None:
        """Raise GatewayError for what is not passed on, whatever it is for."""
        if self._is_draining:
            raise GatewayError.of("shutting_down", RETRY_AFTER_STOP)
        if request.method == "TRACE":  # the answer would have the key
            raise GatewayError(405, "method_not_allowed", "TRACE is not passed on")

    async def _create_handling(self, request: web.Request, client: Client, path: str) -> Handling:
        """Read a request, and count it. Raises GatewayError."""
        priority = find_priority(request.headers.get(PRIORITY), client)
        body = await self._bodies.read(request, client.name)
        try:
            routes = self._find_routes(request, body, path)
            self._clients.check_budget(client)  # others may have come while the body was being read
        except BaseException:
            self._bodies.release(body, client.name)
            raise
        self._begin()
        self._clients.count(client, requests=1)
        task = Task.of(request, client, priority, path, body)
        chosen = [(self._upstreams[route.upstream], route) for route in routes]
        return Handling(task, chosen, self._clients, self._metrics, self._end_handling)

    def _end_handling(self, handling: Handling) -> None:
        self._bodies.release(handling.task.body, handling.task.client.name)
        if not handling.is_sent:
            self._clients.count(handling.task.client, requests=-1)
        self._end()

    def _find_routes(self, request: web.Request, body: Body, path: str) -> list[Route]:
        in_path = _MODEL.fullmatch(path)
        model = in_path[1] if in_path is not None else body.model
        try:
            routes = self._upstreams.router.find(model, request.headers.get(UPSTREAM))
        except UnknownUpstreamError as error:
            raise GatewayError(404, "upstream_not_found", f"there is no upstream {str(error)[:100]!r}") from error
        if routes:
            return self._keep_possible(routes, path)
        if model is None:
            raise GatewayError(404, "model_not_found", "the request names no model, and gateway.default is not set")
        raise GatewayError(404, "model_not_found", f"no upstream has the model {model[:SHOWN_MODEL]!r}")

    def _keep_possible(self, routes: list[Route], path: str) -> list[Route]:
        """Return the upstream of a request, and those of its fallbacks that have the path. Raises GatewayError."""
        possible = [route for route in routes if self._upstreams[route.upstream].has_path(path)]
        if possible[:1] != routes[:1]:
            message = f"{routes[0].upstream} has no paths outside {PREFIX}: its url does not end in {PREFIX}"
            raise GatewayError(404, "path_not_found", message)
        return possible


def _find_token(request: web.Request) -> str:
    """Return the token that a client sends as its API key."""
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credential.strip()
    return request.headers.get("api-key") or request.headers.get("x-api-key") or ""


def _find_path(request: web.Request) -> str:
    """Return the path with its query, as the client has written it. Raises GatewayError."""
    target = request.raw_path
    if not target.startswith("/"):  # in absolute form
        target = "/" + target.split("/", 3)[-1]
    if _may_leave(target.partition("?")[0]):
        message = "the path must not have the parts . and .., nor be encoded more than three times"
        raise GatewayError(400, "bad_request", message)
    return target


def _may_leave(path: str) -> bool:
    """Whether an upstream could understand a path as leaving its base, for which alone the key is meant."""
    for _ in range(_MAX_DECODED):
        if "%" not in path:
            break
        path = unquote(path, "latin-1")
    return _LEAVES.search(path) is not None or unquote(path, "latin-1") != path
