"""The body of a ping. Its beginning and its end are kept: the end of a long output says why a job has failed."""

from fleet.pings import BODY_LIMIT

HEAD_LIMIT = 2 * BODY_LIMIT  # bytes of the beginning: a secret may be on both sides of the limit
END_LIMIT = 16_384  # bytes of the end, of which a part becomes that of the reason


class SentBody:
    """A body that arrives in parts. What is between the beginning and the end is discarded."""

    def __init__(self, whole: bytes = b"") -> None:
        self._head, self._end = bytearray(), bytearray()
        self._length = 0
        self.is_complete = True
        self.add(whole)

    def add(self, part: bytes) -> None:
        self._length += len(part)
        self._head += part[: HEAD_LIMIT - len(self._head)]
        self._end += part[-END_LIMIT:]
        del self._end[:-END_LIMIT]

    @property
    def head(self) -> bytes:
        return bytes(self._head)

    @property
    def end(self) -> bytes:
        return bytes(self._end)

    @property
    def is_cut(self) -> bool:
        """Whether not all of it is stored: it is too long, or has not arrived completely."""
        return not self.is_complete or self._length > BODY_LIMIT
