"""Operators restart single components of a service, such as a transcoder's channels."""

import asyncio
from typing import Any

import pytest

from tests.integration.loop import Loop, alert, delivery
from tests.integration.peers import Transcoder
from tests.integration.test_access import bearer, create_token
from tests.integration.test_safety import defib
from tests.support import eventually

pytestmark = pytest.mark.needs("sshd")


async def restart(loop: Loop, component: str, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = await loop.ask("POST", f"/api/v1/services/tc/components/{component}/restart", body)
    return answer.status_code, answer.json()


def automatic(transcoder: Transcoder, **options: Any) -> dict[str, Any]:
    """The transcoder's service, whose components are restarted automatically; `options` are those of its probe."""
    service = transcoder.service
    service["control"]["http"]["component"]["automatic"] = True
    service["probe"]["status"] |= options
    return service | {"on_failure": "restart"}


def component_alert(name: str) -> dict[str, Any]:
    made = alert("tc", "ServiceComponentDown")
    return made | {"labels": made["labels"] | {"component": name}, "fingerprint": f"component-{name}"}


async def until_ended(loop: Loop, number: int) -> dict[str, Any]:
    async def ended() -> dict[str, Any] | None:
        rows = (await loop.ask("GET", "/api/v1/actions")).json()["actions"]
        return next((row for row in rows if row["id"] == number and row["ended_at"] is not None), None)

    return (await eventually(ended)) or {}


async def test_a_component_is_restarted_and_verified(loop: Loop, transcoder: Transcoder) -> None:
    transcoder.channels |= {"ch1": "stopped", "ch2": "stopped", "线路/3": "stopped"}
    await loop.start({"tc": transcoder.service})
    await loop.fire("tc")
    assert await restart(loop, "ch1") == (202, {"action": 1, "service": "tc", "kind": "restart"})
    action = await until_ended(loop, 1)
    # The service is still down because of others.
    assert (action["state"], action["component"], action["command"]) == ("succeeded", "ch1", "succeeded")
    assert transcoder.restarts == ["ch1"]
    # The console's form. Its answer is relative, since a proxy may serve all paths below a prefix.
    form = f"{loop.stack.url('remediator')}/services/tc/components/%E7%BA%BF%E8%B7%AF%2F3/restart"
    pressed = await loop.stack.client.post(form, data={"form_id": "1"}, headers={"X-Defib-User": "ann"})
    assert (pressed.status_code, pressed.headers["Location"]) == (303, "./../../../../services/tc")
    assert (await until_ended(loop, 2))["component"] == transcoder.restarts[-1] == "线路/3"
    transcoder.broken.add("ch2")
    done = await asyncio.to_thread(defib, loop, "control", "tc", "restart", "--component", "ch2")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "restart component ch2 of tc: succeeded"), done
    failed = await until_ended(loop, 3)
    assert failed["state"] == "failed"
    assert failed["why"].startswith("component ch2: not up within 4 s; state: 1 of 4 components are down: ch2"), failed
    transcoder.channels["ch2"] = "running"
    explained = (await loop.ask("GET", "/api/v1/services/tc/explain")).json()
    assert explained["attempts"] == {}
    await loop.fire("tc", status="resolved")
    incident = await loop.until("recovered")
    assert incident["recovered_by"] == "person"
    started = await loop.until_event("action_started", component="ch1")
    assert (started["detail"]["by"], started["detail"]["kind"]) == ("person", "restart")
    assert not [entry for entry in incident["timeline"] if entry["event"] == "service_up"]
    for language, sentence in (
        ("en", "Action 1 (restart component ch1) started"),
        ("zh", "操作 1（重启组件 ch1）开始"),
    ):
        page = await loop.stack.client.get(
            f"{loop.stack.url('remediator')}/incidents/1", headers={"Accept-Language": language}
        )
        assert sentence in page.text
    entries = (await loop.ask("GET", "/api/v1/audit")).json()["audit"]
    assert [(each["event"], each["target"], each["detail"]) for each in entries if each["event"] == "restart"] == [
        ("restart", "tc", f"component {name}") for name in ("ch2", "线路/3", "ch1")
    ]
    events = (await loop.ask("GET", "/api/v1/events?kind=action&text=component%20ch1")).json()["events"]
    assert [(each["operation"], each["detail"]) for each in events] == [("restart", "component ch1")]


