"""Everything is documented, and examples in the documentation work."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from defib.cli import build_parser
from defib.kinds import KINDS
from exporter.api.host_problems import ProblemKind
from exporter.probes import PROBES
from exporter.results import FailureReason
from exporter.scheduler.collector_scheduler import HostState
from exporter.scheduler.events import EventKind
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.notify import NotificationKind
from fleet.inventory.schema import json_schema
from gateway.metrics import OUTCOMES
from gateway.retreat import STATES
from remediator.notifications import samples
from remediator.notifications.channels import CHANNELS, feishu
from remediator.policy.situation import Refusal, Wait
from tests.metric_names import published_metrics, rules
from tests.support import inventory_of, loaded, write

ROOT = Path(__file__).parents[2]
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}


def test_documented_metrics_are_exactly_the_published_ones() -> None:
    documented = re.findall(
        r"^\| `((?:service|host|gpu|provider|agent|defib|gateway)_[a-z0-9_]+)", DOCS["metrics"], re.MULTILINE
    )
    assert set(documented) == published_metrics()


def test_documented_recorded_series_are_exactly_the_existing_ones() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert set(re.findall(r"^\| `([a-z0-9_]+:[a-z0-9_:]+)", DOCS["metrics"], re.MULTILINE)) == recorded


def test_documented_alerts_are_exactly_the_existing_ones() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert sorted(re.findall(r"^### (\w+)$", DOCS["alerts"], re.MULTILINE)) == sorted(alerts)


@pytest.mark.parametrize("name", [*get_args(Refusal), *get_args(Wait)])
def test_every_refusal_and_wait_is_documented(name: str) -> None:
    assert f"| `{name}` |" in DOCS["remediation"]


@pytest.mark.parametrize("reason", get_args(FailureReason))
def test_every_reason_is_documented(reason: str) -> None:
    assert f"`{reason}`" in DOCS["metrics"]


@pytest.mark.parametrize("name", [*get_args(ProblemKind), *get_args(EventKind), *get_args(HostState)])
def test_every_problem_and_event_of_the_exporter_s_api_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCS["commands"]


def keys(part: Any) -> set[str]:
    """Return all configuration keys in a JSON Schema."""
    if isinstance(part, list):
        return {key for item in part for key in keys(item)}
    if not isinstance(part, dict):
        return set()
    properties = set(part["properties"]) if isinstance(part.get("properties"), dict) else set()
    return properties | {key for item in part.values() for key in keys(item)}


def keys_of(options: type[ConfigModel]) -> set[str]:
    return keys(options.model_json_schema(by_alias=True))


PROBE_KEYS = {key for kind in PROBES.values() for key in keys_of(kind.options)}


@pytest.mark.parametrize("key", sorted(keys(json_schema(KINDS)) - PROBE_KEYS - {"mode"}))
def test_every_configuration_key_is_documented(key: str) -> None:
    assert re.search(rf"\b{key}\b", DOCS["configuration"])


@pytest.mark.parametrize("kind", CHANNELS)
def test_every_key_of_a_channel_is_documented_in_its_row(kind: str) -> None:
    (row,) = re.findall(rf"^\| `{kind}`, .*", DOCS["configuration"], re.MULTILINE)
    assert [key for key in keys_of(CHANNELS[kind].options) if not re.search(rf"`{key}\b", row)] == []


SHARED, *PARTS = DOCS["probes"].split("\n## `")
SECTIONS = {part.split("`")[0]: part for part in PARTS}


@pytest.mark.parametrize("kind", PROBES)
def test_every_key_of_a_probe_is_documented_in_its_section(kind: str) -> None:
    assert f"| [`{kind}`](#{kind}) |" in SHARED
    missing = [key for key in keys_of(PROBES[kind].options) if not re.search(rf"\b{key}\b", SHARED + SECTIONS[kind])]
    assert missing == []


def test_the_readme_lists_every_probe_type() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [kind for kind in PROBES if f"| `{kind}` |" not in readme] == []


def test_every_command_and_option_is_documented() -> None:
    (commands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert f"`defib {name}" in DOCS["commands"]
        for option in (text for action in command._actions for text in action.option_strings if text.startswith("--")):
            assert option == "--help" or option in DOCS["commands"], f"{name} {option}"


def examples(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def read_as_editors(text: str) -> Any:
    """Read YAML 1.2, in which a date is text."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def configurations() -> Iterator[tuple[str, Any]]:
    """Yield every example of a configuration with its place; other YAML is of Prometheus and Alertmanager."""
    sections = json_schema(KINDS)["properties"]
    for page, text in {**DOCS, "README": (ROOT / "README.md").read_text()}.items():
        for number, block in enumerate(examples(text, "yaml")):
            if page == "configuration" or re.match(rf"({'|'.join(sections)}|x-\w+):", block) is not None:
                yield f"{page}-{number}", read_as_editors(block.replace("…", "x"))
    for path in (ROOT / "deploy" / "examples").glob("*.yaml"):
        yield path.name, yaml.safe_load(path.read_text())


