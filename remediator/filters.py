"""Which services a list shows and in which order, from and to the query of its address."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

from remediator.policy.service_states import STATES, ServiceState
from remediator.snapshot import ServiceRow

PAGE_SIZE = 1000
TEXT_LIMIT = 100  # characters
_Key = Callable[[ServiceRow], Any]
GROUPS: Mapping[str, Callable[[ServiceRow], str]] = MappingProxyType(
    {
        "category": lambda row: row.category,
        "group": lambda row: row.group,
        "host": lambda row: row.host,
        "provider": lambda row: row.provider,
    }
)
ORDERS: Mapping[str, _Key] = MappingProxyType(
    {
        "state": lambda row: row.order,
        "name": lambda row: row.sort_name,
        "host": lambda row: (row.host, row.sort_name),
        "since": lambda row: -(row.since or 0.0),
        "latency": lambda row: -(row.latency or 0.0),
    }
)
_EXACT = ("provider", "category", "host", "group")


@dataclass(frozen=True)
class ServiceFilter:
    """What the reader asked for; empty fields do not restrict."""

    states: tuple[ServiceState, ...] = ()
    provider: str = ""
    category: str = ""
    host: str = ""
    group: str = ""
    text: str = ""
    order: str = "state"
    group_by: str = ""
    page: int = 1

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> "ServiceFilter":
        """Return the filter of a query; unknown values are ignored, as if they were not there."""
        wanted = query.get("state", "").split(",")
        exact = {name: query.get(name, "")[:TEXT_LIMIT] for name in _EXACT}
        page = query.get("page", "1")
        return cls(
            states=tuple(state for state in STATES if state in wanted),
            text=query.get("q", "")[:TEXT_LIMIT].strip(),
            order=query["sort"] if query.get("sort") in ORDERS else "state",
            group_by=query["by"] if query.get("by") in GROUPS else "",
            page=max(1, int(page)) if page.isascii() and page.isdigit() and len(page) < 6 else 1,  # noqa: PLR2004 - digits
            **exact,
        )

    def query(self, **changed: Any) -> str:
        """Return the query of this filter with some changes, without what is as usual; the first page again."""
        new = replace(self, page=1, **changed) if "page" not in changed else replace(self, **changed)
        values = {
            "state": ",".join(new.states), "provider": new.provider, "category": new.category, "host": new.host,
            "group": new.group, "q": new.text, "sort": new.order if new.order != "state" else "", "by": new.group_by,
            "page": new.page if new.page > 1 else "",
        }  # fmt: skip
        text = urlencode({name: value for name, value in values.items() if value})
        return f"?{text}" if text else "?"

    @property
    def is_restricted(self) -> bool:
        return bool(self.states or self.text or any(getattr(self, name) for name in _EXACT))

    def select(self, rows: Iterable[ServiceRow]) -> list[ServiceRow]:
        """Return the rows that match, in order."""
        return sorted(filter(self.matches, rows), key=ORDERS[self.order])

    def matches(self, row: ServiceRow) -> bool:
        if self.states and row.state not in self.states:
            return False
        if any(wanted not in ("", getattr(row, name)) for name in _EXACT if (wanted := getattr(self, name))):
            return False
        return all(word in _searchable(row) for word in self.text.lower().split())

    def page_of(self, rows: Sequence[ServiceRow]) -> Sequence[ServiceRow]:
        start = (self.page - 1) * PAGE_SIZE
        return rows[start : start + PAGE_SIZE]

    def grouped(self, rows: Sequence[ServiceRow]) -> list[tuple[str, list[ServiceRow]]]:
        """Return the rows by what they are grouped by, the groups with broken ones first; one group if by nothing."""
        if not self.group_by:
            return [("", list(rows))]
        groups: dict[str, list[ServiceRow]] = {}
        for row in rows:
            groups.setdefault(GROUPS[self.group_by](row), []).append(row)
        return sorted(groups.items(), key=lambda group: (min(row.order[0] for row in group[1]), group[0]))


def _searchable(row: ServiceRow) -> str:
    return f"{row.id} {row.title} {row.host} {row.group} {row.provider} {row.category} {row.reason}".lower()


def values_of(rows: Collection[ServiceRow], name: str) -> list[str]:
    """Return the values that rows have for one of the exact filters, in order."""
    return sorted({str(getattr(row, name)) for row in rows} - {""})
