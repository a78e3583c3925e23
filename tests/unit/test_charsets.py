"""The charset in which the body of a response is read."""

import time

import pytest
import webencodings
from webencodings.labels import LABELS

from exporter.probes.expectations import recode_as_utf8
from exporter.probes.json_conditions import parse_json


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        (None, "é".encode(), "é"),
        ("text/html; charset=unknown", "é".encode(), "é"),
        ("text/html; charset=punycode", b"a-b", "a-b"),
        ('text/html; Charset="ISO-8859-1"; x=y', b"\x93\xe9\x94", "“é”"),
        ("text/html; charset=us-ascii", b"\x80", "€"),
        ("text/html; charset=latin1", b"\xe9", "é"),
        ("text/html; charset=l2", b"\xb1", "ą"),
        ("text/html; charset=gb2312", "鎔㐀".encode("gb18030"), "鎔㐀"),
        ("text/html; charset=x-gbk", b"\xc4\xe3", "你"),
        ("text/html; charset=big5-hkscs", b"\xa7\x41", "你"),
        ("text/html; charset=x-sjis", b"\x87\x40", "①"),
        ("text/html; charset=ks_c_5601-1987", b"\xb0\xa1", "가"),
        ("text/html; charset=x-cp1251", b"\xc0", "А"),
        ("text/html; charset=csiso2022jp", "あ".encode("iso2022_jp"), "あ"),
        ("text/html; charset=utf-16", "é".encode("utf-16-le"), "é"),
        ("text/html; charset=unicodefffe", "é".encode("utf-16-be"), "é"),
        ("text/html", b"\xef\xbb\xbf{}", "{}"),
        ("text/html; charset=gbk", "\ufeff你".encode(), "你"),
        ("text/html; charset=utf-8", "\ufeff你".encode("utf-16-le"), "你"),
        ("text/html; charset=utf-8", "\ufeff你".encode("utf-16-be"), "你"),
    ],
)
def test_charsets(content_type: str | None, body: bytes, text: str) -> None:
    assert recode_as_utf8(content_type, body).decode() == text


def test_json_with_a_byte_order_mark() -> None:
    assert parse_json(recode_as_utf8("application/json", b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize("charset", sorted({each.name for each in map(webencodings.lookup, LABELS) if each}))
@pytest.mark.parametrize(
    "body", [bytes(range(256)) * 3, b"\xff" * 70_000, b"\xef\xbb\xbfa\xff", b"\xfe\xffab", "\u00e9".encode()]
)
def test_the_fast_way_is_that_of_the_standard(charset: str, body: bytes) -> None:
    if charset == "iso-2022-kr":
        expected = "\ufffd"
    else:
        expected, _ = webencodings.decode(body, "gb18030" if charset == "gbk" else charset, "replace")
    assert recode_as_utf8(f"text/plain; charset={charset}", body) == expected.encode("utf-8", "replace")


@pytest.mark.parametrize("charset", ["windows-1255", "koi8-r", "iso-2022-kr", "gb18030", "euc-kr", "utf-8"])
def test_invalid_bytes_hold_up_no_other_thread(charset: str) -> None:
    """Each is a hundred times as slow as others where the decoder calls an error handler."""
    started = time.process_time()
    recode_as_utf8(f"text/plain; charset={charset}", b"\xff" * 10 * 2**20)
    assert time.process_time() - started < 3
