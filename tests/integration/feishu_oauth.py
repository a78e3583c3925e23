"""A stand-in for Feishu's OAuth 2.0, which enforces its rules: codes live 5 minutes, work once, and for one redirect URI."""

import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlencode

from aiohttp import web

APP_ID, APP_SECRET, TENANT = "cli_sign_in", "sign-in-s3cret", "tenant-of-the-company"
CODE_FOR = 300.0  # seconds


@dataclass(frozen=True)
class FeishuUser:
    open_id: str
    name: str
    tenant_key: str = TENANT
    may_use_app: bool = True


class FeishuOAuth:
    """Signs in `user`, whoever asks."""

    def __init__(self) -> None:
        self.user = FeishuUser("ou_ann", "Ann")
        self._codes: dict[str, tuple[FeishuUser, str, float]] = {}
        self._tokens: dict[str, FeishuUser] = {}
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/open-apis/authen/v1/authorize", self._authorize)
        app.router.add_post("/open-apis/authen/v2/oauth/token", self._token)
        app.router.add_get("/open-apis/authen/v1/user_info", self._user_info)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _authorize(self, request: web.Request) -> web.Response:
        query = request.query
        if query.get("client_id") != APP_ID or query.get("response_type") != "code":
            return web.Response(status=400, text="20027: invalid client")
        code = secrets.token_urlsafe(16)
        self._codes[code] = (self.user, query["redirect_uri"], time.monotonic())
        back = f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query.get('state', '')})}"
        return web.Response(status=302, headers={"Location": back})

    async def _token(self, request: web.Request) -> web.Response:
        body = await request.json()
        if (body.get("client_id"), body.get("client_secret")) != (APP_ID, APP_SECRET):
            return _error(401, 20002, "The client secret is invalid.")
        if body.get("grant_type") != "authorization_code":
            return _error(400, 20036, "The grant type is not supported.")
        user, redirect_uri, at = self._codes.pop(body.get("code"), (None, "", 0.0))
        if user is None or time.monotonic() - at > CODE_FOR:
            return _error(400, 20003, "The authorization code is invalid.")
        if body.get("redirect_uri") != redirect_uri:
            return _error(400, 20071, "The redirect_uri does not match.")
        if not user.may_use_app:
            return _error(403, 20010, "The user does not have permission to use the app.")
        token = secrets.token_urlsafe(16)
        self._tokens[token] = user
        return web.json_response({"code": 0, "access_token": token, "expires_in": 7200, "token_type": "Bearer"})

    async def _user_info(self, request: web.Request) -> web.Response:
        user = self._tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if user is None:
            return _error(401, 99991668, "Invalid access token.")
        data = {"open_id": user.open_id, "union_id": "on_1", "name": user.name, "tenant_key": user.tenant_key}
        return web.json_response({"code": 0, "msg": "success", "data": data})


def _error(status: int, code: int, description: str) -> web.Response:
    return web.json_response(
        {"code": code, "error": "invalid_request", "error_description": description}, status=status
    )
