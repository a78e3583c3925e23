"""The doctor's checks of Prometheus, Alertmanager and Grafana."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import re2
import yaml

from defib.doctor.findings import Finding
from defib.doctor.server import Server, not_configured
from defib.output import format_count
from defib.shipped import find_shipped
from fleet.inventory.model import Inventory

LOOKBACK = 300.0  # seconds for which Prometheus treats a sample as current
JOBS = ("defib-exporter", "defib-remediator")
RECORDED = ("service:up:max", "host:up:max", "ALERTS")  # examples of series that alerts and dashboards use
WEBHOOK = "/webhook/alertmanager"


async def check_prometheus(inventory: Inventory) -> Sequence[Finding]:
    """Check that Prometheus scrapes Defib, keeps its labels, and has its rules."""
    endpoint = inventory.remediator.prometheus_url
    if endpoint is None:
        return [not_configured("prometheus", "prometheus_url", "`defib replay` and these checks need it")]
    server = Server("prometheus", endpoint)
    async with server.client:
        response = await server.get("/api/v1/targets?state=active")
        if response is None:
            return server.findings
        server.add("reachable")
        _check_targets(server, response.json()["data"]["activeTargets"])
        await _check_labels(server)
        config = await server.get("/api/v1/status/config")
        if config is not None:
            jobs = yaml.safe_load(config.json()["data"]["yaml"]).get("scrape_configs") or []
            _check_recorded_names(server, jobs)
        rules = await server.get("/api/v1/rules")
        if rules is not None:
            _check_rules(server, rules.json()["data"]["groups"])
        managers = await server.get("/api/v1/alertmanagers")
        if managers is not None:
            active = managers.json()["data"]["activeAlertmanagers"]
            server.add("Alertmanager", "" if active else "it has none", "see `alerting:` in alerts/prometheus.yml")
    return server.findings


def _check_targets(server: Server, active: Sequence[Mapping[str, Any]]) -> None:
    fix = (
        "see scrape_configs in alerts/prometheus.yml; HTTP 401 or 403: set access.metrics_token and let the job send"
        " it, and add the target's name to access.hosts unless it is an address"
    )
    for job in JOBS:
        targets = [each for each in active if each["labels"]["job"] == job]
        down = [
            f"{each['scrapeUrl']}: {each['lastError'] or 'not scraped yet'}"
            for each in targets
            if each["health"] != "up"
        ]
        server.add(f"scrapes {job}", ", ".join(down) if targets else "no such job", fix)


async def _check_labels(server: Server) -> None:
    """Check that Prometheus keeps Defib's labels; one that a target has too is renamed to `exported_…`."""
    selector = f'job=~"{"|".join(JOBS)}"'
    query = urlencode({"match[]": f"{{{selector}}}", "start": int(time.time() - LOOKBACK)})
    response = await server.get(f"/api/v1/labels?{query}")
    if response is None:
        return
    replaced = []
    for name in filter(None, (re.fullmatch(r"exported_(\w+)", label) for label in response.json()["data"])):
        query = f'count by (job, {name[1]}) ({{{selector}, {name[0]}!="", {name[1]}!=""}})'
        counts = await server.get(f"/api/v1/query?{urlencode({'query': query})}")
        for series in counts.json()["data"]["result"] if counts is not None else ():
            labels, count = series["metric"], series["value"][1]
            target = f'the target label {name[1]}="{labels[name[1]]}" replaces that label'
            replaced.append(f"{target} in {count} series of {labels['job']} (renamed to {name[0]})")
    fix = "set honor_labels: true for the job in prometheus.yml, or remove that target label: docs/alerts.md"
    server.add("labels", ", ".join(replaced), fix, severe=False)


