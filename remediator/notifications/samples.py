"""Sample notifications, one for each state: custom templates are checked with them."""

from collections.abc import Iterator
from datetime import datetime
from typing import get_args
from zoneinfo import ZoneInfo

from fleet.inventory.model import Inventory, Service
from fleet.inventory.notify import NotificationKind, Person
from remediator.notifications.content import Attempt, Notification, NotificationState
from remediator.notifications.links import build_links
from remediator.notifications.outbox import MessageForm
from remediator.notifications.rendering import describe_template_error, load_templates
from remediator.reports.description import summarize
from remediator.reports.report import Certificate, Counts, Disk, Report, ServiceReport, TeamReport

STATES: tuple[NotificationState, ...] = (*get_args(NotificationKind), "acting", "watched", "test")
_COUNTS = Counts(2, 1, 1, {"defib": 1}, 0, 1, 41.0, 41.0, 3, 2, 2, 2)
SAMPLE_REPORT = {
    "name": "daily",
    **summarize(
        Report(
            0.0, 86400.0, TeamReport("", 3, 2, 0.998, _COUNTS),
            services=[ServiceReport("wiki", "Wiki", "docs", "h", False, 0.998, 86400.0, 0.0, _COUNTS)],
            alerts_only=1, stopped=1, gpu_count=8, gpu_utilization=0.4,
            certificates=[Certificate("wiki", "Wiki", 200_000.0)],
            disks=[Disk("h", "/data", 0.93, 2e10, 80_000.0, ["HostDiskFull"], "critical")],
            missing={"gpus": "cannot query Prometheus: HTTP 500"},
        )
    ),
}  # fmt: skip
_WITH_DURATION = ("recovered", "unobserved", "alert_over")


def build_test_notification(at: datetime, by: str) -> Notification:
    """Return the notification that tests a channel."""
    return Notification("test", "info", {}, {}, None, at, None, 0.0, [], {"who": by})


def sample_notification(
    state: NotificationState, inventory: Inventory, service: Service | None, at: datetime
) -> Notification:
    """Return a notification that has a value in every field."""
    labels = {"alertname": "ServiceDown", "severity": "critical", "team": "docs", "instance": "host:9100"}
    if service is not None:
        labels |= {"service": service.id, "host": service.host}
    annotations = {
        "summary": "No response", "description": "No response within 10 s", "runbook_url": "https://wiki/x",
    }  # fmt: skip
    return Notification(
        state,
        "critical",
        labels,
        annotations,
        service,
        at,
        duration=41.0 if state in _WITH_DURATION else None,
        open_for=4000.0,
        on_call=[Person(open_id="ou_somebody", name="Somebody")],
        details={
            "probe": "timeout: no response within 10 s",
            "why": "exit status 1",
            "output": "line\nline",
            "who": "ann",
            "seconds": 3.2,
            "action": 3,
            "kind": "recreate",
            "reason": "attempts-used-up",
            "unacknowledged": 600.0,
            "until": at,
            "report": SAMPLE_REPORT,
        },
        attempts=[
            Attempt("restart", "failed", "exit status 1", "", at, None),
            Attempt("recreate", "succeeded", "", "ann", at, 3.2),
        ],
        earlier_attempts=2,
        attempt=(2, 3),
        decision=("wait", "storm", "3 of 4"),
        until=at,
        held=("maintenance", "host h, by ann: disks"),
        recovered_by="defib",
        acknowledged=("ann", at),
        firing=["ServiceDown", "ServiceSlow"],
        incident=7,
        links=build_links(inventory, service, labels, annotations, 7),
        buttons={"acknowledge": {"incident": 7}},
    )


def check_templates(inventory: Inventory) -> Iterator[str]:
    """Render the user's templates with every state; yields every error once."""
    own = inventory.notify.templates
    if own is not None:
        yield from dict.fromkeys(describe_template_error(error, own) for error in _template_errors(inventory))


def _template_errors(inventory: Inventory) -> Iterator[Exception]:
    try:
        templates = load_templates(inventory)
    except Exception as error:  # noqa: BLE001 - an expression in a template can raise anything
        yield error
        return
    at = datetime.now(ZoneInfo(inventory.notify.timezone))
    forms: tuple[MessageForm, ...] = get_args(MessageForm)
    for service in (None, next(iter(inventory.services.values()), None)):
        for state in STATES:
            for form in forms:
                samples = [sample_notification(state, inventory, service, at)] * (1 if form == "one" else 3)
                try:
                    templates.render_title(samples, form)
                    templates.render_body(samples, form)
                except Exception as error:  # noqa: BLE001 - as above
                    yield error
