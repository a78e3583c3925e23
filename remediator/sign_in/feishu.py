"""Signing in with Feishu: OAuth 2.0, then the user's identity.

Reference: https://open.feishu.cn/document/common-capabilities/sso/api/obtain-oauth-code
"""

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

import httpx

from fleet.inventory.access import FeishuAccess
from fleet.inventory.notify import Notify
from remediator.sign_in.services import Redirect, SignedInUser, SignInError
from runtime.access.roles import Role, printable_name

TIMEOUT = 10.0  # seconds for each request
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
        token = await self._request("POST", "/open-apis/authen/v2/oauth/token", json=body)
        headers = {"Authorization": f"Bearer {token.get('access_token')}"}
        answer = await self._request("GET", "/open-apis/authen/v1/user_info", headers=headers)
        user = answer.get("data")
        if not isinstance(user, dict) or not isinstance(user.get("open_id"), str) or not user["open_id"]:
            raise SignInError("Feishu's response has no open_id")
        if user.get("tenant_key") != self._settings.tenant_key:
            raise SignInError(f"the user is of another tenant: {str(user.get('tenant_key'))[:60]!r}")
        person = self._notify().person(user["open_id"])
        name = person[0] if person is not None else printable_name(str(user.get("name", ""))) or user["open_id"]
        return SignedInUser(name, [user["open_id"]])

    def find_role(self, groups: Sequence[str]) -> Role | None:
        person = self._notify().person(groups[0])
        role = person[1].role if person is not None else self._settings.default_role
        return None if role is None else Role(role)

    async def close(self) -> None:
        """Do nothing: the client is shared."""

    async def _request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Return a successful response of Feishu. Raises SignInError."""
        url = f"{self._settings.url.rstrip('/')}{path}"
        try:
            response = await self._client.request(method, url, timeout=TIMEOUT, **arguments)
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise SignInError(f"cannot get an answer from Feishu: {type(error).__name__}") from error
        code = answer.get("code") if isinstance(answer, dict) else None
        if code == NOT_PERMITTED:
            raise SignInError("the user may not use the app in Feishu (20010)")
        if code != 0:
            raise SignInError(f"Feishu refused: HTTP {response.status_code}, code {str(code)[:20]}")
        return dict(answer)
