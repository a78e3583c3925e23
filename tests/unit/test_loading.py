"""Loading the configuration: one bad file per rule with its exact error, and good ones."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from defib.kinds import KINDS
from fleet.inventory.schema import json_schema
from tests.forked_defib import run_defib
from tests.support import load_problems, loaded, write

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
STATUS = "services: {{tc: {{probe: {{status: {{url: 'http://h/', components: {{each: $, up: {{$.a: 1}}, values: {values}}}}}}}}}}}"
COMPONENTS = """services: {{tc: {{probe: {{status: {{url: 'http://h/', components: {{each: $, up: {{$.a: 1}}}}}}}},
  control: {{http: {http}}}}}}}"""
SERVICE = "probe: {http: {url: 'http://h/'}}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("servces: {}", "a.yaml:1: servces: unknown key; did you mean services?"),
        (
            "services:\n  web:\n    probe:\n      evry: 3s\n      http: {url: 'http://h/'}",
            "a.yaml:4: services.web.probe.evry: unknown key; did you mean every?",
        ),
        (
            "services:\n  web: {probe: {http: {url: 'http://h/', expct: {}}}}",
            "a.yaml:2: services.web.probe.http.expct: unknown key; did you mean expect?",
        ),
        ("services: {web: {name: x}}", "a.yaml:1: services.web.probe: is missing"),
        (
            "services: {web: {probe: {every: 3, http: {url: 'http://h/'}}}}",
            "a.yaml:1: services.web.probe.every: 3 is not a duration; write 500ms, 10s, 5m, 1h30m or 7d",
        ),
        (
            "services: {web: {probe: {every: 0s, http: {url: 'http://h/'}}}}",
            "a.yaml:1: services.web.probe.every: must be greater than 0",
        ),
        (
            "services: {web: {probe: {every: 3s}}}",
            "a.yaml:1: services.web.probe: must have exactly one of http, tcp, udp, tls, dns, icmp, grpc, websocket, openai, container, unit, program, port, file, command, status, python, heartbeat",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/'}, tcp: {address: 'h:1'}}}}",
            "a.yaml:1: services.web.probe: must have exactly one of http, tcp, udp, tls, dns, icmp, grpc, websocket, openai, container, unit, program, port, file, command, status, python, heartbeat, not http and tcp",
        ),
        (
            "services: {Web: {" + SERVICE + "}}",
            "a.yaml:1: services.Web: 'Web' is not a valid name; it must match ^[a-z0-9][a-z0-9._-]{0,62}$",
        ),
        (
            "services: {web: {probe: {http: {url: 'h/'}}}}",
            "a.yaml:1: services.web.probe.http.url: is not a URL; write http://host:port/path",
        ),
        (
            r"services: {web: {probe: {http: {url: 'http://a\b/'}}}}",
            "a.yaml:1: services.web.probe.http.url: is not a URL: the name of its host is not valid",
        ),
        (
            r"services: {web: {probe: {websocket: {url: 'ws://a\b/'}}}}",
            "a.yaml:1: services.web.probe.websocket.url: is not a URL: the name of its host is not valid",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/', expect: {headers: {X-A: {optional: true}}}}}}}",
            "a.yaml:1: services.web.probe.http.expect.headers.X-A: can never fail: add matches or lacks, or remove `optional: true`",
        ),
        (
            "services: {web: {host: h, probe: {http: {url: 'http://{host.adress}/'}}}}",
            "a.yaml:1: services.web.probe.http.url: unknown placeholder {host.adress} (known: {host.address}, {host.name}, {service})",
        ),
        (
            "services: {web: {probe: {tcp: {address: h}}}}",
            "a.yaml:1: services.web.probe.tcp.address: 'h' is not an address; write host:port or [v6]:port",
        ),
        (
            "services: {web: {probe: {tcp: {address: 'http://h:25'}}}}",
            "a.yaml:1: services.web.probe.tcp.address: 'http://h:25' is not an address; write host:port or [v6]:port",
        ),
        *(
            (
                "services: {web: {probe: {tcp: {address: 'h:1', dialogue: [{send_bytes: " + written + "}]}}}}",
                'a.yaml:1: services.web.probe.tcp.dialogue[0].send_bytes: must be 1 to 65536 bytes in hexadecimal, in quotes (write "00 1f")',
            )
            for written in ("0x1f", "'0'", "''", "500")
        ),
        *(
            (
                "services: {web: {probe: {grpc: {address: 'h:1', metadata: " + metadata + "}}}}",
                f"a.yaml:1: services.web.probe.grpc.metadata: {problem}",
            )
            for metadata, problem in (
                ("{X-Key: a, x-key: b}", "has a name twice: upper and lower case are the same"),
                ("{'a b': c}", "'a b' is not a name of metadata: use letters, digits, _ . and -"),
                ("{grpc-timeout: 1S}", "grpc-timeout cannot be set: gRPC sets it"),
                ("{TE: trailers}", "te cannot be set: gRPC sets it"),
                ('{x: "a\\nb"}', "x must be one line of printable ASCII characters without blanks at its ends"),
                ("{x-bin: '%'}", "x-bin must be base64, as its name ends in -bin"),
                ("{x: " + 9000 * "a" + "}", "is longer than 8192 bytes"),
            )
        ),
        *(
            (
                "services: {web: {probe: {openai: {url: 'http://h/', model: m, " + options + "}}}}",
                f"a.yaml:1: services.web.probe.openai: {problem}",
            )
            for options, problem in (
                ("max_tokens: 1, max_completion_tokens: 1", "max_tokens and max_completion_tokens exclude each other"),
                ("endpoint: models, prompt: x", "`endpoint: models` has no prompt"),
                ("endpoint: embeddings, stream: false", "`endpoint: embeddings` has no stream"),
                ("endpoint: models, expect: {body_matches: x}", "`endpoint: models` has no expect.body_matches"),
                ("expect: {dimensions: 3}", "`endpoint: chat` has no expect.dimensions"),
            )
        ),
        (
            "services: {web: {probe: {udp: {address: 'h:1', dialogue: [{expect: x}]}}}}",
            "a.yaml:1: services.web.probe.udp.dialogue: must begin with send or send_bytes: a server learns the address of a client from its datagram",
        ),
        (
            "services: {web: {probe: {udp: {address: 'h:1', dialogue: [{send: x}]}}}}",
            "a.yaml:1: services.web.probe.udp.dialogue: can never fail: add a step with expect or expect_bytes",
        ),
        *(
            (
                "services: {web: {probe: {tcp: {address: 'h:1', resolver: '" + written + "'}}}}",
                "a.yaml:1: services.web.probe.tcp.resolver: must be the IP address of a DNS server (write 192.0.2.53 or 192.0.2.53:5353)",
            )
            for written in ("ns.test", "192.0.2.53:0", "::1:x", "[::1]:99999", "")
        ),
        (
            "services: {web: {probe: {tcp: {address: 'h:25', tls: {key_file: a.yaml}}}}}",
            "a.yaml:1: services.web.probe.tcp.tls: key_file needs cert_file",
        ),
        (
            "hosts: {h: {address: h, ssh: {wrapper: true}, collect: {systemd: {every: 30s, units: ['mnt-a\\x2db.mount']}}}}",
            "a.yaml:1: hosts.h.collect: units: 'mnt-a\\\\x2db.mount' has characters that the host's wrapper does not accept (ssh.wrapper)",
        ),
        (
            "hosts: {h: {address: h, shell: local, collect: {gpu: 1ms}}}",
            "a.yaml:1: hosts.h.collect.gpu.every: must be at least 200ms",
        ),
        (
            "hosts: {h: {address: h, thresholds: {filesystem: {warning: 95%}}}}",
            "a.yaml:1: hosts.h.thresholds.filesystem: warning (95%) must be less than critical (90%, the default)",
        ),
        (
            "hosts: {h: {address: h, thresholds: {load: {warning: 9, critical: 8.5}}}}",
            "a.yaml:1: hosts.h.thresholds.load: warning (9) must be less than critical (8.5)",
        ),
        (
            "hosts: {h: {address: h, thresholds: {memory: {warning: 80}}}}",
            "a.yaml:1: hosts.h.thresholds.memory.warning: must be more than 0% and less than 100%, such as 80% or 0.8, not 80",
        ),
        (
            "hosts: {h: {address: h, thresholds: {memory: {warning: 80 %}}}}",
            "a.yaml:1: hosts.h.thresholds.memory.warning: must be more than 0% and less than 100%, such as 80% or 0.8, not '80 %'",
        ),
        (
            "hosts: {h: {address: h, thresholds: {load: {warning: on}}}}",
            "a.yaml:1: hosts.h.thresholds.load.warning: must be a number greater than 0, such as 4, not True",
        ),
        (
            "hosts: {h: {address: h, thresholds: {load: {warning: 0}}}}",
            "a.yaml:1: hosts.h.thresholds.load.warning: must be a number greater than 0, such as 4, not 0",
        ),
        (
            "hosts: {h: {address: h, thresholds: {gpu_temperature: {critical: 95}}}}",
            "a.yaml:1: hosts.h.thresholds.gpu_temperature.critical: unknown key (known: warning)",
        ),
        (
            "hosts: {h: {address: h, thresholds: {disk: off}}}",
            "a.yaml:1: hosts.h.thresholds.disk: unknown key; did you mean disk_queue?",
        ),
        (
            "hosts: {h: {address: h, thresholds: {clock_offset: 1s}}}",
            "a.yaml:1: hosts.h.thresholds.clock_offset: must be a map, not '1s'",
        ),
        (
            "hosts: {h: {address: h, thresholds: {clock_offset: {warning: 1}}}}",
            "a.yaml:1: hosts.h.thresholds.clock_offset.warning: 1 is not a duration; write 500ms, 10s, 5m, 1h30m or 7d",
        ),
        (
            "services: {web: {" + SERVICE + ", thresholds: {certificate: {warning: 5d}}}}",
            "a.yaml:1: services.web.thresholds.certificate: warning (5d) must be greater than critical (7d, the default)",
        ),
        (
            "services: {web: {" + SERVICE + ", thresholds: {certificate: {warning: 0s}}}}",
            "a.yaml:1: services.web.thresholds.certificate.warning: must be greater than 0",
        ),
        (
            "services: {web: {" + SERVICE + ", thresholds: {slowdown: {warning: 1}}}}",
            "a.yaml:1: services.web.thresholds.slowdown.warning: must be a number greater than 1, such as 3, not 1",
        ),
        (
            "defaults: {host: {thresholds: {load: {warning: 9}}}}\nhosts: {h: {address: h}}",
            "a.yaml:1: defaults.host.thresholds.load: warning (9) must be less than critical (8, the default)",
        ),
        (
            "defaults: {groups: {g: {thresholds: {load: {critical: 6}}}}}\nhosts: {h: {address: h, group: g, thresholds: {load: {warning: 7}}}}",
            "a.yaml:2: hosts.h.thresholds.load: warning (7) must be less than critical (6)",
        ),
        (
            "defaults: {thresholds: {slowdown: 3}}\nservices: {web: {" + SERVICE + "}, other: {" + SERVICE + "}}",
            "a.yaml:1: defaults.thresholds.slowdown: must be a map, not 3",
        ),
        (
            "remediator: {retention: 30m}",
            "a.yaml:1: remediator.retention: must be at least 10m, and no shorter than any remediation.window",
        ),
        (
            "hosts: {h: {address: h, ssh: {}, control_ssh: {key_file: k, wrapper: true}}}\n"
            "services: {web: {host: h, " + SERVICE + ", control: {docker: {container: web}}, remediation: {steps: [recreate]}}}",
            "a.yaml:2: services.web.control.docker: the step recreate needs a `command:` where the host's wrapper runs it (control_ssh.wrapper)",
        ),
        (
            "remediation: {steps: [restart, restart]}",
            "a.yaml:1: remediation.steps: a step may be listed once; use its attempts (found restart, restart)",
        ),
        (
            "remediation: {maintenance: [{host: h, from: '25:00', to: '01:00'}]}",
            "a.yaml:1: remediation.maintenance[0].from: '25:00' is not a time of day; write '02:30', in quotes",
        ),
        (
            "hosts: {gpu-01: {address: h}}\nremediation: {maintenance: [{host: gpu-1, from: '02:00', to: '03:00'}]}",
            "a.yaml:2: remediation.maintenance[0].host: there is no host 'gpu-1'; did you mean gpu-01?",
        ),
        (
            "services: {web: {host: db, " + SERVICE + "}}\nhosts: {db1: {address: h}}",
            "a.yaml:1: services.web.host: there is no host 'db'; did you mean db1?",
        ),
        (
            "services: {web: {depends_on: [wen], " + SERVICE + "}}",
            "a.yaml:1: services.web.depends_on[0]: there is no service 'wen'; did you mean web?",
        ),
        (
            "services: {web: {depends_on: [web], " + SERVICE + "}}",
            "a.yaml:1: services.web.depends_on: cycle: web → web",
        ),
        (
            "hosts: {a: {address: h, ssh: {via: b}}}",
            "a.yaml:1: hosts.a.ssh.via: there is no host 'b'",
        ),
        (
            "notify:\n  routes:\n    - {channels: [ops]}",
            "a.yaml:3: notify.routes[0].channels[0]: there is no channel 'ops'",
        ),
        (
            "services: {web: {probe: {command: {run: [true]}}}}",
            "a.yaml:1: services.web.probe.command: runs on a host: the service needs `host:`",
        ),
        (
            "services: {web: {host: a, probe: {command: {run: ['true']}}}}\nhosts: {a: {address: h}}",
            "a.yaml:1: services.web.probe.command: runs on a, which has neither `ssh:` nor `shell: local`",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://{host.address}/'}}}}",
            "a.yaml:1: services.web.probe: uses {host.…}, but the service has no `host:`",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/', expect: {body_matches: '('}}}}}",
            "a.yaml:1: services.web.probe.http.expect.body_matches[0]: '(' is not an RE2 regular expression: missing ): (",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/', expect: {status: 2x}}}}}",
            "a.yaml:1: services.web.probe.http.expect.status: 2x is not a status code (write 200, 2xx or 200-299)",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/', body: x, json: {}}}}}",
            "a.yaml:1: services.web.probe.http: body and json exclude each other (only form and files can be combined)",
        ),
        (
            STATUS.format(values="{a b: $.x}"),
            "a.yaml:1: services.tc.probe.status.components.values.a b: 'a b' is not a valid name; it must match ^[A-Za-z_][A-Za-z0-9_]{0,29}$",
        ),
        (
            STATUS.format(values="{a: x}"),
            "a.yaml:1: services.tc.probe.status.components.values.a: must be a JSONPath (RFC 9535): expected '$', found 'x', line 1, column 0",
        ),
        (
            STATUS.format(values=str({f"v{n}": "$.x" for n in range(11)})),
            "a.yaml:1: services.tc.probe.status.components.values: must have at most 10 items",
        ),
        *(
            (COMPONENTS.format(http=http), f"a.yaml:2: services.tc.control.http{problem}")
            for http, problem in (
                ("{component: {restart: 'http://t/{component}'}}", ": component needs components: the names of those that may be restarted"),
                ("{components: [a], restart: 'http://t/'}", ": components needs component: the requests that restart one of them"),
                ("{components: [a, a], component: {restart: 'http://t/{component}'}}", ": components: each may be listed once"),
                ("{components: [a], component: {stop: 'http://t/{component}'}}", ".component: must have either restart, or stop and start"),
                ("{components: [a], component: {}}", ".component: must have either restart, or stop and start"),
                ("{components: [a], component: {automatic: true}}", ".component: must have either restart, or stop and start"),
                ("{components: [a], component: {automatic: true, restart: 'http://t/{component}'}}", ".component.automatic: components are restarted automatically only with `on_failure: restart`"),
                ("{components: [a], component: {restart: {url: 'http://t/', headers: {X-A: '{component}'}}}}", ".component: none of its requests has {component} in its url, json or body"),
                ("{components: [a], component: {restart: {url: 'http://t/', body: 'id={component}'}}}", ".component: a body with {component} must be JSON: Expecting value: line 1 column 1 (char 0)"),
                ("{components: [a], component: {restart: 'http://{component}/'}}", ".component.restart.url: unknown placeholder {component} (known: {host.address}, {host.name}, {service})"),
                ("{components: [], component: {restart: 'http://t/{component}'}}", ".components: must not be empty"),
                ("{components: [7], component: {restart: 'http://t/{component}'}}", ".components[0]: must be a string, not 7"),
                ("{components: [..], component: {restart: 'http://t/{component}'}}", ".components[0]: '..' cannot be the name of a component: it must be printable, and not . or .."),
                ("{components: [\"a\\r\\nX: 1\"], component: {restart: 'http://t/{component}'}}", r".components[0]: 'a\r\nX: 1' cannot be the name of a component: it must be printable, and not . or .."),
                ("{components: [a], component: {restart: 'http://t/{component}', automatically: true}}", ".component.automatically: unknown key; did you mean automatic?"),
                ("{}", ": at least one of start, stop, restart, status and component is required"),
            )
        ),
        (
            "services: {web: {" + SERVICE + ", control: {http: {components: [a], component: {restart: 'http://t/{component}'}}}}}",
            "a.yaml:1: services.web.control.http.components: the probe http does not report components; use the probe status",
        ),
        (
            "remediator: {database: 'mysql://x'}",
            "a.yaml:1: remediator.database: must be sqlite:///PATH (four slashes before an absolute path)",
        ),
        (
            "notify: {timezone: Mars/Base}",
            "a.yaml:1: notify.timezone: 'Mars/Base' is not a time zone; write Asia/Shanghai",
        ),
        (
            "exporter: {token: '${DEFIB_TOKEN}'}",
            "a.yaml:1: exporter.token: the environment variable DEFIB_TOKEN is not set",
        ),
        ("exporter: {token: '${EMPTY}'}", "a.yaml:1: exporter.token: the environment variable EMPTY is empty"),
        ("exporter: {token: ''}", "a.yaml:1: exporter.token: must not be empty"),
        ("services: {8080: {" + SERVICE + "}}", 'a.yaml:1: services.8080: key must be a string; write "8080", in quotes'),
        (
            "services: {a: {" + SERVICE + "}}\n---\nservices: {a: {" + SERVICE + "}}",
            "a.yaml:3: services.a: duplicate key, first defined at a.yaml:1",
        ),
        (
            "services: {a: {depends_on: [b], " + SERVICE + "}, b: {depends_on: [a], " + SERVICE + "}}",
            "a.yaml:1: services.b.depends_on: cycle: a → b → a",
        ),
        (
            "hosts: {a: {address: h, labels: {host: x}}}",
            "a.yaml:1: hosts.a.labels: the label host is reserved; choose another name",
        ),
        (
            "hosts: {a: {address: h, labels: {job: x}}}",
            "a.yaml:1: hosts.a.labels: the label job is reserved; choose another name",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://u:p@h/'}}}}",
            "a.yaml:1: services.web.probe.http.url: must not contain credentials; use `auth:`",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/', headers: {Content-Length: '1'}}}}}",
            "a.yaml:1: services.web.probe.http.headers: the header Content-Length cannot be set: the exporter sets it",
        ),
        (
            "services: {web: {probe: {http: {url: 'http://h/', json: {d: 2024-01-01}}}}}",
            "a.yaml:1: services.web.probe.http: json: Object of type date is not JSON serializable",
        ),
        (
            "x: &t {probe: {tcp: {address: 'h:1'}}}\nservices:\n  web:\n    <<: *t\n    probe:\n      tcp: {address: h}",
            "a.yaml:6: services.web.probe.tcp.address: 'h' is not an address; write host:port or [v6]:port",
        ),
        (
            "exporter: {token: '${file:nowhere}'}",
            "a.yaml:1: exporter.token: cannot read the secret file {folder}/nowhere: No such file or directory",
        ),
        ("hosts: [a]", "a.yaml:1: hosts: must be a map"),
        ("- a", "a.yaml:1: a configuration file must be a map (hosts:, services:, …)"),
        ("services: {a: b: c}", "a.yaml:1: invalid YAML: a value that contains ': ' must be in quotes, or a comma is missing"),
        ("services:\n  web: {" + SERVICE + "}\n  web: {" + SERVICE + "}", "a.yaml:3: services.web: duplicate key, first defined at a.yaml:2"),
    ],
)  # fmt: skip
def test_each_error_names_its_place_and_remedy(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path, a=text)
    assert problem.replace("{folder}", str(tmp_path)) in load_problems(tmp_path, {"EMPTY": ""})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hosts:\n\ta: {address: h}", "a.yaml:2: invalid YAML: a tab is used for indentation; use spaces"),
        ("a: {host.address}:80", "a.yaml:1: invalid YAML: a value that starts with '{' must be in quotes"),
        ("a: {b: 'http://{host.address}/', c: http://{host.address}:1/}", "a.yaml:1: invalid YAML: a value that contains '{' must be in quotes"),
        ("a: *.example.org", "a.yaml:1: invalid YAML: a value that starts with '*' must be in quotes"),
        ("a: *all", "a.yaml:1: invalid YAML: a value that starts with '*' must be in quotes (there is no anchor &all)"),
        ("a: @daily", "a.yaml:1: invalid YAML: a value that starts with '@' must be in quotes"),
        ("a: b: c", "a.yaml:1: invalid YAML: a value that contains ': ' must be in quotes"),
        ("a:\n  b:1\n  c: 2", "a.yaml:2: invalid YAML: a space is missing after the colon of 'b'"),
        ("services:{}", "a.yaml:1: a configuration file must be a map (hosts:, services:, …) (is a space missing after the colon?)"),
        ("services: {web: 'name:x'}", "a.yaml:1: services.web: must be a map; a space is missing after the colon of 'name'"),
        ("services: {web: {name: {host.name}, " + SERVICE + "}}", "a.yaml:1: services.web.name: must be a string; a value that starts with {host.name} must be in quotes"),
        ("a:\n  b\n  c: 1", "a.yaml:2: invalid YAML: a colon is missing after 'b'"),
        ("a:\n  b: 1\n   c: 2", "a.yaml:3: invalid YAML: the key is indented further than the keys above it (line 2)"),
        ("a:\n  b: 1\n c: 2", "a.yaml:3: invalid YAML: the key is not indented like the keys of its map, which starts on line 1"),
        ("a: 1\na: 2", "a.yaml:2: a: duplicate key, first defined at a.yaml:1"),
        ('a: "x\nb: 1', "a.yaml:1: invalid YAML: the quote that starts here is not closed"),
        ('a: "x\nb: "y"', "a.yaml:1: invalid YAML: the quote that starts on this line is not closed"),
        ("a: 'it's'", "a.yaml:1: invalid YAML: text follows a closing quote; put the whole value in one pair of quotes"),
        ("a: [1, 2\nb: 3", "a.yaml:2: invalid YAML: a comma is missing, or ']' for the '[' on line 1"),
        ('a: "\\d+"', "a.yaml:1: invalid YAML: unknown escape in double quotes; write \\\\ for a backslash, or use single quotes"),
        ("a: - b", "a.yaml:1: invalid YAML: a list must start on the line below its key"),
        ("a: !x y", "a.yaml:1: invalid YAML: a value that starts with '!' must be in quotes"),
        ('a: "\\ud83d"', "a.yaml:1: invalid YAML: a \\u escape is half of a surrogate pair"),
    ],
)  # fmt: skip
def test_yaml_errors_name_the_likely_cause(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert problem in load_problems(tmp_path)


def test_values_of_wrong_types_are_shown_unless_they_may_be_secret(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""
        exporter: {token: [s3cret]}
        remediator: {webhook_token: 12345678}
        hosts: {h: {address: h, ssh: {port: 70000, via: 5}}}
        services:
          web:
            severity: fatal
            depends_on: db
            objective: 100
            probe: {fail_after: 0, recover_after: x, http: {url: 'http://h/', headers: {X-Key: 87654321}}}
        """,
    )
    problems = load_problems(tmp_path)
    assert problems == [
        "a.yaml:1: exporter.token: must be a string, not a list",
        "a.yaml:2: remediator.webhook_token: must be a string",
        "a.yaml:3: hosts.h.ssh.port: must be at most 65535, not 70000",
        "a.yaml:3: hosts.h.ssh.via: must be a string, not 5",
        "a.yaml:6: services.web.severity: must be 'critical', 'warning' or 'info', not 'fatal'",
        "a.yaml:7: services.web.depends_on: must be a list, not 'db'",
        "a.yaml:8: services.web.objective: must be less than 100, not 100",
        "a.yaml:9: services.web.probe.fail_after: must be at least 1, not 0",
        "a.yaml:9: services.web.probe.http.headers.X-Key: must be a string",
        "a.yaml:9: services.web.probe.recover_after: must be a whole number, not 'x'",
    ]


