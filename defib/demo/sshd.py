"""A real sshd on loopback that needs no account, no root, and no files outside one folder."""

import asyncio
import contextlib
import getpass
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import asyncssh

from defib.demo.launcher import Launcher
from runtime.errors import StartError

ACCOUNT = "defib"
START_TIMEOUT = 60.0  # seconds, for a busy machine
_PRIVILEGE_SEPARATION = Path("/run/sshd")  # compiled into Debian's sshd, which needs it when run as root


@dataclass(frozen=True)
class Sshd:
    """A running sshd: its port, the user that can log in, and the files that a client needs."""

    port: int
    user: str
    key_file: Path
    known_hosts: Path
    pid: int | None = None


async def start(launcher: Launcher, folder: Path, port: int, env: Mapping[str, str]) -> Sshd:
    """Start sshd, or asyncssh's server if there is none; commands get `env` as their environment. Raises StartError."""
    folder.mkdir(mode=0o711)
    host_key, client_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    for name, key in (("host", host_key), ("client", client_key)):
        path = folder / name
        path.touch(mode=0o600)
        key.write_private_key(str(path))
    client_key.write_public_key(str(folder / "authorized"))
    public = host_key.export_public_key().decode().strip()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    wrapper = _nss_wrapper()
    user = ACCOUNT if wrapper else getpass.getuser()
    server = Sshd(port, user, folder / "client", folder / "known_hosts")
    real = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
    if real is None or (os.geteuid() == 0 and wrapper is None):
        return await _start_asyncssh(launcher, folder, server, env)
    if os.geteuid() == 0:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)  # not removed: another sshd may use it by then
    (folder / "home").mkdir()
    (folder / "config").write_text(_config(folder, server, env))
    return await _start_sshd(launcher, folder, server, real, _environment(folder, wrapper))


async def restart(launcher: Launcher, folder: Path, server: Sshd) -> Sshd:
    """Start a real sshd again, after it has ended, with the same settings. Raises StartError."""
    real = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
    if real is None:
        raise StartError("sshd is not installed")
    return await _start_sshd(launcher, folder, server, real, _environment(folder, _nss_wrapper()))


async def _start_sshd(launcher: Launcher, folder: Path, server: Sshd, real: str, env: Mapping[str, str]) -> Sshd:
    pid = await launcher.start([real, "-D", "-e", "-f", str(folder / "config")], folder / "log", env)
    if await can_log_in(server):
        return replace(server, pid=pid)
    raise StartError(f"cannot log in to sshd: {(folder / 'log').read_text()[-500:]}")


def _nss_wrapper() -> Path | None:
    places = [Path("/usr/lib"), *(Path(entry).parent / "root/usr/lib" for entry in os.environ["PATH"].split(":"))]
    return next((path for place in places for path in place.glob("*/libnss_wrapper.so")), None)


def _environment(folder: Path, wrapper: Path | None) -> dict[str, str]:
    """Return an environment in which sshd knows an account that this machine does not have."""
    env = {"PATH": "/usr/bin:/bin"}
    if wrapper is None:
        return env
    uid, gid = os.getuid(), os.getgid()
    (folder / "passwd").write_text(
        f"{ACCOUNT}:x:{uid}:{gid}::{folder}/home:/bin/sh\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    (folder / "group").write_text(f"{ACCOUNT}:x:{gid}:\n")
    return env | {
        "LD_PRELOAD": str(wrapper),
        "NSS_WRAPPER_PASSWD": str(folder / "passwd"),
        "NSS_WRAPPER_GROUP": str(folder / "group"),
    }


def _config(folder: Path, server: Sshd, env: Mapping[str, str]) -> str:
    variables = " ".join(f"{name}={value}" for name, value in env.items())
    return f"""Port {server.port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/authorized
AllowUsers {server.user}
AuthenticationMethods publickey
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PrintMotd no
UseDNS no
LogLevel VERBOSE
SetEnv {variables}
"""


async def can_log_in(sshd: Sshd) -> bool:
    """Return whether a login succeeds within the timeout."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                with contextlib.suppress(OSError, asyncssh.Error):
                    return await _log_in(sshd)
                await asyncio.sleep(0.1)
    except TimeoutError:
        return False


async def _log_in(sshd: Sshd) -> bool:
    async with asyncssh.connect(
        "127.0.0.1", sshd.port, username=sshd.user, client_keys=[str(sshd.key_file)],
        known_hosts=str(sshd.known_hosts), config=None, agent_path=None,
    ) as connection:  # fmt: skip
        # A forced command may read its standard input.
        return (await connection.run("true", stdin=asyncssh.DEVNULL)).exit_status == 0


async def _start_asyncssh(launcher: Launcher, folder: Path, server: Sshd, env: Mapping[str, str]) -> Sshd:
    argv = [sys.executable, "-P", "-m", "defib.demo.asyncssh_server", str(folder), str(server.port)]
    pid = await launcher.start(argv, folder / "log", {**os.environ, **env})
    if not await can_log_in(server):
        raise StartError(f"cannot log in to the SSH server: {(folder / 'log').read_text()[-500:]}")
    return Sshd(server.port, server.user, server.key_file, server.known_hosts, pid)
