"""Files that others can read or change: as `defib check` and `defib doctor` report them, here and on hosts."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.doctor.sudo import check_root_paths
from defib.root_paths import SCRIPT, find_changeable, parse_rules
from fleet.inventory.model import SudoOptions
from fleet.shells import CompletedCommand
from fleet.shells.local import LocalShell
from tests.integration.test_host_setup import configure, create_keys, defib, run_in_copy

ACCOUNT, GROUP = 12345, 12346


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="defib-permissions-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def config(folder: Path) -> Path:
    """A configuration that names a key, a secret, known hosts and a program, all of which only their owner can use."""
    (folder / "config" / "secrets").mkdir(parents=True)
    files = {"read": 0o600, "known_hosts": 0o644, "exporter.env": 0o600, "ca.pem": 0o644, "secrets/token": 0o600}
    for name, mode in files.items():
        path = folder / "config" / name
        path.write_text("# no key\n" if name == "known_hosts" else "long-enough\n")
        path.chmod(mode)
    ssh = {"user": "defib", "port": 1, "key_file": "read", "known_hosts": "known_hosts"}
    written = {
        "hosts": {"h": {"address": "127.0.0.1", "ssh": ssh}},
        "services": {"web": {"probe": {"http": {"url": "https://127.0.0.1:1/", "tls": {"ca_file": "ca.pem"}}}}},
        "exporter": {"token": "${file:secrets/token}"},
    }
    (folder / "config" / "a.yaml").write_text(yaml.safe_dump(written))
    (folder / "config" / "a.yaml").chmod(0o644)
    return folder / "config"


def warnings(config: Path) -> list[tuple[str, str]]:
    argv = [sys.executable, "-m", "defib", "check", "--json", "--config", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [(os.path.relpath(each["file"], config), each["message"]) for each in json.loads(done.stdout)["warnings"]]


def files_findings(config: Path) -> dict[str, tuple[str, str, str]]:
    argv = [sys.executable, "-m", "defib", "doctor", "--json", "--for", "exporter", "--config", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    found = [each for each in json.loads(done.stdout)["findings"] if each["subject"] == "files"]
    return {each["check"]: (each["result"], each["detail"], each["fix"]) for each in found}


def test_files_that_only_their_owner_can_use_cause_no_warnings(config: Path) -> None:
    assert warnings(config) == []
    assert files_findings(config)["permissions"][0] == "pass"


def test_the_doctor_of_one_program_needs_nothing_of_the_other(folder: Path) -> None:
    """The secrets of the remediator are not readable by the exporter's user, and the other way round."""
    services = {
        "web": {"host": "h", "probe": {"http": {"url": "http://127.0.0.1:1", "headers": {"X": "${file:probe}"}}}}
    }
    hosts = {"h": {"address": "127.0.0.1", "shell": "local", "collect": {"system": "30s"}}}
    written = {"hosts": hosts, "services": services, "remediator": {"webhook_token": "${file:hook}"}}
    (folder / "a.yaml").write_text(yaml.safe_dump(written))

    def subjects(*arguments: str) -> dict[str, list[str]]:
        done = defib(folder, "doctor", "--json", *arguments)
        found: dict[str, list[str]] = {}
        for each in json.loads(done.stdout)["findings"]:
            found.setdefault(each["subject"], []).append(each["check"])
        return found

    (folder / "probe").write_text("long-enough")
    assert subjects().keys() == {"configuration"}  # a secret is missing
    exporters = subjects("--for", "exporter")
    assert exporters.keys() == {"configuration", "files", "exporter", "h"}
    assert exporters["h"] == ["shell for reading", "collector system"]
    (folder / "probe").rename(folder / "hook")
    remediators = subjects("--for", "remediator")
    assert {"configuration", "files", "database", "exporter", "remediator", "notify"} <= remediators.keys()
    assert "h" not in remediators


EVERYBODY = "every user can change it"