EVERYTHING = """
defaults: {probe: {every: 10s}}
remediation: {steps: [restart, {recreate: {command: [x]}}], maintenance: [{host: a, from: '01:00', to: '02:00'}]}
notify:
  people: {ann: {open_id: ou_1}}
  channels: {ops: {feishu: {webhook: 'https://f/1'}}}
  routes: [{match: {team: x}, channels: [ops], on_call: [ann], escalate: {after: 5m, channels: [ops]}}]
hosts:
  j: {address: j, ssh: {}}
  a: {address: h, group: g, ssh: {via: j, wrapper: true}, control_ssh: {key_file: k, via: j, wrapper: true},
      collect: {gpu: 15s, systemd: {every: 15s, units: [x]}}, labels: {rack: a}}
services:
  db: {probe: {tcp: {address: 'h:1'}}}
  web: {host: a, depends_on: [db], probe: {every: 5s, unit: {name: web}}, on_failure: restart,
        control: {docker: {container: web}}, remediation: {steps: [restart]}}
"""


def test_no_value_of_a_wrong_type_crashes_the_checks(tmp_path: Path) -> None:
    def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from paths(item, (*path, key))

    write(tmp_path, a=EVERYTHING)
    assert load_problems(tmp_path) == []
    for path in paths(yaml.safe_load(EVERYTHING)):
        for other in (["gpu"], [{"a": 1}], {"a": ["b"]}, "text", 5, True, None):
            changed: Any = {"root": yaml.safe_load(EVERYTHING)}
            parent = changed
            for key in ("root", *path)[:-1]:
                parent = parent[key]
            parent[("root", *path)[-1]] = other
            (tmp_path / "a.yaml").write_text(yaml.safe_dump(changed["root"]))
            load_problems(tmp_path)  # raises nothing but a ConfigurationError


