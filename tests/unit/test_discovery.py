"""Discovery: the parsers of what hosts print, the proposed services, and the written YAML."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from defib.discover import parse_choice
from defib.discovery import sections
from defib.discovery.coverage import Coverage, find_coverage
from defib.discovery.known import find_provider, is_no_service, starts_nothing
from defib.discovery.model import (
    Container,
    Endpoint,
    Findings,
    HostProposals,
    Listener,
    Process,
    Program,
    Proposal,
    PublishedPort,
    Unit,
)
from defib.discovery.proposals import propose
from defib.discovery.reading import find_candidates
from defib.discovery.templates import find_shared
from defib.discovery.writing import describe_rest, render, render_flow
from fleet.inventory.model import Host, Inventory
from fleet.managers.containers import ContainerSelector
from runtime.terminal import UNSAFE
from tests.support import inventory_of, loaded, write

NOTHING = Coverage(*(frozenset() for _ in range(5)))
ID = "7a" * 32
HOSTS = "hosts: {h: {address: 10.0.0.11, shell: local}}"


def docker_line(name: str, ports: str = "", **more: str) -> str:
    values = {
        "id": ID[:12], "name": name, "state": "running", "image": "i", "status": "Up 2 hours", "command": '"sh"',
        "ports": ports, "project": "", "service": "", "directory": "", **more,
    }  # fmt: skip
    return json.dumps(list(values.values()))


def proposals_of(found: Findings, coverage: Coverage = NOTHING, taken: Sequence[str] = ()) -> list[Proposal]:
    return list(propose(found, coverage, taken).proposals)


def only(found: Findings) -> Proposal:
    (proposal,) = proposals_of(found)
    return proposal


def load_rendered(folder: Path, found: Findings, proposed: HostProposals) -> Inventory:
    """The inventory with everything that was proposed."""
    write(folder, hosts=HOSTS)
    (folder / "found.yaml").write_text(render([(found, proposed)], proposed.proposals), encoding="utf-8")
    return loaded(folder).inventory


def test_containers_are_parsed_with_their_published_ports() -> None:
    ports = "0.0.0.0:8000-8001->9000-9001/tcp, [::]:8000-8001->9000-9001/tcp, 127.0.0.1:53->53/udp, 7860/tcp"
    text = docker_line("alias/x,vllm", ports, project="stack", service="llm", directory="/srv/stack")
    (container,) = sections.parse_containers(f"{text}\n[1, 2]\nError: x\n{docker_line('cut')[:-9]}")
    assert (container.name, container.command, container.directory) == ("vllm", "sh", "/srv/stack")
    assert container.ports[:2] == (PublishedPort("0.0.0.0", 8000, 9000), PublishedPort("0.0.0.0", 8001, 9001))
    assert {each.port for each in container.ports} == {8000, 8001}


def test_lone_surrogates_are_replaced() -> None:
    (container,) = sections.parse_containers(docker_line("a\ud800b"))
    assert container.name == "a?b"


def test_ports_that_do_not_exist_are_left_out() -> None:
    (container,) = sections.parse_containers(docker_line("x", "0.0.0.0:0->1/tcp, 0.0.0.0:65534-99999->1-9/tcp"))
    assert [each.port for each in container.ports] == [65534, 65535]


def test_a_container_of_compose_is_selected_by_its_labels() -> None:
    """Its name may change with a deploy; the labels of replicas would not tell them apart."""
    compose: dict[str, Any] = {"project": "shop", "service": "web", "directory": "/srv/shop"}
    web = Container("shop-web-1a2b", ID[:12], "running", "shop:v7", **compose)
    labels = [f"com.docker.compose.{each}" for each in ("project=shop", "service=web", "oneoff=False")]
    assert only(Findings("h", [web])).service["control"] == {"docker": {"label": labels}}
    replicas = [web, dataclasses.replace(web, name="shop-web-3c4d")]
    controls = [each.service["control"]["docker"] for each in proposals_of(Findings("h", replicas))]
    assert controls == [{"container": "shop-web-1a2b"}, {"container": "shop-web-3c4d"}]
    strange = dataclasses.replace(web, project="$(id)")
    assert only(Findings("h", [strange])).service["control"] == {"docker": {"container": "shop-web-1a2b"}}
    for selector in (ContainerSelector(labels=tuple(labels[:2])), ContainerSelector(image="shop")):
        coverage = dataclasses.replace(NOTHING, containers=frozenset({selector}))
        assert not proposals_of(Findings("h", [web]), coverage)
    others = [ContainerSelector(labels=(*labels[:2], "a=b")), ContainerSelector(image="shop:v8")]
    assert proposals_of(Findings("h", [web]), dataclasses.replace(NOTHING, containers=frozenset(others)))


def test_a_container_with_every_port_is_cut() -> None:
    (container,) = sections.parse_containers(docker_line("all", "0.0.0.0:1-65535->1-65535/tcp"))
    assert len(container.ports) == sections.PUBLISHED_LIMIT


def test_units_are_parsed() -> None:
    text = (
        "Id=own.service\tType=simple\tLoadState=loaded\tActiveState=active\tSubState=running"
        "\tFragmentPath=/etc/systemd/system/own.service\n"
        "Id=gone.service\tType=\tLoadState=not-found\tActiveState=inactive\tSubState=dead\tFragmentPath=\nnoise"
    )
    path = "/etc/systemd/system/own.service"
    assert sections.parse_units(text) == [Unit("own.service", "active", "running", "simple", path)]


def test_listeners_are_parsed_with_processes_and_control_groups() -> None:
    text = (
        "socket 0100007F:1F90 101\nsocket 00000000:1F91 102\nsocket 00000000000000000000000000000000:1F91 103\n"
        "socket 0000000000000000FFFF00000100007F:1F92 104\nsocket nonsense 9\n"
        "owner 77 102\nprocess 77 70,1- my server\n/proc/77/cgroup:1:name=systemd:/\n"
        "/proc/77/cgroup:0::/system.slice/own.service\n"
        "cgroup *:8081 /system.slice/own.service\ncgroup 127.0.0.1:8080 unreachable:1f\n"
        "inode 31 /sys/fs/cgroup/system.slice/other.service\n"
    )
    first, second, third = sections.parse_listeners(text)
    assert (first.port, first.addresses, first.process) == (8080, ["127.0.0.1"], None)
    assert first.cgroup.endswith("/other.service")
    assert (first.only_loopback, second.only_loopback, third.only_loopback) == (True, False, True)
    assert second.addresses == ["0.0.0.0", "::"]
    assert second.process == Process(77, "my server", "/system.slice/own.service", (70, 1))


@settings(max_examples=300)
@given(st.text())
def test_no_output_breaks_a_parser(text: str) -> None:
    for parse in (sections.parse_containers, sections.parse_units, sections.parse_listeners):
        parse(text)
        parse(f"socket {text} 1\nowner {text}\nprocess {text}\n[{text}]\ncgroup {text} {text}")


def test_a_container_with_three_ports_is_one_service() -> None:
    """The container of docs and examples: only one of its published ports is served, by a process started inside."""
    ports = tuple(PublishedPort("0.0.0.0", port, port) for port in (7860, 8000, 30000))
    container = Container("mineru_container", ID[:12], "running", "mineru:latest", command="/bin/bash", ports=ports)
    proxies = [Listener(port, ["0.0.0.0", "::"], Process(port, "docker-proxy")) for port in (7860, 8000, 30000)]
    endpoints = {
        7860: Endpoint(7860, "http", status=200, title="Gradio"),
        8000: Endpoint(8000, "mineru", status=404),
        30000: Endpoint(30000, "tcp"),
    }
    proposal = only(Findings("gpu-01", [container], listeners=proxies, endpoints=endpoints))
    assert proposal.id == "mineru_container-gpu-01"
    assert proposal.what == "container mineru_container (mineru:latest), port 8000: MinerU"
    assert proposal.service["control"] == {"docker": {"container": "mineru_container"}}
    assert proposal.service["on_failure"] == "notify"
    assert (proposal.service["provider"], proposal.service["category"]) == ("mineru", "ocr")
    assert proposal.service["probe"]["http"]["url"] == "http://{host.address}:8000/openapi.json"
    assert "listens also on 7860 (HTTP “Gradio”), 30000" in proposal.remarks
    assert any("only a shell" in remark for remark in proposal.remarks)


def process(name: str, cgroup: str = "", pid: int = 50, ancestors: Sequence[int] = ()) -> Process:
    return Process(pid, name, cgroup, ancestors)


@pytest.mark.parametrize(
    ("listener", "label"),
    [
        (Listener(8000, ["0.0.0.0"], process("python3", f"/system.slice/docker-{ID}.scope")), "container box"),
        (Listener(8000, ["0.0.0.0"], process("python3", f"/docker/{ID}")), "container box"),
        (Listener(8000, ["0.0.0.0"], cgroup=f"/system.slice/docker-{ID}.scope"), "container box"),
        (Listener(8000, ["0.0.0.0"], process("gunicorn", "/system.slice/supervisor.service", 52, (51, 40))), "program stack:web"),
        (Listener(8000, ["0.0.0.0"], process("nginx", "/system.slice/own.service/worker")), "unit own.service"),
        (Listener(8000, ["0.0.0.0"], cgroup="/system.slice/own.service"), "unit own.service"),
        (Listener(8000, ["0.0.0.0"], process("java", "/user.slice/user-1000.slice/session-3.scope")), "process java"),
        (Listener(8000, ["0.0.0.0"], process("java", "/user.slice/user@1000.service/own.service/x/user@1000.service")), "process java"),
        (Listener(8000, ["0.0.0.0"], process("nohup", "/system.slice/ssh.service")), "process nohup"),
        (Listener(8000, ["0.0.0.0"]), "port 8000"),
    ],
)  # fmt: skip
def test_a_port_belongs_to_what_runs_it(listener: Listener, label: str) -> None:
    found = Findings(
        "h", [Container("box", ID[:12], "running", "i")],
        [Unit("own.service", "active", "running"), Unit("ssh.service", "active", "running")],
        [Program("stack:web", "RUNNING", pid=51)], [listener],
        endpoints={8000: Endpoint(8000, "http", status=200)},
    )  # fmt: skip
    with_port = [each for each in proposals_of(found) if "http" in each.service["probe"]]
    (proposal,) = with_port
    assert proposal.what.startswith(f"{label} (i), port 8000" if "box" in label else label)


def test_what_is_no_service_is_left_out() -> None:
    units = [
        Unit(f"{name}.service", "active", "running", path=f"/etc/systemd/system/{name}.service")
        for name in ("ssh", "systemd-resolved", "dbus", "docker", "defib-exporter", "getty@tty1", "own")
    ]
    units += [
        Unit("packaged.service", "active", "running", path="/lib/systemd/system/packaged.service"),
        Unit("once.service", "active", "exited", path="/etc/systemd/system/once.service"),
        Unit("broken.service", "failed", "failed", path="/etc/systemd/system/broken.service"),
    ]
    listeners = [
        Listener(22, ["0.0.0.0"], process("sshd")), Listener(9999, ["0.0.0.0"], process("defib", pid=9)),
        Listener(22, ["0.0.0.0"]), Listener(45001, ["0.0.0.0"]), Listener(45002, ["0.0.0.0"]),
    ]  # fmt: skip
    containers = [Container("done", "", "exited", "i"), Container("dead", "", "dead", "i")]
    proposed = propose(Findings("h", containers, units, listeners=listeners), NOTHING, ())
    assert [each.id for each in proposed.proposals] == ["own-h", "broken-h"]
    assert proposed.proposals[1].remarks == ["the unit has failed"]
    assert list(proposed.left_out) == [
        "container done: it is exited", "container dead: it is dead",
        "port 45001, port 45002: an unknown program on a temporary port",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "probe"),
    [
        (Endpoint(8000, "vllm", models=("qwen3-32b", "lora")), {"every": "5m", "timeout": "1m", "openai": {"url": "http://{host.address}:8000", "model": "qwen3-32b"}}),
        (Endpoint(8000, "vllm", needs_key=True), {"http": {"url": "http://{host.address}:8000/health"}}),
        (Endpoint(8000, "openai", models=("bge-m3",)), {"http": {"url": "http://{host.address}:8000/v1/models"}}),
        (Endpoint(8000, "vllm", models=("{host.address}",)), {"http": {"url": "http://{host.address}:8000/v1/models"}}),
        (Endpoint(8000, "ollama", models=("llama3:8b",)), {"http": {"url": "http://{host.address}:8000/api/tags"}}),
        (Endpoint(8000, "http", status=200), {"http": {"url": "http://{host.address}:8000/"}}),
        (Endpoint(8000, "http", path="/health", status=200), {"http": {"url": "http://{host.address}:8000/health"}}),
        (Endpoint(8000, "http", status=401), {"http": {"url": "http://{host.address}:8000/", "expect": {"status": 401}}}),
        (Endpoint(8000, "http", status=302), {"http": {"url": "http://{host.address}:8000/", "follow_redirects": False, "expect": {"status": 302}}}),
        (Endpoint(8000, "http", status=502), {"http": {"url": "http://{host.address}:8000/"}}),
        (Endpoint(8000, "http", "https", status=200, verified=False), {"http": {"url": "https://{host.address}:8000/", "tls": {"verify": False}}}),
        (Endpoint(8000, "tcp"), {"tcp": {"address": "{host.address}:8000"}}),
        (Endpoint(8000, "closed"), {"unit": {"name": "own.service"}}),
        (None, {"unit": {"name": "own.service"}}),
    ],
)  # fmt: skip
def test_the_probe_fits_what_answers_and_loads(
    tmp_path: Path, endpoint: Endpoint | None, probe: dict[str, Any]
) -> None:
    listener = Listener(8000, ["0.0.0.0"], process("x", "/system.slice/own.service"))
    endpoints = {} if endpoint is None else {8000: endpoint}
    found = Findings("h", units=[Unit("own.service", "active", "running")], listeners=[listener], endpoints=endpoints)
    proposed = propose(found, NOTHING, ())
    assert proposed.proposals[0].service["probe"] == probe
    service = load_rendered(tmp_path, found, proposed).services["own-h"]
    assert service.control is not None
    assert service.control.options.unit == "own.service"


def test_a_published_port_that_is_not_http_says_nothing_about_the_container() -> None:
    """Docker's proxy accepts connections even if nothing listens behind it."""
    container = Container("db", ID[:12], "running", "postgres:16", ports=(PublishedPort("0.0.0.0", 5432, 5432),))
    proposal = only(Findings("h", [container], endpoints={5432: Endpoint(5432, "tcp")}))
    assert proposal.service["probe"] == {"container": {"name": "db"}}