@pytest.mark.parametrize(
    ("name", "mode", "detail"),
    [
        ("read", 0o644, "other users can read it (644)"),
        ("read", 0o660, "other users can read it (660)"),
        ("secrets/token", 0o644, "every user can read this secret (644)"),
        ("secrets/token", 0o602, EVERYBODY),
        ("exporter.env", 0o644, "every user can read this secret (644)"),
        ("known_hosts", 0o666, EVERYBODY),
        ("ca.pem", 0o666, EVERYBODY),
        ("a.yaml", 0o646, EVERYBODY),
    ],
)
def test_files_that_every_user_can_use(config: Path, name: str, mode: int, detail: str) -> None:
    (config / name).chmod(mode)
    ((warned, message),) = warnings(config)
    assert (warned, message.startswith(detail), "chmod " in message) == (name, True, True), message
    result, found, fix = files_findings(config)[f"permissions of {config / name}"]
    assert (result, found.startswith(detail), fix.startswith("chmod ")) == ("fail", True, True)
    subprocess.run(fix.split(), check=True)  # the fix is a command
    assert warnings(config) == []


def test_a_directory_that_every_user_can_change(config: Path) -> None:
    config.chmod(0o777)
    found = dict(warnings(config))
    assert set(found) == {"read", "known_hosts", "exporter.env", "ca.pem", "secrets/token", "a.yaml"}
    assert all(f"every user can change {config} (777)" in message for message in found.values())
    config.chmod(0o1777)  # as /tmp: nobody can replace the files of others
    assert warnings(config) == []
    config.chmod(0o755)


def test_a_secret_in_a_directory_that_others_cannot_enter(config: Path) -> None:
    (config / "secrets" / "token").chmod(0o644)
    (config / "secrets").chmod(0o700)
    assert warnings(config) == []


@pytest.mark.needs("root")
def test_what_groups_and_service_accounts_can_change(config: Path) -> None:
    os.chown(config / "known_hosts", 999, 999)
    (config / "a.yaml").chmod(0o664)
    os.chown(config / "a.yaml", 0, GROUP)
    os.chown(config / "read", 999, 999)  # keys belong to the account that uses them
    assert {name: message.partition(" can ")[2] for name, message in warnings(config)} == {
        "a.yaml": f"change it (664): chmod g-w {config}/a.yaml",
        "known_hosts": f"change it: chown root {config}/known_hosts",
    }
    assert {result for result, _detail, _fix in files_findings(config).values()} == {"warn"}