def test_a_list_of_collectors_on_a_host_with_a_wrapper(tmp_path: Path) -> None:
    write(tmp_path, a="hosts: {h: {address: h, ssh: {wrapper: true}, collect: [gpu]}}")
    assert load_problems(tmp_path) == ["a.yaml:1: hosts.h.collect: must be a map, not a list"]


@pytest.mark.parametrize(
    ("hosts", "problem"),
    [
        ("a: {address: h, ssh: {via: b}}\n  b: {address: h, ssh: {via: a}}", "a.yaml:3: hosts.b.ssh.via: cycle: a → b → a"),
        (
            "a: {address: h, ssh: {}, control_ssh: {via: b}}\n  b: {address: h, ssh: {}, control_ssh: {via: a}}",
            "a.yaml:3: hosts.b.control_ssh.via: cycle: a → b → a",
        ),
        (
            "a: {address: h, ssh: {via: b}}\n  b: {address: h, ssh: {}, control_ssh: {via: a}}",
            "a.yaml:3: hosts.b.control_ssh.via: cycle: a → b → a",
        ),
        (
            "a: {address: h, ssh: {}, control_ssh: {via: b}}\n  b: {address: h, ssh: {via: a}}",
            "a.yaml:2: hosts.a.control_ssh.via: cycle: a → b → a",
        ),
        (  # reported once, although another host has a route for controls
            "a: {address: h, ssh: {via: b}}\n  b: {address: h, ssh: {via: a}}\n  c: {address: h, ssh: {}, control_ssh: {via: d}}\n  d: {address: h, ssh: {}}",
            "a.yaml:3: hosts.b.ssh.via: cycle: a → b → a",
        ),
    ],
)  # fmt: skip
def test_cycles_of_jump_hosts(tmp_path: Path, hosts: str, problem: str) -> None:
    write(tmp_path, a=f"hosts:\n  {hosts}")
    assert load_problems(tmp_path) == [problem]


