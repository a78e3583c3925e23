"""What exists is documented, and what the documentation shows is true."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from defib.cli import build_parser
from defib.kinds import KINDS
from exporter.probes import PROBES
from exporter.results import Reason
from fleet.inventory.endpoints import Part
from fleet.inventory.model import json_schema
from fleet.inventory.notify import NotificationKind
from remediator.notifications import samples
from remediator.notifications.channels import feishu
from remediator.policy import Refusal, Wait
from tests.names import ours, rules
from tests.support import inventory_of, loaded, write

ROOT = Path(__file__).parents[2]
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}


def test_every_metric_has_a_line_and_every_line_a_metric() -> None:
    written = re.findall(r"^\| `((?:service|host|gpu|provider|defib)_[a-z0-9_]+)", DOCS["metrics"], re.MULTILINE)
    assert set(written) == ours()


def test_every_recorded_series_has_a_line_and_every_line_a_series() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert set(re.findall(r"^\| `([a-z0-9_]+:[a-z0-9_:]+)", DOCS["metrics"], re.MULTILINE)) == recorded


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    there = {rule["alert"] for rule in rules() if "alert" in rule}
    assert sorted(re.findall(r"^### (\w+)$", DOCS["alerts"], re.MULTILINE)) == sorted(there)


@pytest.mark.parametrize("name", [*get_args(Refusal), *get_args(Wait)])
def test_every_refusal_and_wait_has_a_line(name: str) -> None:
    assert f"| `{name}` |" in DOCS["remediation"]


@pytest.mark.parametrize("reason", get_args(Reason))
def test_every_reason_is_explained(reason: str) -> None:
    assert f"`{reason}`" in DOCS["metrics"]


def keys(part: Any) -> set[str]:
    """Every configuration key in a JSON Schema."""
    if isinstance(part, list):
        return {key for item in part for key in keys(item)}
    if not isinstance(part, dict):
        return set()
    found = set(part["properties"]) if isinstance(part.get("properties"), dict) else set()
    return found | {key for item in part.values() for key in keys(item)}


def keys_of(options: type[Part]) -> set[str]:
    return keys(options.model_json_schema(by_alias=True))


OF_PROBES = {key for kind in PROBES.values() for key in keys_of(kind.options)}


@pytest.mark.parametrize("key", sorted(keys(json_schema(KINDS)) - OF_PROBES - {"mode"}))
def test_every_configuration_key_is_documented(key: str) -> None:
    assert re.search(rf"\b{key}\b", DOCS["configuration"])


SHARED, *PARTS = DOCS["probes"].split("\n## `")
SECTIONS = {part.split("`")[0]: part for part in PARTS}


@pytest.mark.parametrize("kind", PROBES)
def test_every_key_of_a_probe_is_documented_in_its_section(kind: str) -> None:
    assert f"| [`{kind}`](#{kind}) |" in SHARED
    missing = [key for key in keys_of(PROBES[kind].options) if not re.search(rf"\b{key}\b", SHARED + SECTIONS[kind])]
    assert missing == []


def test_the_readme_names_every_kind_of_probe() -> None:
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


def test_the_readme_s_configuration_loads(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (first,) = re.findall(r"<<'EOF'\n(.*?)EOF", readme, re.DOTALL)
    (second,) = examples(readme, "yaml")
    assert len(first.splitlines()) == 5
    for name, text in (("first", first), ("second", second)):
        environ = {"DEFIB_WEBHOOK_TOKEN": "t", "FEISHU_WEBHOOK": "http://f/", "FEISHU_SECRET": "s"}
        assert "wiki" in loaded(write(tmp_path / name, a=text), environ).inventory.services


def test_the_readme_s_commands_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"make ([a-z]+)", readme):
        assert target == "help" or f"make {target} " in targets
    told = subprocess.run([sys.executable, "-m", "defib", "--help"], capture_output=True, text=True, check=True).stdout
    for command in re.findall(r"defib ([a-z]+)\b", readme):
        if command in ("check", "probe", "exporter", "remediator", "control", "demo"):
            assert command in told


@pytest.mark.parametrize("text", examples(DOCS["feishu"], "yaml"))
def test_the_configuration_of_the_feishu_page_loads(tmp_path: Path, text: str) -> None:
    names = re.findall(r"\$\{(\w+)\}", text)
    assert loaded(write(tmp_path, a=text), dict.fromkeys(names, "http://f/")).inventory.notify.channels


def test_the_templates_of_the_feishu_page_are_good(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for text in examples(DOCS["feishu"], "jinja"):
        name, _, template = text.partition("\n")
        (tmp_path / "own" / name.removeprefix("{# ").removesuffix(" #}")).write_text(template)
    inventory = inventory_of(tmp_path / "config", {"notify": {"templates": str(tmp_path / "own")}}).inventory
    assert list(samples.check(inventory)) == []
    (tmp_path / "own" / "card.j2").write_text("{{ story.labels.rack }}\n{{ story.nothing }}")
    (wrong,) = samples.check(inventory)
    assert wrong.startswith(f"{tmp_path}/own/card.j2:2: ")
    (tmp_path / "own" / "card.j2").write_text("{% if %}")
    assert [each.startswith(f"{tmp_path}/own/card.j2:1: ") for each in samples.check(inventory)] == [True]


def test_every_code_that_has_words_is_on_the_feishu_page() -> None:
    missing = [code for code in feishu._WORDS if f"`{code}`" not in DOCS["feishu"]]
    assert missing == []


def test_every_state_that_routes_may_name_is_on_the_feishu_page() -> None:
    assert [state for state in get_args(NotificationKind) if not re.search(rf"\b{state}\b", DOCS["feishu"])] == []


def test_the_index_leads_to_every_page() -> None:
    assert set(re.findall(r"\]\((\w[\w-]*)\.md\)", DOCS["index"])) == set(DOCS) - {"index"}


@pytest.mark.parametrize("page", [*DOCS, "README"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "README.md").read_text().replace("](docs/", "](") if page == "README" else DOCS[page]
    for name, anchor in re.findall(r"\]\((?:([\w-]+)\.md)?(?:#([\w-]+))?\)", text):
        there = DOCS[name or page]
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {name}#{anchor}"


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
    (config / "secrets" / "llm_api_key").write_text("a key")
    inventory = loaded(config).inventory
    kinds = {service.probe.kind for service in inventory.services.values()}
    assert {"http", "openai", "status", "program", "unit", "tcp"} <= kinds
    controls = {service.control.kind for service in inventory.services.values() if service.control}
    assert {"docker", "systemd", "supervisor", "http"} <= controls
