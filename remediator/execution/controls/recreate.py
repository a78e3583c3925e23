"""The `recreate` step: a container anew, from the image that it has and with the arguments that it had.

The new one is made first, under a name of its own. Only where docker tells the same of both is the old one stopped and
set aside; it is put back where the new one does not start. Flags:
https://docs.docker.com/reference/cli/docker/container/create/
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fleet.managers import docker
from fleet.shells import Completed
from remediator.execution.controls.docker import DockerOptions, after_start
from remediator.execution.controls.runner import ControlRunner, TargetNotFoundError, succeeded

ASIDE, NEW = ".defib-old", ".defib-new"
WORDS = replace(docker.MESSAGES, gone=())  # what is not there may be another container than the one that is made anew
Doc = Mapping[str, Any]


class _Ended(Exception):  # noqa: N818
    """The step cannot go on."""

    def __init__(self, done: Completed) -> None:
        super().__init__(done)
        self.done = done


async def recreate(options: DockerOptions, runner: ControlRunner) -> Completed:
    """Raises ShellError where nothing was done to the container."""
    name = options.container
    try:
        old = await _taken_up(runner, name)
        await _check(runner, name, old)
        new = await _made_alike(runner, name, old)
    except _Ended as ended:
        return ended.done
    done = await _exchanged(runner, name, str(old["Id"]), str(new["Id"]))
    return await after_start(options, runner, done) if succeeded(done) else done


async def _taken_up(runner: ControlRunner, name: str) -> Doc:
    """What docker tells of the container, after an earlier attempt that was cut short was undone."""
    new, aside, here = [await _inspected(runner, name + end) for end in (NEW, ASIDE, "")]
    for left, end in ((new, NEW), (here if aside is not None else None, "")):
        if left is None:
            continue
        if left["State"]["Status"] != "created":
            raise _Ended(_refusal(f"{name}{end or ASIDE} is left of an earlier attempt: remove it, or {name}"))
        await _in_order(runner, [["docker", "rm", left["Id"]]], acts=bool(aside))
    if aside is not None:
        back = await _in_order(runner, [["docker", "rename", aside["Id"], name]])
        if not succeeded(back):
            raise _Ended(back)
        here = aside
    if here is None:
        raise runner.not_found(f"container {name}")
    return here


async def _check(runner: ControlRunner, name: str, old: Doc) -> None:
    """Raises _Ended where the container cannot be exchanged for another."""
    if old["HostConfig"].get("AutoRemove"):
        raise _Ended(_refusal(f"{name} removes itself when it ends: give the step a command of its own"))
    shared = _shared_with(old)
    other = await _inspected(runner, shared) if shared else None
    if shared and (other is None or not other["State"]["Running"]):
        why = "does not run" if other else "is not there any more"
        raise _Ended(
            _refusal(f"{name} is in the network of the container {shared}, which {why}: HostConfig.NetworkMode")
        )
    listed = await runner.run_manager(["docker", "ps", "--all", "--quiet", "--no-trunc"], "", WORDS, acts=False)
    if not succeeded(listed):
        raise _Ended(listed)
    modes = ["docker", "inspect", "--type", "container", "--format", "{{.HostConfig.NetworkMode}} {{.Name}}"]
    told = await runner.run([*modes, *listed.stdout.split()], acts=False)
    inside = [
        line.partition(" /")[2] for line in told.stdout.splitlines() if line.startswith(f"container:{old['Id']} ")
    ]
    if inside:
        why = f"the network of {name} is also that of {', '.join(inside)}, which would be without one"
        raise _Ended(_refusal(f"{why}: give the step a command of its own"))


async def _made_alike(runner: ControlRunner, name: str, old: Doc) -> Doc:
    """The new container, which was never started. Raises _Ended where it would not be the same, and is gone again."""
    new = None
    done = await _in_order(runner, [create(name + NEW, old), *_connects(name + NEW, old)], acts=False)
    if succeeded(done):
        new = await _inspected(runner, name + NEW)
        wrong = differences(old, new) if new is not None else ["it is not there"]
        if new is not None and not wrong:
            return new
        done = Completed(1, "", f"the new container would not be the same: {'; '.join(wrong)}")
    new = new or await _inspected(runner, name + NEW)
    if new is not None:
        await _in_order(runner, [["docker", "rm", "--force", new["Id"]]], acts=False)
    raise _Ended(replace(done, stderr=f"{done.stderr}\n{name} was not touched"))


async def _exchanged(runner: ControlRunner, name: str, old: str, new: str) -> Completed:
    """Put the new container in the place of the old one; the old one back where that fails."""
    done = await _in_order(runner, [["docker", "stop", old]])
    renamed = False
    if succeeded(done):
        done = await _in_order(runner, [["docker", "rename", old, name + ASIDE]])
        renamed = succeeded(done)
    if renamed:
        done = await _in_order(runner, [["docker", "rename", new, name], ["docker", "start", new]])
        if succeeded(done):
            return await _without_old(runner, name, old)
    if done.status is None:
        return done  # nobody knows what was done; the next attempt looks
    # Whatever stood in the way, the one that there was is better than none.
    await _in_order(runner, [["docker", "rm", "--force", new]])
    back = not renamed or succeeded(await _in_order(runner, [["docker", "rename", old, name]]))
    started = await _in_order(runner, [["docker", "start", old]])
    put = "put back" if back else f"NOT put back; it is {name}{ASIDE}"
    runs = "" if succeeded(started) else f", and does not start: {started.output or started.why}"
    return replace(done, stderr=f"{done.stderr}\nthe old container was {put}{runs}")


async def _without_old(runner: ControlRunner, name: str, old: str) -> Completed:
    """Remove the old container. The new one runs, whatever comes of this."""
    done = await _in_order(runner, [["docker", "rm", old]])
    if succeeded(done):
        return done
    left = f"the new container runs; the old one is left as {name}{ASIDE}: {done.output or done.why}"
    return Completed(0, done.stdout, left)


async def _in_order(runner: ControlRunner, commands: Iterable[list[str]], *, acts: bool = True) -> Completed:
    done = Completed(0, "", "")
    for argv in commands:
        done = await runner.run_manager(argv, "", WORDS, acts=acts)
        if not succeeded(done):
            return done
    return done


async def _inspected(runner: ControlRunner, which: str) -> Doc | None:
    """What docker tells of the container of this very name, or identifier; None where there is none."""
    try:
        argv = ["docker", "inspect", "--type", "container", which]
        done = await runner.run_manager(argv, f"container {which}", docker.MESSAGES, acts=False)
    except TargetNotFoundError:
        return None
    try:
        found = json.loads(done.stdout)[0]
        told = which in (str(found["Name"]).removeprefix("/"), found["Id"])
    except (ValueError, LookupError, TypeError):
        if succeeded(done):
            done = _refusal(f"what docker tells of {which} cannot be understood: give the step a command of its own")
        raise _Ended(done) from None
    return found if told else None


def _refusal(why: str) -> Completed:
    return Completed(1, "", why)


def create(name: str, old: Doc) -> list[str]:
    """The argv that makes a container with the arguments of `old`."""
    config, host = old["Config"], old["HostConfig"]
    argv = ["docker", "create", "--name", name, *_simple(config, _OF_CONFIG), *_simple(host, _OF_HOST), *_network(old)]
    if not _shared_with(old):  # these come from the other container, or from the image
        argv += _simple({**config, "Hostname": _hostname(old)}, _OF_ITSELF)
    argv += [
        *_unmasked(host),
        *_ports(host),
        *_mounts(old),
        *_restart(host),
        *_logging(host),
        *_devices(host),
        *_health(config),
    ]
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
    "StopSignal": _value("--stop-signal"), "StopTimeout": _value("--stop-timeout"),
}  # fmt: skip
_OF_ITSELF: Mapping[str, Callable[[Any], list[str]]] = {
    "Hostname": _value("--hostname"), "ExposedPorts": _each("--expose"),
}  # fmt: skip
_OF_HOST: Mapping[str, Callable[[Any], list[str]]] = {
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


def _network(old: Doc) -> Iterator[str]:
    """The network that it is made with, and its place there."""
    mode, how = str(old["HostConfig"].get("NetworkMode") or "default"), _networks(old).get(_primary(old), {})
    more = [f"driver-opt={key}={value}" for key, value in (how.get("DriverOpts") or {}).items()]
    more += [f"gw-priority={how['GwPriority']}"] if how.get("GwPriority") else []
    fields = [f"name={mode}", *more] if more else [mode]
    yield from ("--network", ",".join(_csv(field) for field in fields))
    mac = old["Config"].get("MacAddress") or how.get("MacAddress")
    if mac:
        yield from ("--mac-address", mac)
    yield from _each("--link")(_links(old))
    yield from _place(how, "--network-alias")


def _csv(field: str) -> str:
    doubled = field.replace('"', '""')
    return f'"{doubled}"' if "," in field or '"' in field else field


def _connects(name: str, old: Doc) -> Iterator[list[str]]:
    """The networks that it joins beside the one that it is made with."""
    for network, how in _networks(old).items():
        if network == _primary(old):
            continue
        options = [
            part for key, value in (how.get("DriverOpts") or {}).items() for part in ("--driver-opt", f"{key}={value}")
        ]
        options += ["--gw-priority", str(how["GwPriority"])] if how.get("GwPriority") else []
        yield ["docker", "network", "connect", *_place(how, "--alias"), *options, network, name]


def _place(how: Doc, alias: str) -> Iterator[str]:
    """Fixed addresses, names and links in one network."""
    fixed = how.get("IPAMConfig") or {}
    for key, flag in (("IPv4Address", "--ip"), ("IPv6Address", "--ip6")):
        if fixed.get(key):
            yield from (flag, fixed[key])
    yield from _each("--link-local-ip")(fixed.get("LinkLocalIPs") or [])
    yield from _each(alias)(how.get("Aliases") or [])
    yield from _each("--link")(how.get("Links") or [])


def _networks(of: Doc) -> dict[str, dict[str, Any]]:
    """What was asked for of each network, without what docker makes up itself."""
    name = str(of.get("Name", "")).removeprefix("/")
    found = {}
    for network, told in ((of.get("NetworkSettings") or {}).get("Networks") or {}).items():
        how = {key: value for key, value in (told or {}).items() if key not in _MADE_UP}
        aliases = dict.fromkeys(how.get("Aliases") or [])
        how["Aliases"] = [each for each in aliases if each != name and not _is_id(each, of)]
        if of["Config"].get("MacAddress") or _locally_administered(how.get("MacAddress")):
            how["MacAddress"] = None
        found[network] = how
    return found


_MADE_UP = {
    "NetworkID", "EndpointID", "Gateway", "IPAddress", "IPPrefixLen", "IPv6Gateway", "GlobalIPv6Address",
    "GlobalIPv6PrefixLen", "DNSNames", "IPAMOperational",
}  # fmt: skip


def _locally_administered(address: str | None) -> bool:
    """Whether docker may have made it up; one that was asked for stands in Config.MacAddress up to docker 28."""
    return not address or bool(int(address[:2], 16) & 2)


def _primary(of: Doc) -> str:
    """The name of the network that a container was made with."""
    mode = str(of["HostConfig"].get("NetworkMode") or "default")
    networks = (of.get("NetworkSettings") or {}).get("Networks") or {}
    by_id = [name for name, told in networks.items() if str((told or {}).get("NetworkID") or "-").startswith(mode)]
    return next(iter(by_id), "bridge" if mode == "default" else mode) if mode not in networks else mode


def _shared_with(of: Doc) -> str:
    """The container whose network it uses, where it has none of its own."""
    kind, _, other = str(of["HostConfig"].get("NetworkMode") or "").partition(":")
    return other if kind == "container" else ""


def _hostname(of: Doc) -> str:
    """The name that it was given; the one of another container is not its own."""
    name = of["Config"].get("Hostname") or ""
    return "" if _is_id(name, of) or _shared_with(of) else name


def _is_id(name: str, of: Doc) -> bool:
    """Whether a name is what docker makes of a container's identifier."""
    return name == str(of["Id"])[:12]