def test_likely_mistakes_are_warned_of(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""
        services:
          web: {on_failure: restart, probe: {every: 5s, timeout: 6s, http: {url: 'http://h/'}}}
          api: {on_failure: notify, probe: {every: 6s, timeout: 6s, http: {url: 'http://h/'}}}
          default: {probe: {every: 1s, http: {url: 'http://h/'}}}
        """,
    )
    assert [str(warning).replace(f"{tmp_path}/", "") for warning in loaded(tmp_path).warnings] == [
        "a.yaml:2: services.web.on_failure: on_failure is restart, but the service has no `control:`: it is never restarted",
        "a.yaml:2: services.web.probe.timeout: timeout (6s) is longer than every (5s): a slow probe delays the next one",
    ]  # fmt: skip


@pytest.mark.parametrize(("every", "message"), [("1ms", "1ms is too short; the minimum is 100ms"), ("100ms", None)])
def test_probes_have_a_shortest_interval(tmp_path: Path, every: str, message: str | None) -> None:
    write(tmp_path, a=f"services: {{web: {{probe: {{every: {every}, timeout: 50ms, http: {{url: 'http://h/'}}}}}}}}")
    assert load_problems(tmp_path) == ([f"a.yaml:1: services.web.probe.every: {message}"] if message else [])


def test_json_in_a_yaml_file(tmp_path: Path) -> None:
    service = {"name": "\U0001f600 \\ud83d\\ude00 \t/", "probe": {"http": {"url": "http://h/"}}}
    text = json.dumps({"services": {"web": service}}, indent="\t")
    assert "\\ud83d\\ude00" in text
    write(tmp_path, a=text)
    assert loaded(tmp_path).inventory.services["web"].name == service["name"]


def test_escapes_mean_nothing_outside_double_quotes(tmp_path: Path) -> None:
    write(tmp_path, a="services: {web: {name: '\\ud83d\\ude00', " + SERVICE + "}}")
    assert loaded(tmp_path).inventory.services["web"].name == "\\ud83d\\ude00"


@pytest.mark.needs("root")
def test_what_may_not_be_read_is_an_error_with_its_path() -> None:
    tls = "services: {web: {probe: {http: {url: 'http://h/', tls: {ca_file: closed/ca.pem}}}}}"
    with tempfile.TemporaryDirectory() as name:
        config = write(Path(name), a=tls, secret=SERVICE, closed__b=SERVICE, listed__c=SERVICE)
        config.chmod(0o755)
        for path, mode in (("secret.yaml", 0), ("closed", 0), ("listed", 0o744)):
            (config / path).chmod(mode)
        argv = [
            "setpriv",
            "--reuid",
            "65534",
            "--clear-groups",
            sys.executable,
            "-m",
            "defib",
            "check",
            "--config",
            name,
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 1
    assert done.stderr.replace(f"{name}/", "").splitlines() == [
        "a.yaml:1: services.web.probe.http.tls.ca_file: the file closed/ca.pem cannot be read: Permission denied",
        "closed:1: cannot be read: Permission denied",
        "listed/c.yaml:1: cannot be read: Permission denied",
        "secret.yaml:1: cannot be read: Permission denied",
    ]


def test_a_key_defined_in_two_files_names_both(tmp_path: Path) -> None:
    write(tmp_path, a="services:\n  web: {" + SERVICE + "}", deep__b="services:\n  web: {" + SERVICE + "}")
    assert load_problems(tmp_path) == ["deep/b.yaml:2: services.web: duplicate key, first defined at a.yaml:2"]


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="servces: {}\nexporter: {token: '${GONE}'}",
        b="services:\n  web: {host: nowhere, probe: {every: 5, http: {url: 'http://h/'}}}",
    )
    assert [each.split(": ")[1] for each in load_problems(tmp_path)] == [
        "servces",
        "exporter.token",
        "services.web.host",
        "services.web.probe.every",
    ]


def test_files_of_any_depth_join(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="services: {web: {" + SERVICE + "}}",
        deep__er__b="services: {api: {" + SERVICE + "}}",
        deep__empty="",
    )
    (tmp_path / ".hidden.yaml").write_text("nonsense: [")
    assert set(loaded(tmp_path).inventory.services) == {"web", "api"}


def test_defaults_fill_in_and_retries_are_never_slower_than_probes(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""
        defaults: {probe: {every: 1m, fail_after: 5}}
        services:
          usual: {probe: {http: {url: 'http://h/'}}}
          quick: {probe: {every: 1s, http: {url: 'http://h/'}}}
          slow: {probe: {every: 30m, http: {url: 'http://h/'}}}
        """,
    )
    services = loaded(tmp_path).inventory.services
    timing = {
        name: (each.probe.every, each.probe.retry_every, each.probe.fail_after) for name, each in services.items()
    }
    assert timing == {"usual": (60, 30, 5), "quick": (1, 1, 5), "slow": (1800, 30, 5)}


