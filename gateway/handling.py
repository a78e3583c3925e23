"""One request of a client: it is admitted to an upstream, and the response is passed back."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from aiohttp import web

from fleet.inventory.gateway import PRIORITIES, Priority
from gateway.admission import Applicant, Permit, RefusedError, Turn
from gateway.bodies import Body
from gateway.clients import Client, Clients
from gateway.connections import Call, UpstreamError
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.headers import request_headers
from gateway.metrics import GatewayMetrics, Outcome
from gateway.retreat import State
from gateway.routing import Route
from gateway.upstreams import Upstream
from gateway.usage import UsageReader
from runtime.suspension import SuspendedError, may_suspend

SHORT_WAIT = 0.25  # seconds; a request that waits longer is suspended, which takes time itself
SHOWN_MODEL = 100  # characters of a model's name in the log
_CLIENT_ERROR, _LIMITED, _SERVER_ERROR = 400, 429, 500
_JSON, _EVENTS = "application/json", "text/event-stream"
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})  # methods
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Task:
    """What a client wants: its path has the query."""

    client: Client
    priority: Priority
    method: str
    path: str
    body: Body
    has_body: bool  # also an empty one
    is_for_model: bool  # it names a model, or is compressed, so that it may

    @classmethod
    def of(cls, request: web.Request, client: Client, priority: Priority, path: str, body: Body) -> "Task":
        has_body = bool(body.content) or "Content-Length" in request.headers or request.method not in _WITHOUT_BODY
        is_for_model = body.model is not None or (bool(body.content) and "Content-Encoding" in request.headers)
        return cls(client, priority, request.method, path, body, has_body, is_for_model)


class Handling:
    """A request while it is handled, and what the log and the metrics will say about it.

    Its upstreams stay the same while it waits, also if a reload replaces them. `end` is called when it has ended.
    """

    __slots__ = (
        "_clients", "_end", "_error", "_metrics", "_outcome", "_routes", "_started_at", "_status", "_tokens", "_turn",
        "_upstream", "_waited", "is_sent", "task",
    )  # fmt: skip

    def __init__(
        self,
        task: Task,
        routes: list[tuple[Upstream, Route]],
        clients: Clients,
        metrics: GatewayMetrics,
        end: "Callable[[Handling], None]",
    ) -> None:
        self.task, self._routes = task, routes
        self._clients, self._metrics, self._end = clients, metrics, end
        self._started_at = time.monotonic()
        self._upstream: Upstream | None = None
        self._turn: Turn | None = None  # while it waits for the upstream
        self._outcome: Outcome = "cancelled"  # unless it ends otherwise
        self._status: int | None = None
        self.is_sent = False  # to any upstream
        self._waited = 0.0
        self._tokens: int | None = None
        self._error = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Return the response of the first upstream that does not fail, or else of the last.

        Raises GatewayError, and SuspendedError if the request waits for long: this is called again when it goes on.
        """
        try:
            answer = await self._answer(request)
        except SuspendedError:
            raise
        except BaseException:
            self.close()
            raise
        self.close()
        return answer

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        while len(self._routes) > 1:
            answer = await self._try(request, *self._routes[0], is_last=False)
            if answer is not None:
                return answer
            self._routes = self._routes[1:]
        answer = await self._try(request, *self._routes[0], is_last=True)
        assert answer is not None  # noqa: S101 - the last one answers or raises
        return answer

    def wait(self, resume: Callable[[], None]) -> None:
        """Call a function when the request, which is suspended, goes on."""
        assert self._turn is not None  # noqa: S101 - it waits for its turn
        self._turn.call(resume)

    def close(self) -> None:
        """End the request."""
        if self._turn is not None:
            self._waited += self._turn.waited
            self._turn.withdraw()
        self._finish()
        self._end(self)

    async def _try(
        self, request: web.Request, upstream: Upstream, route: Route, *, is_last: bool
    ) -> web.StreamResponse | None:
        """Return the response of an upstream, or None if the next one is to be tried. Raises GatewayError."""
        self._upstream = upstream
        self._outcome = "cancelled"
        try:
            permit = await self._admit(request, upstream, has_fallback=not is_last)
        except RefusedError as error:
            self._outcome = error.reason
            if is_last:
                raise GatewayError.of(error.reason, error.retry_after) from error
            return None
        exchange = Exchange(upstream, permit)
        try:
            call = await self._create_call(request, upstream, route)
            return await self._exchange(request, exchange, permit, call, is_last=is_last)
        finally:
            exchange.close()
            permit.close()
            self.is_sent = self.is_sent or permit.is_sent

    async def _admit(self, request: web.Request, upstream: Upstream, *, has_fallback: bool) -> Permit:
        """Wait for the permission to send. Raises RefusedError and SuspendedError."""
        if self._turn is None:
            self._turn = upstream.admission.apply(self._apply(upstream, has_fallback=has_fallback))
        turn = self._turn
        if not await turn.wait(SHORT_WAIT):
            if may_suspend(request):
                raise SuspendedError(self)
            await turn.wait()
        self._turn = None
        self._waited += turn.waited
        return turn.take()

    async def _create_call(self, request: web.Request, upstream: Upstream, route: Route) -> Call:
        content = await self.task.body.with_model(route.model)
        headers = request_headers(request.headers, upstream.api_key)
        target = upstream.target_of(self.task.path)
        return Call(self.task.method, target, headers, content if self.task.has_body else None)

    def _apply(self, upstream: Upstream, *, has_fallback: bool) -> Applicant:
        client, tokens = self.task.client, self._estimate(upstream)
        return Applicant(PRIORITIES.index(self.task.priority), client.name, client.share, tokens, has_fallback)

    def _estimate(self, upstream: Upstream) -> float:
        body = self.task.body
        return upstream.estimator.estimate(self.task.client.name, len(body.content), body.max_completion)

    async def _exchange(
        self, request: web.Request, exchange: Exchange, permit: Permit, call: Call, *, is_last: bool
    ) -> web.StreamResponse | None:
        upstream = exchange.upstream
        self._metrics.queue_wait.labels(upstream.provider, self.task.priority).observe(permit.waited)
        if permit.passthrough:
            self._metrics.passed_through.labels(upstream.provider, self.task.client.name).inc()
        self._metrics.overhead.observe(max(0.0, time.monotonic() - self._started_at - self._waited))
        try:
            await exchange.send(call)
        except UpstreamError as error:
            self._note_failure(upstream, permit, None, str(error))
            if is_last:
                raise GatewayError(502, "upstream_failed", str(error)) from error
            return None
        except asyncio.CancelledError:  # the client has left; the upstream may be answering
            if permit.is_sent and exchange.is_unanswered and self.task.is_for_model:
                self._use_tokens(upstream, self._estimate(upstream))
            raise
        self._note_answer(exchange, permit)
        if exchange.has_failed and not is_last:
            return None
        return await self._pass_on(request, exchange, permit, len(call.content or b""))

    async def _pass_on(self, request: web.Request, exchange: Exchange, permit: Permit, size: int) -> web.StreamResponse:
        outcome, self._outcome = self._outcome, "cancelled"
        usage = UsageReader(exchange.response.headers.get("Content-Encoding", "").lower())
        try:
            answer = await exchange.pass_on(request, usage)
        except UpstreamError as error:
            self._outcome, self._error = "broken", str(error)
            self._metrics.count_upstream_error(exchange.upstream.provider, None)
            raise ConnectionResetError(str(error)) from error
        finally:
            self._count_tokens(exchange, permit, usage, size)
        self._outcome = outcome
        return answer

    def _count_tokens(self, exchange: Exchange, permit: Permit, usage: UsageReader, size: int) -> None:
        if exchange.status >= _CLIENT_ERROR:
            permit.correct_tokens(0)
            return
        upstream, task, kind = exchange.upstream, self.task, exchange.content_type
        found = usage.find() if kind in (_JSON, _EVENTS) else None
        if found is not None and task.body.model is not None:  # the content of a file could have any `usage`
            upstream.estimator.learn(task.client.name, size, found)
            permit.correct_tokens(found.total)
        if found is not None and (task.is_for_model or task.method == "POST"):
            self._use_tokens(upstream, found.total)
        elif task.is_for_model or (task.method == "POST" and self._may_have_usage(exchange, usage)):
            self._use_tokens(upstream, self._estimate(upstream))

    def _may_have_usage(self, exchange: Exchange, usage: UsageReader) -> bool:
        """Whether a response, in which no usage was found, may be a model's though the request names none."""
        is_read = exchange.response.at_end and usage.is_readable
        return exchange.content_type == _EVENTS or (exchange.content_type == _JSON and not is_read)

    def _use_tokens(self, upstream: Upstream, tokens: float) -> None:
        self._tokens = math.ceil(tokens)
        self._metrics.tokens.labels(upstream.provider, self.task.client.name).inc(self._tokens)
        self._clients.count(self.task.client, tokens=self._tokens)

    def _note_answer(self, exchange: Exchange, permit: Permit) -> None:
        """Note what an answer says about the upstream."""
        upstream, status = exchange.upstream, exchange.status
        self._status, self._error = status, ""
        self._metrics.upstream_seconds.labels(upstream.provider).observe(exchange.seconds)
        upstream.admission.traffic.note_answer(exchange.seconds, upstream.admission.clock.now())
        pause = exchange.find_pause()
        if pause:
            log.warning("upstream_asks_for_pause", upstream=upstream.name, status=status, seconds=round(pause, 3))
            upstream.admission.pause(pause)
        if status >= _SERVER_ERROR:
            self._note_failure(upstream, permit, status, "")
            return
        if status >= _CLIENT_ERROR:
            self._metrics.count_upstream_error(upstream.provider, status)
        is_limited = status == _LIMITED
        self._outcome = "client_error" if status >= _CLIENT_ERROR else "ok"
        if is_limited:
            self._outcome = "no_credit" if exchange.is_out_of_quota else "limited"
        refused = None if exchange.is_out_of_quota else is_limited
        self._note_retreat(upstream, permit.note_answer(refused=refused))

    def _note_retreat(self, upstream: Upstream, state: State | None) -> None:
        if state is None:
            return
        retreat = upstream.admission.retreat
        answers, refused = retreat.judged
        numbers = {"rate_per_minute": round(retreat.rate, 2), "answers": answers, "refused": refused}
        if state in ("retreating", "floor"):
            self._metrics.retreats.labels(upstream.provider).inc()
            log.warning("rate_cut", upstream=upstream.name, state=state, **numbers)
        else:
            log.info("rate_raised", upstream=upstream.name, state=state, **numbers)

    def _note_failure(self, upstream: Upstream, permit: Permit, status: int | None, error: str) -> None:
        self._outcome, self._status, self._error = "upstream_error", status, error
        self._metrics.count_upstream_error(upstream.provider, status)
        if permit.note_failure():
            log.error("upstream_unavailable", upstream=upstream.name, status=status, error=error)

    def _finish(self) -> None:
        task, upstream = self.task, self._upstream
        assert upstream is not None  # noqa: S101 - there is at least one route
        if self._outcome == "cancelled" and upstream.admission.is_stopped:
            self._outcome = "shutting_down"
        self._metrics.count_request(upstream.provider, task.client.name, task.priority, self._outcome)
        log.info(
            "request",
            upstream=upstream.name,
            model=(task.body.model or "")[:SHOWN_MODEL],
            client=task.client.name,
            priority=task.priority,
            outcome=self._outcome,
            status=self._status,
            waited=round(self._waited, 3),
            seconds=round(time.monotonic() - self._started_at, 3),
            tokens=self._tokens,
            **({"error": self._error} if self._error else {}),
        )
