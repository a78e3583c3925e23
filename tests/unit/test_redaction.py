"""Secrets are masked wherever they stand, however they were quoted."""

import html
import json
import re
import time
from collections.abc import Callable
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape as escape_xml

import markupsafe
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.utils import htmlsafe_json_dumps
from yarl import URL

from exporter.probes.expectations import check_lacks, quote_excerpt
from exporter.results import ProbeDetails, ProbeFailure
from runtime.redaction import Redactor, mask_credentials
from runtime.secret_forms import list_forms

Quote = Callable[[str], str]


def lower_percent(text: str) -> str:
    """Return a percent-encoded text with lower-case digits, as some programs write them."""
    return re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), quote(text, safe=""))


def json_escaping(characters: str, form: str = "\\u{:04x}") -> Quote:
    """Return a writer of JSON that escapes more characters than it must."""
    table = {ord(each): form.format(ord(each)) for each in characters}
    return lambda text: json.dumps(text)[1:-1].translate(table)


JSON_WRITERS: dict[str, Quote] = {
    "json": lambda text: json.dumps(text)[1:-1],
    "json in UTF-8": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "json of Go": json_escaping("&<>"),
    "json of PHP": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "json in a page": lambda text: str(htmlsafe_json_dumps(text))[1:-1],
    "json of .NET": json_escaping("&<>'+`", "\\u{:04X}"),
}
URL_WRITERS: dict[str, Quote] = {
    "url": quote, "url component": lambda text: quote(text, safe=""), "form": quote_plus, "lower case": lower_percent,
    "url of yarl": lambda text: URL.build(query={"p": text}).raw_query_string.partition("=")[2],
}  # fmt: skip
WRITERS: dict[str, Quote] = {
    **JSON_WRITERS, **URL_WRITERS,
    "nothing": str, "python": lambda text: repr(text)[1:-1],
    "html": html.escape, "html text": lambda text: html.escape(text, quote=False), "xml": escape_xml,
    "xml attribute": lambda text: escape_xml(text, {'"': "&quot;", "'": "&apos;"}),
    "html of Jinja": lambda text: str(markupsafe.escape(text)),
    "html of PHP": lambda text: html.escape(text).replace("&#x27;", "&#039;"),
    "html of Django": lambda text: html.escape(text).replace("&#x27;", "&#39;"),
}  # fmt: skip
TWICE = [(first, second) for each in (JSON_WRITERS, URL_WRITERS) for first in each for second in each]
SECRETS = st.text(st.characters(codec="utf-8"), min_size=6, max_size=30) | st.text(
    "aZ0 /+=&<>\"'\\%\n`:@", min_size=6, max_size=20
)


@given(SECRETS, st.sampled_from(sorted(WRITERS)))
def test_a_secret_that_another_program_wrote(secret: str, writer: str) -> None:
    written = WRITERS[writer](secret)
    assert Redactor([secret])(f"\u2063{written}\u2063") == "\u2063***\u2063"


@given(SECRETS, st.sampled_from(TWICE))
def test_a_secret_that_was_written_twice(secret: str, writers: tuple[str, str]) -> None:
    """JSON inside JSON, and a URL inside another one's query."""
    first, second = (WRITERS[name] for name in writers)
    assert Redactor([secret])(f"\u2063{second(first(secret))}\u2063") == "\u2063***\u2063"


@given(SECRETS)
def test_the_number_of_forms_has_a_limit(secret: str) -> None:
    assert len(list_forms(secret)) <= 300
    assert max(map(len, list_forms(secret))) <= 12 * max(len(secret.encode()), 1)


def test_the_time_depends_on_the_text_alone() -> None:
    """Also if all secrets begin with the same characters, as the URLs of databases do."""
    secrets = [f"postgres://user:{number:06}&pass/word@db/app" for number in range(1000)]
    started = time.process_time()
    redact = Redactor(secrets)
    masked = redact("postgres://nobody@db/app " * 2000 + secrets[-1])
    assert masked.endswith(" ***")
    assert time.process_time() - started < 5


SECRET = "s3cr et/+p%ss&w\u00f6rd~(x)"


@pytest.mark.parametrize(
    "form",
    [
        SECRET, json.dumps(SECRET), repr(SECRET), quote(SECRET), quote(SECRET, safe=""), quote_plus(SECRET),
        URL.build(query={"p": SECRET}).raw_query_string.partition("=")[2],
    ],
)  # fmt: skip
def test_every_form_of_a_secret(form: str) -> None:
    assert Redactor([SECRET])(f"a {form} b") in ("a *** b", 'a "***" b', "a '***' b")


def test_secrets_that_overlap_are_masked_together() -> None:
    assert Redactor(["abcdef", "cdefgh"])("-abcdefgh-") == "-***-"
    assert Redactor(["abcdefgh", "abcdef"])("abcdefgh abcdef abc") == "*** *** abc"