@pytest.mark.parametrize(
    ("address", "url"),
    [("10.0.0.1", "http://10.0.0.1:80/web/a"), ("fd00::1", "http://[fd00::1]:80/web/a"), ("h", "http://h:80/web/a")],
)
def test_substitutions(tmp_path: Path, address: str, url: str) -> None:
    write(
        tmp_path,
        a=f"""
        hosts: {{a: {{address: '{address}'}}}}
        services: {{web: {{host: a, probe: {{http: {{url: 'http://{{host.address}}:80/{{service}}/{{host.name}}'}}}}}}}}
        """,
    )
    assert loaded(tmp_path).inventory.services["web"].probe.options.url == url


def test_each_program_resolves_only_what_it_uses(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""
        notify: {channels: {ops: {feishu: {webhook: '${HOOK}'}}}}
        hosts: {h: {address: h, ssh: {user: u}, sudo: {password: '${SUDO}'}}}
        services: {web: {probe: {http: {url: 'http://h/', auth: {bearer: '${BEARER}'}}}}}
        """,
    )
    assert loaded(tmp_path, {"BEARER": "b3arer"}, ["exporter"]).secrets == {"b3arer"}
    assert loaded(tmp_path, {"HOOK": "http://f/1", "SUDO": "s3cret"}, ["remediator"]).secrets == {
        "http://f/1",
        "s3cret",
    }
    basic = "remediator: {url: {url: 'http://r/', auth: {basic: {username: admin, password: '${PASSWORD}'}}}}"
    assert len(load_problems(tmp_path)) == 3
    assert load_problems(tmp_path, {"BEARER": "b"}, ["remediator"]) == [
        "a.yaml:1: notify.channels.ops.feishu.webhook: the environment variable HOOK is not set",
        "a.yaml:2: hosts.h.sudo.password: the environment variable SUDO is not set",
    ]
    assert loaded(write(tmp_path / "basic", a=basic), {}, ["exporter"]).secrets == set()


def test_references(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    write(tmp_path, a="exporter: {token: 'x-${A}-${file:token}-$${A}'}")
    token = loaded(tmp_path, {"A": "1"}).inventory.exporter.token
    assert token is not None
    assert token.get_secret_value() == "x-1-from-a-file-${A}"


def test_secrets_print_masked(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""
        exporter: {token: t0psecret}
        services: {web: {probe: {http: {url: 'http://h/?key=${KEY}', headers: {X-Key: h1dden},
          auth: {basic: {username: u, password: pa55word}}}}}}
        """,
    )
    known = loaded(tmp_path, {"KEY": "k3y-value"})
    secrets = ("t0psecret", "h1dden", "pa55word")
    assert not any(
        secret in repr(known) + str(known.inventory) + known.inventory.model_dump_json() for secret in secrets
    )
    assert {*secrets, "k3y-value"} <= known.secrets
    shown = run_defib("check", "--config", str(tmp_path), "--show", env={"KEY": "k3y-value"}).stdout
    assert not any(secret in shown for secret in (*secrets, "k3y-value"))
    assert yaml.safe_load(shown)["services"]["web"]["probe"]["http"]["url"] == "http://h/?key=***"


