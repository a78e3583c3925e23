"""How many alerts may be open, and may be new, since whoever has the webhook token can send any number of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from sqlalchemy import func, select

from remediator.clients.alerts import Alert
from remediator.incidents.resolution import EXPORTER_DOWN
from remediator.record.schema import alerts
from remediator.record.situations import HOST_DOWN
from remediator.record.transaction import Transaction

# How many alerts may be open at the same time, and how many may be new within `arrivals.SPAN`.
MAX_FOREIGN = 1000  # of no service or host in the inventory
MAX_OF_SUBJECT = 200  # of a service or host; of each alert there that Defib acts on
# Characters of the labels and annotations of new alerts, in all: beyond that, they are shortened; beyond twice as much,
# those on which Defib does not act are refused.
MAX_TEXT = 4 * 2**20  # of alerts of no service or host, and of others
MAX_TEXT_OF_EACH = 4096  # of others in addition, for each service and host of the inventory
SHORT_TEXT, SHORT_LABELS = 200, 30  # characters of a label that is kept nevertheless, and how many of them
_IMPORTANT = ("alertname", "service", "host", "severity", "team", "category", "provider", "component")  # labels
_LABELS = ("service", "host")
_SELECT_OPEN = (
    select(
        alerts.c.name,
        *(func.json_extract(alerts.c.labels, f"$.{label}").label(label) for label in _LABELS),
        func.count().label("number"),
    )
    .where(alerts.c.status == "firing")
    .group_by(alerts.c.name, *_LABELS)
)


class AlertLimits:
    """The open alerts of one transaction, and the new ones; `refused` counts those for which there is no room."""

    def __init__(self, tx: Transaction) -> None:
        self._tx, self._inventory = tx, tx.inventory
        self._open: Counter[str] | None = None  # by subject; read when it is needed
        self.refused = 0

    def accept(self, alert: Alert) -> Alert | None:
        """Count an alert that was not known before, and return it as it is stored.

        None if it must not be, because too many are new or open. If the texts of new alerts exceed their limit, it is
        stored with short labels only. One that is not firing counts as of no subject, since nobody sees it.
        """
        subject = self._find_subject(alert.name, alert.labels)
        counted = subject if alert.status == "firing" else ""
        if not self._has_room(counted):
            self.refused += 1
            return None
        if alert.status == "firing" and not self._open_place(subject):
            return None
        self._tx.arrivals.add(counted)
        return self._limit_texts(alert, subject)

    def _has_room(self, subject: str) -> bool:
        arrivals = self._tx.arrivals
        is_acted_on = bool(subject) and not subject.endswith(" ")
        if not is_acted_on and arrivals.size(_kind_of(subject)) > 2 * self._find_max_text(subject):
            return False
        return arrivals.count(subject) < (MAX_OF_SUBJECT if subject else MAX_FOREIGN)

    def _limit_texts(self, alert: Alert, subject: str) -> Alert:
        kind = _kind_of(subject)
        if self._tx.arrivals.size(kind) > self._find_max_text(subject):
            alert = replace(alert, labels=_shorten(alert.labels), annotations={})
        texts = (*alert.labels.items(), *alert.annotations.items())
        self._tx.arrivals.add_size(kind, sum(len(name) + len(text) for name, text in texts))
        return alert

    def _find_max_text(self, subject: str) -> int:
        entries = len(self._inventory.services) + len(self._inventory.hosts) if subject else 0
        return MAX_TEXT + MAX_TEXT_OF_EACH * entries

    def take_place(self, name: str, labels: Mapping[str, str]) -> bool:
        """Count a further open alert; False if it must not be, because too many are open."""
        return self._open_place(self._find_subject(name, labels))

    def _open_place(self, subject: str) -> bool:
        if self._open is None:
            self._open = self._count_open()
        if self._open[subject] >= (MAX_OF_SUBJECT if subject else MAX_FOREIGN):
            self.refused += 1
            return False
        self._open[subject] += 1
        return True

    def _find_subject(self, name: str, labels: Mapping[str, str]) -> str:
        """Return what the alert is counted with: others of its service or host, or its equals if Defib acts on it."""
        service, host = (labels.get(label, "") for label in _LABELS)
        if service in self._inventory.services:
            alerts_to_act_on = self._inventory.remediation.for_service(self._inventory.services[service]).alerts
            return f"service {service} {name if name in alerts_to_act_on else ''}"
        if host in self._inventory.hosts:
            is_special = name == HOST_DOWN or self._inventory.find_subject_of_alert(name, labels) is not None
            return f"host {host} {name if is_special else ''}"
        return name if name == EXPORTER_DOWN else ""

    def _count_open(self) -> Counter[str]:
        counter: Counter[str] = Counter()
        for row in self._tx.execute(_SELECT_OPEN):
            labels = {label: getattr(row, label) for label in _LABELS if getattr(row, label) is not None}
            counter[self._find_subject(row.name, labels)] += row.number
        return counter


def _kind_of(subject: str) -> str:
    """Return whose texts count together: those of no service or host must not use up the room of others."""
    return "known" if subject else "foreign"


def _shorten(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the short labels, the important ones first."""
    names = [*(name for name in _IMPORTANT if name in labels), *(name for name in labels if name not in _IMPORTANT)]
    short = [name for name in names if len(name) + len(labels[name]) <= SHORT_TEXT]
    return {name: labels[name] for name in short[:SHORT_LABELS]}
