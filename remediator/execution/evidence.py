"""Evidence of a failure, collected before a command destroys it: the target's state, its logs, GPUs and processes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from fleet.inventory.model import Host, Remediable, SudoOptions
from fleet.shells import Shell
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import CommandRefusedError, ControlRunner, TargetState
from remediator.incidents.actions import Evidence
from runtime.errors import DefibError
from runtime.redaction import Redactor

TIMEOUT = 5.0  # seconds for each item; a restart does not wait longer for them
TEXT_LIMIT = 8000  # characters of each text: the last ones of logs, the first ones of others
# Run as the account of the controls, without sudo.
HOST_COMMANDS = {
    "nvidia-smi": ["sh", "-c", "command -v nvidia-smi >/dev/null || exit 0; exec nvidia-smi"],
    # Without arguments, which may contain secrets.
    "processes": ["sh", "-c", "ps -eo pid,user,pcpu,pmem,rss,etime,comm --sort=-pcpu 2>/dev/null | head -n 15"],
}


async def read_target_state(
    service: Remediable, host: Host | None, shell: Shell | None, redact: Callable[[str], str]
) -> TargetState | None:
    """Read the state of a service's target, or why it cannot be read; None if its control has none to read."""
    control = service.control
    if control is None:
        return None
    runner = ControlRunner(shell, host.sudo if host is not None else SudoOptions(), TIMEOUT, host.name if host else "")
    kind = CONTROLS[control.kind]
    try:
        async with asyncio.timeout(TIMEOUT + 1.0):
            state = await kind.read_state(control.options, runner)
    except CommandRefusedError as error:
        return TargetState(refused=redact(str(error))) if kind.reports_stops else None
    except DefibError as error:
        return TargetState(unseen=redact(f"cannot read the target's state: {error}"))
    except TimeoutError:
        return TargetState(unseen=f"cannot read the target's state: no response within {TIMEOUT:g} s")
    if state is None and kind.reports_stops:
        return TargetState(unseen=f"cannot read the target's state: unexpected output of {control.kind}")
    return _redact_state(state, redact) if state is not None else None


def _redact_state(state: TargetState, redact: Callable[[str], str]) -> TargetState:
    """Return a state without secrets: it is stored, and hosts decide what it says."""
    texts: dict[str, Any] = {name: redact(text) for name, text in asdict(state).items() if isinstance(text, str)}
    return replace(state, **texts)


async def collect_evidence(
    service: Remediable, host: Host | None, shell: Shell | None, redact: Redactor
) -> tuple[Evidence, TargetState | None]:
    """Collect all evidence in parallel; what cannot be read in time is left out."""
    readers: dict[str, Callable[[], Awaitable[str]]] = {"logs": lambda: _read_logs(service, host, shell)}
    if shell is not None:
        readers |= {name: partial(_run_on_host, shell, argv) for name, argv in HOST_COMMANDS.items()}
    state, texts = await asyncio.gather(
        read_target_state(service, host, shell, redact),
        asyncio.gather(*(_read_in_time(read) for read in readers.values())),
    )
    shortened = {
        name: redact.redact_tail(text, TEXT_LIMIT) if name == "logs" else redact.redact_head(text, TEXT_LIMIT)
        for name, text in zip(readers, texts, strict=True)
        if text
    }
    return Evidence(state.known_fields() if state is not None else None, shortened), state


async def _read_logs(service: Remediable, host: Host | None, shell: Shell | None) -> str:
    control = service.control
    if control is None or "logs" not in control.options.verbs:
        return ""
    runner = ControlRunner(shell, host.sudo if host is not None else SudoOptions(), TIMEOUT)
    return (await CONTROLS[control.kind].run("logs", control.options, runner)).output


async def _run_on_host(shell: Shell, argv: Sequence[str]) -> str:
    return (await shell.run(argv, timeout=TIMEOUT)).output


async def _read_in_time(read: Callable[[], Awaitable[str]]) -> str:
    """Return the text, empty if it cannot be read in time."""
    try:
        async with asyncio.timeout(TIMEOUT + 1.0):
            return await read()
    except (DefibError, TimeoutError):
        return ""
