"""The database of heartbeats: their states, their last pings, and when pings could last be received.

SQLite without an ORM: three tables, and a thousand pings per second.
"""

import contextlib
import fcntl
import json
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pydantic import SecretStr

from exporter.heartbeats.agent import AgentReport, state_from_json, state_to_json
from exporter.heartbeats.state import HeartbeatState
from fleet.pings import PingKind
from runtime.clock import StoredClock
from runtime.errors import DefibError, StartError
from runtime.tokens import ensure_token

PINGS_LIMIT = 50  # of each heartbeat
BODIES_LIMIT = 50_000  # bytes of all bodies of a heartbeat
_PRUNE_EVERY = 16  # pings of a heartbeat
VERSION = 1
SCHEMA = """
CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), boot TEXT, running REAL, calendar REAL, steady REAL);
CREATE TABLE heartbeats (service TEXT PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE pings (
    id INTEGER PRIMARY KEY, service TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, exit_status INTEGER,
    run_id TEXT NOT NULL, fault TEXT NOT NULL, body TEXT NOT NULL, is_cut INTEGER NOT NULL, client TEXT NOT NULL
);
CREATE INDEX pings_service ON pings (service, id);
"""
_FIELDS = [field.name for field in fields(HeartbeatState)]
_NUMBERS = (
    "known_since", "last_ping", "exit_status", "started_at", "last_start", "last_duration", "changed_at",
    "not_late_before",
)  # fmt: skip


class HeartbeatStoreError(DefibError):
    """The database of heartbeats cannot be written or read; nothing was stored."""

    retryable = True


@dataclass(frozen=True, slots=True)
class ReceivedPing:
    """A ping as it is stored, with what its sender has sent: `body` is masked, and `is_cut` if it was longer."""

    service: str
    at: float
    kind: PingKind
    exit_status: int | None
    run_id: str
    fault: str
    body: str
    is_cut: bool
    client: str
    report: AgentReport | None = None  # in the body, not stored
    duration: float | None = None  # as the job reports it, not stored


def ping_key_file(database: Path) -> Path:
    """Return the file of the ping key, which is beside the database unless the configuration has one."""
    return database.with_name("ping_key")