class AccountShell:
    """The local shell as another user."""

    wrapped = False

    async def run(self, argv: Sequence[str], **options: Any) -> CompletedCommand:
        become = ["setpriv", "--reuid", str(ACCOUNT), "--regid", str(GROUP), "--clear-groups"]
        return await LocalShell().run([*become, *argv], **options)

    async def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def tree(folder: Path) -> Path:
    """Programs of root, some of which the account can replace."""
    for name, mode in (("safe", 0o755), ("own", 0o755), ("open", 0o777), ("sticky", 0o1777), ("own/below", 0o755)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    for name in ("safe/run", "safe/writable", "safe/owned", "own/run", "own/below/run", "open/run", "sticky/run"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    (folder / "safe" / "writable").chmod(0o757)
    os.chown(folder / "safe" / "owned", ACCOUNT, GROUP)
    (folder / "safe" / "owned").chmod(0o555)
    os.chown(folder / "own", ACCOUNT, GROUP)
    (folder / "open" / "link").symlink_to(folder / "safe" / "run")
    (folder / "safe" / "link").symlink_to(folder / "own" / "run")
    return folder


@pytest.mark.needs("root")
@pytest.mark.parametrize("interpreter", ["sh", "busybox", "bash"])
async def test_programs_that_the_account_can_replace(tree: Path, interpreter: str) -> None:
    names = [str(path) for path in sorted(tree.rglob("*")) if not path.is_dir()] + ["ls", "no-such-program", "/none"]
    if interpreter == "sh":
        found = dict(await find_changeable(AccountShell(), names))
    else:
        argv = [*{"busybox": ["busybox", "sh"], "bash": ["bash"]}[interpreter], "-c", SCRIPT, "sh", *names]
        output = (await AccountShell().run(argv, timeout=20)).stdout
        found = dict(line.split("\t") for line in output.splitlines())
    assert {name.removeprefix(f"{tree}/"): place.removeprefix(f"{tree}/") for name, place in found.items()} == {
        "own/below/run": "own", "own/run": "own", "open/run": "open", "open/link": "open", "safe/link": "own",
        "safe/owned": "safe/owned", "safe/writable": "safe/writable",
    }  # fmt: skip


@pytest.mark.needs("root")
async def test_the_account_of_root_can_change_everything_and_is_not_reported(tree: Path) -> None:
    assert await find_changeable(LocalShell(), [str(tree / "own" / "run")]) == []


@pytest.mark.needs("root")
async def test_commands_that_root_runs_and_the_account_can_replace(tree: Path) -> None:
    sudo = SudoOptions.model_validate("passwordless")

    async def check(*commands: list[str]) -> tuple[str, str]:
        (finding,) = await check_root_paths("h", AccountShell(), sudo, commands)
        return finding.result, finding.detail

    assert await check(["ls"], ["/bin/sh", f"{tree}/safe/run"]) == ("pass", "the account can change none of them")
    detail = f"the account can change {tree}/own, and so replace {tree}/own/run"
    assert await check([f"{tree}/own/run", "restart"]) == ("fail", detail)
    assert await check(["sh", f"{tree}/own/run"]) == ("warn", detail)
    assert await check(["docker", "compose", "--project-directory", f"{tree}/open"]) == (
        "warn", f"the account can change {tree}/open",
    )  # fmt: skip


async def test_what_cannot_be_checked_does_not_pass() -> None:
    class LateShell(LocalShell):
        async def run(self, argv: Sequence[str], **options: Any) -> CompletedCommand:
            return await super().run(["sleep", "60"], **{**options, "timeout": 0.1})

    (finding,) = await check_root_paths("h", LateShell(), SudoOptions.model_validate("passwordless"), [["ls"]])
    assert (finding.result, finding.detail.startswith("cannot be checked: ")) == ("warn", True), finding


LISTED = """\
Matching Defaults entries for defib on h:
    env_reset, mail_badpass{secure_path}, use_pty

User defib may run the following commands on h:

Sudoers entry:
    RunAsUsers: root
    Options: !authenticate
    Commands:
\t{rule}
"""
SECURE_PATH = ", secure_path=/usr/bin"


@pytest.mark.parametrize(
    ("rule", "secure_path", "warned"),
    [
        ("/usr/bin/sh -c { exec chown app '/srv/my dir'; }", SECURE_PATH, ""),
        ("/usr/local/sbin/defib-shell control", SECURE_PATH, ""),
        ('/usr/bin/id ""', SECURE_PATH, ""),
        (
            "/usr/bin/chown app /srv/my dir",
            SECURE_PATH,
            "divide the arguments otherwise in the rule /usr/bin/chown app",
        ),
        ("/usr/bin/sh -c id", SECURE_PATH, "divide the arguments otherwise"),
        ("/usr/bin/cat /proc/uptime", "", "no secure_path for the account"),
        ("ALL", "", "may run every command"),
    ],
)
async def test_rules_that_permit_more_than_they_say(rule: str, secure_path: str, warned: str) -> None:
    class ListingShell(LocalShell):
        async def run(self, argv: Sequence[str], **options: Any) -> CompletedCommand:
            if "sudo" in argv:
                return CompletedCommand(0, LISTED.format(rule=rule, secure_path=secure_path), "")
            return await super().run(argv, **options)

    _, *found = await check_root_paths("h", ListingShell(), SudoOptions.model_validate("passwordless"), [["ls"]])
    assert [(each.result, warned in each.detail) for each in found] == ([("warn", True)] if warned else []), found


@pytest.mark.needs("root", "unshare", "ssh-keygen", "sudo")
@pytest.mark.parametrize("wrapper", [False, True], ids=["sudoers", "wrapper"])
def test_host_setup_warns_of_what_root_runs_and_the_account_can_replace(tmp_path: Path, wrapper: bool) -> None:
    control = {"command": {"restart": ["/srv/own/restart", "x y"], "logs": ["cat", "/srv/safe/log"]}}
    ssh = {"user": "defib", "key_file": "read", "known_hosts": "known"}
    host: dict[str, Any] = {
        "address": "10.0.0.11",
        "ssh": ssh,
        "control_ssh": {"key_file": "control", "wrapper": wrapper},
    }
    if not wrapper:
        host["sudo"] = "passwordless"
    service = {"host": "h", "probe": {"unit": {"name": "nginx"}}, "control": control}
    configure(tmp_path / "config", {"h": host}, {"web": service})
    create_keys(tmp_path / "config", "read", "control")
    setup = defib(tmp_path / "config", "host", "setup", "h").stdout
    inside = """
sh -eu /tmp/setup.sh 2>/dev/null >&2 || exit 1
mkdir -p /srv/own /srv/safe && touch /srv/own/restart /srv/safe/log && chown defib /srv/own || exit 2
sh -eu /tmp/setup.sh || exit 3
"""
    done = run_in_copy(tmp_path, setup, inside)
    assert done.returncode == 0, (done.returncode, done.stderr)
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: root runs")]
    place = "the account can change /srv/own: chown root and chmod go-w"
    assert warned == [f"warning: root runs /srv/own/restart, but {place}"]


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
def test_the_rules_of_a_real_sudo(tmp_path: Path) -> None:
    control = {"command": {"restart": ["echo", "restart", "a, b:c=d"], "logs": ["cat", "/var/log/x"]}}
    ssh = {"user": "defib", "key_file": "read", "known_hosts": "known"}
    host = {"address": "10.0.0.11", "ssh": ssh, "control_ssh": {"key_file": "control"}, "sudo": "passwordless"}
    service = {"host": "h", "probe": {"unit": {"name": "nginx"}}, "control": control}
    configure(tmp_path / "config", {"h": host}, {"web": service})
    create_keys(tmp_path / "config", "read", "control")
    setup = defib(tmp_path / "config", "host", "setup", "h").stdout
    inside = r"""
mount -t proc proc /proc || exit 23
sh -eu /tmp/setup.sh >&2 || exit 1
as_defib() { setpriv --reuid "$(id -u defib)" --regid "$(id -g defib)" --clear-groups env -i LC_ALL=C PATH=/usr/bin:/bin "$@"; }
as_defib sudo -n -l -l || exit 2
echo ====
printf '%s\n' 'defib ALL=(ALL) NOPASSWD: ALL' 'defib ALL=(root) NOPASSWD: /bin/chown app /srv/my\ dir' > /etc/sudoers.d/all
sed -i '/secure_path/d' /etc/sudoers /etc/sudoers.d/defib
as_defib sudo -n -l -l || exit 3
"""
    done = run_in_copy(tmp_path, setup, inside)
    assert done.returncode == 0, (done.returncode, done.stderr)
    limited, unlimited = done.stdout.split("====")
    rules = parse_rules(limited)
    assert {Path(each).name for each in rules.programs} == {"sh", "cat"}
    assert (rules.ambiguous, rules.secure_path) == ((), True)
    loose = parse_rules(unlimited)
    assert (loose.programs - rules.programs, loose.secure_path) == (frozenset({"ALL", "/bin/chown"}), False)
    assert loose.ambiguous == ("/bin/chown app /srv/my dir",)
