"""A transaction of the record, which every function that reads or writes it takes first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable, ScalarResult

from fleet.inventory.model import Inventory
from remediator.record.arrivals import NewArrivals
from runtime.clock import SteadyClock


@dataclass(frozen=True)
class Transaction:
    """An open transaction, with what its statements depend on.

    `now` is the time at which it began, in seconds of the record's `clock`; `inventory` is the one in force, and
    `arrivals` counts the new alerts, which the database adds to those before when it is committed.
    """

    connection: Connection
    clock: SteadyClock
    now: float
    inventory: Inventory
    arrivals: NewArrivals

    def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> CursorResult[Any]:
        return self.connection.execute(statement, parameters)

    def scalar(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Any:
        return self.connection.scalar(statement, parameters)

    def scalars(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> ScalarResult[Any]:
        return self.connection.scalars(statement, parameters)
