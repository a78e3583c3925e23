"""A pseudo-terminal in which tests type."""

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path


class Terminal:
    """An interactive program behind a pseudo-terminal."""

    def __init__(self, argv: list[str], env: dict[str, str], folder: Path) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=folder, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._master, text.encode())

    def until(self, pattern: str, within: float = 30.0) -> None:
        ends = time.monotonic() + within
        while not re.search(pattern, self.seen):
            assert time.monotonic() < ends, self.seen
            if select.select([self._master], [], [], 0.1)[0]:
                self.seen += os.read(self._master, 4096).decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