@pytest.mark.parametrize(("place", "value"), list(configurations()))
def test_the_json_schema_takes_every_example(place: str, value: Any) -> None:
    _validator().validate(value)


@cache
def _validator() -> jsonschema.Draft202012Validator:
    """Return a validator of the schema, which is checked once: that takes half a second."""
    schema = json_schema(KINDS)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_readme_s_configuration_loads(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (first,) = re.findall(r"<<'EOF'\n(.*?)EOF", readme, re.DOTALL)
    second, gateway = examples(readme, "yaml")
    assert len(first.splitlines()) == 5
    for name, text in (("first", first), ("second", second)):
        environ = {
            "DEFIB_WEBHOOK_TOKEN": "t",
            "DEFIB_METRICS_TOKEN": "m",
            "FEISHU_WEBHOOK": "http://f/",
            "FEISHU_SECRET": "s",
        }
        assert "wiki" in loaded(write(tmp_path / name, a=text), environ).inventory.services
    found = loaded(write(tmp_path / "gateway", a=gateway), {"NVIDIA_API_KEY": "k"}).inventory.gateway
    assert found.upstreams.keys() == {"nvidia"}


def test_the_readme_s_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"make ([a-z-]+)", readme):
        assert target == "help" or f"make {target} " in targets
    output = subprocess.run(
        [sys.executable, "-m", "defib", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in re.findall(r"defib ([a-z]+)\b", readme):
        if command in ("check", "probe", "exporter", "remediator", "control", "demo"):
            assert command in output


@pytest.mark.parametrize("text", examples(DOCS["gateway"], "yaml"))
def test_the_configuration_of_the_gateway_page_loads(tmp_path: Path, text: str) -> None:
    (tmp_path / "secrets").mkdir()
    for name in ("nvidia_api_key", "gateway_token"):
        (tmp_path / "secrets" / name).write_text(f"{name} with 24 characters".replace(" ", "-"))
    environ = {name: name for name in re.findall(r"\$\{(\w+)\}", text)}
    gateway = loaded(write(tmp_path, a=text), environ).inventory.gateway
    assert gateway.upstreams["nvidia"].rate == 40
    assert gateway.default == "nvidia"


@pytest.mark.parametrize("outcome", [*OUTCOMES, *STATES])
def test_every_outcome_of_the_gateway_is_documented(outcome: str) -> None:
    assert f"`{outcome}`" in DOCS["metrics"]


@pytest.mark.parametrize("text", examples(DOCS["feishu"], "yaml"))
def test_the_configuration_of_the_feishu_page_loads(tmp_path: Path, text: str) -> None:
    names = re.findall(r"\$\{(\w+)\}", text)
    assert loaded(write(tmp_path, a=text), dict.fromkeys(names, "http://f/")).inventory.notify.channels


def test_the_templates_of_the_feishu_page_render(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for text in examples(DOCS["feishu"], "jinja"):
        name, _, template = text.partition("\n")
        (tmp_path / "own" / name.removeprefix("{# ").removesuffix(" #}")).write_text(template)
    inventory = inventory_of(tmp_path / "config", {"notify": {"templates": str(tmp_path / "own")}}).inventory
    assert list(samples.check_templates(inventory)) == []
    (tmp_path / "own" / "card.j2").write_text("{{ story.labels.rack }}\n{{ story.nothing }}")
    (wrong,) = samples.check_templates(inventory)
    assert wrong.startswith(f"{tmp_path}/own/card.j2:2: ")
    (tmp_path / "own" / "card.j2").write_text("{% if %}")
    assert [each.startswith(f"{tmp_path}/own/card.j2:1: ") for each in samples.check_templates(inventory)] == [True]


def test_every_explained_feishu_code_is_on_the_feishu_page() -> None:
    missing = [code for code in feishu.EXPLANATIONS if f"`{code}`" not in DOCS["feishu"]]
    assert missing == []


def test_every_notification_state_is_on_the_feishu_page() -> None:
    assert [state for state in get_args(NotificationKind) if not re.search(rf"\b{state}\b", DOCS["feishu"])] == []


def test_the_index_links_to_every_page() -> None:
    assert set(re.findall(r"\]\((\w[\w-]*)\.md\)", DOCS["index"])) == set(DOCS) - {"index"}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_are_valid(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/upgrading.md", "CONTRIBUTING.md", "README.md"])
def test_paths_that_are_named_exist(page: str) -> None:
    folders = "alerts|defib|deploy|docs|exporter|fleet|gateway|grafana|remediator|runtime|tests"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*|[\w.-]+\.(?:toml|md|example))`", (ROOT / page).read_text())
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith("alerts/secrets/")] == []


@pytest.mark.parametrize("package", ["console", "defib", "exporter", "fleet", "gateway", "remediator"])
def test_the_architecture_page_names_modules_that_exist(package: str) -> None:
    section = DOCS["architecture"].split(f"\n### {package}\n")[1].split("\n#")[0]
    names = {name.rstrip("/") for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*/?)`", section)} - {"df"}
    assert [name for name in names if not (ROOT / package / name).exists() and not _has_module(package, name)] == []
    top = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    if package != "defib":  # whose modules are the commands
        assert top - {"__init__"} <= names


@pytest.mark.parametrize(
    "folder",
    ["fleet/inventory", *(f"remediator/{name}" for name in ("engine", "http", "incidents", "notifications", "policy"))],
)
def test_the_architecture_page_names_all_modules_of_a_folder(folder: str) -> None:
    package, name = folder.split("/")
    section = DOCS["architecture"].split(f"\n### {package}\n")[1].split("\n#")[0]
    (row,) = re.findall(rf"^\| `{name}/` .*", section, re.MULTILINE)
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert [module for module in sorted(modules) if f"`{module}`" not in row] == []


def _has_module(package: str, name: str) -> bool:
    return any((ROOT / package).rglob(f"{name}.py")) or any((ROOT / package).rglob(f"{name}/"))


@pytest.mark.parametrize("page", [*DOCS, "README"])
def test_commands_that_are_shown_exist(page: str) -> None:
    (commands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    text = (ROOT / "README.md").read_text() if page == "README" else DOCS[page]
    shown = re.findall(r"(?:^|`|exec exporter )defib ([a-z]+)\b", "\n".join(examples(text, "sh")), re.MULTILINE)
    shown += re.findall(r"`defib ([a-z]+)\b", text)
    assert set(shown) <= set(commands.choices)


def test_the_example_configuration_loads(tmp_path: Path) -> None:
    config = shutil.copytree(ROOT / "deploy" / "examples", tmp_path / "config")
    (config / "secrets").mkdir()
    for path in config.glob("*.yaml"):
        for name in re.findall(r"\$\{file:secrets/(\w+)\}", path.read_text()):
            (config / "secrets" / name).write_text(f"a-secret-{name}")
    made = loaded(config)
    assert [str(each) for each in made.warnings if each.path.startswith("gateway.")] == []
    inventory = made.inventory
    agents = {name.removeprefix("agent-") for name in inventory.services if name.startswith("agent-")}
    assert len(agents) == 15
    assert inventory.gateway.clients.keys() == agents
    kinds = {service.probe.kind for service in inventory.services.values()}
    assert {"http", "openai", "status", "program", "unit", "tcp"} <= kinds
    controls = {service.control.kind for service in inventory.services.values() if service.control}
    assert {"docker", "systemd", "supervisor", "http"} <= controls
