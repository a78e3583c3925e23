"""What the week shows: notifications that need no action, and how soon each fault was notified."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.simulated_week.events import (
    HOSTS,
    HOSTS_SCALED,
    MINUTE,
    SERVICES,
    SERVICES_SCALED,
    Effect,
    Fault,
    Week,
)
from tests.simulated_week.notifications import Notification

DAYS = 7
NEEDLESS_A_DAY = 2.0


@dataclass(frozen=True)
class NotifiedFault:
    """A fault, by which alert it was notified, and after how many seconds; None if it was not."""

    fault: Fault
    alert: str | None
    after: float | None

    @property
    def is_in_time(self) -> bool:
        return self.after is not None and self.after <= self.fault.within


@dataclass
class Report:
    faults: list[NotifiedFault]
    needless: list[Notification]
    of_faults: Mapping[str, Sequence[Notification]]
    nearly: Mapping[str, tuple[int, int]]  # by alert: minutes that it was active without firing, and that it waits

    @property
    def needless_a_day(self) -> float:
        return sum(_scale(each) for each in self.needless) / DAYS

    @property
    def is_good(self) -> bool:
        return self.needless_a_day <= NEEDLESS_A_DAY and all(each.is_in_time for each in self.faults)

    def lines(self) -> Iterator[str]:
        yield f"Notifications a day that need no action, for {HOSTS_SCALED} hosts and {SERVICES_SCALED} services:"
        for alert, number in Counter(each.alert for each in self.needless).most_common():
            a_day = sum(_scale(each) for each in self.needless if each.alert == alert) / DAYS
            yield f"  {a_day:8.2f}  {alert} ({number} in the simulation)"
        yield f"  {self.needless_a_day:8.2f}  in all, at most {NEEDLESS_A_DAY:g}"
        yield ""
        yield "Faults:                    notified after  allowed  alert"
        for found in self.faults:
            after = "never" if found.after is None else f"{found.after:.0f} s"
            late = "" if found.is_in_time else "  LATE"
            yield f"  {found.fault.name:25} {after:>13} {found.fault.within:6.0f} s  {found.alert or ''}{late}"
        yield ""
        yield "All notifications of each fault:"
        for name, sent in self.of_faults.items():
            counted = Counter(each.alert for each in sent)
            yield f"  {name:25} " + ", ".join(f"{alert} {number}" for alert, number in sorted(counted.items()))
        yield ""
        yield "Active at most this long without firing:"
        for alert, (minutes, pending) in sorted(self.nearly.items()):
            yield f"  {alert:25} {minutes} of {pending} min"


def _scale(notification: Notification) -> float:
    if "service" in notification.labels:
        return SERVICES_SCALED / SERVICES
    return HOSTS_SCALED / HOSTS if "host" in notification.labels else 1.0


def make_report(week: Week, notifications: Sequence[Notification], nearly: Mapping[str, tuple[int, int]]) -> Report:
    of_faults: dict[str, list[Notification]] = {each.name: [] for each in week.faults}
    needless = []
    for each in notifications:
        cause = next((effect for effect in week.effects if _is_caused(each, effect)), None)
        if cause is None:
            needless.append(each)
        else:
            of_faults[cause.fault].append(each)
    return Report([_find_notified(fault, notifications) for fault in week.faults], needless, of_faults, nearly)


def _is_caused(notification: Notification, effect: Effect) -> bool:
    return (
        notification.alert in effect.alerts
        and effect.labels.items() <= notification.labels.items()
        and notification.minute * MINUTE in effect.span
    )


def _find_notified(fault: Fault, notifications: Sequence[Notification]) -> NotifiedFault:
    for each in notifications:
        after = each.minute * MINUTE - fault.span.begin
        if after >= 0 and each.alert in fault.alerts and fault.labels.items() <= each.labels.items():
            return NotifiedFault(fault, each.alert, after)
    return NotifiedFault(fault, None, None)
