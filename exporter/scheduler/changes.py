"""The order in which services changed last, so that a client can ask for those that have changed since."""

from collections import OrderedDict

from exporter.scheduler.cursors import Cursors


class ServiceChanges:
    """Numbers every change of a service. Finding what has changed takes time for the changed services only."""

    def __init__(self, cursors: Cursors) -> None:
        self._cursors = cursors
        self._number = 0
        self._loaded_at = 0  # the number at the last reload, when any service may have changed
        self._changed: OrderedDict[str, int] = OrderedDict()  # the last change of each service, in order

    @property
    def cursor(self) -> str:
        """The position after the last change."""
        return self._cursors.format(self._number)

    def record(self, service: str) -> None:
        self._number += 1
        self._changed[service] = self._number
        self._changed.move_to_end(service)

    def reload(self) -> None:
        """Make all cursors so far invalid, since services may have been added, changed and removed."""
        self._number += 1
        self._loaded_at = self._number
        self._changed.clear()

    def since(self, cursor: str) -> list[str] | None:
        """Return the services that have changed after `cursor`; None if it is not valid and any may have changed."""
        number = self._cursors.parse(cursor)
        if number is None or not self._loaded_at <= number <= self._number:
            return None
        services = []
        for service, changed in reversed(self._changed.items()):
            if changed <= number:
                break
            services.append(service)
        return services
