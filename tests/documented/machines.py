"""Machines on which the commands of the documentation run as they are written: with /etc/defib, users, sudo and port 9095.

Their files are temporary copies of this machine's, and they share a network of their own with the documentation's
addresses: Defib's server is 10.0.0.5, and all hosts are one machine. Stand-ins replace what cannot run there: systemctl
(starts the programs of units as their users), journalctl (prints their logs), and Python's venv and pip (give this
checkout's Defib, run by `tests.forked_defib`).
"""

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from defib.demo.launcher import Launcher
from tests.machines import copy_environment
from tests.support import eventually
from tests.systemd import UNPACKED

ROOT = Path(__file__).parents[2]
CHECKOUT = "/opt/checkout"
SERVER = "10.0.0.5"
HOSTS = {"web-01": "10.0.0.7", "gpu-01": "10.0.0.11", "gpu-02": "10.0.0.12"}
LONGEST = 100  # seconds that a command may take, on a busy machine
NAMESPACES = ("--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")

# $1: a folder, $2: the checkout, $3: where Debian's packages are unpacked, $4: this Python. $SHARED: a folder that both machines see.
COPY = f"""set -e
mount -t tmpfs -o mode=755 tmpfs "$1"
for path in $SUDO; do
    [ ! -e "$3/$path" ] || {{ mkdir -p "$1/sudo/${{path%/*}}" && cp -a "$3/$path" "$1/sudo/$path"; }}
done
for name in etc home opt root usr var; do
    mkdir -p "$1/upper/$name" "$1/work/$name" "$1/sudo/$name"
    mount -t overlay overlay -o "lowerdir=$1/sudo/$name:/$name,upperdir=$1/upper/$name,workdir=$1/work/$name" "/$name"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p {CHECKOUT} /run/sshd /run/units
mkdir -m 1777 /run/lock
mount --bind "$2" {CHECKOUT}
rm -f /etc/nologin
reachable() {{ # all users may pass the folders above a file, where they are copies
    path=$1
    while [ "$path" != / ]; do
        case $path in /home/* | /root | /root/* | /opt/* | /var/*) chmod a+x "$path" ;; esac
        path=${{path%/*}}
        path=${{path:-/}}
    done
}}
for path in "$2" "$3" "$(readlink -f "$4")"; do reachable "$path"; done
user() {{ getent passwd "$1" >/dev/null || useradd --system "$@"; }}
user sshd --home-dir /run/sshd --shell /usr/sbin/nologin
"""
SERVE = f"""
ip link set lo up
ip address add {SERVER}/32 dev lo
for address in {" ".join(HOSTS.values())}; do
    ip address add $address/32 dev lo
    ip route replace local $address dev lo table local src {SERVER}
done
user prometheus --home-dir /var/lib/prometheus --shell /usr/sbin/nologin
install -d -o prometheus /var/lib/prometheus /var/lib/prometheus/metrics2 /var/lib/prometheus/alertmanager
for name in prometheus prometheus-alertmanager; do
    [ -e /etc/default/$name ] || cp "$3/etc/default/$name" /etc/default/
    [ -e /lib/systemd/system/$name.service ] || cp "$3/lib/systemd/system/$name.service" /etc/systemd/system/
    program=$(readlink -f "$(command -v $name)")
    [ -e /usr/bin/$name ] || {{ touch /usr/bin/$name && mount --bind "$program" /usr/bin/$name; }}
done
install -d -m 700 /root/.ssh
install -m 600 "$SHARED/admin" /root/.ssh/id_ed25519
install -m 755 {CHECKOUT}/tests/documented/bin/* /usr/local/bin/
mv /usr/local/bin/defib /usr/local/lib/
ln -s "$(readlink -f "$4")" /usr/local/lib/real-python3
cd {CHECKOUT}
"$4" -m tests.documented.server 2>/run/documented-server.log &
exec "$4" -m tests.forked_defib /run/forked-defib
"""
BE_A_HOST = """
user admin --create-home --shell /bin/sh
echo 'admin ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/admin
install -d -m 700 -o admin /home/admin/.ssh
install -o admin "$SHARED/admin.pub" /home/admin/.ssh/authorized_keys
printf 'auth required pam_permit.so\\naccount required pam_permit.so\\nsession required pam_permit.so\\n' >/etc/pam.d/sshd
# All hosts are this machine: their administrators take turns.
printf '#!/bin/sh\\nexec flock /run/lock/turn /usr/bin/sudo "$@"\\n' >/usr/local/bin/sudo
chmod 755 /usr/local/bin/sudo
mkdir -p /etc/ssh
rm -f /etc/ssh/ssh_host_*
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
printf 'HostKey /etc/ssh/ssh_host_ed25519_key\\nUsePAM yes\\nPrintMotd no\\nUseDNS no\\nPidFile none\\n' >/run/sshd.conf
exec "$(command -v sshd)" -D -e -f /run/sshd.conf
"""


