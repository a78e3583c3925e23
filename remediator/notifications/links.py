"""Links of notifications: dashboards, runbooks, logs, the console and new silences."""

from collections.abc import Mapping
from urllib.parse import quote, urlencode

from fleet.inventory.endpoints import Endpoint, check_url
from fleet.inventory.model import Inventory, Service

LINK_LIMIT = 2000  # characters
DOCS = "docs/"  # the shipped rules refer to their pages in this way
ALERTS, ALERTS_ZH = "docs/alerts.md#", "docs/zh/alerts.md#"  # with the same anchors


def build_links(
    inventory: Inventory,
    service: Service | None,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    incident: int | None,
) -> dict[str, str]:
    """Return URLs for people's browsers by name, without those whose base URL is not configured."""
    configured, remediator = inventory.notify.links, inventory.remediator
    grafana = _base_url(configured.grafana, remediator.grafana_url)
    alertmanager = _base_url(configured.alertmanager, remediator.alertmanager_url)
    console = _base_url(configured.remediator, remediator.url if "url" in remediator.model_fields_set else None)
    host = service.host if service is not None else labels.get("host", "")
    urls: dict[str, str] = {}
    if grafana and (service is not None or host):
        board, name, value = ("service", "service", service.id) if service is not None else ("hosts", "host", host)
        urls["grafana"] = f"{grafana}/d/defib-{board}?{urlencode({f'var-{name}': value})}"
    runbook = service.runbook if service is not None else ""
    runbook = runbook or annotations.get("runbook_url", "")
    if inventory.notify.language == "zh" and runbook.startswith(ALERTS):
        runbook = ALERTS_ZH + runbook.removeprefix(ALERTS)
    if configured.docs and runbook.startswith(DOCS):
        runbook = configured.docs.rstrip("/") + runbook.removeprefix("docs")
    urls["runbook"] = runbook
    if console and service is not None and service.control is not None and "logs" in service.control.options.verbs:
        urls["logs"] = f"{console}/services/{quote(service.id, safe='')}/logs"
    if console:
        urls["console"] = f"{console}/{_find_page(inventory, service, labels, incident)}"
    if alertmanager:
        matchers = quote(_format_matchers(service, labels), safe="")
        urls["silence"] = f"{alertmanager}/#/silences/new?filter={matchers}"
    return {name: url for name, url in urls.items() if is_link(url)}


def _find_page(inventory: Inventory, service: Service | None, labels: Mapping[str, str], incident: int | None) -> str:
    """Return the console's page of an incident, or of a heartbeat that a job has created; otherwise the first page."""
    if incident is not None:
        return f"incidents/{incident}"
    name = labels.get("service", "") if service is None else ""
    return f"heartbeats/{name}" if inventory.exporter.heartbeats.may_create(name) else ""


def build_page_links(inventory: Inventory, service: Service | None, host: str = "") -> dict[str, str]:
    """Return the links on the page of a service, or of a host: its dashboard and its runbook."""
    links = build_links(inventory, service, {"host": host}, {}, None)
    return {name: url for name, url in links.items() if name in ("grafana", "runbook")}


def is_link(text: str) -> bool:
    """Return whether a text may become a link: a URL of http or https, with a host and without credentials.

    A browser would run other URLs, such as `javascript:`, and `https://known.example@other/` hides where it leads.
    """
    try:
        check_url(text)
    except ValueError:
        return False
    return len(text) <= LINK_LIMIT and text.isprintable()


def is_reference(text: str) -> bool:
    """Return whether a text is a link, or names a page of Defib's documentation as the shipped rules do."""
    return is_link(text) or text.startswith(DOCS)


def _base_url(configured: str | None, endpoint: Endpoint | None) -> str:
    """Return where browsers reach a program: as `notify.links` says, otherwise where Defib reaches it."""
    return configured.rstrip("/") if configured else endpoint.base if endpoint is not None else ""


def _format_matchers(service: Service | None, labels: Mapping[str, str]) -> str:
    matched = {"service": service.id} if service is not None else labels
    escaped = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for name, value in matched.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in sorted(escaped.items())) + "}"
