"""`defib host setup`, on a copy of this machine with a real sudo, and the doctor's checks of hosts."""

import asyncio
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from fleet.inventory.model import SudoOptions
from fleet.shells.ssh import command_digest
from fleet.shells.sudo import build_sudo_command
from tests.forked_defib import run_defib
from tests.machines import IN_NEW_NAMESPACE, MOUNT, copy_environment
from tests.systemd import UNPACKED

# Runs inside: the script twice, then what the account can and cannot do.
INSIDE = r"""
mount -t proc proc /proc || exit 23
sh -eu /tmp/setup.sh || exit 1
sh -eu /tmp/setup.sh || exit 2
as_defib() { setpriv --reuid "$(id -u defib)" --regid "$(id -g defib)" --clear-groups env -i PATH=/usr/bin:/bin "$@"; }
as_defib SSH_ORIGINAL_COMMAND="read @m proc:5:" sudo -n /usr/local/sbin/defib-shell read | grep -q '^@m proc 0$' || exit 3
as_defib SSH_ORIGINAL_COMMAND="read @m df:5:" sudo -n /usr/local/sbin/defib-shell read | grep -q '^@m df 126$' || exit 4
as_defib SSH_ORIGINAL_COMMAND="read @m proc:5:" sudo -n /usr/local/sbin/defib-shell read /tmp/other 2>/dev/null && exit 5
as_defib sudo -n id 2>/dev/null && exit 6
[ "$(as_defib sudo -n sh -c '{ exec echo restart mineru; }')" = "restart mineru" ] || exit 7
as_defib sudo -n sh -c '{ exec echo restart other; }' 2>/dev/null && exit 8
[ "$(as_defib sudo -n sh -c "{ exec echo 'a, b:c=d' e; }")" = "a, b:c=d e" ] || exit 9
as_defib sudo -n echo restart mineru 2>/dev/null && exit 14
as_defib sudo -n echo 'any*' 2>/dev/null && exit 12
as_defib sudo -n echo 'anything' 2>/dev/null && exit 13
as_defib sh -c 'echo key >> /home/defib/.ssh/authorized_keys' 2>/dev/null && exit 10
as_defib sh -c 'mv /home/defib/.ssh /home/defib/x' 2>/dev/null && exit 11
cat /home/defib/.ssh/authorized_keys
"""
# Runs the script again and again: what it has written stays as it is, and what is wrong is corrected.
TWICE = r"""
mount -t proc proc /proc || exit 23
written() { find /etc/defib /etc/sudoers.d /home/defib /usr/local/sbin/defib-shell /etc/passwd /etc/group /etc/shadow -type f; }
describe() { written | sort | xargs stat -c '%n %i %a %u:%g %s %.Y' && written | sort | xargs cat | cksum; }
set_up() { sh /tmp/setup.sh >/tmp/out 2>/tmp/err; echo "$? $(tail -n 1 /tmp/out)"; }
set_up
describe >/tmp/first
set_up
describe >/tmp/second
diff /tmp/first /tmp/second || exit 2
grep -c defib /etc/passwd
find /etc /home /usr/local /root -xdev -name '*.new' 2>/dev/null
chmod 666 /home/defib/.ssh/authorized_keys; set_up
echo ssh-ed25519 AAAA >> /home/defib/.ssh/authorized_keys; set_up
chown -R defib /home/defib/.ssh; set_up
chmod 777 /etc/defib; set_up
[ ! -d /etc/defib/commands ] || { touch /etc/defib/commands/more; set_up; }
[ ! -e /etc/sudoers.d/defib ] || { echo '#' >> /etc/sudoers.d/defib; set_up; }
describe | cut -d' ' -f 1,3-5 | sort >/tmp/third
set_up
cut -d' ' -f 1,3-5 /tmp/second | sort | diff - /tmp/third
"""
# Runs after the script of the same host without sudo: its rights are removed.
TAKEN_BACK = r"""
sh -eu /tmp/bare.sh >/dev/null || exit 30
as_defib sudo -n echo restart mineru 2>/dev/null && exit 31
[ ! -e /etc/sudoers.d/defib ] && [ ! -e /etc/defib/allowed ] && [ ! -e /usr/local/sbin/defib-shell ] || exit 32
"""
OUTSIDE = f"""{MOUNT}
mkdir -p "$1/root/tmp" && cp "$3" "$1/root/tmp/setup.sh" && cp "$4" "$1/root/tmp/inside.sh" || exit 22
exec chroot "$1/root" sh /tmp/inside.sh
"""


