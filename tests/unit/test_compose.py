"""docker-compose.yml: what it asks for, by the compose specification and as compose reads it."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SCHEMA = Path(__file__).parents[2] / ".parts/root/usr/lib/python3/dist-packages/compose/config/compose_spec.json"
INSTALLED = Path("/usr/lib/python3/dist-packages/compose/config/compose_spec.json")
ENVIRONMENT = dict(
    line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#")
)


PINNED = re.compile(r":v?\d+\.\d+\.\d+(-slim-bookworm)?(@sha256:[0-9a-f]{64})?$")


def compose(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with tempfile.NamedTemporaryFile() as empty:  # so that no .env of a developer's is read
        argv = ["docker-compose", "--env-file", empty.name, *arguments]
        return subprocess.run(argv, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.needs("docker-compose")
def test_it_is_what_the_specification_allows() -> None:
    path = next(path for path in (SCHEMA, INSTALLED) if path.is_file())
    schema = jsonschema.Draft201909Validator(json.loads(path.read_text()))
    schema.validate(COMPOSE)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**COMPOSE, "services": {"x": {"imagee": "y"}}})


@pytest.mark.needs("docker-compose")
def test_compose_reads_it_with_what_the_example_says() -> None:
    done = compose(ENVIRONMENT, "--profile", "tools", "--profile", "gateway", "config")
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)
    mirrored = compose({**ENVIRONMENT, "REGISTRY": "registry.example/hub"}, "config")
    images = {each["image"] for each in yaml.safe_load(mirrored.stdout)["services"].values()}
    assert all(image.startswith("registry.example/hub/") or image == "defib:latest" for image in images)


@pytest.mark.needs("docker-compose")
@pytest.mark.parametrize("name", ["DEFIB_UID", "DEFIB_GID", "DEFIB_EXPORTER_UID", "DEFIB_SECRETS"])
def test_what_is_missing_is_named(name: str) -> None:
    done = compose({key: value for key, value in ENVIRONMENT.items() if key != name}, "config")
    assert done.returncode != 0
    assert name in done.stderr
    if name == "DEFIB_SECRETS":
        for secret in (
            "webhook_token",
            "metrics_token",
            "exporter_token",
            "web_config",
            "console_password",
            "grafana_password",
        ):
            assert secret in done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_held_on_a_short_lead(name: str) -> None:
    service = SERVICES[name]
    is_server = service.get("profiles") != ["tools"]
    assert service["restart"] == ("unless-stopped" if is_server else "no")
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["cpus"]
    assert not is_server or service["healthcheck"]["test"]
    assert PINNED.search(service["image"]) or service["image"] == "${DEFIB_IMAGE:-defib:latest}", service["image"]
    for port in service.get("ports", []):
        own = ("${PING_LISTEN:-127.0.0.1:9998}:9998", "${GATEWAY_LISTEN:-127.0.0.1:9190}:9190")
        assert port.startswith("${LISTEN:-127.0.0.1}:") or port in own


def test_the_base_images_are_pinned_and_the_same() -> None:
    built = COMPOSE["x-defib"]["build"]["args"]["BASE_IMAGE"]
    (base,) = re.findall(r"^ARG BASE_IMAGE=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert PINNED.search(base)
    assert built == f"${{REGISTRY:-docker.io}}/library/{base}"


def test_variables_are_explained_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    explained = set(re.findall(r"^#?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used - {"SSH_AUTH_SOCK"} == explained - {"COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}


def test_the_exporter_has_a_user_and_secrets_of_its_own() -> None:
    exporter, remediator = SERVICES["exporter"], SERVICES["remediator"]
    assert exporter["user"].startswith("${DEFIB_EXPORTER_UID:?")
    assert remediator["user"].startswith("${DEFIB_UID:?")
    # Hides the directory of all secrets.
    assert "/etc/defib/secrets:mode=700,uid=${DEFIB_EXPORTER_UID}" in exporter["tmpfs"]
    assert [each["source"] for each in exporter["secrets"]] == ["exporter_token", "metrics_token"]
    assert all(each["ulimits"]["core"] == 0 for each in (exporter, remediator))


def test_the_watcher_runs_as_the_remediator_and_is_published_nowhere() -> None:
    watcher, remediator = SERVICES["deadman"], SERVICES["remediator"]
    assert (watcher["user"], watcher["ulimits"]["core"]) == (remediator["user"], 0)
    assert "ports" not in watcher
    kept = "/var/lib/defib-deadman"
    assert f"watcher:{kept}" in watcher["volumes"]
    assert f" {kept} " in (ROOT / "Dockerfile").read_text()  # a volume gets the mode of this folder
    alertmanager = yaml.safe_load((ROOT / "alerts" / "alertmanager.yml").read_text())
    (fallback,) = (each for each in alertmanager["receivers"] if each["name"] == "fallback")
    assert fallback["webhook_configs"][0]["url"] == "http://deadman:9192/alerts"
    assert {"watcher", "record"} <= set(COMPOSE["volumes"])


def test_the_gateway_starts_only_where_it_is_wanted() -> None:
    assert SERVICES["gateway"]["profiles"] == ["gateway"]
    kept = "/var/lib/defib-gateway"
    assert f"gateway:{kept}" in SERVICES["gateway"]["volumes"]
    assert f" {kept} " in (ROOT / "Dockerfile").read_text()  # a volume gets the mode of this folder


def test_no_secret_is_in_it() -> None:
    for service in SERVICES.values():
        for key, value in (service.get("environment") or {}).items():
            assert "PASSWORD" not in key or key.endswith("__FILE"), (key, value)
