"""Ranges of hosts, defaults of hosts, templates of services, and what is not enabled."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.check import check
from defib.kinds import KINDS
from fleet.inventory.loading import LoadedInventory, load, read_expanded
from fleet.inventory.model import Inventory
from fleet.inventory.problems import ConfigurationError
from tests.support import inventory_of, write

PROBE = {"http": {"url": "http://{host.address}:{port}/{path}"}}
FLEET: dict[str, Any] = {
    "hosts": {
        "gpu-[01-03]": {"address": "10.0.0.{n}", "shell": "local", "group": "gpu", "labels": {"role": "vllm", "rack": "r{n+10}"}},
        "gpu-02": {"labels": {"role": "ocr"}, "templates": {"extra": {"path": "x"}}},
        "gpu-03": {"templates": {"vllm": {"port": 9000}}},
        "web": {"address": "fd00::1", "group": "pages"},
    },
    "templates": {
        "vllm": {
            "for_hosts": {"group": "gpu", "labels": {"role": ["vllm", "sglang"]}},
            "parameters": {"port": 8000, "path": "health", "every": "10s"},
            "service": {
                "name": "vLLM on {host.name}", "provider": "vllm", "probe": {"every": "{every}", **PROBE},
                "control": {"command": {"restart": ["restart", "{service}", "{port}", "{host.labels.rack}"]}},
            },
        },
        "extra": {
            "id": "{host.name}-{path}", "parameters": {"path": None, "port": 80}, "service": {"probe": PROBE},
        },
        "page": {"parameters": {"url": None}, "service": {"category": "page", "probe": {"http": {"url": "{url}"}}}},
        "everywhere": {
            "for_hosts": {"names": ["web", "gpu-0[12]"]}, "id": "ping-{host.name}",
            "service": {"probe": {"tcp": {"address": "{host.address}:22"}}},
        },
    },
    "services": {
        "vllm-gpu-01": {"severity": "warning", "probe": {"every": "30s"}},
        "wiki": {"template": "page", "parameters": {"url": "http://wiki.example/"}, "category": "wiki"},
    },
}  # fmt: skip


def expanded(folder: Path, configuration: dict[str, Any]) -> Inventory:
    return inventory_of(folder, configuration).inventory


def url(inventory: Inventory, service: str) -> str:
    return str(inventory.services[service].probe.options.url)


def test_templates_make_services_for_the_hosts_of_ranges(tmp_path: Path) -> None:
    inventory = expanded(tmp_path, FLEET)
    assert {name: each.address for name, each in inventory.hosts.items()} == {
        "web": "fd00::1", "gpu-01": "10.0.0.1", "gpu-02": "10.0.0.2", "gpu-03": "10.0.0.3",
    }  # fmt: skip
    assert inventory.hosts["gpu-02"].labels == {"role": "ocr", "rack": "r12"}
    assert {name: each.host for name, each in inventory.services.items()} == {
        "vllm-gpu-01": "gpu-01", "vllm-gpu-03": "gpu-03", "gpu-02-x": "gpu-02", "wiki": "",
        "ping-web": "web", "ping-gpu-01": "gpu-01", "ping-gpu-02": "gpu-02",
    }  # fmt: skip
    assert url(inventory, "vllm-gpu-01") == "http://10.0.0.1:8000/health"
    assert url(inventory, "vllm-gpu-03") == "http://10.0.0.3:9000/health"
    assert url(inventory, "gpu-02-x") == "http://10.0.0.2:80/x"
    assert (url(inventory, "wiki"), inventory.services["wiki"].category) == ("http://wiki.example/", "wiki")
    assert inventory.services["ping-web"].probe.options.address == "[fd00::1]:22"
    one, three = inventory.services["vllm-gpu-01"], inventory.services["vllm-gpu-03"]
    assert (one.title, one.severity, one.probe.every) == ("vLLM on gpu-01", "warning", 30.0)
    assert (three.title, three.severity, three.probe.every) == ("vLLM on gpu-03", "critical", 10.0)
    assert three.target == "command:restart vllm-gpu-03 9000 r13"


def test_hosts_inherit_from_their_group_and_from_all_hosts(tmp_path: Path) -> None:
    inventory = expanded(tmp_path, {
        "defaults": {
            "host": {"ssh": {"user": "defib", "key_file": "id", "port": 2222}, "labels": {"site": "a"}, "group": "gpu",
                     "collect": {"system": {"every": "1m"}}},
            "groups": {"gpu": {"ssh": {"port": 22}, "collect": {"gpu": {"every": "30s"}}}, "db": {"sudo": "passwordless"}},
        },
        "hosts": {
            "one": {"address": "h1"},
            "two": {"address": "h2", "group": "db", "ssh": {"user": "root"}, "labels": {"site": "b"}},
            "bare": {"address": "h3", "collect": {"system": None}},
            "here": {"address": "h4", "shell": "local"},
        },
    })  # fmt: skip
    one, two, bare, here = (inventory.hosts[name] for name in ("one", "two", "bare", "here"))
    assert one.ssh is not None
    assert two.ssh is not None
    assert (one.ssh.user, one.ssh.port, one.group, one.labels) == ("defib", 22, "gpu", {"site": "a"})
    assert one.ssh.key_file == tmp_path / "id"  # relative to the file that has it
    assert (two.ssh.user, two.ssh.port, two.sudo.mode, two.labels) == ("root", 2222, "passwordless", {"site": "b"})
    assert [name for name, each in one.collect if each is not None] == ["system", "gpu"]
    assert [name for name, each in bare.collect if each is not None] == ["gpu"]
    assert (here.ssh, here.group) == (None, "gpu")


def test_what_is_not_enabled_is_left_out(tmp_path: Path) -> None:
    probe = {"tcp": {"address": "h:1"}}
    inventory = expanded(tmp_path, {
        "hosts": {"gone-[1-2]": {"address": "h", "enabled": False}, "gone-2": {"enabled": True}},
        "services": {
            "off": {"probe": probe, "enabled": False}, "on_gone": {"probe": probe, "host": "gone-1"},
            "kept": {"probe": probe, "depends_on": ["off", "on_gone", "other"]}, "other": {"probe": probe},
        },
    })  # fmt: skip
    assert (list(inventory.hosts), list(inventory.services)) == (["gone-2"], ["kept", "other"])
    assert inventory.services["kept"].depends_on == ["other"]


def test_maintenance_of_what_is_not_enabled_is_left_out(tmp_path: Path) -> None:
    times = {"from": "01:00", "to": "02:00"}
    scopes = [
        {"host": "gone"},
        {"host": "kept"},
        {"group": "old"},
        {"service": "off"},
        {"service": "on_gone"},
        {"group": "new"},
    ]
    probe = {"tcp": {"address": "h:1"}}
    inventory = expanded(tmp_path, {
        "hosts": {"gone": {"address": "h", "group": "old", "enabled": False}, "kept": {"address": "h", "group": "new"},
                  "gone-too": {"address": "h", "group": "new", "enabled": False}},
        "services": {"off": {"probe": probe, "enabled": False}, "on_gone": {"probe": probe, "host": "gone"}},
        "remediation": {"maintenance": [{**scope, **times} for scope in scopes]},
    })  # fmt: skip
    assert [(each.host, each.group) for each in inventory.remediation.maintenance] == [("kept", None), (None, "new")]


def test_errors_name_the_place_beside_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, a="""
        hosts:
          gone: {address: h, enabled: false}
          kept:
            address: h
            ssh: {via: gone}
        services:
          down: {probe: {tcp: {address: "h:1"}}, enabled: false}
          up: {probe: {tcp: {address: "h:1"}}, depends_on: [down, other]}
        remediation:
          maintenance:
            - {host: gone, from: "01:00", to: "02:00"}
            - {host: kept, from: "01:00", to: "26:00"}
        """)  # fmt: skip
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path, KINDS)
    assert [str(each).removeprefix(f"{tmp_path}/") for each in error.value.problems] == [
        "a.yaml:5: hosts.kept.ssh.via: the host 'gone' is not enabled",
        "a.yaml:8: services.up.depends_on[1]: there is no service 'other'",
        "a.yaml:12: remediation.maintenance[1].to: '26:00' is not a time of day; write '02:30', in quotes",
    ]


def test_sections_for_anchors_are_ignored(tmp_path: Path) -> None:
    write(
        tmp_path, a="x-probe: &p {every: 7s, tcp: {address: 'h:1'}}\nservices: {a: {probe: *p}, b: {probe: {<<: *p}}}"
    )
    loaded = load(tmp_path, KINDS)
    assert [each.probe.every for each in loaded.inventory.services.values()] == [7.0, 7.0]


def test_anchors_of_sections_for_them_are_known_in_all_files(tmp_path: Path) -> None:
    """Also in files before; values keep their directory and line, and an anchor of the file itself comes first."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "token").write_text("t0psecret")
    write(tmp_path, a="""
        services:
          a: {probe: {<<: *p, every: 9s}}
          b: {probe: *p}
          c: {team: &own "of a", probe: *p, category: *own}
        """, b="x-b: &own {probe: *p}\nservices: {d: *own}\nhosts: {h: &h {address: 127.0.0.1, shell: local}}")  # fmt: skip
    (tmp_path / "shared" / "anchors.yaml").write_text(
        "\nx-probe:\n- &p\n  every: 7s\n  http: {url: 'http://h/', auth: {bearer: '${file:token}'}}\n"
    )
    loaded = load(tmp_path, KINDS)
    services = loaded.inventory.services
    assert {name: each.probe.every for name, each in services.items()} == {"a": 9.0, "b": 7.0, "c": 7.0, "d": 7.0}
    assert services["c"].category == "of a"
    assert loaded.secrets == {"t0psecret"}
    assert str(read_expanded(tmp_path).find_origin(("services", "b", "probe", "every"))).endswith("anchors.yaml:4")