def test_a_port_on_loopback_is_checked_on_the_host() -> None:
    listener = Listener(8000, ["127.0.0.1", "::1"], process("python3"))
    proposal = only(Findings("h", listeners=[listener]))
    assert proposal.service["probe"] == {"port": {"listening": 8000}}
    assert any("loopback only" in remark for remark in proposal.remarks)


@pytest.mark.parametrize(("address", "ports"), [("10.0.0.11", [8001, 9001]), ("127.0.0.1", [8000, 8001, 9000, 9001])])
def test_only_ports_that_can_be_reached_are_asked(address: str, ports: list[int]) -> None:
    published = (PublishedPort("127.0.0.1", 9000, 80), PublishedPort("0.0.0.0", 9001, 80))
    listeners = [
        Listener(8000, ["127.0.0.1"]), Listener(8001, ["0.0.0.0"]), Listener(2222, ["0.0.0.0"], process("sshd")),
    ]  # fmt: skip
    found = Findings("h", [Container("c", "", "running", "i", ports=published)], listeners=listeners)
    assert find_candidates(Host(address=address), found) == ports


SERVICES: dict[str, Any] = {
    "a": {"host": "h", "probe": {"container": {"name": "probed"}}},
    "b": {"host": "h", "probe": {"tcp": {"address": "x:1"}}, "control": {"docker": {"container": "controlled"}}},
    "c": {"host": "h", "probe": {"tcp": {"address": "x:1"}}, "control": {"compose": {"directory": "/srv/a/", "service": "web"}}},
    "d": {"host": "h", "probe": {"unit": {"name": "own"}}},
    "e": {"host": "h", "probe": {"program": {"name": "p", "config": "/etc/s.conf"}}},
    "f": {"probe": {"http": {"url": "http://10.0.0.11/x"}}},
    "g": {"host": "other", "probe": {"tcp": {"address": "10.0.0.11:5432"}}},
    "i": {"host": "h", "probe": {"port": {"listening": 7000}}},
    "j": {"host": "h", "probe": {"http": {"url": "http://{host.address}:8000/"}}},
    "k": {"host": "other", "probe": {"container": {"name": "elsewhere"}}},
}  # fmt: skip