async def test_what_may_not_be_restarted_is_refused(loop: Loop, transcoder: Transcoder) -> None:
    await loop.start({"tc": transcoder.service, "web": loop.service("web")})
    for name in ("ch4", "nothing", "..%2Fch1", "ch1%22%7D", "%E7%BA%BF"):
        status, answer = await restart(loop, name)
        assert (status, answer["error"]["code"]) == (404, "unknown_component"), name
        assert answer["error"]["message"].endswith("(listed: ch1, ch2, 线路/3)"), name
    without = await loop.ask("POST", "/api/v1/services/web/components/ch1/restart")
    assert (without.status_code, without.json()["error"]["code"]) == (400, "unknown_verb")
    assert "does not restart components" in without.json()["error"]["message"]
    whole = await loop.ask("POST", "/api/v1/services/tc/restart")
    assert (whole.status_code, whole.json()["error"]["code"]) == (400, "unknown_verb")
    assert (await restart(loop, "ch1", overrule=["host-busy"]))[0] == 400
    url = f"{loop.stack.url('remediator')}/api/v1/services/tc/components/ch1/restart"
    viewer = await create_token(loop, "viewer", "viewer")
    assert (await loop.stack.client.post(url, headers=bearer(viewer))).status_code == 403
    for arguments, message in (
        (["restart", "--component", "ch4"], "does not list the component 'ch4' (listed: ch1, ch2, 线路/3)"),
        (["restart", "--component", "ch4", "--direct"], "does not list the component 'ch4' (listed: ch1, ch2, 线路/3)"),
        (["stop", "--component", "ch1"], "argument --component: cannot stop a component, only restart it"),
    ):
        done = await asyncio.to_thread(defib, loop, "control", "tc", *arguments)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (1, True, False), done
    assert transcoder.restarts == []
    # The gates and locks of a restart.
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "service", "name": "tc", "reason": "r", "for": "1h"})
    status, answer = await restart(loop, "ch1")
    assert (status, answer["error"]["code"]) == (409, "maintenance")
    transcoder.may_restart.clear()
    assert (await restart(loop, "ch1", overrule=["maintenance"]))[0] == 202
    status, answer = await restart(loop, "ch2", overrule=["maintenance"])
    assert (status, answer["error"]["code"]) == (409, "target-busy")
    transcoder.may_restart.set()
    assert (await until_ended(loop, 1))["state"] == "succeeded"
    refused = [
        each for each in (await loop.ask("GET", "/api/v1/audit")).json()["audit"] if each["outcome"] == "refused"
    ]
    # Refusals for want of a role are written a little later.
    assert any(each["detail"].startswith("component ch2; target-busy: ") for each in refused)
    direct = await asyncio.to_thread(defib, loop, "control", "tc", "restart", "--component", "ch2", "--direct")
    assert (direct.returncode, transcoder.restarts) == (0, ["ch1", "ch2"]), direct


async def test_components_are_restarted_automatically_before_the_service(loop: Loop, transcoder: Transcoder) -> None:
    """Only those that are listed; then a person is needed, since the control cannot restart the service."""
    transcoder.channels |= {"ch1": "stopped", "线路/3": "stopped", "ch4": "stopped"}
    await loop.start({"tc": automatic(transcoder)})
    assert (await loop.fire("tc")).status_code == 200
    for number, component in ((1, "ch1"), (2, "线路/3")):
        action = await until_ended(loop, number)
        assert (action["state"], action["component"], action["requested_by"]) == ("succeeded", component, "alert")
    await loop.until_event("person_needed", reason="no-control")
    assert transcoder.restarts == ["ch1", "线路/3"]
    transcoder.channels["ch4"] = "running"
    await loop.fire("tc", status="resolved")
    assert (await loop.until("recovered"))["recovered_by"] == "defib"
    await loop.until_cards("Service down: tc", "A person is needed: tc", "Recovered: tc")


async def test_a_component_with_an_alert_is_restarted_although_its_service_is_up(
    loop: Loop, transcoder: Transcoder
) -> None:
    """A component that stays down has `attempts`, then a person is needed; a reset gives new attempts."""
    transcoder.channels |= {"ch1": "stopped", "ch2": "stopped", "ch4": "stopped"}
    transcoder.broken.add("ch2")
    await loop.start({"tc": automatic(transcoder, up_when="any")}, attempts=2)
    await loop.post(delivery(component_alert("ch2"), component_alert("ch4")))
    await loop.until_event("person_needed", reason="attempts-used-up")
    assert transcoder.restarts == ["ch2", "ch2"]  # no alert fires about ch1, and ch4 is not listed
    explained = await asyncio.to_thread(defib, loop, "explain", "tc")
    lines = explained.stdout.splitlines()
    assert lines[0] == "tc is up; no action: attempts-used-up (restart component ch2: 2 of 2)", explained
    rows = (await loop.ask("GET", "/api/v1/actions")).json()["actions"]
    assert [row["state"] for row in rows] == ["failed", "failed"]
    transcoder.broken.clear()
    assert (await loop.ask("POST", "/api/v1/services/tc/reset")).status_code == 200
    assert (await until_ended(loop, 4))["state"] == "succeeded"
    assert transcoder.channels["ch2"] == "running"
    await loop.until_card("A person is needed: tc")
    titles = [card.title for card in loop.feishu.received]
    assert titles.count("A person is needed: tc") == 1
    assert not any("Could not restart" in title for title in titles)


async def test_a_component_that_was_down_only_once_is_not_restarted(loop: Loop, transcoder: Transcoder) -> None:
    transcoder.channels |= {"ch1": "stopped"}
    transcoder.broken.add("ch1")
    service = automatic(transcoder, up_when="any")
    service["probe"] |= {"every": "1h", "retry_every": "1h"}
    transcoder.channels["ch1"] = "running"
    await loop.start({"tc": service})
    transcoder.channels["ch1"] = "stopped"
    await loop.post(delivery(component_alert("ch1")))
    await loop.until_decision("refuse", "not-an-alert-to-act-on")
    await loop.ask("POST", "/api/v1/services/tc/reset")  # decides again
    assert transcoder.restarts == []


async def test_a_killed_remediator_verifies_the_component(loop: Loop, transcoder: Transcoder) -> None:
    transcoder.channels["ch1"] = transcoder.channels["ch2"] = "stopped"
    await loop.start({"tc": transcoder.service})
    transcoder.may_restart.clear()
    assert (await restart(loop, "ch1"))[0] == 202

    async def is_asked() -> bool:
        return transcoder.restarts == ["ch1"]

    await eventually(is_asked)
    await loop.restart_remediator()
    (action,) = (await loop.ask("GET", "/api/v1/actions")).json()["actions"]
    assert (action["state"], action["component"]) == ("running", "ch1")
    transcoder.channels["ch1"] = "running"
    action = await until_ended(loop, 1)
    # Whether the command had an effect is not known, only that the channel is up, although the service is not.
    assert (action["state"], action["command"], action["up_at"] is not None) == ("unknown", "unknown", True)
    assert action["why"] == "the remediator was interrupted while the command ran"
    assert transcoder.restarts == ["ch1"]
