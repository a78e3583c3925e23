"""Running setup scripts on many hosts at the same time, with their progress and a summary."""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from defib.host_setup.results import HostResult, judge, summarize
from defib.output import print_text, terminal_width
from fleet.shells.local import LocalShell
from runtime.terminal import escape_controls, one_line

NAMED = 3  # hosts in the line about those that are being set up
_CLEAR_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class Run:
    """A script, and the command that runs it on a host; it reads the script from its stdin."""

    host: str
    argv: Sequence[str]
    script: str


class _Progress:
    """Prints a line for each host that is finished and, on a terminal, a counter below them."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._finished = 0
        self._running: dict[str, None] = {}
        self._on_terminal = sys.stderr.isatty()

    def start(self, host: str) -> None:
        self._running[host] = None
        self._draw()

    def finish(self, result: HostResult) -> None:
        self._running.pop(result.host, None)
        self._finished += 1
        self.clear()
        for line in result.output:
            print_text(f"{result.host} | {one_line(line)}")
        print_text(f"[{self._finished}/{self._total}] {one_line(str(result))}")
        self._draw()

    def clear(self) -> None:
        if self._on_terminal:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()

    def _draw(self) -> None:
        if not self._on_terminal or not self._running:
            return
        names = [*self._running]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        text = f"{self._finished} of {self._total} hosts finished; running: {', '.join(names[:NAMED])}{more}"
        sys.stderr.write(f"{_CLEAR_LINE}{escape_controls(text)[: (terminal_width() or 80) - 1]}")
        sys.stderr.flush()


async def run_all(
    runs: Sequence[Run], failed: Sequence[HostResult], *, parallel: int, timeout: float
) -> list[HostResult]:
    """Run scripts, at most `parallel` at the same time, each for at most `timeout` seconds, and print a summary.

    `failed` are the results of hosts that have no script. If this is cancelled, the commands are ended, and the summary
    has the hosts that were not set up.
    """
    progress = _Progress(len(runs) + len(failed))
    results = {each.host: each for each in failed}
    for result in failed:
        progress.finish(result)
    started: set[str] = set()
    slots = asyncio.Semaphore(parallel)
    # ssh needs more variables than other commands, such as those of its agent.
    shell = LocalShell(read_only=True, environ=os.environ)

    async def run(each: Run) -> None:
        async with slots:
            started.add(each.host)
            progress.start(each.host)
            completed = await shell.run(each.argv, timeout=timeout, stdin=each.script.encode())
        results[each.host] = judge(each.host, completed)
        progress.finish(results[each.host])

    try:
        async with asyncio.TaskGroup() as group:
            for each in runs:
                group.create_task(run(each))
    finally:
        progress.clear()
        for each in runs:
            why = "interrupted; run it again" if each.host in started else "interrupted before it began"
            results.setdefault(each.host, HostResult(each.host, "not run", why))
        _print_summary(results)
    return list(results.values())


def _print_summary(results: Mapping[str, HostResult]) -> None:
    for line in summarize([results[host] for host in sorted(results)]):
        print_text(one_line(line))