def problems_with_anchors(folder: Path, **files: str) -> list[str]:
    write(folder, **files)
    with pytest.raises(ConfigurationError) as error:
        load(folder, KINDS)
    return [str(each).replace(f"{folder}/", "") for each in error.value.problems]


def test_errors_in_what_anchors_of_other_files_share(tmp_path: Path) -> None:
    assert problems_with_anchors(
        tmp_path,
        a="services:\n  a: {probe: *p}\n  b: {probe: *p}",
        b="x-p:\n  p: &p\n    every: soon\n    tcp: {address: 'h:1'}",
    ) == [
        f"b.yaml:3: services.{name}.probe.every: 'soon' is not a duration; write 500ms, 10s, 5m, 1h30m or 7d"
        for name in ("a", "b")
    ]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"a": "services: {a: *x}", "b": "x-1: &x {}", "c": "x-2:\n  &x {}"},
            "a.yaml:1: invalid YAML: the anchor &x is defined twice: at b.yaml:1 and c.yaml:2",
        ),
        (
            {"a": "services: {a: *x}", "b": "hosts: {h: &x {address: h}}\nx-1: {}"},
            "a.yaml:1: invalid YAML: a value that starts with '*' must be in quotes (there is no anchor &x)",
        ),
        (
            {"a": "services: {a: *x}", "b": "x-1: &x [*x]"},
            "a.yaml:1: an alias refers to the value that contains it",
        ),
    ],
)
def test_anchors_that_cannot_be_used(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    assert problem in problems_with_anchors(tmp_path, **files)


def test_what_yaml_aliases_share_is_expanded_for_each_user(tmp_path: Path) -> None:
    write(tmp_path, a="""
        templates: {page: {parameters: {url: null}, service: {probe: {http: {url: "{url}"}}}}}
        hosts:
          gone: &gone {address: a, shell: local, enabled: false}
          gone-too: *gone
          h1: &host {address: a1, shell: local, templates: {page: {url: "http://h/"}}}
          h2: *host
        services:
          down: &down {probe: {tcp: {address: "h:1"}}, enabled: false}
          down-too: *down
          a: &page {template: page, parameters: {url: "http://{service}/"}}
          b: *page
          c: &own {host: h1, probe: {http: {url: "http://{service}/"}}, control: {command: {restart: ["{service}"]}}}
          d: *own
        """)  # fmt: skip
    inventory = load(tmp_path, KINDS).inventory
    assert list(inventory.hosts) == ["h1", "h2"]
    assert {name: str(each.probe.options.url) for name, each in inventory.services.items()} == {
        "a": "http://a/", "b": "http://b/", "c": "http://c/", "d": "http://d/",
        "page-h1": "http://h/", "page-h2": "http://h/",
    }  # fmt: skip
    assert [inventory.services[name].target for name in ("c", "d")] == ["command:c", "command:d"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hosts: {'h[3-1]': {address: a}}", "a.yaml:1: hosts.h[3-1]: the range ends before it begins"),
        ("hosts: {'h[1-999999]': {address: a}}", "a.yaml:1: hosts.h[1-999999]: all ranges together have more than 100000 hosts"),
        ("hosts: {'r[1-2]-n[1-2]': {address: a}}", "a.yaml:1: hosts.r[1-2]-n[1-2]: a name may have only one range"),
        ("hosts: {'h[1-3]': {address: a}, 'h[3-4]': {address: a}}", "a.yaml:1: hosts.h[3-4]: the range h[1-3] has the host h3, too"),
        ("hosts:\n  'h[1-3]':\n    adress: a", "a.yaml:3: hosts.h[1-3].adress: unknown key; did you mean address? (in hosts.h1 and 2 more)"),
        ("defaults: {host: {ssh: {prot: 1}}}\nhosts: {a: {address: a}}", "a.yaml:1: defaults.host.ssh.prot: unknown key; did you mean port?"),
        ("defaults: {groups: {g: {sudo: maybe}}}\nhosts: {a: {address: a, group: g}}", "a.yaml:1: defaults.groups.g.sudo: must be none, passwordless or {password: …}, not 'maybe'"),
        ("defaults: {host: {collect: {gpu: {}}}}\nhosts: {'h[1-3]': {address: a, shell: local}}", "a.yaml:1: defaults.host.collect.gpu.every: is missing"),
        ("hosts: {a: {address: a, templates: {t: true}}}", "a.yaml:1: hosts.a.templates.t: there is no template 't'"),
        ("hosts: {a: {address: a, templates: [t]}}", "a.yaml:1: hosts.a.templates: must be a map, not a list"),
        ("hosts: {a: {address: a, templates: t}}", "a.yaml:1: hosts.a.templates: must be a map, not 't'"),
        ("defaults: {host: {templates: [t]}}\nhosts: {a: {address: a}}", "a.yaml:1: defaults.host.templates: must be a map, not a list"),
        ("services: {a: {template: t}}", "a.yaml:1: services.a.template: there is no template 't'"),
        ("{templates}\nservices: {{a: {{template: t, parameters: {{x: 1}}}}}}", "a.yaml:2: services.a.parameters.x: the template t has no such parameter (known: port)"),
        ("{templates}\nservices: {{a: {{template: t}}}}", "a.yaml:2: services.a.parameters: the parameter port of the template t has no value"),
        ("{templates}\nservices: {{a: {{template: t, parameters: }}}}", "a.yaml:2: services.a.parameters: must be a map of parameters (it is empty)"),
        ("{templates}\nhosts: {{a: {{address: a, templates: {{t: 7}}}}}}", "a.yaml:2: hosts.a.templates.t: must be a map of parameters, or true or false"),
        (
            "templates: {t: {for_hosts: {}, service: {probe:\n {http: {url: 7}}}}}\nhosts: {'h[1-3]': {address: a}}",
            "a.yaml:2: templates.t.service.probe.http.url: must be a string, not 7 (in services.t-h1 and 2 more)",
        ),
        (
            "templates: {t: {for_hosts: {}, id: x, service: {probe: {tcp: {address: 'h:1'}}}}}\nhosts: {'h[1-3]': {address: a}}",
            "a.yaml:1: templates.t.id: the template t makes the service x, too",
        ),
        ("templates: {t: {service: {probe: {}}, for_host: {}}}", "a.yaml:1: templates.t.for_host: unknown key; did you mean for_hosts?"),
        (
            "templates: {t: {service: {template: u, probe: {tcp: {address: 'h:1'}}}}}\nservices: {a: {template: t}}",
            "a.yaml:1: templates.t.service.template: a template cannot use another template",
        ),
        (
            "templates: {t: {service: {parameters: {a: 1}, probe: {tcp: {address: 'h:1'}}}}}",
            "a.yaml:1: templates.t.service.parameters: belongs beside `service`, not in it",
        ),
        ("templates: {t: {service: {prob: {}}}}", "a.yaml:1: templates.t.service.prob: unknown key; did you mean probe?"),
        *(
            (f"templates: {{t: {{parameters: {{{name}: 1}}, service: {{}}}}}}", f"a.yaml:1: templates.t.parameters.{name}: {problem}")
            for name, problem in {
                "service": "{service} is the ID of the service; choose another name",
                "component": "{component} is a component of the http control; choose another name",
                "n": "{n} is the number of a host in a range; choose another name",
                "host.name": "'host.name' is not a valid name; it must match ^[a-zA-Z_][a-zA-Z0-9_]*$",
            }.items()
        ),
        ("services: {a: {enabled: maybe, probe: {tcp: {address: 'h:1'}}}}", "a.yaml:1: services.a.enabled: must be true or false"),
    ],
)  # fmt: skip
def test_each_error_names_the_template_and_who_uses_it(tmp_path: Path, text: str, problem: str) -> None:
    template = "templates: {t: {parameters: {port: null}, service: {probe: {tcp: {address: 'h:{port}'}}}}}"
    write(tmp_path, a=text.format(templates=template) if "{templates}" in text else text)
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path, KINDS)
    assert problem in [str(each).removeprefix(f"{tmp_path}/") for each in error.value.problems]


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ("for_hosts: {group: gpus}, ", "templates.t.for_hosts: no host matches: the template makes no services"),
        ("", "templates.t: nothing uses it: the template makes no services"),
    ],
)
def test_a_template_without_services_is_warned_of(tmp_path: Path, keys: str, warning: str) -> None:
    template = f"templates: {{t: {{{keys}service: {{probe: {{tcp: {{address: 'h:1'}}}}}}}}}}"
    write(tmp_path, a=template)
    assert [str(each) for each in load(tmp_path, KINDS).warnings] == [f"{tmp_path}/a.yaml:1: {warning}"]
    write(tmp_path, b="services: {s: {template: t}}")
    assert load(tmp_path, KINDS).warnings == []