def _link(told: str) -> str:
    """A link of the default network, as its flag takes it: docker tells of `/other:/this/alias`."""
    other, _, alias = told.partition(":")
    return f"{other.removeprefix('/')}:{alias.rpartition('/')[2]}"


def _unmasked(host: Doc) -> Iterator[str]:
    """The security option that docker keeps as an empty list of what it hides of /proc and /sys."""
    if host.get("MaskedPaths") == [] and not host.get("Privileged"):
        yield from ("--security-opt", "systempaths=unconfined")


# What docker makes up itself, or tells another way below.
_OF_ITS_OWN = {
    "Binds", "Mounts", "ContainerIDFile", "ConsoleSize", "Hostname", "Links", "Image", "Entrypoint", "Cmd", "Volumes",
    "AttachStdin", "AttachStdout", "AttachStderr", "StdinOnce", "ArgsEscaped", "NetworkDisabled",
}  # fmt: skip


def differences(old: Doc, new: Doc) -> list[str]:
    """What of the arguments of two containers is not the same, by name."""
    found = [
        f"{part}.{key}"
        for part in ("Config", "HostConfig")
        for key in sorted({*old[part], *new[part]} - _OF_ITS_OWN)
        if _plain(old[part].get(key)) != _plain(new[part].get(key))
    ]
    old_nets, new_nets = _networks(old), _networks(new)
    for network in sorted({*old_nets, *new_nets}):
        if (network in old_nets) != (network in new_nets):
            found.append(f"NetworkSettings.Networks.{network}")
            continue
        was, is_ = old_nets[network], new_nets[network]
        keys = sorted(key for key in {*was, *is_} if _plain(was.get(key)) != _plain(is_.get(key)))
        found += [f"NetworkSettings.Networks.{network}.{key}" for key in keys]
    if _hostname(old) != _hostname(new):
        found.append("Config.Hostname")
    if _links(old) != _links(new):
        found.append("HostConfig.Links")
    if (old.get("Path"), old.get("Args")) != (new.get("Path"), new.get("Args")):
        found.append("the command")
    if old.get("Image") != new.get("Image"):
        found.append("the image")
    if _mounted(old) != _mounted(new):
        found.append("what is mounted")
    return found


def _links(of: Doc) -> list[str]:
    return sorted(map(_link, of["HostConfig"].get("Links") or []))


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