def test_what_the_inventory_has_is_left_out_and_counted(tmp_path: Path) -> None:
    hosts = {name: {"address": address, "ssh": {}} for name, address in (("h", "10.0.0.11"), ("other", "10.0.0.12"))}
    inventory = inventory_of(tmp_path, {"hosts": hosts, "services": SERVICES}).inventory
    containers = [Container(name, "", "running", "i") for name in ("probed", "controlled", "elsewhere")]
    containers.append(Container("a-web-1", "", "running", "i", project="a", service="web", directory="/srv/a"))
    found = Findings(
        "h", containers, [Unit("own.service", "active", "running", path="/etc/systemd/system/own.service")],
        [Program("p", "RUNNING", "/etc/s.conf"), Program("p", "RUNNING")],
        [Listener(port, ["0.0.0.0"]) for port in (80, 5432, 7000, 8000, 8001)],
    )  # fmt: skip
    proposed = propose(found, find_coverage(inventory.hosts["h"], inventory), inventory.services)
    assert [each.id for each in proposed.proposals] == ["elsewhere-h", "p-h", "port-8001-h"]
    assert len(proposed.covered) == 9


def test_identifiers_are_valid_and_unique() -> None:
    names = ["web", "Web", "x" * 200, "x" * 201]
    found = Findings("h", [Container(name, "", "running", "i") for name in names])
    ids = [each.id for each in proposals_of(found, taken=["web-h"])]
    assert ids[:2] == ["web-h-2", "web-h-3"]
    assert ids[2:] == [f"{'x' * 61}-h", f"{'x' * 59}-h-2"]
    host = "h" * 63
    ids = [each.id for each in proposals_of(dataclasses.replace(found, host=host))]
    assert len(set(ids)) == 4
    assert {len(each) for each in ids if each.startswith("x")} == {63}


