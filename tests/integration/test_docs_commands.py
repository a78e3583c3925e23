"""Every command that the documentation shows is executed, or is in a table with the reason why it cannot be.

They run one after the other on the machines of `tests.documented.machines`, on which the commands of the documentation
install, configure and start Defib. A command that succeeds as it is written needs no entry in a table; the tables are in
`tests.documented.runs` and `tests.documented.not_executed`.
"""

import asyncio
import itertools
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from defib.demo.launcher import Launcher
from tests.documented.commands import Shown, commands_of, placeholders, variants
from tests.documented.machines import Machine, start_host, start_server
from tests.documented.not_executed import NOT_EXECUTED
from tests.documented.runs import BLOCKS, COMMANDS, PLACEHOLDERS, STORY, Run
from tests.support import load_problems, write

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [each for page in PAGES for each in commands_of(str(page.relative_to(ROOT)), page.read_text())]


def excuse(shown: Shown) -> str | None:
    """Return the entry in the table of what is not executed, if any. A block has one of its own, or is executed."""
    if block_run(shown) is not None:
        return None
    return next((pattern for pattern in NOT_EXECUTED if re.fullmatch(pattern, shown.key)), None)


def block_run(shown: Shown) -> str | None:
    """Return the entry of a block that needs one: the longest that it begins with."""
    found = [key for key in BLOCKS if shown.is_block and shown.key.startswith(key)]
    return max(found, key=len, default=None)


def command_run(shown: Shown, variant: str) -> str | None:
    if variant in COMMANDS:
        return variant
    return next((pattern for pattern in COMMANDS if re.fullmatch(pattern, variant)), None)


def runs_of(shown: Shown) -> Iterator[tuple[str, Run]]:
    """Yield the scripts that a shown command or block stands for, each with how it runs."""
    if shown.is_block:
        run = BLOCKS.get(block_run(shown) or "", Run())
        yield f"set -eo pipefail\n{filled_in(shown.text + chr(10), run)}", run
        return
    for variant in variants(shown.text):
        run = COMMANDS.get(command_run(shown, variant) or "", Run())
        yield filled_in(run.instead or variant, run), run


def filled_in(script: str, run: Run) -> str:
    for answer in run.answers:
        assert answer[0] in script, f"{answer[0]!r} is not in {script!r}"
        script = script.replace(*answer)
    for pattern, value in PLACEHOLDERS.items():
        script = re.sub(pattern, value, script)
    return script


@dataclass(frozen=True)
class Step:
    """A script that is executed once, for the first place that shows it."""

    shown: Shown
    script: str
    run: Run

    @property
    def is_independent(self) -> bool:
        """Whether it may run while others of its kind do. Two of them may not act on the same service."""
        return self.run == Run() and self.script.startswith("defib ") and "control" not in self.script


def story() -> list[Step]:
    """Return what is executed, in an order in which it works: first what STORY names."""
    executed = [each for each in SHOWN if excuse(each) is None]
    first = [next(each for each in executed if each.is_block and each.key.startswith(key)) for key in STORY]
    steps = [
        Step(shown, script, run)
        for shown in [*first, *(each for each in executed if each not in first)]
        for script, run in runs_of(shown)
    ]
    once: dict[str, Step] = {}
    for step in steps:
        once.setdefault(step.script, step)
    return list(once.values())


async def fault_of(step: Step, machine: Machine, folder: str) -> str | None:
    """Execute a step, and return what is wrong with it."""
    until_idle = "until-idle || exit\n" if re.search(r"\bcontrol\b|/restart\b", step.script) else ""
    faults = []
    for script in (
        until_idle + step.run.before,
        step.script,
        step.run.after,
    ):  # the last one in any case: others follow
        if not script:
            continue
        done = await machine.run(script, folder)
        is_own = script is not step.script
        fault = judge(done, Run() if is_own else step.run)
        if fault is not None:
            what = f"{script!r} in the table: " if is_own else ""
            faults.append(f"{step.shown.place}: {step.shown.text}\n  {what}{fault}\n{done.stdout[-2000:]}")
    return "\n".join(faults) or None


def judge(done: subprocess.CompletedProcess[str], run: Run) -> str | None:
    if done.returncode not in run.status:
        return (
            f"exit status {done.returncode}: correct the page, or say in BLOCKS or COMMANDS how it runs, or in NOT_EXECUTED why it"
            " cannot"
        )
    if "Traceback (most recent call last)" in done.stdout:
        return "a traceback"
    if not re.search(run.prints, done.stdout):
        return f"the output does not match {run.prints!r}"
    if run.sample and run.sample not in done.stdout.splitlines():
        return f"does not print {run.sample!r}"
    return None


