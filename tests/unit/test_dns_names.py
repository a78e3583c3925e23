"""What the names of DNS messages cost, before they are parsed."""

import struct
import time

import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.probes.net.dns_names import count_labels, count_records

QUERY = dns.message.make_query("example.org", "A")


def respond(*records: tuple[str, str, str]) -> bytes:
    message = dns.message.make_response(QUERY)
    for name, kind, data in records:
        message.answer.append(dns.rrset.from_text(name, 60, "IN", kind, data))
    return message.to_wire()


@pytest.mark.parametrize(
    ("records", "labels"),
    [
        ([], 2),
        ([("example.org.", "A", "192.0.2.1")], 4),
        ([("a.example.org.", "A", "203.0.113.1"), ("a.example.org.", "TXT", '"\xc0\xff"')], 2 + 3 + 3),
        ([("example.org.", "CNAME", "a.b.example.net.")], 2 + 2 + 4),
    ],
)
def test_labels_are_counted_as_if_names_were_not_compressed(records: list[tuple[str, str, str]], labels: int) -> None:
    wire = respond(*records)
    assert count_records(wire) == 1 + len(records)
    assert count_labels(wire) == labels


def expand(message: dns.message.Message) -> int:
    names = [question.name for question in message.question]
    for rrset in (*message.answer, *message.authority, *message.additional):
        for record in rrset:
            names += [
                rrset.name,
                *(value for slot in record.__slots__ if isinstance(value := getattr(record, slot), dns.name.Name)),
            ]
    return sum(len(name) - 1 for name in names)


NAME = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=20).map(lambda parts: ".".join(parts) + ".")


@given(st.lists(st.tuples(NAME, NAME, st.sampled_from(["NS", "MX", "SOA", "SRV", "PTR"])), max_size=20))
def test_no_label_is_missed(records: list[tuple[str, str, str]]) -> None:
    data = {"NS": "{}", "PTR": "{}", "MX": "10 {}", "SRV": "1 2 3 {}", "SOA": "{0} {0} 1 2 3 4 5"}
    wire = respond(*((name, kind, data[kind].format(target)) for name, target, kind in records))
    assert count_labels(wire) >= expand(dns.message.from_wire(wire, one_rr_per_rrset=True))


@given(st.binary(max_size=300), st.integers(0, 65535))
def test_anything_is_counted(data: bytes, number: int) -> None:
    count_labels(data)
    count_labels(QUERY.to_wire()[:4] + struct.pack("!HHHH", 1, number, 0, 0) + data)


@pytest.mark.parametrize("data", [b"\xc0\x0c", b"\xc1\x00", b"\x01a\xc0\x0c", bytes(range(256)), b"\xff"])
def test_the_longest_messages_take_little_time(data: bytes) -> None:
    """Also chains of pointers."""
    chain = b"".join((0xC000 | (12 + 2 * (number - 1))).to_bytes(2) for number in range(1, 8000))
    started = time.process_time()
    for body in (data * (65000 // len(data)), b"\x00" + chain):
        count_labels(QUERY.to_wire()[:4] + struct.pack("!HHHH", 0, 65535, 0, 0) + body)
    assert time.process_time() - started < 5
