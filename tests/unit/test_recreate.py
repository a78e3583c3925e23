"""The arguments of recreated containers, for versions of docker that the other tests do not run."""

import copy
from typing import Any

import pytest

from remediator.execution.controls.container_arguments import build_connects, build_create, find_differences

ID = "4d5c7c9d3f6a" + 52 * "0"


def inspect_output(**networks: dict[str, Any]) -> dict[str, Any]:
    """Return the output of `docker inspect` of docker 28; the networks have generated values, too."""
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


def test_the_settings_of_each_network_are_kept() -> None:
    fixed = {"IPv4Address": "10.0.0.9", "IPv6Address": "fd00::9", "LinkLocalIPs": ["169.254.1.1"]}
    old = inspect_output(
        front={"IPAMConfig": fixed, "Aliases": ["web", "www", ID[:12]], "Links": ["db:database"], "MacAddress": "00:16:3e:00:00:01"},
        back={"DriverOpts": {"com.example.a": "b"}, "GwPriority": 3, "Aliases": ["cache"]},
    )  # fmt: skip
    argv, _ = build_create("web.defib-new", old)
    assert argv[argv.index("--network") : -2] == [
        "--network", "front", "--mac-address", "00:16:3e:00:00:01", "--ip", "10.0.0.9", "--ip6", "fd00::9",
        "--link-local-ip", "169.254.1.1", "--network-alias", "www", "--link", "db:database",
    ]  # fmt: skip
    (connect,) = build_connects("web.defib-new", old)
    assert connect == [
        "docker", "network", "connect", "--alias", "cache", "--driver-opt", "com.example.a=b", "--gw-priority", "3", "back",
        "web.defib-new",
    ]  # fmt: skip


def test_the_options_of_the_first_network_are_kept() -> None:
    argv, _ = build_create("new", inspect_output(front={"DriverOpts": {"a": 'b,"c'}, "GwPriority": 1}))
    assert argv[argv.index("--network") + 1] == 'name=front,"driver-opt=a=b,""c",gw-priority=1'


def test_the_links_of_the_default_network_are_kept() -> None:
    old = inspect_output(bridge={})
    old["HostConfig"] |= {"NetworkMode": "default", "Links": ["/db:/web/database"]}
    argv, _ = build_create("new", old)
    assert argv[argv.index("--link") + 1] == "db:database"
    new = copy.deepcopy(old)
    new["HostConfig"]["Links"] = ["/db:/web.defib-new/database"]
    assert find_differences(old, new) == []
    new["HostConfig"]["Links"] = None
    assert find_differences(old, new) == ["HostConfig.Links"]


def test_the_network_of_another_container_is_kept_without_its_hostname_and_ports() -> None:
    old = inspect_output()
    old["HostConfig"]["NetworkMode"] = "container:" + 64 * "c"
    old["Config"] |= {"Hostname": "other", "ExposedPorts": {"80/tcp": {}}}
    argv, _ = build_create("new", old)
    assert argv[argv.index("--network") + 1] == "container:" + 64 * "c"
    assert not {"--hostname", "--expose", "--mac-address"} & {*argv}
    new = copy.deepcopy(old)
    new["Config"]["Hostname"] = new["Id"][:12]
    assert find_differences(old, new) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IPAMConfig", {"IPv4Address": "10.0.0.8"}), ("Aliases", ["www"]), ("Links", ["db:db"]), ("DriverOpts", {"a": "b"}),
        ("GwPriority", 1), ("MacAddress", "00:16:3e:00:00:01"), ("SomethingNew", "x"),
    ],
)  # fmt: skip
def test_a_difference_is_named(key: str, value: Any) -> None:
    old, new = inspect_output(front={}, back={key: value}), inspect_output(front={}, back={})
    assert find_differences(old, new) == [f"NetworkSettings.Networks.back.{key}"]
    assert find_differences(old, inspect_output(front={})) == ["NetworkSettings.Networks.back"]


def test_generated_settings_are_no_difference() -> None:
    old, new = inspect_output(front={}), inspect_output(front={})
    new["NetworkSettings"]["Networks"]["front"] = {"IPAMConfig": {}, "Links": [], "Aliases": [], "DriverOpts": {}}
    assert find_differences(old, new) == []
