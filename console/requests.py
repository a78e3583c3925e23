"""Forms that are sent once, though their button may be pressed twice."""

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
REMEMBERED = 2000  # forms
_ID = re.compile(r"[\w-]{16,64}")


class SubmittedForms:
    """Remembers the outcome of each form by its id, so that sending it again does nothing more."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()

    @staticmethod
    def new_id() -> str:
        return secrets.token_urlsafe(16)

    async def run_once(self, form_id: str, work: Callable[[], Awaitable[T]]) -> T:
        """Return the outcome of `work`; that of the first time if the form was sent before."""
        if not _ID.fullmatch(form_id):
            return await work()
        known = self._outcomes.get(form_id)
        if known is None:
            known = self._outcomes[form_id] = asyncio.ensure_future(work())
            while len(self._outcomes) > REMEMBERED:
                self._outcomes.popitem(last=False)
        # The operation is completed even if this browser goes away.
        outcome: T = await asyncio.shield(known)
        return outcome
