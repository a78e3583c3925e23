"""What is looked at before a command destroys it: how the target stands, its logs, its host's cards and processes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from fleet.inventory.model import Host, Service, Sudo
from fleet.shells import Shell
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.context import Facts, Hands, NotAllowed
from remediator.incidents.actions import Seen
from runtime.errors import DefibError

T = TypeVar("T")
WITHIN = 5.0  # seconds for each look; a restart waits no longer for what hangs
KEPT = 8000  # characters of each text: the last ones of logs, the first ones of others
# Of the host, as the account that the controls use: what needs more than that is not worth it.
OF_THE_HOST = {
    "nvidia-smi": ["sh", "-c", "command -v nvidia-smi >/dev/null || exit 0; exec nvidia-smi"],
    # Without their arguments, which may hold others' secrets.
    "processes": ["sh", "-c", "ps -eo pid,user,pcpu,pmem,rss,etime,comm --sort=-pcpu 2>/dev/null | head -n 15"],
}


async def facts(service: Service, host: Host | None, shell: Shell | None, redact: Callable[[str], str]) -> Facts | None:
    """How the target stands, or why that cannot be seen; None where its control knows of none."""
    control = service.control
    if control is None:
        return None
    hands = Hands(shell, host.sudo if host is not None else Sudo(), WITHIN, host.name if host is not None else "")
    kind = CONTROLS[control.kind]
    try:
        async with asyncio.timeout(WITHIN + 1.0):
            found = await kind.facts(control.options, hands)
            if found is None and kind.tells_of_stops:
                return Facts(unseen=f"how it stands on its host could not be seen: {control.kind} did not tell")
            return found
    except NotAllowed as error:
        return Facts(refused=redact(str(error))) if kind.tells_of_stops else None
    except DefibError as error:
        return Facts(unseen=redact(f"how it stands on its host could not be seen: {error}"))
    except TimeoutError:
        return Facts(unseen=f"how it stands on its host could not be seen within {WITHIN:g} s")


async def look(
    service: Service, host: Host | None, shell: Shell | None, redact: Callable[[str], str]
) -> tuple[Seen, Facts | None]:
    """All that can be seen in time, each look in a session of its own; what cannot is left out."""
    looks: dict[str, Callable[[], Awaitable[str]]] = {"logs": lambda: _logs(service, host, shell)}
    if shell is not None:
        looks |= {name: partial(_of_the_host, shell, argv) for name, argv in OF_THE_HOST.items()}
    found, said = await asyncio.gather(
        facts(service, host, shell, redact), asyncio.gather(*(_seen(each) for each in looks.values()))
    )
    told = {name: redact(text) for name, text in zip(looks, said, strict=True) if text}
    kept = {name: text[-KEPT:] if name == "logs" else text[:KEPT] for name, text in told.items()}
    return Seen(found.told() if found is not None else None, kept), found


async def _logs(service: Service, host: Host | None, shell: Shell | None) -> str:
    control = service.control
    if control is None or "logs" not in control.options.verbs:
        return ""
    hands = Hands(shell, host.sudo if host is not None else Sudo(), WITHIN)
    return (await CONTROLS[control.kind].control("logs", control.options, hands)).output


async def _of_the_host(shell: Shell, argv: Sequence[str]) -> str:
    return (await shell.run(argv, timeout=WITHIN)).output


async def _seen(see: Callable[[], Awaitable[T]]) -> T | None:
    """What a look gives, or None where it does not come in time, or not at all."""
    try:
        async with asyncio.timeout(WITHIN + 1.0):
            return await see()
    except (DefibError, TimeoutError):
        return None
