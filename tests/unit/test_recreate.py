"""What `recreate` makes of what docker tells of a container, of versions that no test runs."""

import copy
from typing import Any

import pytest

from remediator.execution.controls.recreate import _connects, create, differences

ID = "4d5c7c9d3f6a" + 52 * "0"


def document(**networks: dict[str, Any]) -> dict[str, Any]:
    """As docker 28 tells of a running container; endpoints have what it makes up itself."""
    own = {
        "NetworkID": 64 * "a", "EndpointID": 64 * "b", "Gateway": "10.0.0.1", "IPAddress": "10.0.0.9", "IPPrefixLen": 24,
        "IPv6Gateway": "", "GlobalIPv6Address": "fd00::9", "GlobalIPv6PrefixLen": 64, "DNSNames": ["web", ID[:12]],
        "MacAddress": "3e:17:b8:10:00:09", "Links": None, "Aliases": None, "DriverOpts": None, "GwPriority": 0,
        "IPAMConfig": None,
    }  # fmt: skip
    return {
        "Id": ID, "Name": "/web", "Image": "sha256:1", "Path": "serve", "Args": [], "Mounts": [],
        "Config": {"Hostname": ID[:12], "Cmd": ["serve"]},
        "HostConfig": {"NetworkMode": next(iter(networks), "default"), "PortBindings": {}},
        "NetworkSettings": {"Networks": {name: {**own, **how} for name, how in networks.items()}},
    }  # fmt: skip


def test_what_was_asked_for_in_each_network() -> None:
    fixed = {"IPv4Address": "10.0.0.9", "IPv6Address": "fd00::9", "LinkLocalIPs": ["169.254.1.1"]}
    old = document(
        front={"IPAMConfig": fixed, "Aliases": ["web", "www", ID[:12]], "Links": ["db:database"], "MacAddress": "00:16:3e:00:00:01"},
        back={"DriverOpts": {"com.example.a": "b"}, "GwPriority": 3, "Aliases": ["cache"]},
    )  # fmt: skip
    argv = create("web.defib-new", old)
    assert argv[argv.index("--network") : -2] == [
        "--network", "front", "--mac-address", "00:16:3e:00:00:01", "--ip", "10.0.0.9", "--ip6", "fd00::9",
        "--link-local-ip", "169.254.1.1", "--network-alias", "www", "--link", "db:database",
    ]  # fmt: skip
    (connect,) = _connects("web.defib-new", old)
    assert connect == [
        "docker", "network", "connect", "--alias", "cache", "--driver-opt", "com.example.a=b", "--gw-priority", "3", "back",
        "web.defib-new",
    ]  # fmt: skip


def test_options_of_the_first_network() -> None:
    argv = create("new", document(front={"DriverOpts": {"a": 'b,"c'}, "GwPriority": 1}))
    assert argv[argv.index("--network") + 1] == 'name=front,"driver-opt=a=b,""c",gw-priority=1'


def test_links_of_the_default_network() -> None:
    old = document(bridge={})
    old["HostConfig"] |= {"NetworkMode": "default", "Links": ["/db:/web/database"]}
    argv = create("new", old)
    assert argv[argv.index("--link") + 1] == "db:database"
    new = copy.deepcopy(old)
    new["HostConfig"]["Links"] = ["/db:/web.defib-new/database"]
    assert differences(old, new) == []
    new["HostConfig"]["Links"] = None
    assert differences(old, new) == ["HostConfig.Links"]


def test_what_comes_from_another_container() -> None:
    old = document()
    old["HostConfig"]["NetworkMode"] = "container:" + 64 * "c"
    old["Config"] |= {"Hostname": "other", "ExposedPorts": {"80/tcp": {}}}
    argv = create("new", old)
    assert argv[argv.index("--network") + 1] == "container:" + 64 * "c"
    assert not {"--hostname", "--expose", "--mac-address"} & {*argv}
    new = copy.deepcopy(old)
    new["Config"]["Hostname"] = new["Id"][:12]
    assert differences(old, new) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IPAMConfig", {"IPv4Address": "10.0.0.8"}), ("Aliases", ["www"]), ("Links", ["db:db"]), ("DriverOpts", {"a": "b"}),
        ("GwPriority", 1), ("MacAddress", "00:16:3e:00:00:01"), ("SomethingNew", "x"),
    ],
)  # fmt: skip
def test_a_difference_is_named(key: str, value: Any) -> None:
    old, new = document(front={}, back={key: value}), document(front={}, back={})
    assert differences(old, new) == [f"NetworkSettings.Networks.back.{key}"]
    assert differences(old, document(front={})) == ["NetworkSettings.Networks.back"]


def test_what_docker_makes_up_is_no_difference() -> None:
    old, new = document(front={}), document(front={})
    new["NetworkSettings"]["Networks"]["front"] = {"IPAMConfig": {}, "Links": [], "Aliases": [], "DriverOpts": {}}
    assert differences(old, new) == []
