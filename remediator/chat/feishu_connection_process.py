"""The process of a long connection: the SDK's client, its events as lines on stdout, their answers as lines on stdin.

Its end is how it says that the connection is lost; who watches over it starts another.
"""

import contextlib
import json
import os
import sys
import threading
from typing import IO, Any


def main() -> None:
    """Connect with what stdin says, and hand events on until the connection or stdin ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the SDK prints is not for our reader
    told = json.loads(sys.stdin.readline())

    from lark_oapi.core.enum import LogLevel
    from lark_oapi.ws import Client

    client = Client(
        told["app_id"], told["app_secret"], domain=told["url"], log_level=LogLevel.CRITICAL,
        event_handler=_Handler(out, _Answers()), auto_reconnect=True,
    )  # fmt: skip
    client.on_reconnecting = lambda: _end(out, "the connection was lost")
    _tell_when_connected(client, out)
    try:
        client.start()
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises ends this process, and is told
        # Its text may hold the address, which is a ticket to connect with.
        _end(out, f"not connected: {type(error).__name__} {getattr(error, 'code', '')}".strip())


class _Answers:
    """The lines of stdin, whose end is ours too."""

    def __init__(self) -> None:
        self._came = threading.Condition()
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            with self._came:
                self._lines.append(line)
                self._came.notify()
        os._exit(0)

    def next(self) -> str:
        with self._came:
            self._came.wait_for(lambda: bool(self._lines))
            return self._lines.pop(0)


class _Handler:
    """What the SDK's client hands an event to, in the place of its own dispatcher."""

    def __init__(self, out: IO[str], answers: _Answers) -> None:
        self._out, self._answers = out, answers

    def _do_without_validation(self, payload: bytes) -> Any:
        _say(self._out, {"event": json.loads(payload)})
        return json.loads(self._answers.next()) or None

    do_without_validation = _do_without_validation


def _tell_when_connected(client: Any, out: IO[str]) -> None:
    connect = client._connect  # noqa: SLF001 - the SDK tells nobody when it has connected

    async def connected() -> None:
        await connect()
        _say(out, {"connected": True})

    client._connect = connected  # noqa: SLF001


def _say(out: IO[str], what: dict[str, Any]) -> None:
    out.write(json.dumps(what) + "\n")


def _end(out: IO[str], why: str) -> None:
    with contextlib.suppress(OSError):
        _say(out, {"why": why})
    os._exit(1)


if __name__ == "__main__":
    main()
