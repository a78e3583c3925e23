"""What `defib check` says about heartbeats that disturb each other."""

from pathlib import Path

import pytest

from fleet.inventory.problems import ConfigurationError
from tests.support import loaded, write

UUID = "4a1b6d0e-8f0f-4a5c-9f3c-0e6c1f4e7d21"
CONTROLLED = """
hosts: {h: {address: h, shell: local}}
services:
  job: {host: h, on_failure: restart, probe: {heartbeat: {PROBE}}, control: {CONTROL systemd: {unit: job}}}
"""


def test_two_heartbeats_with_the_same_uuid_are_an_error(tmp_path: Path) -> None:
    services = (
        f"services:\n  a: {{probe: {{heartbeat: {{every: 1h, uuid: {UUID}}}}}}}\n"
        f"  b: {{probe: {{heartbeat: {{every: 1h, uuid: '{UUID.upper()}'}}}}}}\n"
    )
    write(tmp_path, a=services)
    with pytest.raises(ConfigurationError) as raised:
        loaded(tmp_path)
    (problem,) = raised.value.problems
    assert str(problem) == f"{tmp_path}/a.yaml:3: services.b.probe.heartbeat.uuid: the service a has the same uuid"


def test_the_same_uuid_in_a_secret_is_found_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(UUID)
    heartbeat = "{heartbeat: {every: 1h, uuid: '${file:secret}'}}"
    write(tmp_path, a=f"services:\n  a: {{probe: {heartbeat}}}\n  b: {{probe: {heartbeat}}}\n")
    with pytest.raises(ConfigurationError) as raised:
        loaded(tmp_path)
    assert [each.message for each in raised.value.problems] == ["the service a has the same uuid"]


@pytest.mark.parametrize(("first", "second"), [("slug: x", "slug: x"), ("grace: 1m", "slug: a")])
def test_two_heartbeats_with_the_same_slug_are_a_warning(tmp_path: Path, first: str, second: str) -> None:
    heartbeats = {"a": first, "b": second, "c": "grace: 2m"}
    lines = [f"  {name}: {{probe: {{heartbeat: {{every: 1h, {more}}}}}}}\n" for name, more in heartbeats.items()]
    write(tmp_path, a="services:\n" + "".join(lines))
    (warning,) = loaded(tmp_path).warnings
    slug = second.removeprefix("slug: ")
    assert str(warning) == (
        f"{tmp_path}/a.yaml:3: services.b.probe.heartbeat.slug: same slug as a ({slug}): "
        "only the URLs with their UUIDs work; or set different slugs"
    )


@pytest.mark.parametrize(
    ("probe", "control", "problem"),
    [
        ("every: 1h", "", "start_within (5m) is shorter than the time between two pings (1h)"),
        ("cron: '0 3 * * *'", "start_within: 2h,", "start_within (2h) is shorter than the time between two pings (1d)"),
        (
            "cron: '0 9 * * 1-5'",
            "start_within: 2d,",
            "start_within (2d) is shorter than the time between two pings (3d)",
        ),
        ("every: 1h", "start_within: 65m,", ""),
        ("cron: '*/5 * * * *'", "", ""),
    ],
)
def test_a_restart_that_cannot_help_in_time_is_a_warning(
    tmp_path: Path, probe: str, control: str, problem: str
) -> None:
    write(tmp_path, a=CONTROLLED.replace("PROBE", probe).replace("CONTROL", control))
    warnings = [each.message.partition(": a restart")[0] for each in loaded(tmp_path).warnings]
    assert warnings == ([problem] if problem else [])
