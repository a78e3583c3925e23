"""What two programs compare of their configurations: the same text gives the same, whoever loads it."""

from pathlib import Path
from typing import Any

import pytest

from defib.kinds import KINDS
from fleet.inventory.digests import digests_differ
from fleet.inventory.loading import load
from fleet.inventory.references import Program
from tests.support import write

WRITTEN = """
    defaults: {probe: {every: 10s}}
    hosts:
      jump: {address: 10.0.0.1, ssh: {}}
      h: {address: "10.0.0.2", group: gpu, ssh: {user: probe, via: jump}, control_ssh: {user: root}, labels: {rack: r1}}
    services:
      web:
        host: h
        probe:
          timeout: 5s
          http: {url: "http://{host.address}/", headers: {X-Key: "${KEY}"}, auth: {basic: {username: u, password: hidden}}}
        control: {command: {restart: ["true"]}}
    """
KNOWN = "2:723af0281795da48c30e501bd2beb43f"


def digest(folder: Path, text: str, *programs: Program, key: str = "k") -> str:
    loaded = load(write(folder, a=text), KINDS, programs=programs, environ={"KEY": key})
    return loaded.inventory.services["web"].digest


def test_the_canonical_form_is_the_same_in_every_version(tmp_path: Path) -> None:
    assert digest(tmp_path, WRITTEN, "exporter") == KNOWN


def test_every_program_computes_the_same_without_the_secrets(tmp_path: Path) -> None:
    assert {
        digest(tmp_path, WRITTEN, *programs, key=key)
        for programs in (("exporter",), ("remediator",), (), ("exporter", "remediator", "client"))
        for key in ("one", "gpu")
    } == {KNOWN}


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("hidden", "other", True),  # a secret that is written out
        ("labels: {rack: r1}", "labels: {rack: r2}", True),
        ("control_ssh: {user: root}", "control_ssh: {user: ops}", True),
        ("group: gpu", "group: cpu", True),
        ("timeout: 5s", "timeout: 5000ms", True),
        ("timeout: 5s", "timeout: 5s\n          fail_after: 3", True),  # the default
        ("{host.address}", "10.0.0.2", True),
        ("timeout: 5s", "timeout: 6s", False),
        ("every: 10s", "every: 11s", False),
        ('"10.0.0.2"', '"10.0.0.3"', False),
        ("user: probe", "user: other", False),
        ("10.0.0.1", "10.0.0.9", False),  # the host on the way
        ("{host.address}/", "{host.address}/ready", False),
        ("X-Key", "X-Token", False),
        ("username: u", "username: v", False),
    ],
)
def test_what_makes_a_difference(tmp_path: Path, old: str, new: str, same: bool) -> None:
    assert old in WRITTEN
    changed = digest(tmp_path, WRITTEN.replace(old, new), "remediator")
    assert (changed == KNOWN, digests_differ(changed, KNOWN)) == (same, not same)


@pytest.mark.parametrize(("one", "other"), [("", "1:a"), (None, "1:a"), ("1:a", "2:b"), ("1:a", "1:a")])
def test_what_cannot_be_compared_is_no_difference(one: Any, other: Any) -> None:
    assert not digests_differ(one, other)
    assert not digests_differ(other, one)
