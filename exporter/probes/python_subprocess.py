"""The subprocess of a `python` probe: calls a function of the user and prints its outcome. Imports only the standard
library, so that it starts quickly.
"""

import asyncio
import importlib
import inspect
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any, NoReturn

OUTPUT_LIMIT = 10_000  # characters of a message or traceback


class ProbeFailed(Exception):  # noqa: N818 - a failed probe is an expected result
    """Raised by `Context.fail`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.message, self.reason = str(message), str(reason)


@dataclass(frozen=True)
class Context:
    """The argument of the user's function. `timeout` is in seconds."""

    service: str
    host: str
    timeout: float
    options: dict[str, Any] = field(default_factory=dict)

    def fail(self, message: str, reason: str = "state") -> NoReturn:
        """End the probe as failed, with a one-line message and one of Defib's reasons."""
        raise ProbeFailed(message, reason)


def main() -> None:
    call = json.load(sys.stdin)
    result_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the function's output goes to stderr, so that it cannot mix with the result
    sys.path.insert(0, call["folder"])
    reason, message, trace = _call(call["call"], Context(**call["context"]))
    with result_file:
        outcome = {
            "reason": reason,
            "message": _replace_unencodable(message[:OUTPUT_LIMIT]),
            "traceback": _replace_unencodable(trace[-OUTPUT_LIMIT:]),
        }
        json.dump(outcome, result_file)
    sys.stdout.flush()
    os._exit(0)  # does not wait for threads that the function left running


def _call(function: str, context: Context) -> tuple[str | None, str, str]:
    """Call the function; return a reason (None for a success), a message and a traceback."""
    module, _, name = function.partition(":")
    try:
        returned = getattr(importlib.import_module(module), name)(context)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_await(returned))
    except ProbeFailed as failure:
        return failure.reason, failure.message, ""
    except BaseException as error:  # noqa: BLE001 - whatever the function raises is its outcome
        return "error", f"{function} raised {type(error).__name__}: {error}", traceback.format_exc()
    if returned is None or returned is True:
        return None, "", ""
    return "state", returned if isinstance(returned, str) else f"{function} returned {returned!r}", ""


def _replace_unencodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


async def _await(awaitable: Any) -> Any:
    return await awaitable


if __name__ == "__main__":
    main()