ENVIRON = {
    "VALUE": "some-value",
    "HEX": "0102030405",
    "PART": "a-part",
    "ENV": "product",
    "BASE": "http://base.test/",
    "QUERY": "http://q/?t=s3cret-q",
}


@pytest.mark.parametrize(
    ("section", "secrets"),
    [
        # Secret fields: the whole value, and the references that it is made of.
        ("exporter: {token: literal-token}", {"literal-token"}),
        ("exporter: {token: 'x-${PART}-${VALUE}'}", {"x-a-part-some-value", "a-part", "some-value"}),
        ("hosts: {h: {address: h, ssh: {}, sudo: {password: '${VALUE}'}}}", {"some-value"}),
        ("notify: {channels: {it: {webhook: {url: '${BASE}d/${VALUE}'}}}}", {"http://base.test/d/some-value", "http://base.test/", "some-value"}),
        ("exporter: {url: {url: 'http://e/', auth: {basic: {username: '${PART}', password: '${VALUE}'}}}}", {"some-value", "YS1wYXJ0OnNvbWUtdmFsdWU="}),
        # Headers and variables: those whose names suggest credentials, and references in the others.
        ("PROBE: {http: {url: 'http://h/', headers: {X-Env: product, Accept: text/html, x-api-key: literal-key}}}", {"literal-key"}),
        ("PROBE: {http: {url: 'http://h/', headers: {Authorization: 'Bearer ${VALUE}'}}}", {"Bearer some-value", "some-value"}),
        ("PROBE: {http: {url: 'http://h/', headers: {authorization: 'Token literal-token'}}}", {"Token literal-token", "literal-token"}),
        ("PROBE: {http: {url: 'http://h/', headers: {X-Tenant: 'a ${VALUE}'}}}", {"some-value"}),
        ("notify: {channels: {it: {webhook: {url: 'http://hook.test/', headers: {X-Env: product, X-Auth: s3cret-auth}}}}}", {"http://hook.test/", "s3cret-auth"}),
        ("CONTROL: {docker: {container: c1, after_start: [{exec: [x], env: {MODE: product, DB_PASSWORD: literal-pw, HOOK: '${VALUE}'}}]}}", {"literal-pw", "some-value"}),
        # Fields that often contain credentials: references only.
        ("PROBE: {command: {run: [curl, product-1, '-u${VALUE}']}}", {"some-value"}),
        ("PROBE: {http: {url: 'http://h/', method: POST, json: {product: [{key: 'k ${VALUE}'}]}}}", {"some-value"}),
        ("PROBE: {http: {url: 'http://h/', method: POST, form: {user: product, password: '${VALUE}'}}}", {"some-value"}),
        ("PROBE: {tcp: {address: 'h:1', dialogue: [{send: 'AUTH ${VALUE}'}]}}", {"some-value"}),
        ("PROBE: {grpc: {address: 'h:1', metadata: {x-key: literal-key, x-env: product, x-other: '${VALUE}'}}}", {"literal-key", "some-value"}),
        ("PROBE: {tcp: {address: 'h:1', dialogue: [{send_bytes: '${HEX}'}, {expect_bytes: '00'}]}}", {"0102030405"}),
        ("PROBE: {websocket: {url: 'ws://h/', auth: {bearer: '${VALUE}'}}}", {"some-value"}),
        ("PROBE: {python: {call: 'm:f', options: {token: '${VALUE}', at: product}}}", {"some-value"}),
        ("CONTROL: {command: {restart: [remake, product-1, '${VALUE}']}}", {"some-value"}),
        ("CONTROL: {docker: {container: c1, after_start: [{exec: [sh, '${VALUE}']}]}}", {"some-value"}),
        ("CONTROL: {http: {start: {url: 'http://h/', body: 'token=${VALUE}'}}}", {"some-value"}),
        ("remediation: {steps: [{recreate: {command: [remake, '${VALUE}']}}]}", {"some-value"}),
        # URLs: references in the query.
        ("PROBE: {http: {url: '${BASE}d/${PART}?env=product&key=${VALUE}'}}", {"some-value"}),
        ("CONTROL: {http: {start: '${QUERY}'}}", {"t=s3cret-q", "s3cret-q"}),
        # Everything else: addresses, paths, names and links.
        ("remediator: {grafana_url: '${BASE}', database: 'sqlite:////${PART}/${VALUE}'}", set()),
        ("notify: {links: {grafana: '${BASE}d/${VALUE}', docs: '${BASE}'}}", set()),
        ("hosts: {h: {address: '${VALUE}', group: '${ENV}', ssh: {user: '${PART}', key_file: '${VALUE}'}, labels: {zone: '${VALUE}'}}}", set()),
        ("PROBE: {http: {url: '${BASE}d/${VALUE}', auth: {basic: {username: '${PART}', password: short}}}}", {"short", "YS1wYXJ0OnNob3J0"}),
        ("PROBE: {tcp: {address: '${VALUE}:80'}}", set()),
        ("CONTROL: {docker: {container: '${VALUE}'}}", set()),
        # A value that is secret anywhere is secret everywhere.
        ("{remediator: {grafana_url: '${BASE}'}, exporter: {token: '${BASE}'}}", {"http://base.test/"}),
    ],
)  # fmt: skip
def test_what_is_secret(tmp_path: Path, section: str, secrets: set[str]) -> None:
    hosts = "hosts: {h: {address: h, shell: local}}\nservices: {it: {host: h, "
    section = section.replace("PROBE:", f"{hosts}probe: ", 1) + "}}" * ("PROBE" in section)
    section = section.replace("CONTROL:", f"{hosts}probe: {{unit: {{name: u}}}}, control: ", 1) + "}}" * (
        "CONTROL" in section
    )
    write(tmp_path, a=section)
    assert loaded(tmp_path, ENVIRON).secrets == secrets


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["yaml", "json"])
@pytest.mark.parametrize(
    "secret",
    [
        "words " * 40 + "that YAML folds over several lines",
        "it's 'quoted': \"twice\" # and \\ more",
        "caf\u00e9 \x07 \U0001f511 that JSON or YAML escapes",
        "several\nlines\n  of a key\n",
        "- looks like: a list",
        "0x1234567",
    ],
)
def test_the_printed_configuration_has_no_secret_in_any_form(tmp_path: Path, form: list[str], secret: str) -> None:
    (tmp_path / "secret").write_text(secret)
    request = {"url": "http://h/", "method": "POST", "json": {"a": ["before ${file:secret} after"]}}
    write(tmp_path, a=json.dumps({"services": {"it": {"probe": {"http": request}}}}))
    shown = run_defib("check", "--config", str(tmp_path), "--show", *form).stdout
    assert yaml.safe_load(shown)["services"]["it"]["probe"]["http"]["json"] == {"a": ["before *** after"]}


