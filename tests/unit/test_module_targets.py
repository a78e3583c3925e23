"""Which hosts modules may probe."""

import pytest
from pydantic import TypeAdapter, ValidationError

from fleet.inventory.module_targets import TargetPattern, matches_target

PATTERNS = ["wiki.example", "*.Shop.example", "10.0.0.0/8", "192.0.2.7", "fe80::/10", "2001:db8::1"]


@pytest.mark.parametrize(
    ("host", "matches"),
    [
        ("wiki.example", True),
        ("WIKI.example.", True),
        ("a.wiki.example", False),
        ("wiki.example.net", False),
        ("a.shop.example", True),
        ("a.b.shop.EXAMPLE", True),
        ("shop.example", False),
        ("ashop.example", False),
        (".shop.example.net", False),
        ("10.255.0.1", True),
        ("11.0.0.1", False),
        ("10.0.0.1.", False),  # a name
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("fe80::1%eth0", True),
        ("2001:DB8:0::1", True),
        ("2001:db8::2", False),
        ("::ffff:10.0.0.1", False),
        ("167772161", False),  # 10.0.0.1 for some resolvers
        ("", False),
    ],
)
def test_hosts_and_patterns(host: str, matches: bool) -> None:
    assert matches_target(PATTERNS, host) == matches


def test_a_name_that_looks_like_a_network_matches_no_address() -> None:
    assert not matches_target(["*.0.0.1"], "127.0.0.1")


@pytest.mark.parametrize(
    "pattern", ["", "*", "*.", "a.*", "a*.example", "10.0.0.1/8", "http://a/", "a:80", "[::1]", "**.a"]
)
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"is not a host or a network; write host\.example"):
        TypeAdapter(TargetPattern).validate_python(pattern)
    for good in PATTERNS:
        assert TypeAdapter(TargetPattern).validate_python(good) == good
