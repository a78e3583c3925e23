"""`defib heartbeat run`: run a job, and report its start and its end to its ping URL.

Nothing that goes wrong with the reports changes the job; what went wrong is one line on stderr.
"""

import asyncio
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit, urlunsplit

import httpx

from defib.job import EndedJob, Job, handle_signals
from defib.output import print_text
from runtime import VERSION
from runtime.errors import DefibError
from runtime.http_clients import find_cause, limit_interim_responses
from runtime.tls import create_client_context

URL_VARIABLE = "DEFIB_PING_URL"
CANNOT_START = 127  # exit status
START_TIMEOUT, END_TIMEOUT = 5.0, 10.0  # seconds for a request
PAUSES = (0.0, 1.0, 3.0)  # seconds before each attempt to report the end
PATIENCE = 45.0  # seconds after the end of the job in which it may be reported
URL_LIMIT = 4096  # bytes of a file
TRIED_AGAIN = (429, 500, 502, 503, 504)  # statuses of answers


class ReportError(DefibError):
    """A ping was not accepted, or cannot be sent."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class _AbandonedError(Exception):
    """A signal has arrived after the end of the job."""


@dataclass(frozen=True)
class PingUrl:
    """A ping URL, which is a secret: neither errors nor its representation have its path."""

    _url: str

    @classmethod
    def parse(cls, text: str, source: str) -> "PingUrl":
        """Parse what `source` has. Raises ReportError."""
        try:
            parts = urlsplit(text.strip())
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            is_valid = False
        if not is_valid or not text.strip().isprintable() or " " in text.strip():
            raise ReportError(f"{source} has no URL that begins with http:// or https://")
        return cls(text.strip())

    def __repr__(self) -> str:
        return "PingUrl(***)"

    @property
    def server(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"

    def of(self, action: str, run_id: str) -> str:
        """Return the URL for a start or an exit status, with the parameters that it has, such as `create=1`."""
        parts = urlsplit(self._url)
        query = "&".join(filter(None, [parts.query, f"rid={run_id}"]))
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{action}", query=query, fragment=""))


def read_url(url_file: Path | None, environment: Mapping[str, str], ask: Callable[[], str]) -> PingUrl:
    """Return the URL in a file or the environment; otherwise that which `ask` returns. Raises DefibError."""
    if url_file is not None:
        try:
            with url_file.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    print_text(f"defib: warning: others may read {url_file}, which has a secret: chmod 600", sys.stderr)
                text = file.read(URL_LIMIT).decode("ascii", "replace")
        except OSError as error:
            raise ReportError(f"cannot read {url_file}: {error.strerror}") from error
        return PingUrl.parse(text, str(url_file))
    if given := environment.get(URL_VARIABLE):
        return PingUrl.parse(given, URL_VARIABLE)
    return PingUrl.parse(ask(), "the remediator's answer")


async def send_ping(url: PingUrl, action: str, run_id: str, body: bytes, timeout: float) -> None:
    """Send a ping. Raises ReportError."""
    headers = {"User-Agent": f"defib/{VERSION}"}
    client = httpx.AsyncClient(verify=create_client_context(), trust_env=False, timeout=timeout, headers=headers)
    try:
        async with (
            asyncio.timeout(timeout),
            limit_interim_responses(client),
            client.stream("POST", url.of(action, run_id), content=body) as response,
        ):
            status, is_success = response.status_code, response.is_success
    except httpx.ConnectError as error:
        raise ReportError(f"cannot connect to {url.server}: {find_cause(error)}", retryable=True) from None
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
        raise ReportError(f"no answer of {url.server}: {type(error).__name__}", retryable=True) from None
    if not is_success:  # its text may contain the URL
        message = f"{url.server} has answered HTTP {status} {httpx.codes.get_reason_phrase(status)}".rstrip()
        raise ReportError(message, retryable=status in TRIED_AGAIN)


class Reporter:
    """Sends the start and the end of a job from one thread, so that they arrive in this order."""

    def __init__(self, find_url: Callable[[], PingUrl]) -> None:
        self._find_url = find_url
        self._url: PingUrl | None = None
        self._run_id = str(uuid.uuid4())
        self._end: EndedJob | None = None
        self._has_ended = threading.Event()
        self._start_problem = self._end_problem = ""
        self._thread = threading.Thread(target=self._report, daemon=True)
        self._thread.start()

    def finish(self, ended: EndedJob) -> str:
        """Report the end, and return what could not be reported, and why; empty if all was."""
        self._end = ended
        self._has_ended.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            return "cannot report its end: no answer in time"
        if self._end_problem:
            return f"cannot report its end: {self._end_problem}"
        return f"cannot report its start: {self._start_problem}" if self._start_problem else ""

    def _report(self) -> None:
        self._start_problem, _ = self._attempt("start", b"", START_TIMEOUT)
        self._has_ended.wait()
        assert self._end is not None  # noqa: S101 - set before the event
        for pause in PAUSES:
            time.sleep(pause)
            action = str(self._end.exit_status)
            self._end_problem, may_help = self._attempt(action, self._end.output, END_TIMEOUT)
            if not may_help:
                return

    def _attempt(self, action: str, body: bytes, timeout: float) -> tuple[str, bool]:
        """Send a ping; returns why that failed, if it did, and whether another attempt may succeed."""
        try:
            if self._url is None:
                self._url = self._find_url()
            asyncio.run(send_ping(self._url, action, self._run_id, body, timeout))
        except DefibError as error:
            return " ".join(str(error).split()), error.retryable
        except Exception as error:  # noqa: BLE001 - the job goes on, and a traceback would have the URL
            return type(error).__name__, False
        return "", False


def run(
    service: str, command: Sequence[str], url_file: Path | None, environment: Mapping[str, str], ask: Callable[[], str]
) -> int:
    """Run a job and report it; returns its exit status, 127 if it cannot be started."""
    job = Job()
    hidden = {URL_VARIABLE} if url_file is None else set()  # else it is the job's own
    job_environment = {name: value for name, value in environment.items() if name not in hidden}
    fault: OSError | None = None
    try:
        job.start(command, job_environment)
    except OSError as error:
        fault = error
    reporter = Reporter(lambda: read_url(url_file, environment, ask))
    if fault is None:
        ended = job.wait()
    else:
        message = f"cannot start {command[0]}: {fault.strerror}"
        print_text(f"defib: {message}", sys.stderr)
        ended = EndedJob(CANNOT_START, message.encode("utf-8", "replace"))
    try:
        handle_signals(_abandon)
        problem = reporter.finish(ended)
    except _AbandonedError:
        problem = "its end may not be reported: interrupted"
    if problem:
        print_text(f"defib: warning: heartbeat {service}: {problem}", sys.stderr)
    return ended.exit_status


def _abandon(_number: int, _frame: FrameType | None) -> None:
    raise _AbandonedError