@pytest.mark.needs(
    "root", "sudo", "sshd", "ssh", "ssh-keygen", "ssh-keyscan", "prometheus", "prometheus-alertmanager", "openssl",
    "unshare", "nsenter", "setpriv", "ip", "curl", "jq",
)  # fmt: skip
async def test_commands_that_are_shown_succeed(launcher: Launcher, tmp_path: Path) -> None:
    server = await start_server(launcher, tmp_path)
    host = await start_host(server, tmp_path)
    limit = asyncio.Semaphore(3)

    async def execute(number: int, step: Step) -> str | None:
        async with limit:  # each in a new folder: without ./config, which Defib would read
            return await fault_of(step, host if step.run.on_host else server, f"/root/{number}")

    faults: list[str] = []
    for independent, steps in itertools.groupby(enumerate(story()), lambda numbered: numbered[1].is_independent):
        if independent:
            faults += filter(None, await asyncio.gather(*(execute(*each) for each in steps)))
        else:
            faults += [fault for each in steps if (fault := await execute(*each))]
    await host.stop()
    await server.stop()
    assert faults == [], "\n\n".join(["", *faults])


@pytest.mark.parametrize("shown", [each for each in SHOWN if excuse(each)], ids=lambda each: str(each.place))
@pytest.mark.needs("docker", "docker-compose")
def test_what_is_not_executed_is_right_as_far_as_it_can_be_seen(shown: Shown) -> None:
    NOT_EXECUTED[excuse(shown) or ""][1](shown.text)


def unfilled(shown: Iterable[Shown]) -> list[str]:
    """Return what cannot be executed since it has words that stand for something unknown."""
    return [
        f"{each.place}: `{each.text}` cannot be executed: add a value of {', '.join(left)} to PLACEHOLDERS, or the command to"
        " COMMANDS or NOT_EXECUTED"
        for each in shown
        if not each.is_block and excuse(each) is None
        for script, _ in runs_of(each)
        if (left := placeholders(script))
    ]


def test_every_word_in_capitals_is_filled_in() -> None:
    assert unfilled(SHOWN) == []


def test_tables_name_only_what_is_shown() -> None:
    executed = [each for each in SHOWN if excuse(each) is None]
    blocks = {block_run(each) for each in executed}
    commands = {command_run(each, variant) for each in executed if not each.is_block for variant in variants(each.text)}
    excused = {excuse(each) for each in SHOWN}
    written = [variant if not each.is_block else each.text for each in executed for variant in variants(each.text)]
    unused = [
        *(f"BLOCKS: {key}" for key in BLOCKS if key not in blocks),
        *(f"COMMANDS: {key}" for key in COMMANDS if key not in commands),
        *(f"NOT_EXECUTED: {key}" for key in NOT_EXECUTED if key not in excused),
        *(f"PLACEHOLDERS: {key}" for key in PLACEHOLDERS if not any(re.search(key, text) for text in written)),
    ]
    assert unused == [], "no page shows this any more: remove it"


@pytest.mark.parametrize("sample", [run.sample for run in COMMANDS.values() if run.sample])
def test_samples_are_in_the_documentation(sample: str) -> None:
    assert any(f"```\n{sample}\n```" in page.read_text() for page in PAGES)


def test_the_sample_of_errors_is_what_is_reported(tmp_path: Path) -> None:
    written = """
        services:
          wiki:
            probe:
              http: {url: http://wiki.example/}
              timout: 5s
          mail:
            category: mail
            host: mail-1
            probe:
              every: 50ms
              tcp: {address: mail.example:25}
        """
    reported = "\n".join(load_problems(write(tmp_path, services=written)))
    assert f"```\n{reported}\n```" in (ROOT / "docs" / "configuration.md").read_text()


PAGE = """Run `defib check` or `defib x [ID]`, `chmod 600` what `defib` reads; `on\\|off`.

```yaml
- {a: b}
```

1. First:

   ```sh
   umask 077    # why
   defib y
   ```

| `defib z a\\|b NAME` | `0 3 * * * defib /usr/bin/true x` |
"""


def test_commands_are_found_with_their_lines() -> None:
    found = commands_of("x.md", PAGE)
    assert [each.place for each in found] == ["x.md:1", "x.md:1", "x.md:10", "x.md:14", "x.md:14"]
    assert [each.key for each in found if each.is_block] == ["umask 077"]
    assert variants(found[1].text) == ["defib x", "defib x ID"]
    assert variants(found[3].text) == ["defib z a NAME", "defib z b NAME"]
    assert placeholders('defib z NAME --x "IN QUOTES" --y=${Z} A') == ["NAME"]


def test_a_new_placeholder_is_reported_with_its_place() -> None:
    (wrong,) = unfilled(commands_of("docs/x.md", "\n\n`defib probe THING`"))
    assert wrong.startswith("docs/x.md:3: `defib probe THING` cannot be executed: add a value of THING to PLACEHOLDERS")
