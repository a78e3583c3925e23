"""The doctor's checks of Prometheus, Alertmanager and Grafana."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import httpx
import re2
import yaml

from defib.doctor.findings import Finding
from defib.doctor.server import TIMEOUT, Server, not_configured
from defib.output import format_count
from defib.shipped import find_shipped
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import Inventory
from fleet.json_client import http_client

LOOKBACK = 300.0  # seconds for which Prometheus treats a sample as current
JOBS = ("defib-exporter", "defib-remediator")
GATEWAY_JOB = "defib-gateway"
RECORDED = ("service:up:max", "host:up:max", "ALERTS")  # examples of series that alerts and dashboards use
WEBHOOK = "/webhook/alertmanager"
# Where the watcher is: its webhook, and its addresses as shipped, with systemd and with docker compose.
WATCHER_PATH, WATCHERS = "/alerts", ("http://127.0.0.1:9192", "http://deadman:9192")


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
        jobs = (*JOBS, GATEWAY_JOB) if inventory.gateway.upstreams else JOBS
        _check_targets(server, response.json()["data"]["activeTargets"], jobs)
        await _check_labels(server)
        config = await server.get("/api/v1/status/config")
        if config is not None:
            _check_recorded_names(server, yaml.safe_load(config.json()["data"]["yaml"]).get("scrape_configs") or [])
        rules = await server.get("/api/v1/rules")
        if rules is not None:
            _check_rules(server, rules.json()["data"]["groups"])
        managers = await server.get("/api/v1/alertmanagers")
        if managers is not None:
            active = managers.json()["data"]["activeAlertmanagers"]
            server.add("Alertmanager", "" if active else "it has none", "see `alerting:` in alerts/prometheus.yml")
    return server.findings


def _check_targets(server: Server, active: Sequence[Mapping[str, Any]], jobs: Sequence[str]) -> None:
    fix = (
        "see scrape_configs in alerts/prometheus.yml; HTTP 401 or 403: set access.metrics_token and let the job send"
        " it, and add the target's name to access.hosts unless it is an address"
    )
    for job in jobs:
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
    receivers = {each["name"]: each for each in config.get("receivers") or []}
    _check_receivers(server, receivers)
    await _check_fallback(server, receivers.get("fallback"))
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


async def _check_fallback(server: Server, fallback: Mapping[str, Any] | None) -> None:
    """Check that the receiver for problems of Defib has a destination, and that the watcher answers if it is one."""
    configs = [name for name, value in (fallback or {}).items() if name.endswith("_configs") and value]
    problem = "there is no such receiver" if fallback is None else "" if configs else "it has no destination"
    if problem:
        fix = "give it a destination, as in alerts/alertmanager.yml: it reports that the remediator is down"
        server.add("receiver fallback", problem, fix, severe=False)
        return
    places = _find_watchers((fallback or {}).get("webhook_configs") or [])
    problems = [await _ask_watcher(each) for each in places]
    problem = "" if "" in problems else "; ".join(problems)
    fix = "start it, or see its log: docs/operations.md, When Defib itself fails"
    server.add("receiver fallback", problem, fix, detail="the watcher answers" if places else "", severe=False)


def _find_watchers(hooks: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Return where the watcher may be: the address in the URL of its webhook, or where that is hidden, as shipped."""
    for hook in hooks:
        url = str(hook.get("url", ""))
        if url.endswith(WATCHER_PATH):
            return [url.removesuffix(WATCHER_PATH)]
        sent = ((hook.get("http_config") or {}).get("authorization") or {}).get("credentials_file", "")
        if "secret" in url and str(sent).endswith("webhook_token"):  # newer versions hide the URLs
            return WATCHERS
    return []


async def _ask_watcher(base: str) -> str:
    """Return why the watcher cannot notify; empty if it can."""
    try:
        async with http_client(Endpoint(url=base)) as client:
            response = await client.get("/-/ready", timeout=TIMEOUT)
    except httpx.HTTPError:
        return f"the watcher, `defib deadman`, does not answer at {base}"
    return "" if response.is_success else f"the watcher at {base} has no channel"


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