@dataclass
class Machine:
    """A started machine: runs shell scripts as root."""

    launcher: Launcher
    pid: int
    shared: Path  # a folder that all machines see

    def enter(self) -> list[str]:
        """Return the beginning of an argument list that runs a program on this machine."""
        return [
            "nsenter", "--target", str(self.pid), "--mount", "--net", f"--pid=/proc/{self.pid}/ns/pid_for_children", "--",
        ]  # fmt: skip

    async def run(self, script: str, folder: str = "/root") -> subprocess.CompletedProcess[str]:
        """Run a script with bash in a folder of the machine, perhaps a new one; stderr is a part of `stdout`. Status 124: it took too long."""
        return await asyncio.to_thread(self._run, script, folder)

    async def stop(self) -> None:
        """End all processes of the machine; `unshare` ignores the signal that the launcher would send first."""
        await self.launcher.kill(self.pid, signal.SIGKILL)

    def _run(self, script: str, folder: str) -> subprocess.CompletedProcess[str]:
        inside = [
            "timeout",
            "--kill-after=5",
            str(LONGEST),
            "bash",
            "-c",
            f'mkdir -p {folder} && cd {folder} && eval "$0"',
        ]
        # A file, not a pipe: a server that a script leaves running would keep it open.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            done = subprocess.run(
                [*self.enter(), *inside, script],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True, check=False,
                env={**environment(), "SHARED": str(self.shared)},
            )  # fmt: skip
            output.seek(0)
            return subprocess.CompletedProcess(script, done.returncode, output.read())


def environment() -> Mapping[str, str]:
    parts = f"{UNPACKED.parent / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        **copy_environment(),
        "PATH": parts,
        "HOME": "/root",
        "LOGNAME": "root",
        "USER": "root",
        "LC_ALL": "C.UTF-8",
    }


async def start_server(launcher: Launcher, folder: Path) -> Machine:
    """Start the machine of Defib, on which nothing is installed yet."""
    shared = folder / "shared"
    await asyncio.to_thread(_create_keys, shared)
    machine = await _start(launcher, folder / "server", shared, ["unshare", "--net", *NAMESPACES], SERVE)

    async def serving() -> bool:
        return (await machine.run("[ -S /run/forked-defib ] && curl -fs http://127.0.0.1:8080/")).returncode == 0

    await eventually(serving)
    return machine


async def start_host(server: Machine, folder: Path) -> Machine:
    """Start the machine that is all hosts, in the server's network."""
    begin = ["nsenter", "--target", str(server.pid), "--net", "unshare", *NAMESPACES]
    machine = await _start(server.launcher, folder / "host", server.shared, begin, BE_A_HOST)

    async def listening() -> bool:
        return (await server.run(f"ssh-keyscan -t ed25519 {HOSTS['gpu-01']} | grep -q ed25519")).returncode == 0

    await eventually(listening)
    return machine


async def _start(launcher: Launcher, folder: Path, shared: Path, begin: list[str], script: str) -> Machine:
    await asyncio.to_thread(folder.mkdir, parents=True)
    argv = [*begin, "sh", "-c", COPY + script, "sh", str(folder), str(ROOT), str(UNPACKED), sys.executable]
    environ = {**environment(), "SHARED": str(shared), "PYTHONUTF8": "1"}
    return Machine(launcher, await launcher.start(argv, folder.with_suffix(".log"), environ), shared)


def _create_keys(folder: Path) -> None:
    """Create the administrator's key."""
    folder.mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "admin"], check=True)
