"""How much memory the bodies of responses take, of all probes together, until each probe has ended."""

from exporter.results import ProbeDetails


class HeldBodies:
    """The bytes of all bodies. Those of one probe are in its details."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, details: ProbeDetails, size: int) -> None:
        details.held += size
        self.total += size

    def release(self, details: ProbeDetails) -> None:
        """Note that a probe has ended."""
        self.total -= details.held
        details.held = 0


HELD = HeldBodies()