def _check_recorded_names(server: Server, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Check that no job can serve series that rules record: its targets could then fake or hide alerts."""
    accepted = {job["job_name"]: [name for name in RECORDED if _is_accepted(name, job)] for job in jobs}
    problem = "; ".join(f"{job} can serve {', '.join(names)}" for job, names in accepted.items() if names)
    fix = "give each job the metric_relabel_configs of alerts/prometheus.yml: docs/alerts.md"
    server.add("recorded names", problem, fix, severe=False)


def _is_accepted(name: str, job: Mapping[str, Any]) -> bool:
    """Return whether a job's samples with that name are stored."""
    for rule in job.get("metric_relabel_configs") or []:
        if rule.get("source_labels") == ["__name__"]:
            matches = re2.fullmatch(rule.get("regex", ".*"), name) is not None
            if (rule.get("action") == "drop" and matches) or (rule.get("action") == "keep" and not matches):
                return False
    return True


def _check_rules(server: Server, groups: Sequence[Mapping[str, Any]]) -> None:
    rules = [rule for group in groups for rule in group["rules"]]
    names = {rule["name"] for rule in rules}
    alerts = {rule["name"] for rule in rules if rule.get("type") != "recording"}
    missing = [name for name in ("ServiceDown", "Watchdog") if name not in names]
    problem = f"missing: {', '.join(missing)}" if missing else ""
    server.add("rules", problem, "add alerts/rules/*.yml to rule_files", detail=format_count(len(alerts), "alert"))
    if not missing and (others := sorted(_list_shipped_rules() - names)):
        fix = "give Prometheus the alerts/rules/*.yml of this version, and reload it"
        server.add("version of the rules", f"missing: {', '.join(others)}", fix, severe=False)
    failing = [f"{rule['name']}: {rule.get('lastError', '')}" for rule in rules if rule["health"] == "err"]
    if failing:
        server.add("rule evaluation", failing[0], "see the page /rules of Prometheus, and its log")


def _list_shipped_rules() -> set[str]:
    """Return the names of the alerts and the recorded series of this version."""
    files = (find_shipped() / "alerts" / "rules").glob("*.yml")
    groups = [group for path in files for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return {str(rule.get("alert") or rule["record"]) for group in groups for rule in group["rules"]}


async def check_alertmanager(inventory: Inventory) -> Sequence[Finding]:
    """Check that Alertmanager sends to the remediator, and has a fallback receiver."""
    endpoint = inventory.remediator.alertmanager_url
    if endpoint is None:
        consequence = "silences and missed notifications of resolved alerts are not seen"
        return [not_configured("alertmanager", "alertmanager_url", consequence)]
    server = Server("alertmanager", endpoint)
    async with server.client:
        status = await server.get("/api/v2/status")
        if status is None:
            return server.findings
        server.add("reachable", detail=f"version {status.json()['versionInfo']['version']}")
        config = yaml.safe_load(status.json()["config"]["original"]) or {}
    _check_receivers(server, {each["name"]: each for each in config.get("receivers") or []})
    return server.findings


def _check_receivers(server: Server, receivers: Mapping[str, Mapping[str, Any]]) -> None:
    urls = [str(hook.get("url", "")) for each in receivers.values() for hook in each.get("webhook_configs") or []]
    fix = "see the receiver `defib` in alerts/alertmanager.yml"
    if any(WEBHOOK in url for url in urls) or not any("secret" in url for url in urls):
        problem = (
            "" if any(WEBHOOK in url for url in urls) else f"no receiver has a webhook with a URL ending in {WEBHOOK}"
        )
        server.add("webhook", problem, fix)
    else:  # newer versions hide the URLs
        configured = bool(receivers.get("defib", {}).get("webhook_configs"))
        problem = "" if configured else "the URLs are hidden, and there is no receiver `defib` with a webhook"
        server.add("webhook", problem, fix, detail="the URL is hidden")
    fallback = receivers.get("fallback")
    configs = [name for name, value in (fallback or {}).items() if name.endswith("_configs") and value]
    problem = "there is no such receiver" if fallback is None else "" if configs else "it has no destination"
    fix = "give it an email address or another webhook: it reports that the remediator is down"
    server.add("receiver fallback", problem, fix, severe=False)


async def check_grafana(inventory: Inventory) -> Sequence[Finding]:
    """Check that Grafana runs and its database works."""
    endpoint = inventory.remediator.grafana_url
    if endpoint is None:
        return [not_configured("grafana", "grafana_url", "cards have no Grafana button")]
    server = Server("grafana", endpoint)
    async with server.client:
        health = await server.get("/api/health")
        if health is not None:
            problem = "" if health.json().get("database") == "ok" else "its database does not work"
            version = health.json().get("version", "unknown")
            server.add("reachable", problem, "see its log", detail=f"version {version}")
    return server.findings
