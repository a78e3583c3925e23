"""The child process of a long connection: runs the SDK's client, with events on stdout and responses on stdin.

The process exits when the connection is lost. The remediator then starts another one.
"""

import contextlib
import json
import os
import sys
import threading
from typing import IO, Any


def main() -> None:
    """Read the credentials from stdin, connect, and pass events on until the connection or stdin ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the SDK also prints to stdout
    credentials = json.loads(sys.stdin.readline())

    from lark_oapi.core.enum import LogLevel
    from lark_oapi.ws import Client

    client = Client(
        credentials["app_id"], credentials["app_secret"], domain=credentials["url"], log_level=LogLevel.CRITICAL,
        event_handler=_EventHandler(out, _Responses()), auto_reconnect=True,
    )  # fmt: skip
    client.on_reconnecting = lambda: _exit(out, "the connection was lost")
    _report_connection(client, out)
    try:
        client.start()
    except Exception as error:  # noqa: BLE001 - any error of the SDK ends this process and is reported
        # Its message may contain the URL, which includes a ticket to connect with.
        _exit(out, f"cannot connect: {type(error).__name__} {getattr(error, 'code', '')}".strip())


class _Responses:
    """The lines of stdin. When it ends, the process exits."""

    def __init__(self) -> None:
        self._received = threading.Condition()
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            with self._received:
                self._lines.append(line)
                self._received.notify()
        os._exit(0)

    def next(self) -> str:
        """Wait for the next line and return it."""
        with self._received:
            self._received.wait_for(lambda: bool(self._lines))
            return self._lines.pop(0)


class _EventHandler:
    """Replaces the SDK's dispatcher: passes each event on and returns the response to it."""

    def __init__(self, out: IO[str], responses: _Responses) -> None:
        self._out, self._responses = out, responses

    def _do_without_validation(self, payload: bytes) -> Any:
        _write(self._out, {"event": json.loads(payload)})
        return json.loads(self._responses.next()) or None

    do_without_validation = _do_without_validation  # the method's name depends on the SDK's version


def _report_connection(client: Any, out: IO[str]) -> None:
    """Write a message when the client has connected."""
    connect = client._connect  # noqa: SLF001 - the SDK has no callback for it

    async def connect_and_report() -> None:
        await connect()
        _write(out, {"connected": True})

    client._connect = connect_and_report  # noqa: SLF001 - as above


def _write(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")


def _exit(out: IO[str], why: str) -> None:
    with contextlib.suppress(OSError):
        _write(out, {"why": why})
    os._exit(1)


if __name__ == "__main__":
    main()
