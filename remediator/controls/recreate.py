"""The `recreate` step: a container anew, from the image that it has and with the arguments that it had.

The old one is set aside until the new one is seen to be the same: where docker's own word of the two differs, the old
one is put back, and what differs is told. Flags: https://docs.docker.com/reference/cli/docker/container/create/
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fleet.shells import Completed
from remediator.controls.docker import DockerOptions, after_start
from remediator.controls.hands import Hands, good

ASIDE = ".defib-old"
Doc = Mapping[str, Any]


async def recreate(options: DockerOptions, hands: Hands) -> Completed:
    """Raises ShellError where nothing at all was run."""
    name = options.container
    seen = await _taken_up(hands, name)
    if not good(seen):
        return seen
    old = _document(seen.stdout)
    if old is None or old["HostConfig"].get("AutoRemove"):
        why = "removes itself when it ends" if old else "cannot be understood from what docker tells of it"
        return Completed(1, "", f"{name} {why}: give the step a command of its own")
    done = await _in_order(hands, [["docker", "stop", name], ["docker", "rename", name, name + ASIDE]])
    if not good(done):
        return done
    made = await _made_alike(hands, name, old)
    if not good(made):
        # Whatever stood in the way, the one that there was is better than none.
        await _in_order(hands, [["docker", "rm", "--force", name]])
        back = await _in_order(hands, [["docker", "rename", name + ASIDE, name], ["docker", "start", name]])
        put = "put back" if good(back) else f"NOT put back; it is {name}{ASIDE}"
        return Completed(made.status, made.stdout, f"{made.stderr}\nthe old container was {put}", made.why)
    started = await _in_order(hands, [["docker", "start", name], ["docker", "rm", name + ASIDE]])
    return await after_start(options, hands, started) if good(started) else started


async def _taken_up(hands: Hands, name: str) -> Completed:
    """What docker tells of the container, after an earlier attempt that was cut short was undone."""
    seen = await hands.run(_inspect(name))
    if not good(await hands.run(_inspect(name + ASIDE))):
        return seen
    here = _document(seen.stdout) if good(seen) else None
    if here is not None and here["State"]["Status"] != "created":
        return Completed(1, "", f"{name}{ASIDE} is left of an earlier attempt: remove it, or {name}")
    undo = [["docker", "rm", name]] if here is not None else []
    back = await _in_order(hands, [*undo, ["docker", "rename", name + ASIDE, name]])
    return await hands.run(_inspect(name)) if good(back) else back


async def _made_alike(hands: Hands, name: str, old: Doc) -> Completed:
    done = await _in_order(hands, [create(name, old), *_connects(name, old)])
    seen = await hands.run(_inspect(name)) if good(done) else done
    new = _document(seen.stdout) if good(seen) else None
    if new is None:
        return seen if not good(seen) else Completed(1, "", "the new container cannot be understood")
    wrong = differences(old, new)
    return Completed(1, "", f"the new container would not be the same: {'; '.join(wrong)}") if wrong else done


async def _in_order(hands: Hands, commands: Iterable[list[str]]) -> Completed:
    done = Completed(0, "", "")
    for argv in commands:
        done = await hands.run(argv)
        if not good(done):
            return done
    return done


def _inspect(name: str) -> list[str]:
    return ["docker", "inspect", "--type", "container", name]


def _document(output: str) -> Doc | None:
    try:
        found = json.loads(output)[0]
        return found if isinstance(found["HostConfig"], dict) and isinstance(found["Config"], dict) else None
    except (ValueError, LookupError, TypeError):
        return None


def create(name: str, old: Doc) -> list[str]:
    """The argv that makes a container with the arguments of `old`."""
    config, host = old["Config"], old["HostConfig"]
    argv = ["docker", "create", "--name", name, *_simple(config, _OF_CONFIG), *_simple(host, _OF_HOST)]
    if config.get("Hostname") and not str(old["Id"]).startswith(config["Hostname"]):
        argv += ["--hostname", config["Hostname"]]
    argv += [*_ports(host), *_mounts(old), *_restart(host), *_logging(host), *_devices(host), *_health(config)]
    entrypoint, command = config.get("Entrypoint") or [], config.get("Cmd") or []
    if entrypoint:
        # One word is all that the flag takes; the others come before the command's, to the same effect.
        argv += ["--entrypoint", entrypoint[0]]
    return [*argv, old["Image"], *entrypoint[1:], *command]


def _each(flag: str) -> Callable[[Any], list[str]]:
    return lambda values: [part for value in values for part in (flag, str(value))]


def _pairs(flag: str) -> Callable[[Any], list[str]]:
    return lambda values: [part for key, value in values.items() for part in (flag, f"{key}={value}" if value else key)]


def _value(flag: str) -> Callable[[Any], list[str]]:
    return lambda value: [flag, str(value)]


def _switch(flag: str) -> Callable[[Any], list[str]]:
    return lambda value: [flag] if value else []


_OF_CONFIG: Mapping[str, Callable[[Any], list[str]]] = {
    "Domainname": _value("--domainname"), "User": _value("--user"), "Tty": _switch("--tty"),
    "OpenStdin": _switch("--interactive"), "Env": _each("--env"), "WorkingDir": _value("--workdir"),
    "Labels": lambda labels: [part for key, value in labels.items() for part in ("--label", f"{key}={value}")],
    "ExposedPorts": _each("--expose"), "StopSignal": _value("--stop-signal"), "StopTimeout": _value("--stop-timeout"),
}  # fmt: skip
_OF_HOST: Mapping[str, Callable[[Any], list[str]]] = {
    "NetworkMode": _value("--network"), "PublishAllPorts": _switch("--publish-all"),
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


def _simple(part: Doc, flags: Mapping[str, Callable[[Any], list[str]]]) -> Iterator[str]:
    for key, flag in flags.items():
        if part.get(key) not in (None, "", 0, False, [], {}):
            yield from flag(part[key])


def _ports(host: Doc) -> Iterator[str]:
    for port, bindings in (host.get("PortBindings") or {}).items():
        for binding in bindings or [{}]:
            address, published = binding.get("HostIp") or "", binding.get("HostPort") or ""
            shown = f"[{address}]" if ":" in address else address
            yield from (
                "--publish",
                f"{f'{shown}:' if shown else ''}{f'{published}:' if published or shown else ''}{port}",
            )


def _mounts(old: Doc) -> Iterator[str]:
    """What is mounted, the volumes without a name of a user's too: their data stays."""
    host = old["HostConfig"]
    yield from _each("--volume")(host.get("Binds") or [])
    for mount in host.get("Mounts") or []:
        parts = [f"type={mount['Type']}", f"target={mount['Target']}"]
        parts += [f"source={mount['Source']}"] if mount.get("Source") else []
        parts += ["readonly"] if mount.get("ReadOnly") else []
        yield from ("--mount", ",".join(parts))
    told = {bind.split(":")[1] for bind in host.get("Binds") or [] if ":" in bind}
    told |= {mount["Target"] for mount in host.get("Mounts") or []}
    for mount in old.get("Mounts") or []:
        if mount.get("Type") == "volume" and mount["Destination"] not in told:
            yield from ("--volume", f"{mount['Name']}:{mount['Destination']}")