def defib(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_defib(*arguments, "--config", str(folder))


def configure(folder: Path, hosts: dict[str, Any], services: dict[str, Any] | None = None, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.yaml").write_text(yaml.safe_dump({"hosts": hosts, "services": services or {}, **more}))


def create_keys(folder: Path, *names: str) -> None:
    for name in names:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)


def run_in_copy(folder: Path, setup: str, inside: str) -> subprocess.CompletedProcess[str]:
    """Run a setup script and then a test script as root, on a temporary copy of this machine's files."""
    (folder / "setup.sh").write_text(setup)
    (folder / "inside.sh").write_text(inside)
    (folder / "root").mkdir()
    argv: list[Any] = [*IN_NEW_NAMESPACE, OUTSIDE, "sh", folder / "root", UNPACKED]
    return subprocess.run(
        [*argv, folder / "setup.sh", folder / "inside.sh"],
        capture_output=True, text=True, env=copy_environment(), timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
def test_a_host_that_controls_through_the_wrapper(tmp_path: Path) -> None:
    """Only the commands of the inventory run, each by its digest, and the account cannot see their files."""
    config = tmp_path / "config"
    restart = ["sh", "-c", 'echo "$0" restarted; id -u', "it's $HOME"]
    host = {
        "address": "10.0.0.11", "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"},
        "control_ssh": {"key_file": "control", "wrapper": True},
    }  # fmt: skip
    probe = {"unit": {"name": "nginx"}}
    prune = ["echo", "pruned"]
    configure(
        config,
        {"gpu-01": host},
        {"it": {"host": "gpu-01", "probe": probe, "control": {"command": {"restart": restart}}}},
        runbooks={
            "prune": {"alerts": ["HostDiskFull"], "run": prune},
            "other": {"alerts": ["HostDiskFull"], "run": ["id"], "hosts": {"names": "x*"}},
        },
    )
    create_keys(config, "read", "control")
    made = defib(config, "host", "setup", "gpu-01")
    assert made.returncode == 0, made.stderr
    tried = f"""{INSIDE.partition("as_defib SSH")[0]}
shell() {{ as_defib SSH_ORIGINAL_COMMAND="$1" sudo -n /usr/local/sbin/defib-shell control; }}
[ "$(shell 'run 5 {command_digest(restart)}')" = "it's \\$HOME restarted
0" ] || exit 3
[ "$(shell 'run 5 {command_digest(prune)}')" = pruned ] || exit 8
[ "$(shell 'run 5 {command_digest(restart)} @a @b' 2>/dev/null)" = "@a@b
it's \\$HOME restarted
0
@b@a 0" ] || exit 7
for asked in 'run 5 {command_digest(["id"])}' 'run 0 {command_digest(restart)}' 'run 5 ../../bin/id' 'run 5 {command_digest(restart)} x' 'run 5 {command_digest(restart)} x y z' 'id' ''; do
    shell "$asked" 2>/dev/null
    [ $? -eq 126 ] || exit 4
done
as_defib ls /etc/defib/commands 2>/dev/null && exit 5
as_defib sudo -n /usr/local/sbin/defib-shell read 2>/dev/null && exit 6
cat /home/defib/.ssh/authorized_keys
"""
    done = run_in_copy(tmp_path, made.stdout, tried)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    reads, controls = done.stdout.splitlines()[-2:]
    assert reads.startswith("restrict ssh-ed25519 ")
    assert controls.startswith('restrict,command="sudo -n /usr/local/sbin/defib-shell control" ssh-ed25519 ')


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
def test_a_host_after_setup(tmp_path: Path) -> None:
    config = tmp_path / "config"
    control = {
        "command": {
            "restart": ["echo", "restart", "mineru"],
            "status": ["echo", "a, b:c=d", "e"],
            "logs": ["echo", "any*"],
        }
    }
    host: dict[str, Any] = {
        "address": "10.0.0.11", "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known", "wrapper": True},
        "control_ssh": {"key_file": "control"}, "sudo": "passwordless",
    }  # fmt: skip
    probe = {"unit": {"name": "nginx"}}
    configure(config, {"gpu-01": host}, {"mineru": {"host": "gpu-01", "probe": probe, "control": control}})
    create_keys(config, "read", "control")
    text = (
        (config / "a.yaml")
        .read_text()
        .replace("sudo: passwordless", "sudo: passwordless\n    collect: {supervisor: 30s}")
    )
    (config / "a.yaml").write_text(text)
    made = defib(config, "host", "setup", "gpu-01", "--from", "10.0.0.5")
    assert made.returncode == 0, made.stderr
    assert "supervisor -\nsystemd nginx.service\n" in made.stdout
    # On the copy only commands that every machine has can run.
    bare = {**host, "sudo": "none", "ssh": {**host["ssh"], "wrapper": False}}
    configure(tmp_path / "bare", {"gpu-01": bare})
    create_keys(tmp_path / "bare", "read", "control")
    after = defib(tmp_path / "bare", "host", "setup", "gpu-01").stdout
    taken_back = f"cat > /tmp/bare.sh <<'END_OF_BARE'\n{after}END_OF_BARE\n{TAKEN_BACK}"
    setup = made.stdout.replace("supervisor -\n", "supervisor -\nproc\n")
    done = run_in_copy(tmp_path, setup, f"{INSIDE}({taken_back}) >&2\n")
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith('restrict,from="10.0.0.5",command="sudo -n /usr/local/sbin/defib-shell read" ssh-ed25519 ')
    assert second.startswith('restrict,from="10.0.0.5" ssh-ed25519 ')


