"""The local token of another program of Defib, in requests to it."""

import asyncio
from collections.abc import AsyncGenerator

import httpx

from runtime.logs import LimitedLog
from runtime.tokens import ConfiguredToken, TokenError

CALLER = "remediator"  # as the audit log of the other program would name it
limited_log = LimitedLog()


class TokenAuth(httpx.Auth):
    """Sends a token, if there is one. It is read again when it is refused, since its file may have changed."""

    def __init__(self, token: ConfiguredToken, program: str) -> None:
        self._token, self._program, self._value = token, program, ""

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if not self._value:
            self._value = await self._read()
        sent = self._set(request)
        response = yield request
        if response.status_code == httpx.codes.UNAUTHORIZED:
            self._value = await self._read()
            if self._value != sent:
                self._set(request)
                yield request

    def _set(self, request: httpx.Request) -> str:
        if self._value:
            request.headers["Authorization"] = f"Bearer {self._value}"
        return self._value

    async def _read(self) -> str:
        try:
            return (await asyncio.to_thread(self._token.read)).get_secret_value()
        except TokenError as error:
            limited_log.warning("token_unreadable", program=self._program, error=str(error))
            return ""