def _restart(host: Doc) -> Iterator[str]:
    policy = host.get("RestartPolicy") or {}
    if policy.get("Name"):
        most = policy.get("MaximumRetryCount")
        yield from ("--restart", f"{policy['Name']}:{most}" if most else policy["Name"])


def _logging(host: Doc) -> Iterator[str]:
    config = host.get("LogConfig") or {}
    if config.get("Type"):
        yield from ("--log-driver", config["Type"])
    yield from _pairs("--log-opt")(config.get("Config") or {})


def _devices(host: Doc) -> Iterator[str]:
    for device in host.get("Devices") or []:
        yield from ("--device", f"{device['PathOnHost']}:{device['PathInContainer']}:{device['CgroupPermissions']}")
    for request in host.get("DeviceRequests") or []:
        ids, count = request.get("DeviceIDs") or [], request.get("Count")
        wanted = f"device={','.join(ids)}" if ids else "all" if count == -1 else f"count={count}"
        kinds = {kind for group in request.get("Capabilities") or [] for kind in group} - {"gpu"}
        more = [f'"capabilities={",".join(sorted(kinds))}"'] if kinds else []
        yield from ("--gpus", ",".join([f'"{wanted}"' if ids else wanted, *more]))


def _health(config: Doc) -> Iterator[str]:
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


def _connects(name: str, old: Doc) -> Iterator[list[str]]:
    """The networks that it joins beside the one that it is made with."""
    networks = (old.get("NetworkSettings") or {}).get("Networks") or {}
    for network, how in networks.items():
        if network != old["HostConfig"].get("NetworkMode") and len(networks) > 1:
            aliases = [each for each in how.get("Aliases") or [] if not str(old["Id"]).startswith(each)]
            yield ["docker", "network", "connect", *_each("--alias")(aliases), network, name]


# What docker makes up itself, or tells another way below.
_OF_ITS_OWN = {
    "Binds", "Mounts", "ContainerIDFile", "ConsoleSize", "MaskedPaths", "ReadonlyPaths", "Hostname", "Image",
    "Entrypoint", "Cmd", "Volumes", "AttachStdin", "AttachStdout", "AttachStderr", "StdinOnce", "ArgsEscaped",
    "NetworkDisabled",
}  # fmt: skip


def differences(old: Doc, new: Doc) -> list[str]:
    """What of the arguments of two containers is not the same, by name."""
    found = [
        f"{part}.{key}"
        for part in ("Config", "HostConfig")
        for key in sorted({*old[part], *new[part]} - _OF_ITS_OWN)
        if _plain(old[part].get(key)) != _plain(new[part].get(key))
    ]
    if (old.get("Path"), old.get("Args")) != (new.get("Path"), new.get("Args")):
        found.append("the command")
    if old.get("Image") != new.get("Image"):
        found.append("the image")
    if _mounted(old) != _mounted(new):
        found.append("what is mounted")
    return found


def _plain(value: Any) -> Any:
    """A value without what docker spells in more than one way: nothing at all, and the order of what has none."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if _plain(item) is not None} or None
    if isinstance(value, list):
        return sorted((_plain(item) for item in value), key=repr) or None
    return value or None


def _mounted(of: Doc) -> list[tuple[Any, ...]]:
    return sorted(
        (each.get("Type"), each.get("Name") or each.get("Source"), each.get("Destination"), each.get("RW"))
        for each in of.get("Mounts") or []
    )