DIVIDED = r"""
mount -t proc proc /proc || exit 23
sh -eu /tmp/setup.sh || exit 1
as_defib() { setpriv --reuid "$(id -u defib)" --regid "$(id -g defib)" --clear-groups env -i PATH=/tmp/bin:/usr/bin:/bin "$@"; }
mkdir -p /tmp/bin '/srv/my dir' && printf '#!/bin/sh\necho other program\n' | tee /tmp/bin/ls /tmp/bin/touch >/tmp/bin/sh || exit 3
chmod 755 /tmp/bin/*
cd /tmp
grep -v secure_path /etc/sudoers > /tmp/sudoers && cat /tmp/sudoers > /etc/sudoers
"""


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
def test_the_account_cannot_divide_the_arguments_or_choose_the_programs_and_the_directory(tmp_path: Path) -> None:
    """The host's own sudoers has no secure_path."""
    commands = (["touch", "/srv/my dir/a"], ["ls", "-l", "/srv/my dir"])
    host = {
        "address": "10.0.0.11", "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"},
        "control_ssh": {"key_file": "control"}, "sudo": "passwordless",
    }  # fmt: skip
    control = {"command": {"restart": commands[0], "status": commands[1], "logs": ["pwd"]}}
    service = {"host": "h", "probe": {"unit": {"name": "nginx"}}, "control": control}
    configure(tmp_path / "config", {"h": host}, {"it": service})
    create_keys(tmp_path / "config", "read", "control")
    made = defib(tmp_path / "config", "host", "setup", "h")
    tries = []
    for command in commands:
        words = " ".join(build_sudo_command(command, SudoOptions.model_validate("passwordless"))[0][3:]).split(" ")
        plain = " ".join(command).split(" ")
        for each in (words, plain):
            tries += [[*each[:at], " ".join(each[at:])] for at in range(1, len(each)) if each is plain or at != 2]
            tries += [[each[0], " ".join(each[1 : at + 1]), *each[at + 1 :]] for at in range(1, len(each))]
    divided = "\n".join(f"as_defib sudo -n -- {shlex.join(each)} 2>/dev/null && exit 40" for each in tries)
    runs = [shlex.join(build_sudo_command(each, SudoOptions.model_validate("passwordless"))[0]) for each in commands]
    inside = (
        f"{DIVIDED}{divided}\n[ -z \"$(ls -A '/srv/my dir')\" ] && [ ! -e /srv/my ] || exit 41\n"
        f"as_defib {runs[0]} || exit 42\n[ -e '/srv/my dir/a' ] || exit 43\nas_defib {runs[1]} | grep -q ' a$' || exit 44\n"
        '[ "$(as_defib sudo -n -- pwd)" = / ] || exit 45\n'
    )
    done = run_in_copy(tmp_path, made.stdout, inside)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
