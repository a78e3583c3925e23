"""Who sends requests: clients with their tokens, priorities, shares and budgets."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from fleet.inventory.gateway import PRIORITIES, Budget, ClientSettings, Priority
from gateway.errors import GatewayError
from runtime.access.tokens import digest_of

ANONYMOUS = "anonymous"  # the client of all requests where no clients are configured
DAY = 86_400
log = structlog.get_logger()


@dataclass(frozen=True)
class Client:
    name: str
    priority: Priority = "normal"
    share: float = 1.0
    budget: Budget = field(default_factory=Budget)


class Clients:
    """The clients of a configuration, and what each has used today, in UTC."""

    def __init__(self, unix: Callable[[], float]) -> None:
        self._unix = unix
        self._by_digest: dict[str, Client] = {}
        self._day = 0
        self._used: dict[str, dict[str, int]] = {}  # requests and tokens by client

    def replace(self, settings: Mapping[str, ClientSettings]) -> None:
        self._by_digest = {
            digest_of(each.token.get_secret_value()): Client(name, each.priority, each.share, each.budget)
            for name, each in settings.items()
        }

    @property
    def are_named(self) -> bool:
        """Whether clients are configured, so that each must show its token."""
        return bool(self._by_digest)

    def find(self, token: str) -> Client | None:
        return self._by_digest.get(digest_of(token))

    def list_all(self) -> list[Client]:
        return list(self._by_digest.values()) or [Client(ANONYMOUS)]

    def check_budget(self, client: Client) -> None:
        """Raise GatewayError if a client has used its budget."""
        used = self.used_today(client.name)
        limits = {"requests": client.budget.requests, "tokens": client.budget.tokens}
        for what, limit in limits.items():
            if limit is not None and used[what] >= limit:
                hours = math.ceil((DAY - self._unix() % DAY) / 3600)
                message = f"{client.name} has used its {limit} {what} of today, which ends in {hours} h (UTC)"
                raise GatewayError(429, "budget_exceeded", message)

    def count(self, client: Client, *, requests: int = 0, tokens: int = 0) -> None:
        """Count what a client has used. A negative number returns what it has not used, except that of yesterday."""
        used = self.used_today(client.name)
        self._used[client.name] = {
            "requests": max(0, used["requests"] + requests),
            "tokens": used["tokens"] + tokens,
        }

    def used_today(self, name: str) -> Mapping[str, int]:
        today = int(self._unix() // DAY)
        if today != self._day:
            self._day, self._used = today, {}
        return self._used.get(name, {"requests": 0, "tokens": 0})

    def dump(self) -> dict[str, Any]:
        """Return what `restore` reads after a restart."""
        return {"day": self._day, "used": self._used}

    def restore(self, stored: Any) -> None:
        """Continue with what was used before; what is not as `dump` returned it counts as nothing."""
        try:
            used = {
                str(name): {what: int(each[what]) for what in ("requests", "tokens")}
                for name, each in stored["used"].items()
            }
            self._day, self._used = int(stored["day"]), used
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            log.warning("budgets_not_restored", effect="the budgets of today begin anew")


def find_priority(text: str | None, client: Client) -> Priority:
    """Return the priority that a header names, or else the client's."""
    wanted = (text or "").strip().lower()
    return next((priority for priority in PRIORITIES if priority == wanted), client.priority)
