"""The arguments of a container: the docker commands that create another one like it, and the differences between two.

Containers are documents of `docker inspect`. Flags: https://docs.docker.com/reference/cli/docker/container/create/
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fleet.managers import docker

ContainerDocument = Mapping[str, Any]
ToFlags = Callable[[Any], list[str]]  # from the value of a key to flags of `docker create`


def build_create(name: str, old: ContainerDocument) -> tuple[list[str], bytes]:
    """Return the command that creates a container with the arguments of `old`, and its stdin."""
    config, host = old["Config"], old["HostConfig"]
    argv = [
        "--name",
        name,
        *_simple_flags(config, _CONFIG_FLAGS),
        *_simple_flags(host, _HOST_FLAGS),
        *_network_flags(old),
    ]
    if not network_owner(old):  # else these come from the other container
        argv += _simple_flags({**config, "Hostname": _own_hostname(old)}, _OWN_NETWORK_FLAGS)
    argv += [
        *_systempaths_flags(host),
        *_port_flags(host),
        *_mount_flags(old),
        *_restart_flags(host),
        *_logging_flags(host),
        *_device_flags(host),
        *_healthcheck_flags(config),
    ]
    entrypoint, command = config.get("Entrypoint") or [], config.get("Cmd") or []
    if entrypoint:
        # The flag takes one word; the others have the same effect before the command.
        argv += ["--entrypoint", entrypoint[0]]
    return docker.build_create([*argv, old["Image"], *entrypoint[1:], *command], config.get("Env") or [])


def _each(flag: str) -> ToFlags:
    return lambda values: [part for value in values for part in (flag, str(value))]


def _pairs(flag: str) -> ToFlags:
    return lambda values: [part for key, value in values.items() for part in (flag, f"{key}={value}" if value else key)]


def _value(flag: str) -> ToFlags:
    return lambda value: [flag, str(value)]


def _switch(flag: str) -> ToFlags:
    return lambda value: [flag] if value else []


_CONFIG_FLAGS: Mapping[str, ToFlags] = {
    "Domainname": _value("--domainname"), "User": _value("--user"), "Tty": _switch("--tty"),
    "OpenStdin": _switch("--interactive"), "WorkingDir": _value("--workdir"),
    "Labels": lambda labels: [part for key, value in labels.items() for part in ("--label", f"{key}={value}")],
    "StopSignal": _value("--stop-signal"), "StopTimeout": _value("--stop-timeout"),
}  # fmt: skip
_OWN_NETWORK_FLAGS: Mapping[str, ToFlags] = {
    "Hostname": _value("--hostname"), "ExposedPorts": _each("--expose"),
}  # fmt: skip
_HOST_FLAGS: Mapping[str, ToFlags] = {
    "PublishAllPorts": _switch("--publish-all"),
    "VolumesFrom": _each("--volumes-from"), "CapAdd": _each("--cap-add"), "CapDrop": _each("--cap-drop"),
    "Dns": _each("--dns"), "DnsOptions": _each("--dns-option"), "DnsSearch": _each("--dns-search"),
    "ExtraHosts": _each("--add-host"), "GroupAdd": _each("--group-add"), "IpcMode": _value("--ipc"),
    "PidMode": _value("--pid"), "UTSMode": _value("--uts"), "UsernsMode": _value("--userns"),
    "CgroupnsMode": _value("--cgroupns"), "Privileged": _switch("--privileged"),
    "ReadonlyRootfs": _switch("--read-only"), "SecurityOpt": _each("--security-opt"),
    "Tmpfs": lambda values: [part for at, how in values.items() for part in ("--tmpfs", f"{at}:{how}" if how else at)],
    "ShmSize": _value("--shm-size"), "Sysctls": _pairs("--sysctl"), "Runtime": _value("--runtime"),
    "Init": _switch("--init"), "Memory": _value("--memory"), "MemorySwap": _value("--memory-swap"),
    "MemoryReservation": _value("--memory-reservation"), "MemorySwappiness": _value("--memory-swappiness"),
    "NanoCpus": lambda nano: ["--cpus", f"{nano / 1e9:.9f}".rstrip("0").rstrip(".")],
    "CpuShares": _value("--cpu-shares"), "CpuPeriod": _value("--cpu-period"), "CpuQuota": _value("--cpu-quota"),
    "CpusetCpus": _value("--cpuset-cpus"), "CpusetMems": _value("--cpuset-mems"),
    "PidsLimit": _value("--pids-limit"), "BlkioWeight": _value("--blkio-weight"),
    "OomKillDisable": _switch("--oom-kill-disable"), "OomScoreAdj": _value("--oom-score-adj"),
    "CgroupParent": _value("--cgroup-parent"), "StorageOpt": _pairs("--storage-opt"),
    "DeviceCgroupRules": _each("--device-cgroup-rule"),
    "Ulimits": lambda all_: [f"--ulimit={each['Name']}={each['Soft']}:{each['Hard']}" for each in all_],
}  # fmt: skip


def _simple_flags(part: ContainerDocument, flags: Mapping[str, ToFlags]) -> Iterator[str]:
    for key, flag in flags.items():
        if part.get(key) not in (None, "", 0, False, [], {}):
            yield from flag(part[key])


def _port_flags(host: ContainerDocument) -> Iterator[str]:
    for port, bindings in (host.get("PortBindings") or {}).items():
        for binding in bindings or [{}]:
            address, published = binding.get("HostIp") or "", binding.get("HostPort") or ""
            shown = f"[{address}]" if ":" in address else address
            yield from (
                "--publish",
                f"{f'{shown}:' if shown else ''}{f'{published}:' if published or shown else ''}{port}",
            )


def _mount_flags(old: ContainerDocument) -> Iterator[str]:
    """Return the flags of all mounts, including anonymous volumes, whose data is kept."""
    host = old["HostConfig"]
    yield from _each("--volume")(host.get("Binds") or [])
    for mount in host.get("Mounts") or []:
        parts = [f"type={mount['Type']}", f"target={mount['Target']}"]
        parts += [f"source={mount['Source']}"] if mount.get("Source") else []
        parts += ["readonly"] if mount.get("ReadOnly") else []
        yield from ("--mount", ",".join(parts))
    targets = {bind.split(":")[1] for bind in host.get("Binds") or [] if ":" in bind}
    targets |= {mount["Target"] for mount in host.get("Mounts") or []}
    for mount in old.get("Mounts") or []:
        if mount.get("Type") == "volume" and mount["Destination"] not in targets:
            yield from ("--volume", f"{mount['Name']}:{mount['Destination']}")


def _restart_flags(host: ContainerDocument) -> Iterator[str]:
    policy = host.get("RestartPolicy") or {}
    if policy.get("Name"):
        retries = policy.get("MaximumRetryCount")
        yield from ("--restart", f"{policy['Name']}:{retries}" if retries else policy["Name"])


def _logging_flags(host: ContainerDocument) -> Iterator[str]:
    config = host.get("LogConfig") or {}
    if config.get("Type"):
        yield from ("--log-driver", config["Type"])
    yield from _pairs("--log-opt")(config.get("Config") or {})


def _device_flags(host: ContainerDocument) -> Iterator[str]:
    for device in host.get("Devices") or []:
        yield from ("--device", f"{device['PathOnHost']}:{device['PathInContainer']}:{device['CgroupPermissions']}")
    for request in host.get("DeviceRequests") or []:
        ids, count = request.get("DeviceIDs") or [], request.get("Count")
        selection = f"device={','.join(ids)}" if ids else "all" if count == -1 else f"count={count}"
        kinds = {kind for group in request.get("Capabilities") or [] for kind in group} - {"gpu"}
        capabilities = [f'"capabilities={",".join(sorted(kinds))}"'] if kinds else []
        yield from ("--gpus", ",".join([f'"{selection}"' if ids else selection, *capabilities]))


def _healthcheck_flags(config: ContainerDocument) -> Iterator[str]:
    check = config.get("Healthcheck") or {}
    test = check.get("Test") or []
    if test[:1] == ["NONE"]:
        yield "--no-healthcheck"
    elif test[:1] == ["CMD-SHELL"]:
        yield from ("--health-cmd", test[1])
        for key, flag in (("Interval", "interval"), ("Timeout", "timeout"), ("StartPeriod", "start-period")):
            if check.get(key):
                yield from (f"--health-{flag}", f"{check[key]}ns")
        if check.get("Retries"):
            yield from ("--health-retries", str(check["Retries"]))


def _network_flags(old: ContainerDocument) -> Iterator[str]:
    """Return the flags of the network that the container is created with."""
    mode = str(old["HostConfig"].get("NetworkMode") or "default")
    settings = _network_settings(old).get(_first_network(old), {})
    options = [f"driver-opt={key}={value}" for key, value in (settings.get("DriverOpts") or {}).items()]
    options += [f"gw-priority={settings['GwPriority']}"] if settings.get("GwPriority") else []
    fields = [f"name={mode}", *options] if options else [mode]
    yield from ("--network", ",".join(_quote_csv(field) for field in fields))
    mac = old["Config"].get("MacAddress") or settings.get("MacAddress")
    if mac:
        yield from ("--mac-address", mac)
    yield from _each("--link")(_links(old))
    yield from _endpoint_flags(settings, "--network-alias")


def _quote_csv(field: str) -> str:
    doubled = field.replace('"', '""')
    return f'"{doubled}"' if "," in field or '"' in field else field


def build_connects(name: str, old: ContainerDocument) -> Iterator[list[str]]:
    """Return the commands that connect a container to the other networks of `old`."""
    for network, settings in _network_settings(old).items():
        if network == _first_network(old):
            continue
        driver_options = (settings.get("DriverOpts") or {}).items()
        options = [part for key, value in driver_options for part in ("--driver-opt", f"{key}={value}")]
        options += ["--gw-priority", str(settings["GwPriority"])] if settings.get("GwPriority") else []
        yield ["docker", "network", "connect", *_endpoint_flags(settings, "--alias"), *options, network, name]


def _endpoint_flags(settings: ContainerDocument, alias: str) -> Iterator[str]:
    """Return the flags of fixed addresses, aliases and links in one network."""
    fixed = settings.get("IPAMConfig") or {}
    for key, flag in (("IPv4Address", "--ip"), ("IPv6Address", "--ip6")):
        if fixed.get(key):
            yield from (flag, fixed[key])
    yield from _each("--link-local-ip")(fixed.get("LinkLocalIPs") or [])
    yield from _each(alias)(settings.get("Aliases") or [])
    yield from _each("--link")(settings.get("Links") or [])


def _network_settings(container: ContainerDocument) -> dict[str, dict[str, Any]]:
    """Return the settings of each network that were given by the user, not generated by docker."""
    name = str(container.get("Name", "")).removeprefix("/")
    by_network = {}
    for network, reported in ((container.get("NetworkSettings") or {}).get("Networks") or {}).items():
        settings = {key: value for key, value in (reported or {}).items() if key not in _GENERATED}
        aliases = dict.fromkeys(settings.get("Aliases") or [])
        settings["Aliases"] = [each for each in aliases if each != name and not _is_short_id(each, container)]
        if container["Config"].get("MacAddress") or _may_be_generated(settings.get("MacAddress")):
            settings["MacAddress"] = None
        by_network[network] = settings
    return by_network


_GENERATED = {
    "NetworkID", "EndpointID", "Gateway", "IPAddress", "IPPrefixLen", "IPv6Gateway", "GlobalIPv6Address",
    "GlobalIPv6PrefixLen", "DNSNames", "IPAMOperational",
}  # fmt: skip


def _may_be_generated(address: str | None) -> bool:
    """Whether docker may have generated a MAC address; up to docker 28, a given one is in Config.MacAddress."""
    return not address or bool(int(address[:2], 16) & 2)


def _first_network(container: ContainerDocument) -> str:
    """Return the name of the network that a container was created with."""
    mode = str(container["HostConfig"].get("NetworkMode") or "default")
    networks = (container.get("NetworkSettings") or {}).get("Networks") or {}
    if mode in networks:
        return mode
    by_id = (name for name, each in networks.items() if str((each or {}).get("NetworkID") or "-").startswith(mode))
    return next(by_id, "bridge" if mode == "default" else mode)


def network_owner(container: ContainerDocument) -> str:
    """Return the ID of the container whose network this one uses; empty if it has its own."""
    kind, _, other = str(container["HostConfig"].get("NetworkMode") or "").partition(":")
    return other if kind == "container" else ""


def _own_hostname(container: ContainerDocument) -> str:
    """Return the hostname that the user gave; empty for a generated one or that of another container."""
    name = container["Config"].get("Hostname") or ""
    return "" if _is_short_id(name, container) or network_owner(container) else name


def _is_short_id(name: str, container: ContainerDocument) -> bool:
    return name == str(container["Id"])[:12]


def _convert_link(reported: str) -> str:
    """Convert a link of the default network, such as `/other:/this/alias`, to the form of the flag."""
    other, _, alias = reported.partition(":")
    return f"{other.removeprefix('/')}:{alias.rpartition('/')[2]}"


def _systempaths_flags(host: ContainerDocument) -> Iterator[str]:
    """Return the security option that docker stores as an empty list of masked paths."""
    if host.get("MaskedPaths") == [] and not host.get("Privileged"):
        yield from ("--security-opt", "systempaths=unconfined")


# Generated by docker, or compared in another way below.
_NOT_COMPARED = {
    "Binds", "Mounts", "ContainerIDFile", "ConsoleSize", "Hostname", "Links", "Image", "Entrypoint", "Cmd", "Volumes",
    "AttachStdin", "AttachStdout", "AttachStderr", "StdinOnce", "ArgsEscaped", "NetworkDisabled",
}  # fmt: skip


def find_differences(old: ContainerDocument, new: ContainerDocument) -> list[str]:
    """Return the names of the arguments that differ between two containers."""
    names = [
        f"{part}.{key}"
        for part in ("Config", "HostConfig")
        for key in sorted({*old[part], *new[part]} - _NOT_COMPARED)
        if _normalize(old[part].get(key)) != _normalize(new[part].get(key))
    ]
    names += _find_network_differences(old, new)
    if _own_hostname(old) != _own_hostname(new):
        names.append("Config.Hostname")
    if _links(old) != _links(new):
        names.append("HostConfig.Links")
    if (old.get("Path"), old.get("Args")) != (new.get("Path"), new.get("Args")):
        names.append("the command")
    if old.get("Image") != new.get("Image"):
        names.append("the image")
    if _mounts(old) != _mounts(new):
        names.append("the mounts")
    return names


def _find_network_differences(old: ContainerDocument, new: ContainerDocument) -> Iterator[str]:
    old_networks, new_networks = _network_settings(old), _network_settings(new)
    for network in sorted({*old_networks, *new_networks}):
        if (network in old_networks) != (network in new_networks):
            yield f"NetworkSettings.Networks.{network}"
            continue
        before, after = old_networks[network], new_networks[network]
        for key in sorted({*before, *after}):
            if _normalize(before.get(key)) != _normalize(after.get(key)):
                yield f"NetworkSettings.Networks.{network}.{key}"


def _links(container: ContainerDocument) -> list[str]:
    return sorted(map(_convert_link, container["HostConfig"].get("Links") or []))


def _normalize(value: Any) -> Any:
    """Return a value without what docker reports in several ways: empty values, and the order of lists."""
    if isinstance(value, dict):
        return {key: _normalize(item) for key, item in value.items() if _normalize(item) is not None} or None
    if isinstance(value, list):
        return sorted((_normalize(item) for item in value), key=repr) or None
    return value or None


def _mounts(container: ContainerDocument) -> list[tuple[Any, ...]]:
    return sorted(
        (each.get("Type"), each.get("Name") or each.get("Source"), each.get("Destination"), each.get("RW"))
        for each in container.get("Mounts") or []
    )