def test_the_rules_for_an_older_sudo(tmp_path: Path) -> None:
    """It does not know `runcwd`."""
    host = {
        "address": "10.0.0.11", "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"},
        "control_ssh": {"key_file": "control"}, "sudo": "passwordless",
    }  # fmt: skip
    service = {"host": "h", "probe": {"unit": {"name": "nginx"}}, "control": {"command": {"restart": ["id", "-u"]}}}
    configure(tmp_path / "config", {"h": host}, {"it": service})
    create_keys(tmp_path / "config", "read", "control")
    made = defib(tmp_path / "config", "host", "setup", "h").stdout
    inside = f"""
mkdir /tmp/bin
printf '#!/bin/sh\\n! grep -q runcwd "$2" || exit 1\\nexec %s "$@"\\n' "$(command -v visudo)" >/tmp/bin/visudo
chmod 755 /tmp/bin/visudo
PATH=/tmp/bin:$PATH
{DIVIDED.replace("PATH=/tmp/bin:", "PATH=")}
as_defib sudo -n -- id -u
"""
    done = run_in_copy(tmp_path, made, inside)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "0"), (done.returncode, done.stdout, done.stderr)
    assert "sudo before 1.9.3" in done.stderr


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
@pytest.mark.parametrize(
    ("settings", "corrections"),
    [
        ({"control_ssh": {"key_file": "control", "wrapper": True}}, 6),
        ({"control_ssh": {"key_file": "control"}, "sudo": "passwordless"}, 5),
        ({}, 4),
    ],
)
def test_a_second_setup_changes_nothing(tmp_path: Path, settings: dict[str, Any], corrections: int) -> None:
    config = tmp_path / "config"
    host = {"address": "10.0.0.11", "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"}, **settings}
    control = {"command": {"restart": ["echo", "restart"], "status": ["echo", "status"]}}
    configure(config, {"h": host}, {"it": {"host": "h", "probe": {"unit": {"name": "nginx"}}, "control": control}})
    create_keys(config, "read", "control")
    made = defib(config, "host", "setup", "h")
    assert made.returncode == 0, made.stderr
    done = run_in_copy(tmp_path, made.stdout, TWICE)
    changed, unchanged = "0 defib-setup: changed", "0 defib-setup: unchanged"
    assert done.stdout.splitlines() == [changed, unchanged, "1", *[changed] * corrections, unchanged], done
    assert done.returncode == 0


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
def test_a_part_of_the_script_does_nothing(tmp_path: Path) -> None:
    """As when the connection is lost while the script is sent."""
    host = {"address": "10.0.0.11", "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"}}
    configure(tmp_path / "config", {"h": host})
    create_keys(tmp_path / "config", "read")
    made = defib(tmp_path / "config", "host", "setup", "h").stdout
    part = made[: made.index("restrict") + 30]
    done = run_in_copy(tmp_path, part, "sh /tmp/setup.sh 2>/dev/null; id defib; ls /etc/defib; ls /home/defib")
    assert (done.returncode != 0, done.stdout) == (True, ""), done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["host", "setup", "nowhere"], "the inventory has no host 'nowhere'"),
        (["host", "setup", "here"], "the host 'here' has no SSH settings"),
        (["host", "setup", "keyless"], "ssh.key_file is not set"),
        (["host", "setup", "roots"], "'root' cannot be the account of Defib"),
        (["host", "setup", "keyless", "roots"], "several hosts: run the scripts with --apply USER, or write them with"),
        (["host", "setup"], "no hosts: name them, or use --group GROUP or --all"),
        (["host", "setup", "--group", "gpus"], "the inventory has no group 'gpus'; did you mean gpu?"),
        (["host", "setup", "keyless", "--from", "10.0.0.1;id"], "'10.0.0.1;id' is not a list of addresses"),
        (["host", "setup", "keyless", "roots", "--apply", "u"], "keyless and roots have the same address, 10.0.0.1:22"),
        (["host", "setup", "keyless", "--apply=-oProxyCommand=id"], "'-oProxyCommand=id' is not the name of a user"),
        (["doctor", "nowhere"], "the inventory has no host 'nowhere'"),
    ],
)
def test_invalid_setups_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    hosts: dict[str, Any] = {
        "here": {"address": "127.0.0.1", "shell": "local"},
        "keyless": {"address": "10.0.0.1", "group": "gpu", "ssh": {"user": "u"}},
        "roots": {"address": "10.0.0.1", "ssh": {"user": "root"}},
    }
    configure(tmp_path, hosts)
    done = defib(tmp_path, *arguments)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr


