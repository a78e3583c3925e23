"""Access over HTTP: API tokens, sessions and the audit log, for admins."""

import asyncio
import json
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from fleet.inventory.units import Identifier, PositiveDuration
from remediator.administration import Administration
from remediator.http.read_api import parse_before
from remediator.http.views import format_times, read_record
from remediator.http.write_api import translating_errors
from remediator.record import audit
from remediator.record.database import Database
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement, UserRole
from runtime.access.sessions import Session
from runtime.access.tokens import ApiToken
from runtime.errors import ApiError
from runtime.request_bodies import RequestBody, parse_request
from runtime.web import add_route

MAX_PAGE = 1000
DEFAULT_PAGE = 100


class _TokenBody(RequestBody):
    name: Identifier
    role: UserRole
    expires_in: Annotated[PositiveDuration | None, Field(None)]


def add_routes(app: web.Application, administration: Administration, database: Database) -> None:
    api = _AccessApi(administration, database)
    for method, path, handler in (
        ("GET", "/api/v1/tokens", api.list_tokens),
        ("POST", "/api/v1/tokens", api.create_token),
        ("DELETE", "/api/v1/tokens/{name}", api.revoke_token),
        ("GET", "/api/v1/sessions", api.list_sessions),
        ("DELETE", "/api/v1/sessions/{number}", api.end_session),
        ("GET", "/api/v1/audit", api.read_audit),
    ):
        add_route(app, method, path, translating_errors(handler), AccessRequirement.ADMIN)


class _AccessApi:
    def __init__(self, administration: Administration, database: Database) -> None:
        self._administration, self._database = administration, database

    async def list_tokens(self, _request: web.Request) -> web.Response:
        now = self._database.clock.now()
        tokens = await self._administration.list_tokens()
        rows = [{**_token_json(token), "expired": token.has_expired(now)} for token in tokens]
        return web.json_response(format_times({"tokens": rows}, self._database.clock))

    async def create_token(self, request: web.Request) -> web.Response:
        body = await parse_request(request, _TokenBody)
        created = await self._administration.create_token(body.name, body.role, body.expires_in, get_identity(request))
        # The only time that the secret is shown.
        row = {**_token_json(created.token), "token": created.secret}
        headers = {"Cache-Control": "no-store"}
        return web.json_response(format_times(row, self._database.clock), status=201, headers=headers)

    async def revoke_token(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await self._administration.revoke_token(name, get_identity(request))
        return web.json_response({"name": name})

    async def list_sessions(self, _request: web.Request) -> web.Response:
        rows = [_session_json(session) for session in self._administration.list_sessions()]
        return web.json_response(format_times({"sessions": rows}, self._database.clock))

    async def end_session(self, request: web.Request) -> web.Response:
        number = request.match_info["number"]
        await self._administration.end_session(number, get_identity(request))
        return web.json_response({"id": number})

    async def read_audit(self, request: web.Request) -> web.Response:
        rows = await read_record(self._database, audit.page, parse_before(request), _parse_limit(request))
        return web.Response(body=await asyncio.to_thread(self._render, rows), content_type="application/json")

    def _render(self, rows: list[dict[str, Any]]) -> bytes:
        return json.dumps(format_times({"audit": rows}, self._database.clock)).encode()


def _token_json(token: ApiToken) -> dict[str, object]:
    return {
        "name": token.name,
        "role": token.role,
        "created_at": token.created_at,
        "created_by": token.created_by,
        "expires_at": token.expires_at,
        "last_used_at": token.last_used_at,
    }


def _session_json(session: Session) -> dict[str, object]:
    return {
        "id": session.number,
        "user": session.user,
        "method": session.method,
        "address": session.address,
        "browser": session.browser,
        "created_at": session.created_at,
        "last_used_at": session.last_used_at,
    }


def _parse_limit(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(MAX_PAGE)) or not 0 < int(text) <= MAX_PAGE:
        raise ApiError(400, "bad_request", f"`limit` must be a number from 1 to {MAX_PAGE}")
    return int(text)