SHARED = """
hosts: {h: {address: h, shell: local}, other: {address: o, shell: local}}
services:
  a: {host: h, probe: {http: {url: 'http://h/'}}, control: {CONTROL}}
  b: {host: h, probe: {http: {url: 'http://h/'}}, control: {CONTROL}}
  c: {host: other, probe: {http: {url: 'http://h/'}}, control: {CONTROL}}
  d: {host: h, probe: {http: {url: 'http://h/'}}}
  e: {host: h, probe: {http: {url: 'http://h/'}}}
"""


@pytest.mark.parametrize(
    ("control", "target"),
    [
        ("docker: {container: ocr}", "docker:ocr"),
        ("docker: {label: [b=2, a=1]}", "docker:label:a=1,b=2"),
        ("docker: {image: registry/ocr}", "docker:image:registry/ocr"),
        ("compose: {directory: /srv//app/, service: web}", "compose:/srv/app:web"),
        ("systemd: {unit: web}", "systemd:web.service"),
        ("supervisor: {program: 'web:web'}", "supervisor:-:web"),
        ("supervisor: {program: 'grp:web', config: /etc/s.conf}", "supervisor:/etc/s.conf:grp:web"),
        ("command: {restart: [remake, 'a b', '${KEY}'], status: [x]}", "command:remake 'a b' ***"),
        (
            "http: {start: 'http://h/start?key=${KEY}', stop: {url: 'http://h/stop', json: {n: 1}}}",
            "http:POST http://h/start?key=***",
        ),
        ("http: {restart: {url: 'http://h/7', method: PUT, json: {n: 1}}}", 'http:PUT http://h/7 {"n": 1}'),
    ],
)
def test_services_that_share_a_target_are_a_warning(tmp_path: Path, control: str, target: str) -> None:
    write(tmp_path, a=SHARED.replace("CONTROL", control))
    (warning,) = loaded(tmp_path, {"KEY": "k3y-value"}).warnings
    assert str(warning) == (
        f"{tmp_path}/a.yaml:4: services.b.control: same target as a ({target} on h):"
        " only one action at a time runs for both"
    )
    done = run_defib("check", "--config", str(tmp_path), env={"KEY": "k3y-value"})
    assert done.stderr == f"warning: {warning}\n"


def test_a_service_of_an_earlier_configuration_still_has_a_target(tmp_path: Path) -> None:
    write(tmp_path, a=SHARED.replace("CONTROL", "docker: {container: ocr}"))
    service = loaded(tmp_path).inventory.services["b"]
    assert set(loaded(tmp_path).inventory.services_sharing_target(service)) == {"a", "b"}
    write(tmp_path, a="hosts: {h: {address: 127.0.0.1}}")
    assert loaded(tmp_path).inventory.services_sharing_target(service) == ["b"]


def test_the_first_service_of_the_design_loads(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "sample.pdf").write_bytes(b"%PDF-1.4")
    write(
        tmp_path,
        hosts="hosts: {gpu-01: {address: 10.0.0.11, group: gpu, ssh: {user: defib, key_file: k, known_hosts: kh}}}",
        services__mineru="""
        services:
          mineru:
            name: Mineru PDF OCR
            category: api
            provider: mineru
            host: gpu-01
            team: docs
            probe:
              every: 30m
              timeout: 2m
              http:
                url: http://{host.address}:8000/file_parse
                method: POST
                files: {files: {path: sample.pdf, content_type: application/pdf}}
                expect: {status: 2xx, body_matches: 'Hello OCR'}
            control:
              docker:
                container: mineru_container
                after_start:
                  - {exec: [mineru-api, --host, 0.0.0.0, --port, "8000"], env: {MINERU_MODEL_SOURCE: local}, detach: true,
                     log: /vllm-workspace/api.log}
              start_within: 5m
            on_failure: restart
            runbook: https://wiki/mineru
        """,
    )
    mineru = loaded(tmp_path).inventory.services["mineru"]
    assert mineru.control is not None
    assert mineru.control.start_within == 300
    assert mineru.probe.options.files["files"].path == tmp_path / "services" / "sample.pdf"


def test_what_two_loads_made_can_be_compared(tmp_path: Path) -> None:
    write(tmp_path, a="services: {web: {probe: {http: {url: 'http://h/'}}}}")
    assert loaded(tmp_path).inventory.services == loaded(tmp_path).inventory.services


def test_a_secret_is_not_in_the_error_that_it_causes(tmp_path: Path) -> None:
    expect = "{status: '${S}', body_matches: '(${S}'}"
    write(tmp_path, a="services: {web: {probe: {http: {url: 'http://h/', expect: " + expect + "}}}}")
    found = load_problems(tmp_path, {"S": "t0p-secret"})
    assert len(found) == 2
    assert "t0p-secret" not in str(found)


def test_the_json_schema_takes_what_is_expanded(tmp_path: Path) -> None:
    text = """
    x-anchors: [anything]
    defaults:
      host: {labels: {site: a}, ssh: {user: u, port: 22}, collect: {system: 1m, systemd: {every: 1m, units: [a]}}}
      groups: {g: {sudo: passwordless}}
    templates:
      t: {parameters: {every: 10s, url: null}, service: {probe: {every: "{every}", http: {url: "{url}"}}}}
    hosts:
      "a-[1-2]": {address: "10.0.0.{n}", group: g, ssh: {port: "222{n}"}, labels: null}
      "[01-02]-b.c": {address: "10.0.0.{n+10}", templates: {t: {url: "http://h/"}}}
      a-1: {collect: {systemd: {units: [b]}, system: null}, templates: {t: false}}
      a-2: {enabled: false}
    services:
      t-01-b.c: {probe: {every: 20s, http: {method: HEAD}}, severity: info}
      t-02-b.c: {enabled: false}
      s: {template: t, parameters: {url: "http://h/"}}
    """
    write(tmp_path, a=text)
    services = loaded(tmp_path).inventory.services
    assert {name: each.probe.every for name, each in services.items()} == {"t-01-b.c": 20.0, "s": 10.0}
    jsonschema.validate(yaml.safe_load(text), json_schema(KINDS))


def test_the_json_schema_takes_what_loads_and_refuses_what_does_not() -> None:
    schema = json_schema(KINDS)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    succeeded = {
        "exporter": {"url": "http://e:1"},
        "hosts": {"h": {"address": "h", "sudo": "passwordless"}},
        "services": {
            "web": {
                "probe": {"every": "1s", "http": {"url": "http://h/", "expect": {"status": "2xx", "body_matches": "x"}}}
            }
        },
        "notify": None,
        "remediation": {"attempts": "${N}", "hold": "${HOLD}"},
    }
    validator.validate(json.loads(json.dumps(succeeded)))
    two_kinds = {"services": {"web": {"probe": {"http": {"url": "http://h/"}, "tcp": {"address": "h:1"}}}}}
    refused: list[dict[str, Any]] = [
        {"servces": {}},
        {"services": {"web": []}},
        {"services": {"web": {"prob": {}}}},
        {"services": {"web": {"probe": {"every": 3}}}},
        {"hosts": {"A": {"address": "h"}}},
        {"hosts": {"a[1-2": {"address": "h"}}},
        {"hosts": {"a[1-2]b[1-2]": {"address": "h"}}},
        {"notify": {"channels": {"ops": {}}}},
        two_kinds,
    ]
    for bad in refused:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(bad)