# Lone surrogates are replaced when the answers of hosts and services are read.
HOSTILE = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    ["a\nservices: {}", "${file:/etc/passwd}", "$${HOME}", "{service}", "x: y # z", "\x1b[2J", "a\u202eb", "- x", "'", '"', "~", "yes", "1e3", "a\x85b", "&a *a !!x", "x" * 5000]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        HOSTILE,
        lambda part: (
            st.lists(part, max_size=4)
            | st.dictionaries(st.sampled_from(["a", "on", "8080", "null", "0x10", "x: y", "~", "1e3"]), part)
        ),
    )
)
def test_written_yaml_has_the_same_texts(value: Any) -> None:
    text = render_flow(value)
    assert "\n" not in text
    assert UNSAFE.search(text) is None

    def written(part: Any) -> Any:
        if isinstance(part, str):
            return part.replace("${", "$${")
        return [*map(written, part)] if isinstance(part, list) else {key: written(each) for key, each in part.items()}

    assert yaml.safe_load(f"a: {text}")["a"] == written(value)


@settings(max_examples=60, deadline=None)
@given(st.lists(HOSTILE, min_size=7, max_size=7))
@example(["0", "", "00", "x" * 300, "", "", ""])  # the label of a compose service that is too long for a selector
def test_hostile_names_are_only_data(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Whatever a host answers: the file loads, names what was found, and no line of it comes from the host."""
    title, model, name, note, image, program, directory = names
    listeners = [Listener(port, ["0.0.0.0"], process(name, pid=port)) for port in (8000, 8001, 8002)]
    found = Findings(
        "h", [Container(name, "", "running", image, project=title, service=note, directory=directory), Container("ok", "", "running", image)],
        [Unit(name, "active", "running", path="/etc/systemd/system/x")], [Program(program, "RUNNING", pid=1)], listeners,
        endpoints={
            8000: Endpoint(8000, "http", status=200, title=title), 8001: Endpoint(8001, "vllm", models=(model,)),
            8002: Endpoint(8002, "tcp"),
        },
        notes=[note], missing=[name],
    )  # fmt: skip
    proposed = propose(found, NOTHING, ())
    inventory = load_rendered(tmp_path_factory.mktemp("c"), found, proposed)
    assert set(inventory.services) == {each.id for each in proposed.proposals}
    models = [each.probe.options.model for each in inventory.services.values() if each.probe.kind == "openai"]
    assert models in ([], [model])
    programs = [each.probe.options.name for each in inventory.services.values() if each.probe.kind == "program"]
    assert programs in ([], [program])
    text = render([(found, proposed)], proposed.proposals)
    assert UNSAFE.search(text) is None
    assert all(len(line) < 6000 for line in text.splitlines())
    assert not any("\n" in line for line in describe_rest(found, proposed))


def test_a_reference_in_a_name_is_not_resolved(tmp_path: Path) -> None:
    model = "${file:/etc/hostname}"
    listener = Listener(8000, ["0.0.0.0"], process("x"))
    found = Findings("h", listeners=[listener], endpoints={8000: Endpoint(8000, "vllm", models=(model, "second"))})
    proposed = propose(found, NOTHING, ())
    service = load_rendered(tmp_path, found, proposed).services["vllm-8000-h"]
    assert service.probe.options.model == "second"
    assert render_flow(model) == "'$${file:/etc/hostname}'"


def alike(hosts: Sequence[str], port: int = 8000, name: str = "vllm") -> list[Proposal]:
    made = []
    for host in hosts:
        container = Container(name, ID[:12], "running", "i", ports=(PublishedPort("0.0.0.0", port, port),))
        endpoints = {port: Endpoint(port, "vllm", models=("qwen",))}
        made += proposals_of(Findings(host, [container], endpoints=endpoints))
    return made


GPUS = [f"gpu-0{number}" for number in range(1, 5)]


@pytest.mark.parametrize(
    ("groups", "hosts", "for_hosts"),
    [
        (["gpu"] * 4, GPUS, {"group": "gpu"}),
        (["gpu"] * 4, GPUS[:3], {"names": GPUS[:3]}),
        (["gpu", "gpu", "gpu", ""], GPUS, {"names": GPUS}),
        ([""] * 4, GPUS, {"names": GPUS}),
    ],
)
def test_what_hosts_have_alike_is_one_template_for_exactly_these(
    tmp_path: Path, groups: list[str], hosts: list[str], for_hosts: dict[str, Any]
) -> None:
    written: dict[str, Any] = {
        "hosts": {
            name: {"address": "10.0.0.1", "shell": "local", "group": group}
            for name, group in zip(GPUS, groups, strict=True)
        }
    }
    inventory = inventory_of(tmp_path, written).inventory
    proposals = alike(hosts)
    shared, single = find_shared(proposals, inventory.hosts, ())
    assert ([each.for_hosts for each in shared], single) == ([for_hosts], [])
    (tmp_path / "found.yaml").write_text(render([], shared))
    services = loaded(tmp_path).inventory.services
    assert set(services) == {f"vllm-{host}" for host in hosts}
    assert services[f"vllm-{hosts[0]}"].probe.options.model == "qwen"


def test_what_differs_or_is_on_two_hosts_only_is_no_template() -> None:
    hosts = {name: Host(address="10.0.0.1") for name in GPUS}
    proposals = [*alike(GPUS[:2]), *alike(GPUS[2:], port=9000), *alike(GPUS[:3], name="taken")]
    assert find_shared(proposals, hosts, ["taken"]) == ([], proposals)


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("", [1, 2, 3, 4, 5]), ("all", [1, 2, 3, 4, 5]), ("n", []), ("1,3-5", [1, 3, 4, 5]), ("2 4", [2, 4]),
        ("5, 1 , 1", [1, 5]), ("0", None), ("6", None), ("3-1", None), ("1-", None), ("x", None), ("-1", None),
        ("1,,2", [1, 2]), ("²", None),
    ],
)  # fmt: skip
def test_choices(answer: str, numbers: list[int] | None) -> None:
    assert parse_choice(answer, 5) == numbers


def test_known_programs() -> None:
    assert find_provider("other", "vllm-openai:v0.8", "x") == ("vllm", "llm")
    assert find_provider("", "my-job") == ("other", "other")
    assert is_no_service("systemd-resolved.service")
    assert not is_no_service("nginx.service")
    assert [starts_nothing(text) for text in ("/bin/bash", "sleep infinity", "/bin/sh -c 'x y'", "", "vllm serve x")] == [
        True, True, False, False, False,
    ]  # fmt: skip
