"""Forms that are sent once, though their button may be pressed twice."""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

from runtime.access.control import get_identity
from runtime.errors import ApiError
from runtime.web import SHOWN_AT, relative_path

T = TypeVar("T")
REMEMBERED = 2000  # forms
MAX_ID = 200  # characters


class SubmittedForms:
    """Remembers the outcome of each form of a user by its id, so that sending it again does nothing more."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[tuple[str, str, str], asyncio.Future[Any]] = OrderedDict()

    @staticmethod
    def new_id() -> str:
        return secrets.token_urlsafe(16)

    async def run_once(self, request: web.Request, form: Mapping[str, str], work: Callable[[], Awaitable[T]]) -> T:
        """Return the outcome of `work`; that of the first time if the user has sent this form before.

        Work that failed with an error is done again.
        """
        form_id = form.get("form_id", "")
        if len(form_id) > MAX_ID:
            raise ApiError(400, "bad_request", "form_id is too long")
        if not form_id:  # a script's request
            return await work()
        return await self.run_once_as((get_identity(request).label, request.path, form_id), work)

    async def run_once_as(self, key: tuple[str, str, str], work: Callable[[], Awaitable[T]]) -> T:
        """As `run_once`, by user, path and id."""
        known = self._outcomes.get(key)
        if known is None or (known.done() and (known.cancelled() or known.exception() is not None)):
            known = self._outcomes[key] = asyncio.ensure_future(work())
            while len(self._outcomes) > REMEMBERED:
                self._outcomes.popitem(last=False)
        # The operation is completed even if this browser goes away.
        outcome: T = await asyncio.shield(known)
        return outcome


async def answer_form(
    request: web.Request, outcome: T, show: Callable[[web.Request, T], Awaitable[web.Response]], path: str
) -> web.Response:
    """Return the page at `path`: with what is to be said of the form, and to scripts; else send the browser there."""
    if request.headers.get("Sec-Fetch-Mode") == "cors":  # a script shows the answer in the page
        request[SHOWN_AT] = f"/{path}"
        return await show(request, outcome)
    if outcome is not None:
        return await show(request, outcome)
    return web.Response(status=303, headers={"Location": relative_path(request, path)})