def test_references_in_templates_and_defaults_are_resolved_where_they_are_used(tmp_path: Path) -> None:
    text = """
defaults: {host: {ssh: {user: u}, sudo: {password: "${SUDO}"}}}
templates:
  t:
    for_hosts: {}
    service:
      probe: {http: {url: "http://{host.address}/", auth: {bearer: "${TOKEN}"}}}
hosts: {h: {address: a}}
"""
    write(tmp_path, a=text)
    exporter: LoadedInventory = load(tmp_path, KINDS, programs=["exporter"], environ={"TOKEN": "a-secret-token"})
    assert "a-secret-token" in exporter.secrets
    both = load(tmp_path, KINDS, environ={"TOKEN": "a-secret-token", "SUDO": "a-password"})
    assert {"a-secret-token", "a-password"} <= both.secrets
    with pytest.raises(ConfigurationError, match=r"templates\.t\.service\.probe\.http\.auth\.bearer.*TOKEN is not set"):
        load(tmp_path, KINDS, environ={"SUDO": "a-password"})


def test_files_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path, templates__t="""
        templates:
          t:
            parameters: {key: "${file:default}", header: null}
            service:
              probe:
                http:
                  url: http://h/
                  auth: {bearer: "{key}"}
                  headers: {X-Whole: "{header}", X-Mixed: "a {header} ${file:default}"}
        """, services__a="""
        services:
          a: {template: t, parameters: {key: "${file:own}", header: "${file:../top} ${file:own} $${file:own}"}}
          b: {template: t, parameters: {header: "${file:/dev/null/../own}"}}
        """)  # fmt: skip
    for name in ("templates/default", "services/own", "top"):
        (tmp_path / name).write_text(f"the-{Path(name).name}")
    folder = tmp_path / "services"
    (folder / "a.yaml").write_text((folder / "a.yaml").read_text().replace("/dev/null/..", str(folder)))
    services = load(tmp_path, KINDS).inventory.services
    a, b = (services[name].probe.options for name in ("a", "b"))
    assert (a.auth.bearer.get_secret_value(), b.auth.bearer.get_secret_value()) == ("the-own", "the-default")
    assert {name: each.get_secret_value() for name, each in a.headers.items()} == {
        "X-Whole": "the-top the-own ${file:own}", "X-Mixed": "a the-top the-own ${file:own} the-default",
    }  # fmt: skip
    assert b.headers["X-Mixed"].get_secret_value() == "a the-own the-default"


