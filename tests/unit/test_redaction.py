"""Secrets are masked wherever they stand, however they were quoted."""

import json
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
