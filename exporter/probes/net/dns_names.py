"""How many labels the names of a DNS message have when their pointers are followed (RFC 1035, 4.1.4).

dnspython takes up to 50 µs for each of them, and a pointer of two bytes can stand for a name of 126 labels.
"""

import struct

_HEADER = struct.Struct("!4xHHHH")  # after id and flags: the numbers of questions and records
_RECORD = struct.Struct("!H6xH")  # after the name: type, and the length of the data
_QUESTION_SIZE = 4  # after the name
_POINTER, _LABEL_LIMIT = 0xC0, 64  # the first byte of a pointer is at least the one, that of a label below the other
_NAME_LIMIT = 127  # labels of a name
_SOA, _WITH_NAME = 6, {2: 0, 5: 0, 12: 0, 15: 2, 33: 6, 39: 0}  # where the name is: NS, CNAME, PTR, MX, SRV, DNAME
_WITHOUT_NAMES = frozenset({1, 16, 28, 41, 43, 48, 52, 257})  # A, TXT, AAAA, OPT, DS, DNSKEY, TLSA, CAA


def count_records(wire: bytes) -> int:
    """Return how many questions and records the message says that it has."""
    return sum(_HEADER.unpack_from(wire)) if len(wire) >= _HEADER.size else 0


def count_labels(wire: bytes) -> int:
    """Return how many labels all names have, of rare types not fewer; of a malformed message, those up to the fault."""
    if len(wire) < _HEADER.size:
        return 0
    questions, *records = _HEADER.unpack_from(wire)
    names, at, labels = _Names(wire), _HEADER.size, 0
    for number in range(questions + sum(records)):
        labels += names.count(at)
        end = names.find_end(at)
        if number < questions:
            at = end + _QUESTION_SIZE
            continue
        if end + _RECORD.size > len(wire):
            break
        kind, size = _RECORD.unpack_from(wire, end)
        data = end + _RECORD.size
        at = data + size
        if kind in _WITH_NAME:
            labels += names.count(data + _WITH_NAME[kind])
        elif kind == _SOA:
            labels += names.count(data) + names.count(names.find_end(data))
        elif kind not in _WITHOUT_NAMES:
            labels += names.count_in_data(data, min(at, len(wire)))
    return labels


class _Names:
    """The names in a message."""

    def __init__(self, wire: bytes) -> None:
        self._wire = wire
        self._counts: dict[int, int] = {}  # labels of the name at an offset

    def find_end(self, at: int) -> int:
        """Return the offset after a name."""
        while at < len(self._wire) and 0 < (first := self._wire[at]) < _LABEL_LIMIT:
            at += 1 + first
        return at + (2 if at < len(self._wire) and self._wire[at] >= _POINTER else 1)

    def count(self, at: int) -> int:
        """Return the labels of the name at an offset. No offset is looked at twice."""
        passed: list[tuple[int, int]] = []  # offsets, with 1 for a label and 0 for a pointer
        begin = at  # of the part that was pointed to
        while at < len(self._wire) and at not in self._counts:
            first = self._wire[at]
            target = int.from_bytes(self._wire[at : at + 2]) & 0x3FFF
            if first >= _POINTER and target < begin:  # others are malformed, and may be a loop
                passed.append((at, 0))
                begin = at = target
            elif 0 < first < _LABEL_LIMIT:
                passed.append((at, 1))
                at += 1 + first
            else:
                break
        labels = self._counts.get(at, 0)
        for each, number in reversed(passed):
            labels = self._counts[each] = min(labels + number, _NAME_LIMIT)
        return labels

    def count_in_data(self, start: int, end: int) -> int:
        """Return how many labels names in a record's data may have: where they are depends on its type."""
        pointers = (at for at in range(start, end) if self._wire[at] >= _POINTER)
        return (end - start) // 2 + sum(self.count(at) for at in pointers)