def test_references_are_no_placeholders(tmp_path: Path) -> None:
    write(tmp_path, a="""
        templates: {t: {parameters: {port: 80}, service: {name: "${port} $${port} {port}", probe: {tcp: {address: "h:1"}}}}}
        hosts: {"h[1-1]": {address: a, labels: {x: "${n} $${n} {n}"}}}
        services: {s: {template: t}}
        """)  # fmt: skip
    inventory = load(tmp_path, KINDS, environ={"port": "a", "n": "b"}).inventory
    assert inventory.services["s"].name == "a ${port} 80"
    assert inventory.hosts["h1"].labels == {"x": "b ${n} 1"}


def test_the_resolved_configuration_says_where_each_value_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, hosts="""
        defaults: {host: {ssh: {user: u}, thresholds: {load: {critical: 16}}}, thresholds: {slowdown: off}}
        hosts:
          h-[1-2]: {address: a}
          h-2: {thresholds: {memory: {warning: 70%}}}
        """, services="""
        templates:
          t:
            for_hosts: {names: h-2}
            service:
              probe: {http: {url: "http://{host.address}/", headers: {X-Key: a-literal-secret}}}
          unused: {service: {probe: {http: {url: "http://h/", headers: {X-Key: another-secret}}}}}
        services:
          t-h-2:
            severity: info
        """)  # fmt: skip
    assert check(lambda: load(tmp_path, KINDS), tmp_path, None, show=True, as_json=False) == 0
    shown = capsys.readouterr().out
    loaded = yaml.safe_load(shown)  # with its comments
    assert loaded["hosts"]["h-2"]["ssh"]["user"] == "u"
    lines = [line.strip() for line in shown.splitlines()]
    for line in (
        "h-2:  # hosts.yaml:4", "address: a  # hosts.yaml:3", "user: u  # hosts.yaml:1",
        "critical: 16  # hosts.yaml:1", "warning: 70%  # hosts.yaml:4", "warning: 4", "slowdown:  # hosts.yaml:1",
        "severity: info  # services.yaml:9", "url: http://a/  # services.yaml:5",
    ):  # fmt: skip
        assert line in lines, shown
    assert "fail_after: 3" in lines  # a default
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("text", "section", "problem"),
    [
        ("hosts: {'h[1-2]': {address: a, ssh: {user: '${GONE}'}}}", "hosts.h2", "hosts.h[1-2].ssh.user: …"),
        ("defaults: {host: {ssh: {user: '${GONE}'}}}\nhosts: {h: {address: a}}", "hosts.h", "defaults.host.ssh.user: …"),
        ("defaults: {groups: {g: {sudo: {password: '${GONE}'}}}}\nhosts: {h: {address: a, shell: local, group: g}}", "hosts.h", "defaults.groups.g.sudo.password: …"),
        ("{template}\nhosts: {{h: {{address: a, shell: local, templates: {{t: true}}}}}}", "services.t-h.control", "templates.t.service.control.command.restart[1]: …"),
        ("{template}\nservices: {{s: {{template: t, host: h}}, other: {{template: t, host: h}}}}\nhosts: {{h: {{address: a, shell: local}}}}", "services.s.control", "templates.t.service.control.command.restart[1]: …"),
    ],
)  # fmt: skip
def test_unresolved_references_are_found_where_they_are_used(
    tmp_path: Path, text: str, section: str, problem: str
) -> None:
    template = "templates: {t: {service: {probe: {tcp: {address: 'h:1'}}, control: {command: {restart: [rm, '${GONE}/cache']}}}}}"
    write(tmp_path, a=text.format(template=template) if "{template}" in text else text)
    lenient = load(tmp_path, KINDS, environ={}, strict=False)
    with pytest.raises(ConfigurationError) as error:
        lenient.require_resolved(section)
    problem = problem.replace("…", f"the environment variable GONE is not set (in {section.removesuffix('.control')})")
    assert [str(each) for each in error.value.problems] == [f"{tmp_path}/a.yaml:1: {problem}"]
    lenient.require_resolved("notify", "services.s.probe", "hosts.other")
    lenient.require_resolved(section, ignore=[section])
