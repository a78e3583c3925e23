"""A client for the remediator's HTTP API, for the commands that use it."""

import getpass
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import tzinfo
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import SecretStr

from defib.lookup import names_of, suggest
from defib.output import time_zone
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Inventory
from fleet.json_client import ClientError, HttpStatusError, JsonClient, parsing_response
from runtime import tokens
from runtime.access.roles import USER_HEADER
from runtime.errors import DefibError
from runtime.tokens import TokenError

ACCESS_HINT = "run this as the remediator's user (for example `sudo -u defib defib …`), or use --token-file FILE"
Connect = Callable[..., AbstractAsyncContextManager["RemediatorClient"]]


class UnknownEntryError(DefibError):
    """The remediator has no such service, component, host, group, incident, action or maintenance: `code` tells."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class UnexpectedAnswerError(ClientError):
    """The answer is not one of the remediator's API, or of another version's."""

    exit_status = 2

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem} (are remediator.url and the remediator's version right?)")


@contextmanager
def checking_answers() -> Iterator[None]:
    """Raise UnexpectedAnswerError where an answer lacks a field or has one of another type."""
    try:
        with parsing_response():
            yield
    except ClientError as error:
        raise UnexpectedAnswerError(f"unexpected answer of the remediator: {error}") from error


def _decode(body: bytes) -> dict[str, Any]:
    """Parse an answer; nothing else runs meanwhile. Raises UnexpectedAnswerError."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnexpectedAnswerError("unexpected answer of the remediator: it is not JSON") from error
    if not isinstance(answer, dict):
        raise UnexpectedAnswerError("unexpected answer of the remediator: it is not a JSON object")
    return answer


class RemediatorClient:
    """The remediator's API, called with the name of the current user, and the configuration of this command."""

    def __init__(self, client: JsonClient, inventory: Inventory) -> None:
        self._client, self.inventory = client, inventory

    @property
    def zone(self) -> tzinfo | None:
        """The time zone for times that are printed."""
        return time_zone(self.inventory)

    async def request(self, method: str, path: str, *, timeout: float | None = None, body: Any = None) -> Any:
        """Send a request and return the parsed answer. Raises UnknownEntryError and ClientError."""
        try:
            return await self._client.request(method, path, timeout, body)
        except HttpStatusError as error:
            if error.status == httpx.codes.NOT_FOUND:
                raise UnknownEntryError(str(error), error.code) from error
            raise

    async def request_named(
        self, kind: str, name: str, method: str, path: str, *, timeout: float | None = None, body: Any = None
    ) -> Any:
        """Send a request about a service, host or group; `{name}` in `path` is replaced.

        Raises ClientError, and UnknownEntryError with similar names if there is no such service, host or group.
        """
        try:
            return await self.request(method, path.replace("{name}", quote(name, safe="")), timeout=timeout, body=body)
        except UnknownEntryError as error:
            if error.code in ("unknown_component", "unknown_heartbeat"):
                raise
            known = names_of(self.inventory, kind)
            if name in known or (kind == "service" and name in self.inventory.host_alerts):
                message = f"the remediator's inventory has no {kind} {name!r} yet: reload the remediator"
            else:
                message = f"the inventory has no {kind} {name!r}{suggest(kind, name, known)}"
            raise UnknownEntryError(message) from None


@asynccontextmanager
async def connect(
    load: Callable[[], LoadedInventory], token_file: Path | None, *, hint: str = ""
) -> AsyncIterator[RemediatorClient]:
    """Yield a client for the configured remediator; `hint` ends the error message if it does not answer.

    Raises DefibError.
    """
    loaded = load()
    loaded.require_resolved("remediator.url", ignore=["remediator.url.auth"] if token_file is not None else [])
    endpoint = loaded.inventory.remediator.url
    if token_file is not None:
        endpoint = endpoint.model_copy(update={"auth": None})
    token = _read_token(loaded, token_file) if endpoint.auth is None else None
    client = JsonClient(endpoint, token, headers={USER_HEADER: getpass.getuser()}, decode=_decode)
    try:
        yield RemediatorClient(client, loaded.inventory)
    except UnexpectedAnswerError:
        raise
    except HttpStatusError as error:
        raise DefibError(f"the remediator at {endpoint.base} refused the request: {error}") from error
    except ClientError as error:
        raise DefibError(f"cannot get an answer from the remediator at {endpoint.base}: {error}{hint}") from error
    finally:
        await client.close()


def _read_token(loaded: LoadedInventory, token_file: Path | None) -> SecretStr:
    """Return a token: from `token_file`, else the local token. Raises DefibError."""
    if token_file is not None:
        return tokens.read_token(token_file)
    settings = loaded.inventory.remediator
    loaded.require_resolved("remediator.token")
    if settings.token is None:
        loaded.require_resolved("remediator.database")  # the token file is in its folder
    try:
        return loaded.local_token("remediator").read()
    except TokenError as error:
        raise DefibError(f"{error}; {ACCESS_HINT}") from error