def test_one_more_secret_beside_those_that_are_known() -> None:
    known = Redactor(["first-secret"])
    both = known.with_secret("second-secret")
    assert both("first-secret second-secret") == "*** ***"
    assert known("second-secret") == "second-secret"
    assert both.longest == len("second-secret")


def test_short_values_are_not_masked() -> None:
    """A password of four letters would otherwise be masked in every longer word."""
    assert Redactor(["prod"])("the product of prod") == "the product of prod"
    assert Redactor(["produc"])("the product") == "the ***t"


@given(st.lists(st.text("ab", min_size=6, max_size=10), max_size=5), st.text("abc", max_size=60))
def test_no_secret_is_left_whole(secrets: list[str], text: str) -> None:
    masked = Redactor(secrets)(text)
    assert not any(secret in masked for secret in secrets)


@pytest.mark.parametrize(
    "secret",
    [
        "01234567-89ab-cdef-0123-456789abcdef",
        "a.c*+(x[",
        "\0\0\0\0\0\0",
        "\udce4\udcff-bytes",
        "schl\u00fcssel",
        "\U0001f511" * 6,
    ],
)
def test_any_characters_may_be_in_a_secret(secret: str) -> None:
    """Also those of a regular expression, and bytes of an environment that are not UTF-8."""
    assert Redactor([secret, "another"])(f"\udc80 {secret}\n{secret}") == "\udc80 ***\n***"


def test_secrets_are_masked_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.redaction._PATTERN_MEMORY", 10_000)  # of the search that finds text without secrets
    secrets = [f"{number:06}-secret" for number in range(2000)]
    assert Redactor(secrets)(f"a {secrets[-1]} b") == "a *** b"


def test_a_secret_at_the_cut_does_not_remain_in_part() -> None:
    secret = "0123456789abcdef"
    redact = Redactor([secret])
    for text in (secret * 10, f"x{secret}" * 10, "x" * 30 + secret + "x" * 30):
        for limit in range(1, len(text)):
            for part in (redact.redact_head(text, limit), redact.redact_tail(text, limit)):
                assert len(part) <= limit
                assert not set(part) & set(secret), part


def test_short_texts_are_redacted_whole() -> None:
    redact = Redactor(["secret"])
    assert (redact.redact_head("a secret b", 99), redact.redact_tail("a secret b", 99)) == ("a *** b", "a *** b")


def test_only_what_is_shown_is_redacted() -> None:
    redact, text = Redactor(["secret"]), "x" * 50_000_000
    started = time.process_time()
    assert (redact.redact_head(text, 100), redact.redact_tail(text, 100)) == ("x" * 100, "x" * 100)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("GET /a?token=abc&b=1 HTTP/1.1", "GET /a?token=***&b=1 HTTP/1.1"),
        ("DB_PASSWORD=hunter2; retry", "DB_PASSWORD=***; retry"),
        ('{"api_key": "sk-1", "x": 2}', '{"api_key": "***", "x": 2}'),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("cannot connect to postgres://app:s3cret@db:5432/x", "cannot connect to postgres://app:***@db:5432/x"),
        ("the token has expired at http://h:80/a", "the token has expired at http://h:80/a"),
        ("passwd " * 3, "passwd " * 3),
        ("AWS_SECRET_ACCESS_KEY=abc/def aws_access_key_id", "AWS_SECRET_ACCESS_KEY=*** aws_access_key_id"),
        ("Set-Cookie: session=abc; Path=/; x=y\nnext", "Set-Cookie: ***\nnext"),
        ('{"cookie": "a=b; c=d", "e": 1}', '{"cookie": "***", "e": 1}'),
        ("got eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl here", "got *** here"),
        ("max_tokens=120 tokens: 5 keys: 3", "max_tokens=120 tokens: 5 keys: 3"),
        ("mysql --password hunter2 -h db", "mysql --password *** -h db"),
        ("x --db-password 'a b' --token=abc", "x --db-password '***' --token=***"),
        (r'{"token": "a\"b, c", "x": 1}', '{"token": "***", "x": 1}'),
        ("DB_PASS=abc pass: abc PWD=abc", "DB_PASS=*** pass: *** PWD=***"),
        ("AccountName=x;AccountKey=ab/c+d==;", "AccountName=x;AccountKey=***;"),
        ("export API_KEY='a b' c", "export API_KEY='***' c"),
        ("curl -u ann:hunter2 http://x", "curl -u ann:*** http://x"),
        ("curl --user 'ann:a b' http://x", "curl --user 'ann:***' http://x"),
        ("sshpass -p hunter2 ssh h", "sshpass -p *** ssh h"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\nnext",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\nnext",
        ),
        ("-----BEGIN PRIVATE KEY-----\nMIIE", "-----BEGIN PRIVATE KEY-----***"),
        ("got ghp_0123456789abcdef0123456789abcdef0123", "got ghp_***"),
        *(
            (text, text)
            for text in (
                "pass: 12 fail: 3",
                "test: pass: ok",
                "bypass: x compass=y",
                "PWD=/home/ann OLDPWD=/",
                "--password is required",
                "option --token requires an argument",
                "--secret --other x",
                "docker run -u 1000:1000 x",
                "ls -u /a:b",
                "keys: a primary key: b",
                "-----BEGIN CERTIFICATE-----\nMIIE",
                "first pass over data",
                "task-1 risk-free-and-very-long-words",
                "--passes 3",
            )
        ),
    ],
)
def test_what_looks_like_a_credential_is_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked


@pytest.mark.parametrize(
    "part",
    [
        "--",
        "--token ",
        " -u a",
        "-u 'a:",
        "-----BEGIN PRIVATE KEY-----",
        "pass: ",
        'token="\\',
        "gh",
        "cookie: ",
        "eyJ-",
        "eyJaaaaaaaaaa.",
    ],
)
def test_the_time_to_mask_credentials_is_proportional_to_the_text(part: str) -> None:
    started = time.process_time()
    mask_credentials(part * 50_000)
    assert time.process_time() - started < 10


@given(
    st.lists(st.text("ab", min_size=6, max_size=14) | st.integers(6, 30).map(lambda n: "a" * n + "b"), max_size=12),
    st.text("abc", max_size=80),
)
def test_the_longest_secret_at_each_place_is_masked(secrets: list[str], text: str) -> None:
    expected, at, end = "", 0, 0
    while at < len(text):
        longest = max((len(each) for each in secrets if text.startswith(each, at)), default=0)
        if longest:
            expected += "***" if at >= end else ""
            end = max(end, at + longest)
        elif at >= end:
            expected += text[at]
        at += 1
    assert Redactor(secrets)(text) == expected


@pytest.mark.parametrize("text", ["a" * 10_000, "b" * 10_000, ("a" * 50 + "c") * 200])
def test_the_time_hardly_depends_on_the_number_of_secrets_with_one_beginning(text: str) -> None:
    few, many = Redactor(), Redactor()
    few.add_from_server(["a" * 100 + "b", "b" * 100 + "a", "a" * 100])
    many.add_from_server([f"{'a' * n}b" for n in range(6, 400)] + [f"{'b' * n}a" for n in range(6, 400)])
    many.add_from_server(["a" * n for n in range(6, 400)])

    def best(redact: Redactor) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            redact(text)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best(many) < 20 * best(few)


def test_a_token_of_a_file_is_masked_in_all_forms() -> None:
    assert Redactor().with_secret("tok+en&'1")("tok\\u002Ben\\u0026\\u00271") == "***"


@pytest.mark.parametrize("secret", ["a/b+c=&<d>\"e'é", "plain-1", "semi;colon space"])
@pytest.mark.parametrize("writer", ["nothing", "json", "json of PHP", "url", "url component", "form", "html", "python"])
def test_common_forms_of_what_a_server_chooses(writer: str, secret: str) -> None:
    redact = Redactor()
    redact.add_from_server([secret])
    assert secret not in redact(f"x {WRITERS[writer](secret)} y")
    assert redact(f"x {WRITERS[writer](secret)} y") == "x *** y"


@given(
    st.lists(st.text("ab", min_size=6, max_size=20), min_size=1, max_size=4),
    st.text("abcd", max_size=10),
    st.integers(1, 400),
    st.integers(0, 60),
)
def test_a_part_of_a_text_shows_no_part_of_a_secret_however_often_it_is_there(
    secrets: list[str], between: str, times: int, limit: int
) -> None:
    """A mask is shorter than what it stands for: what is cut behind it must not move into what is shown."""
    redact = Redactor(secrets[:1]).with_secret(secrets[-1])
    text = "c" + (secrets[0] + between + secrets[-1]) * times
    whole = redact(text)
    head, tail = redact.redact_head(text, limit), redact.redact_tail(text, limit)
    assert whole.startswith(head.rstrip("*"))
    assert whole.endswith(tail.lstrip("*"))
    cut = redact.redact_head(text[:-3], limit, is_cut=True)
    assert whole.startswith(cut.rstrip("*"))


@pytest.mark.parametrize("times", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("length", [6, 40, 119, 120, 121, 2000])
def test_excerpts_show_no_part_of_a_secret(length: int, times: int) -> None:
    secret = "".join(chr(ord("a") + number % 26) for number in range(length))[::-1]
    details = ProbeDetails(redact=Redactor([secret]))
    for before in range(130):
        text = ("-" * before + secret * times).encode()
        excerpt = quote_excerpt(text, details)
        assert set(excerpt) <= set("-*'…"), excerpt
        with pytest.raises(ProbeFailure) as caught:
            check_lacks(["[a-z]+"], text, "it", details)
        assert "but contains '***" in caught.value.message, caught.value.message


def test_what_probes_send_in_urls_is_masked() -> None:
    assert Redactor(['p4ss W0rd+/x"&z~\u00e91'])('/a?key=p4ss%20W0rd+/x"&z~%C3%A91') == "/a?key=***"