@pytest.mark.needs("ssh-keygen")
def test_references_are_resolved_for_the_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script has the digest of the command that the remediator sends; what it does not use may be unset."""
    host = {
        "address": "${ADDRESS}",
        "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"},
        "control_ssh": {"key_file": "control", "wrapper": True},
        "sudo": {"password": "${UNSET}"},
    }
    used = {
        "host": "gpu-01",
        "probe": {"http": {"url": "http://h/", "auth": {"bearer": "${UNSET}"}}},
        "control": {"command": {"restart": ["remake", "--token=${TOKEN}"]}},
    }
    unused = {"probe": {"http": {"url": "${UNSET}"}}, "control": {"http": {"start": "${UNSET}"}}}
    configure(tmp_path, {"gpu-01": host}, {"used": used, "unused": unused})
    create_keys(tmp_path, "read", "control")
    monkeypatch.setenv("ADDRESS", "10.0.0.11")
    missing = defib(tmp_path, "host", "setup", "gpu-01")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "services.used.control.command.restart[1]: the environment variable TOKEN is not set" in missing.stderr
    assert "UNSET" not in missing.stderr
    monkeypatch.setenv("TOKEN", "s3cret-token")
    made = defib(tmp_path, "host", "setup", "gpu-01")
    assert made.returncode == 0, made.stderr
    assert f"commands.new/{command_digest(['remake', '--token=s3cret-token'])} <<" in made.stdout
    assert "exec remake --token=s3cret-token\n" in made.stdout
    assert "    10.0.0.11 ssh-ed25519" in made.stdout
    assert "the script contains secrets" in made.stderr


@pytest.mark.needs("ssh-keygen")
@pytest.mark.parametrize(("mode", "status"), [(0o600, 0), (0o640, 1), (0o604, 1)])
def test_a_script_with_secrets_is_not_written_where_others_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, status: int
) -> None:
    ssh = {"user": "defib", "key_file": "read", "known_hosts": "known"}
    host = {"address": "h", "ssh": ssh, "control_ssh": {"key_file": "control", "wrapper": True}}
    control = {"command": {"restart": ["remake", "${TOKEN}"]}}
    configure(tmp_path, {"h": host}, {"it": {"host": "h", "probe": {"unit": {"name": "u"}}, "control": control}})
    create_keys(tmp_path, "read", "control")
    monkeypatch.setenv("TOKEN", "s3cret-token")
    script = tmp_path / "setup.sh"
    script.touch()
    script.chmod(mode)
    argv = [sys.executable, "-m", "defib", "host", "setup", "h", "--config", str(tmp_path)]
    with script.open("w") as stdout:
        done = subprocess.run(argv, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "s3cret-token" in script.read_text()) == (status, status == 0)
    assert ("write it to a new file after `umask 077`" in done.stderr) == (status == 1)


@pytest.mark.needs("sshd")
async def test_the_doctor_checks_hosts(launcher: Launcher, tmp_path: Path) -> None:
    (port,) = reserve_ports(1)
    host = await sshd.start(launcher, tmp_path / "sshd", port, {"PATH": os.environ["PATH"]})
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    (tmp_path / "other").write_text(
        host.known_hosts.read_text().replace("AAAAC3NzaC1lZDI1NTE5AAAAI", "AAAAC3NzaC1lZDI1NTE5AAAAJ")
    )
    (tmp_path / "open").write_bytes(host.key_file.read_bytes())
    (tmp_path / "open").chmod(0o644)
    hosts = {
        "well": {"address": "127.0.0.1", "ssh": ssh, "collect": {"system": "30s"}},
        "no-gpu": {"address": "127.0.0.1", "shell": "local", "collect": {"gpu": "30s"}},
        "unpinned": {"address": "127.0.0.1", "ssh": {**ssh, "known_hosts": str(tmp_path / "none")}},
        "open": {"address": "127.0.0.1", "ssh": {**ssh, "key_file": str(tmp_path / "open")}},
        "gone": {"address": "127.0.0.1", "ssh": {**ssh, "port": 1}},
    }
    await asyncio.to_thread(configure, tmp_path / "config", hosts)
    passing = await asyncio.to_thread(defib, tmp_path / "config", "doctor", "well")
    passed = "PASS  well: collector system" in passing.stdout
    assert (passing.returncode, "FAIL" in passing.stdout, passed) == (0, False, True), passing.stdout
    failing = await asyncio.to_thread(defib, tmp_path / "config", "doctor", *hosts)
    assert failing.returncode == 1
    for message in (
        "FAIL  no-gpu: collector gpu", "none: there is no such file", "other users can read it (644)", "chmod 600", "Connection refused",
        "→ pin the host's key in that file: defib discover --known-hosts unpinned",
    ):  # fmt: skip
        assert message in failing.stdout, (message, failing.stdout)
    assert "Traceback" not in failing.stderr
