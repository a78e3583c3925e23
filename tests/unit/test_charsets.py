"""The charset in which the body of a response is read."""

import pytest

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
