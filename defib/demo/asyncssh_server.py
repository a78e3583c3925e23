"""An SSH server for machines without sshd: `python -m defib.demo.asyncssh_server FOLDER PORT`."""

import asyncio
import sys
from pathlib import Path

import asyncssh


async def _session(process: "asyncssh.SSHServerProcess[bytes]") -> None:
    child = await asyncio.create_subprocess_shell(
        process.command or "exit 1",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await process.redirect(child.stdin, child.stdout, child.stderr)
    process.exit(await child.wait())


async def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    server = await asyncssh.listen(
        "127.0.0.1", port, server_host_keys=[str(folder / "host")],
        authorized_client_keys=str(folder / "authorized"), process_factory=_session, encoding=None,
    )  # fmt: skip
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
