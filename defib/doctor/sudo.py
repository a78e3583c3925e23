"""The doctor's checks of what sudo runs as root on a host."""

from collections.abc import Iterable, Sequence

from defib.doctor.findings import Finding
from defib.root_paths import find_changeable, list_rules, names_in
from fleet.inventory.model import SudoOptions
from fleet.shells import Shell, ShellError

LISTED = 3  # paths in a message


async def check_root_paths(
    host: str, shell: Shell, sudo: SudoOptions, commands: Iterable[Sequence[str]]
) -> list[Finding]:
    """Check the commands of controls that sudo runs as root, and the account's rules of sudo; none is run."""
    commands = list(commands)
    fix = "make them and the directories above belong to root: chown root and chmod go-w"
    check = "files that root uses"
    try:
        rules = await list_rules(shell, sudo)
    except ShellError as error:
        return [Finding(host, check, "warn", f"cannot be checked: {error}", "try again, and see docs/hosts.md")]
    programs = {argv[0] for argv in commands} | {rule for rule in rules if rule != "ALL"}
    try:
        changeable = await find_changeable(shell, sorted(programs | names_in(commands)))
    except ShellError as error:
        return [Finding(host, check, "warn", f"cannot be checked: {error}", "try again, and see docs/hosts.md")]
    severe = [each for each in changeable if each[0] in programs]
    if changeable:
        detail = "; ".join(_describe(name, place) for name, place in (severe or changeable)[:LISTED])
        findings = [Finding(host, check, "fail" if severe else "warn", detail, fix)]
    else:
        findings = [Finding(host, check, "pass", "the account can change none of them")]
    if "ALL" in rules:
        fix = f"allow only what the controls need: `defib host setup {host}`"
        findings.append(Finding(host, "sudo rules", "warn", "the account may run every command as root", fix))
    return findings


def _describe(name: str, place: str) -> str:
    return (
        f"the account can change {name}" if name == place else f"the account can change {place}, and so replace {name}"
    )
