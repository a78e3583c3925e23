"""The process of a `python` probe: reads what to call, calls it, prints what came of it. Imports nothing of ours."""

import asyncio
import importlib
import inspect
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any, NoReturn

LIMIT = 10_000  # characters of what is told


class Failed(Exception):  # noqa: N818 - it says what became of the service
    """What `Context.fail` raises."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.message, self.reason = str(message), str(reason)


@dataclass(frozen=True)
class Context:
    """What the function is given. `timeout` is in seconds."""

    service: str
    host: str
    timeout: float
    options: dict[str, Any] = field(default_factory=dict)

    def fail(self, message: str, reason: str = "state") -> NoReturn:
        """The service is not well: end the probe with one of Defib's reasons, and one line that says why."""
        raise Failed(message, reason)


def main() -> None:
    wanted = json.load(sys.stdin)
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints is for people, and must not mix with the result
    sys.path.insert(0, wanted["folder"])
    reason, message, trace = _outcome(wanted["call"], Context(**wanted["context"]))
    with results:
        told = {"reason": reason, "message": _sayable(message[:LIMIT]), "traceback": _sayable(trace[-LIMIT:])}
        json.dump(told, results)
    sys.stdout.flush()
    os._exit(0)  # threads that the function left running are of no use to anyone


def _outcome(call: str, context: Context) -> tuple[str | None, str, str]:
    module, _, name = call.partition(":")
    try:
        said = getattr(importlib.import_module(module), name)(context)
        if inspect.isawaitable(said):
            said = asyncio.run(_awaited(said))
    except Failed as failure:
        return failure.reason, failure.message, ""
    except BaseException as error:  # noqa: BLE001 - whatever the function ends with is its result
        return "error", f"{call} raised {type(error).__name__}: {error}", traceback.format_exc()
    if said is None or said is True:
        return None, "", ""
    return "state", said if isinstance(said, str) else f"{call} returned {said!r}", ""


def _sayable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


async def _awaited(said: Any) -> Any:
    return await said


if __name__ == "__main__":
    main()
