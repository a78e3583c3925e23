"""Cursors: opaque positions in what this process has recorded, with which clients ask for what came later."""

import re
import secrets

_CURSOR = re.compile(r"([0-9a-f]{16})-([0-9]{1,18})", re.ASCII)


class Cursors:
    """Formats and parses the cursors of one process; those of another process have another ID."""

    def __init__(self) -> None:
        self._process = secrets.token_hex(8)

    def format(self, number: int) -> str:
        return f"{self._process}-{number}"

    def parse(self, cursor: str) -> int | None:
        """Return the number of a cursor; None if it is malformed or of another process."""
        found = _CURSOR.fullmatch(cursor)
        return int(found[2]) if found is not None and found[1] == self._process else None
