"""Files for Prometheus, Alertmanager and Grafana, with the addresses of an installation."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from defib.shipped import find_shipped
from defib.starter.answers import Answers
from fleet.inventory.notify import Language
from runtime.errors import DefibError

_SYSTEMD_SHARE = Path("/opt/defib/current/share/defib")  # of the version in use
_SYSTEMD_SECRETS = Path("/etc/prometheus/secrets")  # which these servers can read
WATCHER = "127.0.0.1:9192"
_ADDRESSES = {
    "exporter": "127.0.0.1:9999", "remediator": "127.0.0.1:9095", "alertmanager": "127.0.0.1:9093",
    "prometheus": "127.0.0.1:9090", "node-exporter": "127.0.0.1:9100", "deadman": WATCHER,
}  # fmt: skip
# The dashboards of a language have the same UIDs as those of the others: Grafana loads one of these folders.
DASHBOARDS: Mapping[Language, str] = {"en": "dashboards", "zh": "dashboards-zh"}
_FALLBACK = re.compile(r"(?: *#.*\n)*  - name: fallback\n(?:    .*\n)+")


def directory_of(directory: Path) -> Path:
    """Return where the files are, beside the configuration, which these servers cannot read."""
    named = directory if directory.name else directory.absolute()
    return named.with_name(f"{named.name}-monitoring")


def render(directory: Path, answers: Answers) -> Mapping[str, str]:
    """Return the files by name. Raises DefibError."""
    shipped = find_shipped()
    texts = {
        f"{name}.yml": (shipped / "alerts" / f"{name}.yml").read_text(encoding="utf-8")
        for name in ("prometheus", "alertmanager")
    }
    if answers.mode != "compose":
        share = _SYSTEMD_SHARE if answers.mode == "systemd" else shipped
        of_secrets = _SYSTEMD_SECRETS if answers.mode == "systemd" else directory.absolute() / "secrets"
        texts |= _list_grafana_files(shipped, share, DASHBOARDS[answers.language])
        texts = {name: _set_addresses(text) for name, text in texts.items()}
        for name in ("prometheus.yml", "alertmanager.yml"):
            texts[name] = texts[name].replace("secrets/", f"{of_secrets}/")
        texts["prometheus.yml"] = texts["prometheus.yml"].replace("rules/*.yml", f"{share}/alerts/rules/*.yml")
    texts["alertmanager.yml"] = _set_fallback(texts["alertmanager.yml"], answers)
    return texts


def _list_grafana_files(shipped: Path, share: Path, chosen: str) -> dict[str, str]:
    folder = shipped / "grafana" / "provisioning"
    sources, dashboards = (folder / name / "defib.yml" for name in ("datasources", "dashboards"))
    return {
        "grafana-datasources.yaml": sources.read_text(encoding="utf-8"),
        "grafana-dashboards.yaml": dashboards.read_text(encoding="utf-8").replace(
            "/etc/grafana/dashboards", f"{share}/grafana/{chosen}"
        ),
    }


def _set_addresses(text: str) -> str:
    text = text.replace("The addresses are the service names of docker-compose.yml; change them to yours. ", "")
    names = "|".join(map(re.escape, _ADDRESSES))
    return re.sub(rf"(?<![\w.-])({names}):\d+", lambda match: _ADDRESSES[match[1]], text)


def _set_fallback(text: str, answers: Answers) -> str:
    """Return Alertmanager's configuration with another receiver for alerts about the remediator than the watcher."""
    configs: dict[str, Any] = {}
    if answers.fallback_mail:
        sender = f"defib@{answers.fallback_mail.partition('@')[2]}"
        mail = {"to": answers.fallback_mail, "from": sender, "smarthost": answers.smtp, "require_tls": False}
        configs["email_configs"] = [{**mail, "send_resolved": True}]
    if answers.fallback_webhook:
        configs["webhook_configs"] = [{"url": answers.fallback_webhook, "send_resolved": True}]
    if not configs:
        return text
    receiver = textwrap.indent(yaml.safe_dump([{"name": "fallback", **configs}], sort_keys=False), "  ")
    text, count = _FALLBACK.subn(lambda _: receiver, text)
    if count != 1:
        raise DefibError("alerts/alertmanager.yml has no receiver `fallback` as it was shipped")
    return text