@pytest.mark.parametrize(
    "text",
    [
        "services: " + "[" * 100_000,
        "services: " + "[" * 900 + "]" * 900,
        BOMB,
        "&a [*a]",
        "services: &a {x: *a}",
        "a: !!python/object:os.system x",
        "\x00",
        "a: 2026-99-99",
    ],
)
def test_nonsense_is_an_error_and_no_crash(tmp_path: Path, text: str) -> None:
    write(tmp_path, a=text)
    assert load_problems(tmp_path)


def test_controls_of_root_in_directories_of_others_are_a_warning(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="""
        hosts:
          h: {address: 10.0.0.1, ssh: {user: ops}, sudo: passwordless}
          without: {address: 10.0.0.2, ssh: {user: ops}}
        services:
          a:
            host: h
            probe: {tcp: {address: "10.0.0.1:1"}}
            control:
              command:
                restart: [sh, /home/ops/restart.sh]
                stop: [/usr/local/bin/stop]
                start: [/tmp/start]
          b: {host: h, probe: {tcp: {address: "10.0.0.1:1"}}, control: {compose: {directory: /home/ops/b, service: b}}}
          c: {host: without, probe: {tcp: {address: "10.0.0.2:1"}}, control: {command: {restart: [/home/ops/c]}}}
        """,
    )
    said = "which others can probably change: move it, for example to /usr/local"
    assert [str(warning).replace(f"{tmp_path}/", "") for warning in loaded(tmp_path).warnings] == [
        f"a.yaml:10: services.a.control.command.restart: root uses /home/ops/restart.sh, {said}",
        f"a.yaml:12: services.a.control.command.start: root uses /tmp/start, {said}",
        f"a.yaml:13: services.b.control.compose.directory: root uses /home/ops/b, {said}",
    ]


RUNBOOKS = """
hosts:
  gpu-1: {address: 10.0.0.1, group: gpu, ssh: {user: ops}, sudo: passwordless}
  bare: {address: 10.0.0.2, group: net}
  hard: {address: 10.0.0.3, ssh: {user: ops, wrapper: true}}
runbooks:
"""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alerts: [HostDiskFull]", "run: is missing"),
        ("run: [x]", "has neither `alerts` nor `own_alerts`"),
        (
            "alerts: [HostDiskful], run: [x]",
            "alerts[0]: there is no alert 'HostDiskful' about hosts; one of your own rules belongs in `own_alerts`; did you mean HostDiskFull?",
        ),
        (
            "alerts: [HostDiskFull, ServiceDown], run: [x]",
            "alerts[1]: ServiceDown is not about a host: only alerts with the label `host` and without `service` have runbooks",
        ),
        ("alerts: [HostDown], run: [x]", "alerts[0]: while HostDown fires, nothing can be run on the host"),
        (
            "own_alerts: [HostDiskFull], run: [x]",
            "own_alerts[0]: HostDiskFull is an alert of Defib's own rules: it belongs in `alerts`",
        ),
        (
            "own_alerts: ['my alert'], run: [x]",
            "own_alerts[0]: must match ^[A-Za-z_][A-Za-z0-9_.:-]*$, not 'my alert'",
        ),
        ("alerts: [HostDiskFull], hosts: {group: gpus}, run: [x]", "hosts.group: there is no group 'gpus'; did you mean gpu?"),
        ("alerts: [HostDiskFull], hosts: {names: gpu-2}, run: [x]", "hosts.names: there is no host 'gpu-2'; did you mean gpu-1?"),
        (
            "alerts: [HostDiskFull], hosts: {names: bar*}, run: [x]",
            "hosts: runs on bare, which has neither `ssh:` nor `shell: local`",
        ),
        (
            "alerts: [HostDiskFull], run: [x]",
            "hard needs `control_ssh: {key_file: …}`: its ssh.key_file may only read (ssh.wrapper)",
        ),
        ("alerts: [HostDiskFull], run: docker image prune", "run: must be a list, not 'docker image prune'"),
        ("alerts: [HostDiskFull], run: []", "run: must not be empty"),
        ("alerts: [HostDiskFull], run: [x], approved: false", "approved: unknown key; did you mean approve?"),
        ("alerts: [HostDiskFull], run: [x], attempts: 0", "attempts: must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_errors_of_runbooks(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path, a=f"{RUNBOOKS}  prune: {{{text}}}")
    separator = ": " if problem.startswith(("has", "hard")) else "."
    problems = [str(each).replace(f"{tmp_path}/", "") for each in load_problems(tmp_path)]
    assert f"a.yaml:6: runbooks.prune{separator}{problem}" in problems


def test_likely_mistakes_in_runbooks_are_warned_of(tmp_path: Path) -> None:
    written = "  prune: {alerts: [HostDiskFull], hosts: {names: gpu-*}, run: [sh, /home/ops/prune.sh]}\n"
    written += "  none: {alerts: [HostDiskFull], hosts: {labels: {disk: none}}, run: [x]}"
    write(tmp_path, a=f"{RUNBOOKS}{written}")
    assert [str(warning).replace(f"{tmp_path}/", "") for warning in loaded(tmp_path).warnings] == [
        "a.yaml:6: runbooks.prune.run: root uses /home/ops/prune.sh, which others can probably change: move it, for example to /usr/local",
        "a.yaml:7: runbooks.none: no host matches: it is never run",
    ]


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("owner", "mode", "caller", "refusal"),
    [
        (0, 0o755, None, ""),
        (0, 0o775, None, ""),
        (65534, 0o755, None, "it belongs to another user"),
        (65534, 0o755, "65534", ""),
        (65534, 0o755, "1234", "it belongs to another user"),
        (0, 0o777, None, "all users may write to it"),
        (0, 0o1777, None, "all users may write to it"),
    ],
)
def test_a_configuration_of_another_user_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, caller: str | None, refusal: str
) -> None:
    """The working directory may be one such as `/tmp`, where others could have put it."""
    write(tmp_path / "config", a="services: {web: {probe: {tcp: {address: 'h:1'}}}}")
    os.chown(tmp_path / "config", owner, owner)
    (tmp_path / "config").chmod(mode)
    monkeypatch.delenv("DEFIB_CONFIG", raising=False)
    if caller is None:
        monkeypatch.delenv("SUDO_UID", raising=False)
    else:
        monkeypatch.setenv("SUDO_UID", caller)
    done = run_defib("check", cwd=tmp_path)
    if not refusal:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr == (
        f"defib: {tmp_path}/config is used only if --config or DEFIB_CONFIG names it, since {refusal}; nothing was done\n"
    )
    assert run_defib("check", "--config", "config", cwd=tmp_path).returncode == 0