def ensure_ping_key(database: Path) -> SecretStr:
    """Return the ping key in its file, which is created where it is missing. Raises StartError and TokenError."""
    path = ping_key_file(database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot create the folder {path.parent}: {error.strerror}") from error
    return ensure_token(path)


def lock_database(path: Path) -> int:
    """Lock the database at `path`, which need not exist, until the returned descriptor is closed.

    Raises OSError, and StartError while an exporter uses it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_file = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_file)
        raise StartError(f"another exporter uses the database of heartbeats {path}") from None
    return lock_file


def read_states(database: sqlite3.Connection) -> Iterator[tuple[str, HeartbeatState]]:
    """Yield the services with their states. Raises sqlite3.DatabaseError if one is damaged."""
    for service, state in database.execute("SELECT service, state FROM heartbeats"):
        try:
            yield service, _from_json(state)
        except (TypeError, ValueError, AttributeError) as error:
            raise sqlite3.DatabaseError(f"the state of {service} is not readable") from error


class HeartbeatStore:
    """The opened database. Its methods block, and are called by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the database, which is created where it is missing. Raises StartError."""
        self._path = path
        self._since_pruning: Counter[str] = Counter()
        with contextlib.ExitStack() as opened:
            try:
                opened.callback(os.close, lock_database(path))
                # It has the output of jobs. SQLite's other files get the same mode.
                os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
                self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                opened.callback(self._connection.close)
                self._prepare()
            except (OSError, sqlite3.Error) as error:
                raise StartError(f"cannot open the database of heartbeats {path}: {error}") from error
            self._opened = opened.pop_all()
        self._file = self._identify_file()

    def _prepare(self) -> None:
        connection = self._connection
        for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise sqlite3.DatabaseError("it was written by a newer version of Defib, install that version")
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")

    def _identify_file(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def read_clock(self) -> StoredClock | None:
        """Return the time until which pings could be received; None in a new database."""
        row = self._connection.execute("SELECT boot, running, calendar, steady FROM clock").fetchone()
        return None if row is None else StoredClock(*row)

    def read_states(self) -> dict[str, HeartbeatState]:
        """Return the states by service. Raises HeartbeatStoreError."""
        try:
            return dict(read_states(self._connection))
        except sqlite3.Error as error:
            raise HeartbeatStoreError(f"cannot read the database of heartbeats {self._path}: {error}") from error

    def commit(self, pings: Sequence[ReceivedPing], states: Mapping[str, HeartbeatState], clock: StoredClock) -> None:
        """Store pings and states in one transaction, which is durable afterwards. Raises HeartbeatStoreError."""
        connection = self._connection
        if self._identify_file() != self._file:
            raise HeartbeatStoreError(f"the database of heartbeats {self._path} was deleted or replaced")
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(
                    "INSERT INTO pings (service, at, kind, exit_status, run_id, fault, body, is_cut, client)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (each.service, each.at, each.kind, each.exit_status, each.run_id, each.fault, each.body,
                         each.is_cut, each.client)
                        for each in pings
                    ],
                )  # fmt: skip
                connection.executemany(
                    "INSERT OR REPLACE INTO heartbeats (service, state) VALUES (?, ?)",
                    [(service, _to_json(state)) for service, state in states.items()],
                )
                connection.execute(
                    "INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?, ?)",
                    (clock.boot, clock.running, clock.calendar, clock.steady),
                )
                pruned = self._prune(pings)
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise
        except sqlite3.Error as error:
            raise HeartbeatStoreError(f"cannot write the database of heartbeats {self._path}: {error}") from error
        for service in pruned:
            self._since_pruning[service] = 0

    def _prune(self, pings: Iterable[ReceivedPing]) -> list[str]:
        """Remove old pings and bodies of services with many new ones, and return these services."""
        # A body may be as long as a fifth of all bodies of its service.
        for each in pings:
            self._since_pruning[each.service] += _PRUNE_EVERY if each.body else 1
        services = [name for name in {each.service for each in pings} if self._since_pruning[name] >= _PRUNE_EVERY]
        for service in services:
            rows = self._connection.execute(
                "SELECT id, length(CAST(body AS BLOB)) FROM pings WHERE service = ? ORDER BY id DESC", (service,)
            ).fetchall()
            old = [(number,) for number, _ in rows[PINGS_LIMIT:]]
            total, without_body = 0, []
            for number, length in rows[:PINGS_LIMIT]:
                total += length
                if length and total > BODIES_LIMIT:
                    without_body.append((number,))
            self._connection.executemany("DELETE FROM pings WHERE id = ?", old)
            self._connection.executemany("UPDATE pings SET body = '', is_cut = 1 WHERE id = ?", without_body)
        return services

    def forget(self, services: Iterable[str]) -> None:
        """Remove all that is stored of some services. Raises HeartbeatStoreError."""
        names = [(service,) for service in services]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("DELETE FROM heartbeats WHERE service = ?", names)
            self._connection.executemany("DELETE FROM pings WHERE service = ?", names)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._connection.rollback()
            raise HeartbeatStoreError(f"cannot write the database of heartbeats {self._path}: {error}") from error

    def read_pings(self, service: str) -> list[ReceivedPing]:
        """Return the last pings of a service, newest first. Raises HeartbeatStoreError."""
        try:
            rows = self._connection.execute(
                "SELECT service, at, kind, exit_status, run_id, fault, body, is_cut, client FROM pings"
                " WHERE service = ? ORDER BY id DESC LIMIT ?",
                (service, PINGS_LIMIT),
            ).fetchall()
        except sqlite3.Error as error:
            raise HeartbeatStoreError(f"cannot read the database of heartbeats {self._path}: {error}") from error
        pings = [ReceivedPing(*columns) for columns in rows]
        return [replace(ping, is_cut=bool(ping.is_cut)) for ping in pings]  # SQLite has numbers

    def close(self) -> None:
        self._opened.close()


def _to_json(state: HeartbeatState) -> str:
    stored = {name: getattr(state, name) for name in _FIELDS}
    return json.dumps(stored if state.agent is None else {**stored, "agent": state_to_json(state.agent)})


def _from_json(text: str) -> HeartbeatState:
    """Return a state. Raises TypeError, ValueError and AttributeError for what none has been stored as."""
    stored = {name: value for name, value in json.loads(text).items() if name in _FIELDS}
    agent = stored.pop("agent", None)
    state = HeartbeatState(**stored, agent=None if agent is None else state_from_json(agent))
    numbers = [getattr(state, name) for name in _NUMBERS] + ([] if state.agent is None else [state.agent.last_progress])
    texts = [state.fault, state.run_id]
    if not all(math.isfinite(each or 0.0) for each in numbers) or not all(isinstance(each, str) for each in texts):
        raise ValueError(text)
    return state
