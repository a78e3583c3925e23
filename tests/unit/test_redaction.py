"""Secrets are masked wherever they stand, however they were quoted."""

import json
import time
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from runtime.redaction import Redactor

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
