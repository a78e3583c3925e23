"""The pages of hosts: all of them with what they use, and one with everything that its collectors have read."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import structlog
from aiohttp import web
from jinja2 import UndefinedError

from console.history import HOST_SPANS, History
from console.rendering import PageRenderer
from console.things import find_services_of_things
from fleet.json_client import ClientError, HttpStatusError, parsing_response
from remediator.http.views import may_read_evidence
from remediator.notifications.links import build_page_links
from remediator.record.database import Database
from remediator.snapshot import SnapshotSource
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.web import add_route

NOT_FOUND = 404
LOGS = "logs"  # the collector that reads logs
log = structlog.get_logger()


class HostPages:
    def __init__(self, source: SnapshotSource, history: History, renderer: PageRenderer, database: Database) -> None:
        self._source, self._history, self._renderer, self._database = source, history, renderer, database

    def add_routes(self, app: web.Application) -> None:
        add_route(app, "GET", "/hosts", self.show_list, AccessRequirement.VIEWER)
        add_route(app, "GET", "/hosts/{name}", self.show_host, AccessRequirement.VIEWER)

    async def show_list(self, request: web.Request) -> web.Response:
        answer, snapshot = await self._read("/api/v1/hosts"), await self._source.get()

        async def respond(answer: Mapping[str, Any]) -> web.Response:
            hosts = sorted(answer.get("hosts", ()), key=lambda host: (-len(host["problems"]), host["name"]))
            return await self._renderer.respond(
                request, "hosts.html", snapshot=snapshot.describe(), hosts=_with_texts(hosts),
                unavailable=answer.get("unavailable", ""), states=self._states(),
            )  # fmt: skip

        return await _respond_about(answer, respond)

    async def show_host(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        span = request.query.get("span", "24h")
        host, charts = await asyncio.gather(
            self._read_host(name), self._history.read_host(name, HOST_SPANS.get(span, HOST_SPANS["24h"]))
        )
        logs = await self._read_logs(name, host) if may_read_evidence(request) else ()
        snapshot, inventory = await self._source.get(), self._database.inventory

        async def respond(host: Mapping[str, Any]) -> web.Response:
            shown = None if "unavailable" in host else _with_texts([host])[0]
            return await self._renderer.respond(
                request, "host.html", snapshot=snapshot.describe(), host=shown, name=name, charts=charts,
                spans=list(HOST_SPANS), span=span, unavailable=host.get("unavailable", ""), states=self._states(),
                owners=find_services_of_things(inventory, name), links=build_page_links(inventory, None, name),
                logs=logs,
                incidents=[
                    dict(row) for subject, row in snapshot.overview.incidents.items()
                    if (alert := inventory.host_alerts.get(subject)) is not None and alert.host == name
                ],
            )  # fmt: skip

        return await _respond_about(host, respond)

    def _states(self) -> Mapping[str, str]:
        return {row.id: row.state for row in self._source.snapshot.rows.values()}

    async def _read_host(self, name: str) -> Mapping[str, Any]:
        unknown = ApiError(404, "unknown_host", f"the inventory has no host {name!r}")
        if name not in self._database.inventory.hosts:  # which could be another path of the exporter's
            raise unknown
        try:
            return await self._read(f"/api/v1/hosts/{name}")
        except HttpStatusError as error:
            raise unknown from error

    async def _read_logs(self, name: str, host: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return the last matching lines of a host's logs, which only operators may read."""
        if not any(each["name"] == LOGS for each in host.get("collectors", ())):
            return ()
        try:
            answer = await self._read(f"/api/v1/hosts/{name}/logs")
        except HttpStatusError:  # the host was removed meanwhile
            return ()
        return [
            {**each, "read_at": datetime.fromisoformat(each["read_at"]).timestamp()} for each in answer.get("logs", ())
        ]

    async def _read(self, path: str) -> Mapping[str, Any]:
        """Return what the exporter answers, or why it does not."""
        try:
            return await self._source.read_from_exporter(path)
        except ClientError as error:
            if isinstance(error, HttpStatusError) and error.status == NOT_FOUND:
                raise
            return {"unavailable": str(error)}


async def _respond_about(
    answer: Mapping[str, Any], respond: Callable[[Mapping[str, Any]], Awaitable[web.Response]]
) -> web.Response:
    """Return a page about what the exporter answered, or about an answer that cannot be shown."""
    try:
        with parsing_response():
            try:
                return await respond(answer)
            except UndefinedError as error:  # a field that a template shows
                raise ValueError(str(error)) from error
    except ClientError as error:
        if "unavailable" in answer:
            raise
        log.warning("exporter_answer_malformed", exc_info=True)
        return await respond({"unavailable": str(error)})


def _with_texts(hosts: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return hosts whose problems are shown to all roles: `message` is the key of what only operators may read."""
    return [
        {**host, "problems": [{**each, "text": each.get("message") or ""} for each in host["problems"]]}
        for host in hosts
    ]
