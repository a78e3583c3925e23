"""Machines to set up: temporary copies of this machine's files, with a real sudo, that are reached through a real sshd."""

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from tests.support import eventually
from tests.systemd import UNPACKED

SUDO = (
    "usr/bin/sudo",
    "usr/sbin/visudo",
    "usr/libexec/sudo",
    "etc/sudoers",
    "etc/sudoers.d",
    "etc/pam.d/sudo",
    "etc/sudo.conf",
)
# Mounts the copy at $1/root, in a mount namespace of its own. $2: where Debian's sudo is unpacked.
MOUNT = """
mount -t tmpfs -o mode=755 tmpfs "$1" && mkdir "$1/upper" "$1/work" "$1/root" "$1/sudo" || exit 20
for path in $SUDO; do
    [ -e "$2/$path" ] && mkdir -p "$1/sudo/${path%/*}" && cp -a "$2/$path" "$1/sudo/$path"
done
mount -t overlay overlay -o "lowerdir=$1/sudo:/,upperdir=$1/upper,workdir=$1/work" "$1/root" || exit 21
"""
STAY = f"""{MOUNT}
mount -t proc proc "$1/root/proc" && mount --rbind /dev "$1/root/dev" && touch "$1.ready" || exit 22
exec sleep 86400
"""
IN_NEW_NAMESPACE = ("unshare", "--mount", "--propagation", "private", "sh", "-c")


def copy_environment() -> Mapping[str, str]:
    """Return the environment of the scripts above: sudo is copied where this machine has none."""
    return {**os.environ, "SUDO": "" if shutil.which("sudo", path="/usr/bin") else " ".join(SUDO)}


async def start_machine(launcher: Launcher, folder: Path) -> Sshd:
    """Start a machine; its `sudo` acts on the copy."""
    await asyncio.to_thread((folder / "root").mkdir, parents=True)
    argv = [*IN_NEW_NAMESPACE, STAY, "sh", str(folder / "root"), str(UNPACKED)]
    pid = await launcher.start(argv, folder / "log", copy_environment())

    async def ready() -> bool:
        return (folder / "root.ready").exists()

    await eventually(ready)
    inside = f'exec nsenter --target {pid} --mount chroot {folder}/root/root /usr/bin/sudo "$@"'
    return await start_sshd(launcher, folder, inside)


async def start_sshd(launcher: Launcher, folder: Path, sudo: str) -> Sshd:
    """Start a sshd whose `sudo` is a shell script."""
    tools = folder / "bin"
    await asyncio.to_thread(tools.mkdir, parents=True)
    (tools / "sudo").write_text(f"#!/bin/sh\n{sudo}\n")
    (tools / "sudo").chmod(0o755)
    (port,) = reserve_ports(1)
    return await sshd.start(launcher, folder / "sshd", port, {"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"})
