"""The state of a service as pages, the API and commands show it."""

from typing import Literal

ServiceState = Literal["down", "degraded", "stopped", "unknown", "up"]
STATES: tuple[ServiceState, ...] = ("down", "degraded", "stopped", "unknown", "up")  # in the order of lists


def find_state(up: bool | None, *, is_stopped: bool, decision: str, is_impaired: bool) -> ServiceState:
    """Return the state of a service.

    `up` is what the exporter has seen, None if it has no result yet; `is_stopped` whether it was stopped through Defib;
    `decision` the reason of the last decision about its incident; `is_impaired` whether an alert about it is firing or
    one of its components is down.
    """
    if is_stopped or (up is not True and decision == "stopped-by-hand"):
        return "stopped"
    if up is None:
        return "unknown"
    if not up:
        return "down"
    return "degraded" if is_impaired else "up"
