"""The upstreams of the configuration, with what each has learned; a reload keeps that, also when it renames one."""

import asyncio
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from yarl import URL

from fleet.inventory.endpoints import TlsSettings
from fleet.inventory.gateway import PRIORITIES, GatewaySettings, QueueSettings, UpstreamSettings
from gateway.admission import Admission, Clock, Limits, QueueRules, Timer
from gateway.ledger import Ledger, SentFile, key_of
from gateway.metrics import UpstreamState
from gateway.pools import ConnectionPool, Origin, create_tls
from gateway.retreat import STATES, Retreat
from gateway.routing import PREFIX, Router, UpstreamModels, is_versioned
from gateway.shared import SharedLimits
from gateway.state import sent_path
from gateway.usage import Estimator

log = structlog.get_logger()


class LoopClock:
    """The time of this machine, and the timers of the event loop."""

    def now(self) -> float:
        return time.monotonic()  # not the event loop's, which is that of the beginning of its turn

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)


@dataclass(frozen=True)
class Upstream:
    """An upstream with the settings of one configuration; `admission` and `estimator` outlive that."""

    name: str
    settings: UpstreamSettings
    admission: Admission
    estimator: Estimator
    pool: ConnectionPool

    @property
    def provider(self) -> str:
        return self.settings.provider or self.name

    @property
    def base(self) -> str:
        return self.settings.url.rstrip("/")

    def has_path(self, path: str) -> bool:
        """Whether requests with a path of the gateway can be sent: outside `/v1`, if the URL ends in `/v1`."""
        return is_versioned(path) or urlsplit(self.base).path.endswith(PREFIX)

    @functools.cached_property
    def origin(self) -> Origin:
        return Origin.of(URL(self.base))

    def target_of(self, path: str) -> str:
        """Return what a request for a path of the gateway, which the upstream has, asks it for."""
        base = self._base_path
        target = base + path.removeprefix(PREFIX) if is_versioned(path) else base.removesuffix(PREFIX) + path
        return target.partition("#")[0] or "/"

    @functools.cached_property
    def _base_path(self) -> str:
        return URL(self.base).raw_path.rstrip("/")

    @property
    def api_key(self) -> str | None:
        return self.settings.api_key.get_secret_value() if self.settings.api_key is not None else None

    @property
    def key(self) -> bytes:
        return key_of(self.base, self.api_key or "")

    def describe(self) -> UpstreamState:
        """Return its present state for metrics."""
        admission = self.admission
        return UpstreamState(
            self.provider,
            admission.in_flight,
            list(admission.depths),
            admission.retreat.rate,
            admission.retreat.base,
            admission.count_available(),
            STATES.index(admission.retreat.state),
            admission.breaker.is_open,
            max(0.0, admission.paused_until - admission.clock.now()),
        )


class Upstreams:
    """The upstreams in force. `restored` has the learned rates by key, as `dump` returned them before a restart."""

    def __init__(
        self, clock: Clock, sent: SentFile | None, restored: Any = None, shared: SharedLimits | None = None
    ) -> None:
        self._clock, self._sent, self._shared = clock, sent, shared
        self._restored = restored if isinstance(restored, dict) else {}
        self._by_name: dict[str, Upstream] = {}
        self._learned: dict[bytes, tuple[Admission, Estimator]] = {}
        self._pools: dict[TlsSettings, ConnectionPool] = {}
        self.router = Router({}, None)

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Upstream:
        return self._by_name[name]

    def __len__(self) -> int:
        return len(self._by_name)

    async def apply(self, settings: GatewaySettings) -> None:
        """Put a configuration in force. Requests in progress, and those that wait, stay. Raises DefibError."""
        used = {each.tls for each in settings.upstreams.values()}
        contexts = {tls: await asyncio.to_thread(create_tls, tls) for tls in used - self._pools.keys()}
        self._pools |= {tls: ConnectionPool(context, tls.server_name) for tls, context in contexts.items()}
        self._by_name = {name: self._create(name, each, settings) for name, each in settings.upstreams.items()}
        self._learned |= {each.key: (each.admission, each.estimator) for each in self}
        self._forget_unused()
        self.router = Router(
            {
                name: UpstreamModels(each.match, each.aliases, each.fallback)
                for name, each in settings.upstreams.items()
            },
            settings.default,
        )
        for tls in self._pools.keys() - used:
            self._pools.pop(tls).retire()

    def _forget_unused(self) -> None:
        """Forget removed upstreams, except what counts if a later reload brings them back."""
        used = {each.key for each in self}
        for key, (admission, _) in list(self._learned.items()):
            if key not in used and not admission.is_in_use():
                admission.close()
                del self._learned[key]

    def _create(self, name: str, upstream: UpstreamSettings, settings: GatewaySettings) -> Upstream:
        key = key_of(upstream.url.rstrip("/"), upstream.api_key.get_secret_value() if upstream.api_key else "")
        limits = Limits(upstream.tokens, upstream.burst, upstream.concurrency)
        queue, rules = create_rules(settings.queue), settings.retreat
        found = self._learned.get(key)
        if found is not None:
            admission, estimator = found
            admission.retreat.configure(upstream.rate, rules, self._clock.now())
            admission.configure(limits, queue)
        else:
            retreat, estimator = Retreat(upstream.rate, rules, self._clock.now()), Estimator()
            self._restore(retreat, key)
            shared = functools.partial(self._shared.create_window, key) if self._shared is not None else None
            admission = Admission(limits, queue, retreat, self._clock, Ledger(self._sent, key), shared)
        return Upstream(name, upstream, admission, estimator, self._pools[upstream.tls])

    def _restore(self, retreat: Retreat, key: bytes) -> None:
        rate = self._restored.pop(key.hex(), None)
        if isinstance(rate, int | float) and rate < retreat.base:
            retreat.restore(float(rate), self._clock.now())

    def dump(self) -> dict[str, float]:
        """Return the learned rates of upstreams whose rate was cut, by key."""
        return {
            each.key.hex(): each.admission.retreat.rate for each in self if each.admission.retreat.state != "steady"
        }

    def stop(self) -> None:
        """Refuse the requests that wait, also those for upstreams that were removed."""
        for admission, _ in self._learned.values():
            admission.stop()

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def create_rules(queue: QueueSettings) -> QueueRules:
    waits = [queue.waits[priority] for priority in PRIORITIES]
    return QueueRules(queue.size, queue.when_full, waits, queue.ageing)


def open_sent_file(path: Path | None) -> SentFile | None:
    """Open the ledger's file beside the state file. Raises StartError."""
    return SentFile(sent_path(path)) if path is not None else None
