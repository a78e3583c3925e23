"""The service of the demo: a web server in a container, or under supervisor if docker is not available."""

import asyncio
import contextlib
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from defib.demo.launcher import Launcher
from defib.output import print_text
from runtime.errors import StartError

PAGE, BROKEN_PAGE = "the heart beats\n", "broken\n"
START_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class DemoService:
    """A running service: its kind, its control in the inventory, and the commands that kill, break and repair it."""

    kind: str
    control: Mapping[str, Any]
    kill_command: list[str]
    break_command: list[str] = field(default_factory=list)
    repair_command: list[str] = field(default_factory=list)

    async def kill(self) -> None:
        """Kill it, as a crash would. Raises StartError."""
        status, output = await run(*self.kill_command)
        if status:
            raise StartError(f"cannot kill the demo's service: {output}")


async def start(launcher: Launcher, folder: Path, port: int, name: str) -> DemoService:
    """Start the service on loopback."""
    (folder / "www").mkdir()
    (folder / "www" / "index.html").write_text(PAGE)
    return await _container(launcher, port, name) or await _supervised(launcher, folder, port)


async def run(*argv: str, stdin: bytes = b"", within: float = 30.0) -> tuple[int, str]:
    """Run a command and return its exit status and output; -1 if it takes too long."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(within):
            output, _ = await process.communicate(stdin)
    except TimeoutError:
        process.kill()
        await process.wait()
        return -1, f"still running after {within:g} s"
    return process.returncode or 0, output.decode("utf-8", "replace").strip()


async def docker_answers() -> bool:
    """Return whether a docker daemon on this machine is reachable."""
    if shutil.which("docker") is None or not os.environ.get("DOCKER_HOST", "unix://").startswith("unix://"):
        return False
    status, _ = await run("docker", "version", "--format", "{{.Server.Version}}", within=5.0)
    return status == 0


def busybox_image(page: str = PAGE) -> bytes | None:
    """Return a tar file of a root file system with a static busybox and one page; None without a static busybox."""
    busybox = shutil.which("busybox")
    content = Path(busybox).read_bytes() if busybox else b""
    if not content or b"/ld-linux" in content[:4096] or b"/ld-musl" in content[:4096]:
        return None
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data, mode in (
            ("bin/busybox", content, 0o755),
            ("www/index.html", page.encode(), 0o644),
            ("etc/passwd", b"root:x:0:0::/:/bin/sh\n", 0o644),
        ):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
        for applet in ("sh", "httpd", "sleep", "tail", "echo", "cat"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return buffer.getvalue()


async def run_container(image: str, container: str, command: list[str]) -> None:
    """Import the image and run a container from it in the host's network. Raises RuntimeError."""
    tree = busybox_image()
    if tree is None:
        raise RuntimeError("cannot build the demo's image: install a statically linked busybox")
    for argv, stdin in (
        (["docker", "import", "-", image], tree),
        # busybox as process 1 ignores SIGTERM, so that a stop would take ten seconds.
        (["docker", "run", "--detach", "--pull", "never", "--name", container, "--network", "host",
          "--stop-signal", "KILL", image, *command], b""),
    ):  # fmt: skip
        status, output = await run(*argv, stdin=stdin)
        if status:
            raise RuntimeError(output)


async def _container(launcher: Launcher, port: int, name: str) -> DemoService | None:
    if not await docker_answers() or busybox_image() is None:
        return None
    await launcher.remove_docker_at_end("image", name)
    await launcher.remove_docker_at_end("container", name)
    httpd = ["/bin/httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", "/www"]
    try:
        await run_container(name, name, httpd)
        await _wait_until_up(port)
    except (RuntimeError, TimeoutError) as error:
        # For example, the daemon runs in a virtual machine with a network of its own.
        print_text(f"docker is available, but cannot run the demo's service ({error}); using supervisor", sys.stderr)
        await run("docker", "rm", "--force", name)
        return None
    control = {"docker": {"container": name}}
    break_command, repair_command = (
        ["docker", "exec", name, "sh", "-c", f"echo {page.strip()} > /www/index.html"] for page in (BROKEN_PAGE, PAGE)
    )
    return DemoService("a docker container", control, ["docker", "kill", name], break_command, repair_command)


async def _supervised(launcher: Launcher, folder: Path, port: int) -> DemoService:
    config = folder / "supervisord.conf"
    server = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {folder}/www"
    config.write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={folder}/supervisord.log\npidfile={folder}/supervisord.pid\n"
        f"childlogdir={folder}\nuser={'root' if os.geteuid() == 0 else ''}\n"
        f"[unix_http_server]\nfile={folder}/supervisor.sock\n"
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
        f"[supervisorctl]\nserverurl=unix://{folder}/supervisor.sock\n"
        # Defib, not supervisor, restarts it.
        f"[program:web]\ncommand={server}\nautorestart=false\nstartsecs=0\nstdout_logfile={folder}/web.log\n"
        "redirect_stderr=true\n".replace("user=\n", "")
    )
    supervisord = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(config)]
    await launcher.start(supervisord, folder / "supervisord.out")
    await _wait_until_up(port)
    supervisorctl = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisorctl", "-c", str(config)]
    control = {"supervisor": {"program": "web", "config": str(config)}}
    kill_command = [*supervisorctl, "signal", "KILL", "web"]
    break_command, repair_command = (
        ["sh", "-c", f"echo {page.strip()} > {folder}/www/index.html"] for page in (BROKEN_PAGE, PAGE)
    )
    return DemoService("a program of supervisor", control, kill_command, break_command, repair_command)


async def _wait_until_up(port: int) -> None:
    async with asyncio.timeout(START_TIMEOUT), httpx.AsyncClient(trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{port}/")).text == PAGE:
                    return
            await asyncio.sleep(0.05)
