"""HTTP routes of the exporter: `/metrics`, service discovery, services, heartbeats, hosts, events, reload."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from exporter.api.events import EventsApi
from exporter.api.heartbeats import HeartbeatsApi
from exporter.api.hosts import HostsApi
from exporter.api.module_probe import ModuleProbeApi
from exporter.api.scrape import ScrapeApi
from exporter.api.services import ServicesApi
from exporter.metrics import ExporterMetrics
from exporter.modules.prober import ModuleProber
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.access.roles import AccessRequirement
from runtime.web import add_route


def add_routes(
    app: web.Application,
    scheduler: ProbeScheduler,
    modules: ModuleProber,
    metrics: ExporterMetrics,
    reload: Callable[[], Awaitable[None]],
) -> None:
    scrape, services = ScrapeApi(scheduler, metrics), ServicesApi(scheduler, reload)
    hosts, events, heartbeats = HostsApi(scheduler), EventsApi(scheduler), HeartbeatsApi(scheduler)
    add_route(app, "GET", "/metrics", scrape.metrics, AccessRequirement.SCRAPE)
    add_route(app, "GET", "/metrics/healthchecks", scrape.healthchecks, AccessRequirement.SCRAPE)
    add_route(app, "GET", "/metrics/agents", scrape.agents, AccessRequirement.SCRAPE)
    add_route(app, "GET", "/probe", ModuleProbeApi(modules).probe, AccessRequirement.TARGETS)
    add_route(app, "GET", "/api/v1/sd/node-exporter", scrape.node_exporters, AccessRequirement.SCRAPE)
    add_route(app, "GET", "/api/v1/services", services.list_services, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/services/{id}", services.show_service, AccessRequirement.VIEWER)
    add_route(app, "POST", "/api/v1/services/{id}/probe", services.probe, AccessRequirement.OPERATOR)
    add_route(app, "PUT", "/api/v1/pauses", services.set_pauses, AccessRequirement.OPERATOR)
    add_route(app, "GET", "/api/v1/hosts", hosts.list_hosts, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/hosts/{name}", hosts.show_host, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/heartbeats", heartbeats.list_heartbeats, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/heartbeats/{id}", heartbeats.show_heartbeat, AccessRequirement.OPERATOR)
    add_route(app, "GET", "/api/v1/heartbeats/{id}/urls", heartbeats.show_urls, AccessRequirement.OPERATOR)
    add_route(app, "DELETE", "/api/v1/heartbeats/{id}", heartbeats.remove, AccessRequirement.OPERATOR)
    add_route(app, "GET", "/api/v1/hosts/{name}/logs", hosts.show_logs, AccessRequirement.OPERATOR)
    add_route(app, "POST", "/api/v1/heartbeats/{id}/ping", heartbeats.ping, AccessRequirement.OPERATOR)
    add_route(app, "GET", "/api/v1/events", events.list_events, AccessRequirement.VIEWER)
    add_route(app, "POST", "/-/reload", services.reload, AccessRequirement.ADMIN)
