"""Signing in with Feishu: OAuth 2.0, then the user's identity.

Reference: https://open.feishu.cn/document/common-capabilities/sso/api/obtain-oauth-code
"""

import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

import httpx

from fleet.inventory.access import FeishuAccess
from fleet.inventory.notify import Notify
from remediator.notifications.channels.http import send_request
from remediator.sign_in.services import Redirect, SignedInUser, SignInError
from runtime.access.roles import Role, printable_name

NOT_PERMITTED = 20010  # the user may not use the app


class FeishuSignIn:
    """Feishu's users have the role of their entry in `notify.people`, or else the default role."""

    title = "Feishu"

    def __init__(self, settings: FeishuAccess, notify: Callable[[], Notify], client: httpx.AsyncClient) -> None:
        self._settings, self._notify, self._client = settings, notify, client

    async def create_url(self, redirect: Redirect) -> str:
        query = {
            "client_id": self._settings.app_id, "redirect_uri": redirect.redirect_uri, "response_type": "code",
            "state": redirect.state,
        }  # fmt: skip
        return f"{self._settings.authorize_url.rstrip('/')}/open-apis/authen/v1/authorize?{urlencode(query)}"

    async def fetch_user(self, code: str, redirect: Redirect) -> SignedInUser:
        body = {
            "grant_type": "authorization_code", "client_id": self._settings.app_id,
            "client_secret": self._settings.app_secret.get_secret_value(), "code": code,
            "redirect_uri": redirect.redirect_uri,
        }  # fmt: skip
        token = await self._request("POST", "/open-apis/authen/v2/oauth/token", body)
        answer = await self._request("GET", "/open-apis/authen/v1/user_info", token=str(token.get("access_token")))
        user = answer.get("data")
        if not isinstance(user, dict) or not isinstance(user.get("open_id"), str) or not user["open_id"]:
            raise SignInError("Feishu's response has no open_id")
        if user.get("tenant_key") != self._settings.tenant_key:
            raise SignInError(f"the user is of another tenant: {str(user.get('tenant_key'))[:60]!r}")
        person = self._notify().person(user["open_id"])
        # The name in Feishu may be that of a person in the inventory.
        name = person[0] if person is not None else f"{printable_name(str(user.get('name', '')))} {user['open_id']}"
        return SignedInUser(name, [user["open_id"]])

    @property
    def provider(self) -> str:
        return f"{self._settings.url} {self._settings.tenant_key}"

    def find_role(self, groups: Sequence[str]) -> Role | None:
        person = self._notify().person(groups[0])
        role = person[1].role if person is not None else self._settings.default_role
        return None if role is None else Role(role)

    async def close(self) -> None:
        """Do nothing: the client is shared."""

    async def _request(self, method: str, path: str, body: Any = None, token: str = "") -> dict[str, Any]:
        """Return a successful response of Feishu. Raises SignInError."""
        headers = {"Authorization": f"Bearer {token}"} if token else {"Content-Type": "application/json"}
        content = b"" if body is None else json.dumps(body).encode()
        url = f"{self._settings.url.rstrip('/')}{path}"
        reply = await send_request(self._client, method, url, content, headers)
        if reply.error:
            raise SignInError(f"cannot get an answer from Feishu: {reply.error}")
        answer = reply.parse_json()
        if answer.get("code") == NOT_PERMITTED:
            raise SignInError("the user may not use the app in Feishu (20010)")
        if answer.get("code") != 0:
            raise SignInError(f"Feishu refused: HTTP {reply.status}, code {str(answer.get('code'))[:20]}")
        return answer
