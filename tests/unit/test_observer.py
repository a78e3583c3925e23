"""What silences and inhibitions of Alertmanager mean for the restart of a service or of its components."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from remediator.clients.alertmanager import AlertState, KnownAlerts
from remediator.engine.observer import AlertLookup, ServiceObserver
from tests.support import inventory_of

CH1 = AlertState("ServiceComponentDown", "", "ch1")
SILENCED = AlertState("ServiceComponentDown", "silenced by 1", "ch2")
DOWN, MUTED_DOWN = AlertState("ServiceDown", ""), AlertState("ServiceDown", "silenced by 2")


class Alerts:
    """An Alertmanager with these alerts of every service."""

    def __init__(self, *alerts: AlertState) -> None:
        self._alerts = alerts

    async def alerts_with(self, _labels: Mapping[str, str]) -> KnownAlerts:
        return KnownAlerts(self._alerts, 1000.0)


@pytest.mark.parametrize(
    ("service", "alerts", "found"),
    [
        ("tc", (DOWN, CH1), AlertLookup()),
        ("tc", (MUTED_DOWN, CH1), AlertLookup(silenced="silenced by 2")),
        ("web", (MUTED_DOWN, CH1), AlertLookup(silenced="silenced by 2")),
        ("tc", (CH1, SILENCED), AlertLookup(active_components=frozenset({"ch1"}))),
        ("tc", (SILENCED,), AlertLookup(silenced="silenced by 1")),
        ("web", (CH1,), AlertLookup(gone=True)),
    ],
)
def test_alerts_that_are_muted_hold_what_they_are_about(
    tmp_path: Path, service: str, alerts: tuple[AlertState, ...], found: AlertLookup
) -> None:
    page = {"url": "http://h/", "components": {"each": "$.c[*]", "name": "$.name", "up": {"$.state": "on"}}}
    component = {"restart": {"url": "http://h/{component}"}, "automatic": True}
    inventory = inventory_of(tmp_path, {"services": {
        "web": {"probe": {"tcp": {"address": "h:1"}}},
        "tc": {"probe": {"status": page}, "on_failure": "restart",
               "control": {"http": {"components": ["ch1", "ch2"], "component": component}}},
    }}).inventory  # fmt: skip
    nobody = cast("Any", None)
    observer = ServiceObserver(nobody, inventory, nobody, cast("Any", Alerts(*alerts)))
    firing = frozenset(each.name for each in alerts)
    assert asyncio.run(observer.look_up_alerts(inventory.services[service], firing)) == found
