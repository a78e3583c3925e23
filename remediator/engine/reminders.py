"""Periodic notifications about Defib itself: no Watchdog alert received, automation off."""

import structlog

from fleet.inventory.notify import NotificationKind
from remediator.incidents import resolution
from remediator.record import notifications, timestamps
from remediator.record.automation import read_switch
from remediator.record.transaction import Transaction

WATCHDOG_MISSING_LABELS = {"alertname": "WatchdogMissing", "severity": "critical"}
AUTOMATION_OFF_LABELS = {"alertname": "AutomationOff", "severity": "warning"}
AUTOMATION_OFF_EVERY = 6 * 3600.0
log = structlog.get_logger()


def check_watchdog(tx: Transaction, within: float, started: float) -> bool:
    """Notify once if no Watchdog alert was received for `within` seconds, and once when it is received again.

    `started` is when the remediator started: it could not receive one before. Returns whether a notification was added.
    """
    if not within:
        return False
    received, missed = timestamps.get(tx, "watchdog"), timestamps.get(tx, "watchdog-missed")
    last = max(received.at if received is not None else started, started)
    if tx.now - last >= within or (received is not None and resolution.is_watchdog_resolved(tx)):
        if missed is not None:
            return False
        timestamps.put(tx, "watchdog-missed", tx.now)
        content = {"since": received.at} if received is not None else {}
        notifications.notify(tx, "watchdog_missing", f"watchdog missing {tx.now}", WATCHDOG_MISSING_LABELS, content)
        log.error("watchdog_missing", hint="check Prometheus, Alertmanager and the route to the remediator")
        return True
    if missed is None or received is None or received.at <= missed.at:
        return False
    timestamps.remove(tx, "watchdog-missed")
    content = {"opened_at": missed.at, "closed_at": tx.now}
    notifications.notify(tx, "watchdog_back", f"watchdog back {tx.now}", WATCHDOG_MISSING_LABELS, content)
    log.info("watchdog_received_again")
    return True


def notify_automation_switched(tx: Transaction, *, enabled: bool, by: str, reason: str) -> None:
    """Notify that an operator switched automation on or off."""
    kind: NotificationKind = "automation_on" if enabled else "automation_off"
    content = {"who": by, "why": reason}
    notifications.notify(tx, kind, f"{kind} {tx.now}", AUTOMATION_OFF_LABELS, content)
    timestamps.put(tx, "automation-notified", tx.now)


def remind_automation_off(tx: Transaction) -> bool:
    """Notify every few hours while automation is off; returns whether a notification was added."""
    switch, notified = read_switch(tx), timestamps.get(tx, "automation-notified")
    if switch.enabled and tx.inventory.remediation.automatic:
        if notified is not None:
            timestamps.remove(tx, "automation-notified")
        return False
    if notified is None:
        # The inventory disables it: its author knows.
        timestamps.put(tx, "automation-notified", tx.now)
        return False
    if tx.now - notified.at < AUTOMATION_OFF_EVERY:
        return False
    by, since = (switch.by, {"since": switch.at}) if not switch.enabled else ("", {})
    content = {"who": by, "why": switch.reason, **since}
    notifications.notify(tx, "automation_off", f"automation_off still {tx.now}", AUTOMATION_OFF_LABELS, content)
    timestamps.put(tx, "automation-notified", tx.now)
    return True
