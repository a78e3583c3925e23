"""What the doctor asks the servers: ours, Prometheus, Alertmanager, Grafana."""

import contextlib
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import httpx
import re2
import yaml
from pydantic import SecretStr

from defib.doctor.findings import Finding, Result
from fleet.inventory.digests import digests_differ
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import Inventory
from remediator.clients.json_client import http_client
from runtime.errors import DefibError
from runtime.tokens import ApiToken, TokenError

WITHIN = 5.0  # seconds for each answer
CLOCK = 5.0  # seconds; a date in a header has whole ones
CERTIFICATE_DAYS = 30
LATELY = 300.0  # seconds; for that long Prometheus takes a sample as current
WATCHDOG, UNSENT = 120.0, 300.0  # seconds, as the alerts have them
OURS = ("defib-exporter", "defib-remediator")
RECORDED = ("service:up:max", "host:up:max", "ALERTS")  # some of what an alert or a dashboard is made from
WEBHOOK_PATH = "/webhook/alertmanager"
NOBODY = "-"  # what no service is called


class _Server:
    """One server that is asked, and the findings about it so far."""

    def __init__(self, name: str, endpoint: Endpoint, token: SecretStr | None = None) -> None:
        self.name, self.endpoint = name, endpoint
        self.findings: list[Finding] = []
        self.client = http_client(endpoint, token)

    def found(self, check: str, problem: str = "", mend: str = "", *, seen: str = "", grave: bool = True) -> bool:
        """Note a check, which passed unless there is a problem; tells whether it did."""
        result: Result = "pass" if not problem else "fail" if grave else "warn"
        self.findings.append(Finding(self.name, check, result, problem or seen, mend))
        return not problem

    async def get(self, path: str) -> httpx.Response | None:
        """An answer of success, or None and a finding."""
        try:
            async with self.client.stream("GET", path, timeout=WITHIN) as response:
                await response.aread()
                self._certificate(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = str(error) or type(error).__name__
            self.found("answers", f"{self.endpoint.base}: {said}", "start it, or mend the inventory's address of it")
            return None
        if not response.is_success:
            problem = f"{self.endpoint.base}{path}: HTTP {response.status_code}"
            mend = "mend its credentials in the inventory" if response.status_code in (401, 403) else "see its log"
            self.found("answers", problem, mend)
            return None
        self._clock(response)
        return response

    async def takes(self, token: ApiToken, path: str) -> None:
        """Note whether it takes the API token; `path` is of a change to something that is not there."""
        try:
            shown = {"Authorization": f"Bearer {token.get().get_secret_value()}"} if self.endpoint.auth is None else {}
        except TokenError as error:
            mend = f"run this as the remediator's user, name a file with --token-file, or set {token.setting}"
            self.found("takes the API token", str(error), mend, grave=False)
            return
        try:
            answer = await self.client.post(path, headers=shown, timeout=WITHIN)
        except httpx.HTTPError as error:
            self.found("takes the API token", type(error).__name__, "see its log")
            return
        problem = f"HTTP {answer.status_code}" if answer.status_code != HTTPStatus.NOT_FOUND else ""
        mend = f"give it the same {token.setting} as here, or have it read the same token file, and reload it"
        self.found("takes the API token", problem, mend)

    def _clock(self, response: httpx.Response) -> None:
        said = response.headers.get("Date")
        offset = time.time() - parsedate_to_datetime(said).timestamp() if said else 0.0
        if abs(offset) > CLOCK:
            self.found("its clock", f"this machine is {offset:+.0f} s off it", "run NTP on both", grave=False)

    def _certificate(self, response: httpx.Response) -> None:
        stream = response.extensions.get("network_stream")
        tls = stream.get_extra_info("ssl_object") if stream is not None else None
        ends = (tls.getpeercert() or {}).get("notAfter") if tls is not None else None
        if ends:
            days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86400
            problem = f"it expires in {days:.0f} days" if days < CERTIFICATE_DAYS else ""
            self.found("its certificate", problem, "renew it", seen=f"{days:.0f} days left", grave=False)


async def exporter(inventory: Inventory) -> Sequence[Finding]:
    server = _Server("exporter", inventory.exporter.url, inventory.exporter.token)
    async with server.client:
        if await server.get("/-/ready") is not None:
            listed = await server.get("/api/v1/services")
            if listed is not None:
                services = listed.json()["services"]
                there = {each["id"] for each in services}
                missing = sorted(inventory.services.keys() ^ there)
                problem = f"it does not have the same services: {', '.join(missing[:5])}" if missing else ""
                mend = "reload it: kill -HUP, or POST /-/reload"
                server.found("answers", problem, mend, seen=f"{len(there)} services", grave=False)
                others = _configured_otherwise(inventory, services)
                problem = f"it has another configuration of {', '.join(others[:5])}" if others else ""
                server.found("has this configuration", problem, mend, grave=False)
                token = ApiToken("exporter.token", inventory.exporter.token, inventory.remediator.token_file)
                await server.takes(token, f"/api/v1/services/{NOBODY}/probe")
    return server.findings


def _configured_otherwise(inventory: Inventory, services: Sequence[Mapping[str, Any]]) -> list[str]:
    known = inventory.services
    return sorted(
        each["id"]
        for each in services
        if each["id"] in known and digests_differ(known[each["id"]].digest, each.get("digest"))
    )


async def remediator(inventory: Inventory) -> Sequence[Finding]:
    settings = inventory.remediator
    token = ApiToken("remediator.token", settings.token, settings.token_file)
    shown = settings.webhook_token
    if shown is None:
        with contextlib.suppress(TokenError):
            shown = token.get()
    server = _Server("remediator", settings.url, shown)
    async with server.client:
        if await server.get("/-/ready") is None or not await _is_healthy(server):
            return server.findings
        await server.takes(token, f"/api/v1/services/{NOBODY}/reset")
        page = await server.get("/metrics")
        if page is None:
            return server.findings
        server.found("answers")
        values = _values(page.text)
        arrived = values.get("defib_remediator_watchdog_last_timestamp_seconds", 0.0)
        ago = time.time() - arrived
        late = f"not for {ago:.0f} s" if arrived else "it has not come"
        problem = late if ago > max(settings.watchdog, WATCHDOG) else ""
        mend = "see that Prometheus has alerts/rules, and that Alertmanager's receiver is this remediator"
        server.found("the Watchdog arrives", problem, mend, seen=f"{ago:.0f} s ago")
        off = values.get("defib_remediator_automation_enabled") == 0
        server.found("automation", "it is off" if off else "", "defib automation says why", grave=False)
        count = values.get("defib_remediator_config_mismatch", 0.0)
        problem = f"the exporter has another configuration of {count:.0f} services: nothing is done to them"
        mend = "reload the program that has the old configuration"
        server.found("has the exporter's configuration", problem if count else "", mend)
        unsent = values.get("defib_remediator_outbox_oldest_seconds", 0.0)
        problem = f"the oldest has waited {unsent:.0f} s" if unsent > UNSENT else ""
        server.found("notices are sent", problem, "see its log, and `defib notify test`")
        connections = re.findall(r'^defib_remediator_feishu_connected{channel="(.+)"} (\S+)', page.text, re.MULTILINE)
        for channel, connected in connections:
            problem = "" if float(connected) else "it does not stand: buttons do nothing"
            server.found(f"the long connection of {channel}", problem, "see its log", grave=False)
    return server.findings


async def _is_healthy(server: _Server) -> bool:
    """Whether the remediator says that it is well; else it says what is to be mended."""
    answer = await server.client.get("/-/healthy", timeout=WITHIN)
    return server.found("is healthy", "" if answer.is_success else answer.text.strip()[:500], "do as it says")


async def prometheus(inventory: Inventory) -> Sequence[Finding]:
    endpoint = inventory.remediator.prometheus_url
    if endpoint is None:
        return [_unset("prometheus", "prometheus_url", "`defib replay` cannot ask it, nor can this")]
    server = _Server("prometheus", endpoint)
    async with server.client:
        targets = await server.get("/api/v1/targets?state=active")
        if targets is None:
            return server.findings
        server.found("answers")
        active = targets.json()["data"]["activeTargets"]
        for job in OURS:
            told = [each for each in active if each["labels"]["job"] == job]
            down = [f"{each['scrapeUrl']}: {each['lastError']}" for each in told if each["health"] != "up"]
            problem = ", ".join(down) if told else "it has no such job"
            server.found(f"scrapes {job}", problem, "see scrape_configs in alerts/prometheus.yml, and its token")
        await _labels(server)
        config = await server.get("/api/v1/status/config")
        if config is not None:
            _recorded(server, yaml.safe_load(config.json()["data"]["yaml"]).get("scrape_configs") or [])
        rules = await server.get("/api/v1/rules?type=alert")
        if rules is not None:
            _rules(server, rules.json()["data"]["groups"])
        managers = await server.get("/api/v1/alertmanagers")
        if managers is not None:
            known = managers.json()["data"]["activeAlertmanagers"]
            server.found("knows an Alertmanager", "" if known else "it knows none", "see `alerting:` in prometheus.yml")
    return server.findings


async def _labels(server: _Server) -> None:
    """Whether Prometheus keeps our labels: where a target has one of the same name, ours is renamed to `exported_…`."""
    ours = f'job=~"{"|".join(OURS)}"'
    lately = urlencode({"match[]": f"{{{ours}}}", "start": int(time.time() - LATELY)})
    listed = await server.get(f"/api/v1/labels?{lately}")
    if listed is None:
        return
    replaced = []
    for name in filter(None, (re.fullmatch(r"exported_(\w+)", label) for label in listed.json()["data"])):
        query = f'count by (job, {name[1]}) ({{{ours}, {name[0]}!="", {name[1]}!=""}})'
        counted = await server.get(f"/api/v1/query?{urlencode({'query': query})}")
        for series in counted.json()["data"]["result"] if counted is not None else ():
            labels, count = series["metric"], series["value"][1]
            target = f'the target\'s {name[1]}="{labels[name[1]]}" replaces that label'
            replaced.append(f"{target} of {count} series of {labels['job']} (now {name[0]})")
    mend = "set honor_labels: true for the job in prometheus.yml, or remove that label there: docs/alerts.md"
    server.found("keeps our labels", ", ".join(replaced), mend, grave=False)


def _recorded(server: _Server, jobs: list[Any]) -> None:
    """Whether a job can serve what rules record: what it scrapes could then raise alerts, or end them."""
    may = {job["job_name"]: [name for name in RECORDED if _is_taken(name, job)] for job in jobs}
    problem = "; ".join(f"{job} may serve {', '.join(names)}" for job, names in may.items() if names)
    mend = "give each the metric_relabel_configs of alerts/prometheus.yml: docs/alerts.md"
    server.found("takes recorded names from no job", problem, mend, grave=False)


def _is_taken(name: str, job: Any) -> bool:
    """Whether a job's samples of that name are stored."""
    for rule in job.get("metric_relabel_configs") or []:
        if rule.get("source_labels") == ["__name__"]:
            matches = re2.fullmatch(rule.get("regex", ".*"), name) is not None
            if (rule.get("action") == "drop" and matches) or (rule.get("action") == "keep" and not matches):
                return False
    return True


def _rules(server: _Server, groups: list[Any]) -> None:
    rules = [rule for group in groups for rule in group["rules"]]
    names = {rule["name"] for rule in rules}
    missing = [name for name in ("ServiceDown", "Watchdog") if name not in names]
    problem = f"it has no {' and no '.join(missing)}" if missing else ""
    server.found("has the rules", problem, "give it alerts/rules as rule_files", seen=f"{len(names)} alerts")
    broken = [f"{rule['name']}: {rule.get('lastError', '')}" for rule in rules if rule["health"] == "err"]
    if broken:
        server.found("its rules work", broken[0], "see its log")


async def alertmanager(inventory: Inventory) -> Sequence[Finding]:
    endpoint = inventory.remediator.alertmanager_url
    if endpoint is None:
        return [_unset("alertmanager", "alertmanager_url", "missed resolves and silences are not seen")]
    server = _Server("alertmanager", endpoint)
    async with server.client:
        status = await server.get("/api/v2/status")
        if status is None:
            return server.findings
        server.found("answers", seen=f"version {status.json()['versionInfo']['version']}")
        config = yaml.safe_load(status.json()["config"]["original"]) or {}
    receivers = {each["name"]: each for each in config.get("receivers") or []}
    urls = [str(hook.get("url", "")) for each in receivers.values() for hook in each.get("webhook_configs") or []]
    mend = "see the receiver `defib` in alerts/alertmanager.yml"
    if any(WEBHOOK_PATH in url for url in urls) or not any("secret" in url for url in urls):
        told = any(WEBHOOK_PATH in url for url in urls)
        server.found("tells the remediator", "" if told else f"no receiver's webhook ends in {WEBHOOK_PATH}", mend)
    else:
        there = bool(receivers.get("defib", {}).get("webhook_configs"))
        problem = "" if there else "it hides where its webhooks lead, and none is of a receiver `defib`"
        server.found("tells the remediator", problem, mend, seen="it hides the address")
    fallback = receivers.get("fallback")
    ways = [name for name, value in (fallback or {}).items() if name.endswith("_configs") and value]
    problem = "there is no such receiver" if fallback is None else "" if ways else "it leads nowhere"
    mend = "give it mail, or another webhook: by it you hear that the remediator is down"
    server.found("the receiver `fallback`", problem, mend, grave=False)
    return server.findings


async def grafana(inventory: Inventory) -> Sequence[Finding]:
    endpoint = inventory.remediator.grafana_url
    if endpoint is None:
        return [_unset("grafana", "grafana_url", "cards have no button for it")]
    server = _Server("grafana", endpoint)
    async with server.client:
        health = await server.get("/api/health")
        if health is not None:
            problem = "" if health.json().get("database") == "ok" else "its database is not well"
            server.found("answers", problem, "see its log", seen=f"version {health.json().get('version', '?')}")
    return server.findings


Look = Callable[[Inventory], Awaitable[Sequence[Finding]]]
ALL: tuple[tuple[str, Look], ...] = (
    ("exporter", exporter), ("remediator", remediator), ("prometheus", prometheus), ("alertmanager", alertmanager),
    ("grafana", grafana),
)  # fmt: skip


def _unset(name: str, key: str, without: str) -> Finding:
    return Finding(name, "is known", "warn", f"remediator.{key} is not set: {without}", f"set remediator.{key}")


def _values(page: str) -> dict[str, float]:
    """The samples without labels of a page of metrics."""
    found = {}
    for line in page.splitlines():
        name, _, value = line.partition(" ")
        if not line.startswith("#") and "{" not in name:
            found[name] = float(value)
    return found


async def guarded(name: str, look: Look, inventory: Inventory) -> Sequence[Finding]:
    """What one of these finds; an answer that makes no sense is a finding, too."""
    try:
        return await look(inventory)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        seen = f"what answers there is something else ({type(error).__name__})"
        return [Finding(name, "answers", "fail", seen, "mend its address in the inventory")]
    except DefibError as error:
        return [Finding(name, "answers", "fail", str(error), "mend it in the inventory")]
