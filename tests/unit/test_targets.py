"""Services that a template makes for the targets of files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import load_problems, loaded, write

CONFIGURATION = """
    hosts:
      db: {address: 10.0.0.5, shell: local}
      one: {address: 10.0.0.8}
      other: {address: 10.0.0.8}
    templates:
      node:
        parameters: {team: ops, rack: null}
        service:
          name: "{target.host} in {rack}"
          team: "{team}"
          probe: {tcp: {address: "{target}"}}
    services_from:
      nodes: {file: targets/*.json, template: node, parameters: {rack: r1}}
    services:
      node-10.0.0.6-9100: {enabled: false}
      node-10.0.0.7-9100: {severity: warning}
"""


def configure(folder: Path, **files: Any) -> Path:
    """Write the configuration, and files with targets: lists, or their text."""
    write(folder, defib=CONFIGURATION)
    (folder / "targets").mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "targets" / f"{name}.json").write_text(text)
    return folder


def test_each_target_makes_a_service(tmp_path: Path) -> None:
    configure(
        tmp_path,
        a=[
            {"targets": ["10.0.0.5:9100", "10.0.0.6:9100", "10.0.0.5:9100"], "labels": {"team": "web", "unused": "x"}},
            {"targets": ["10.0.0.8:9100", "[fd00::1]:9100"]},
        ],
        b='[\n\t{"targets": ["10.0.0.7:9100"], "labels": null}\n]',
        c=[],
    )
    services = loaded(tmp_path).inventory.services
    assert {
        name: (each.name, each.host, each.team, each.severity, each.probe.options.address)
        for name, each in services.items()
    } == {
        "node-10.0.0.5-9100": ("10.0.0.5 in r1", "db", "web", "critical", "10.0.0.5:9100"),
        "node-10.0.0.7-9100": ("10.0.0.7 in r1", "", "ops", "warning", "10.0.0.7:9100"),
        "node-10.0.0.8-9100": ("10.0.0.8 in r1", "", "ops", "critical", "10.0.0.8:9100"),  # of two hosts
        "node-fd00-1-9100": ("fd00::1 in r1", "", "ops", "critical", "[fd00::1]:9100"),
    }


def test_labels_are_data(tmp_path: Path) -> None:
    """They are no references to files and variables."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret-of-somebody")
    labels = {"team": f"${{file:{secret}}} ${{HOME}} $${{x"}
    configure(tmp_path, a=[{"targets": ["h:1"], "labels": labels}])
    assert loaded(tmp_path).inventory.services["node-h-1"].team == labels["team"]


@pytest.mark.parametrize("before", ["$", "$$", "a$", "${", "$${"])
def test_labels_side_by_side_are_data(tmp_path: Path, before: str) -> None:
    """They make no references and placeholders together, nor with the text of the template."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret-of-somebody")
    template = {
        "parameters": {"a": "", "b": "", "c": ""},
        "service": {"name": "{a}{b} {a}{service}", "probe": {"http": {"url": "http://{target}/{a}{b}{c}{a}{service}"}}},
    }
    labels = {"a": before, "b": f"{{file:{secret}}}", "c": "{host.name}{HOME}"}
    targets = [{"targets": ["h:1"], "labels": labels}]
    write(
        tmp_path,
        a=yaml.safe_dump({"templates": {"t": template}, "services_from": {"s": {"file": "t.json", "template": "t"}}}),
    )
    (tmp_path / "t.json").write_text(json.dumps(targets))
    known = loaded(tmp_path)
    (service,) = known.inventory.services.values()
    assert service.name == f"{labels['a']}{labels['b']} {before}t-h-1"
    path = f"{before}{labels['b']}{labels['c']}{before}t-h-1"
    assert str(service.probe.options.model_dump()["url"]) == f"http://h:1/{path}"
    assert known.secrets == set()


def test_a_target_changes_no_service_that_has_a_probe(tmp_path: Path) -> None:
    """Keys that are written for its own service change that."""
    template = {
        "id": "{name}", "parameters": {"name": None, "box": ""},
        "service": {"probe": {"tcp": {"address": "{target}"}}, "control": {"docker": {"container": "{box}"}}},
    }  # fmt: skip
    write(tmp_path, a=yaml.safe_dump({
        "hosts": {"h": {"address": "h", "shell": "local"}},
        "templates": {"t": template, "page": {"service": {"probe": {"tcp": {"address": "page:1"}}}}},
        "services": {
            "billing": {"host": "h", "probe": {"tcp": {"address": "b:1"}}}, "wiki": {"template": "page"},
            "mine": {"probe": {"every": "7s"}, "host": "h"},
        },
        "services_from": {"s": {"file": "t.json", "template": "t"}},
    }))  # fmt: skip
    entries = [
        {"targets": [f"{name}:1"], "labels": {"name": name, "box": "other"}} for name in ("billing", "wiki", "mine")
    ]
    (tmp_path / "t.json").write_text(json.dumps(entries))
    problems = [each.replace(f"{tmp_path}/", "") for each in load_problems(tmp_path)]
    assert [each.split(", which")[0] for each in problems] == [
        f"t.json:1: the target {name}:1 would change the service {name}" for name in ("billing", "wiki")
    ]
    (tmp_path / "t.json").write_text(json.dumps(entries[2:]))
    assert loaded(tmp_path).inventory.services["mine"].probe.every == 7.0


def test_a_wrong_key_of_a_service_is_an_error_also_with_sources(tmp_path: Path) -> None:
    configure(tmp_path, a=[{"targets": ["h:1"]}])
    write(tmp_path, b="services: {billing: {prob: {tcp: {address: 'b:1'}}}}")
    assert any("services.billing.prob: unknown key; did you mean probe?" in each for each in load_problems(tmp_path))


def test_the_name_of_a_host_has_a_limit(tmp_path: Path) -> None:
    """Before it is encoded, which takes seconds for a long one."""
    configure(tmp_path, a=[{"targets": ["".join(map(chr, range(0x4E00, 0x4E00 + 1900))) + ":1"]}])
    (problem,) = load_problems(tmp_path)
    assert "probe.tcp.address: the name of the host is longer than 253 characters" in problem


def test_ids_of_unusual_targets(tmp_path: Path) -> None:
    long = f"https://{'x' * 80}.example/a"
    targets = ["https://Wiki.Example:8443/start?a=b", long, f"{long}b"]
    write(
        tmp_path,
        defib="""
            templates:
              page: {service: {probe: {http: {url: "{target}"}}}}
              port: {id: "{name}-{target.port}", parameters: {name: null}, service: {probe: {tcp: {address: "{target}"}}}}
            services_from:
              pages: {file: [pages.yml], template: page}
              ports: {file: ["*/ports.yaml"], template: port}
        """,
        d__ports="[{targets: ['h:22'], labels: {name: Host A}}]",
    )
    (tmp_path / "pages.yml").write_text(f"- targets: {json.dumps(targets)}\n")
    services = loaded(tmp_path).inventory.services
    assert sorted(name[:20] for name in services) == [
        "host-a-22", "page-wiki.example-84", "page-xxxxxxxxxxxxxxx", "page-xxxxxxxxxxxxxxx",
    ]  # fmt: skip
    assert services["page-wiki.example-8443-start-a-b"].probe.options.url == targets[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "a.json: is empty; write [] if it has no targets"),
        ("{", "a.json:1: invalid YAML: did not find expected node content"),
        ("{}", "a.json:1: must be a list: [{targets: [host:port], labels: {name: value}}]"),
        ('[{"targets": ["h:1"]},\n{"labels": {}}]', "a.json:2: `targets` must be a list of addresses, such as [10.0.0.5:9100]"),
        ('[{"targets": [1]}]', "a.json:1: `targets` must be a list of addresses, such as [10.0.0.5:9100]"),
        ('[{"targets": ["h\\u0007:1"]}]', "a.json:1: `targets` must be a list of addresses, such as [10.0.0.5:9100]"),
        ('[{"targets": ["h:1"], "labels": {"rack": 1}}]', "a.json:1: `labels` must be a map of texts; write numbers in quotes"),
        ('[{"targets": ["h:1"], "labels": ["rack"]}]', "a.json:1: `labels` must be a map of texts; write numbers in quotes"),
        (
            '[{"targets": ["h:1"]},\n{"targets": ["H:1"]}]',
            "a.json:2: the target h:1 makes the service node-h-1, too",
        ),
        (
            '[\n{"targets": ["h"]}]',
            "defib.yaml:11: templates.node.service.probe.tcp.address: 'h' is not an address; write host:port or [v6]:port (in services.node-h from targets/a.json:2)",
        ),
        (f'[{{"targets": ["h:1"]}},\n{{"targets": [{"0," * 9_999}0]}}]'.replace("0", '"h"'), "a.json:2: there are more than 10000 targets up to here"),
        ("[&a [*a]]", "a.json:1: an alias refers to the value that contains it"),
        ("[" * 200 + "]" * 200, "a.json:1: nesting is deeper than 100 levels"),
        ("- " * 30_000 + "a", "a.json:1: nesting is deeper than 100 levels"),
        ("? " * 30_000 + "a", "a.json:1: nesting is deeper than 100 levels"),
        ("- !!bool maybe", "a.json:1: invalid YAML: a value does not have the form of its type: 'maybe'"),
        ('- !!int ""', "a.json:1: invalid YAML: a value does not have the form of its type: string index out of range"),
        ("- !!timestamp x", "a.json:1: invalid YAML: a value does not have the form of its type: 'NoneType' object has no attribute 'groupdict'"),
        ("- 2026-02-31", "a.json:1: invalid YAML: a value does not have the form of its type: day is out of range for month"),
        (f"- 1{':0' * 250}:0.5", "a.json:1: invalid YAML: a value does not have the form of its type: int too large to convert to float"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_the_line(tmp_path: Path, content: str, problem: str) -> None:
    configure(tmp_path, a=content)
    folder = f"{tmp_path}/"
    problems = [each.replace(f"{folder}targets/a.json:", "a.json:") for each in load_problems(tmp_path)]
    assert [
        each.replace(f"from {folder}", "from ").replace("from a.json", "from targets/a.json") for each in problems
    ] == [problem]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"file": "a.json", "template": "other"}, "template: there is no template 'other'"),
        ({"file": "a.json"}, "template: is missing"),
        ({"template": "page"}, ": must have exactly one of file, http"),
        ({"file": "a.json", "template": "page", "parameters": {"x": 1}}, "parameters.x: the template page has no such parameter (known: team)"),
        ({"file": "missing.json", "template": "page"}, "missing.json: cannot be read: No such file or directory"),
        ({"file": "folder", "template": "page"}, "folder: is not a file"),
        ({"file": "t\0.json", "template": "page"}, "file: a path cannot contain a null character"),
        ({"http": "ftp://h/", "template": "page"}, "http.url: is not a URL; write http://host:port/path"),
        ({"file": "b.json", "template": "page"}, "b.json:1: the target h:1 has no label team, which the template page needs"),
    ],
)  # fmt: skip
def test_errors_of_a_source(tmp_path: Path, source: dict[str, Any], problem: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text('[{"targets": ["h:1"]}]')
    page = {"parameters": {"team": None}, "service": {"team": "{team}", "probe": {"tcp": {"address": "{target}"}}}}
    write(tmp_path, defib=json.dumps({"templates": {"page": page}, "services_from": {"s": source}}))
    problems = [
        each.replace(f"{tmp_path}/", "").replace("services_from.s.", "").replace("services_from.s", "")
        for each in load_problems(tmp_path)
    ]
    assert [each.removeprefix("defib.yaml:1: ") for each in problems] == [problem]


def test_a_list_that_no_source_names_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, defib="services: {}", other="- targets: ['h:1']")
    assert load_problems(tmp_path) == ["other.yaml:1: a configuration file must be a map (hosts:, services:, …)"]


def test_a_source_without_targets_is_a_warning(tmp_path: Path) -> None:
    configure(tmp_path)
    assert [f"{each.path}: {each.message}" for each in loaded(tmp_path).warnings if "target" in each.message] == [
        "services_from.nodes: it has no targets and makes no services",
        "services.node-10.0.0.7-9100: has no probe, and no target makes this service: it is left out",
    ]


def test_files_that_everyone_can_change_are_reported(tmp_path: Path) -> None:
    configure(tmp_path, a=[])
    assert tmp_path / "targets" / "a.json" in loaded(tmp_path).files


def test_a_file_of_ten_thousand_targets(tmp_path: Path) -> None:
    targets = [f"10.1.{number // 256}.{number % 256}:9100" for number in range(10_000)]
    configure(tmp_path, a=[{"targets": targets}])
    assert len(loaded(tmp_path).inventory.services) == len(targets)
