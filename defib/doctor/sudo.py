"""The doctor's checks of what sudo runs as root on a host."""

from collections.abc import Iterable, Sequence

from defib.doctor.findings import Finding
from defib.root_paths import SudoRules, find_changeable, list_rules, names_in
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
    programs = {argv[0] for argv in commands} | (rules.programs - {"ALL"})
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
    return findings + _check_rules(host, rules)


def _check_rules(host: str, rules: SudoRules) -> list[Finding]:
    """Warn of rules that permit more than they say."""
    if "ALL" in rules.programs:
        fix = f"allow only what the controls need: `defib host setup {host}`"
        return [Finding(host, "sudo rules", "warn", "the account may run every command as root", fix)]
    fix = f"run `defib host setup {host}`, and see docs/hosts.md for rules of your own"
    findings = []
    if rules.ambiguous:
        more = f", and {len(rules.ambiguous) - 1} more" if len(rules.ambiguous) > 1 else ""
        detail = f"the account may divide the arguments otherwise in the rule {rules.ambiguous[0]}{more}"
        findings.append(Finding(host, "sudo rules", "warn", detail, fix))
    if rules.programs and not rules.secure_path:
        detail = "there is no secure_path for the account: its PATH chooses the programs that root runs"
        findings.append(Finding(host, "sudo secure_path", "warn", detail, fix))
    return findings


def _describe(name: str, place: str) -> str:
    return (
        f"the account can change {name}" if name == place else f"the account can change {place}, and so replace {name}"
    )
