"""The forms that a secret may have in text that another program wrote: quoted for URLs, HTML, JSON and Python."""

import html
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from string import punctuation
from urllib.parse import quote, quote_plus

_YARL = "!$'()*,/:?@"  # not quoted by yarl in queries
_PERCENT = re.compile("%[0-9A-F]{2}")
_PLAIN = re.compile("[A-Za-z0-9-]*")
_ESCAPED_QUOTE = re.compile(r'\\(["\\])')


def _escape_in_json(characters: str, digits: str = "04x") -> Mapping[int, str]:
    return {ord(each): f"\\u{ord(each):{digits}}" for each in characters}


# What writers of JSON escape beside what they must.
_JSON: tuple[Mapping[int, str], ...] = (
    {},
    {ord("/"): "\\/"},  # PHP
    _escape_in_json("&<>\u2028\u2029"),  # Go
    _escape_in_json("&<>'"),  # in pages, by Flask, Django and Rails
    _escape_in_json("&<>'+`", "04X"),  # .NET, and PHP's JSON_HEX_*
)
# Quotes, and other characters that writers of HTML and XML escape beside `&`, `<` and `>`.
_HTML: tuple[Mapping[int, str], ...] = (
    {},
    {ord('"'): "&quot;"},
    {ord('"'): "&quot;", ord("'"): "&#x27;"},  # Python, Django
    {ord('"'): "&quot;", ord("'"): "&#39;"},
    {ord('"'): "&quot;", ord("'"): "&#039;"},  # PHP
    {ord('"'): "&quot;", ord("'"): "&apos;"},  # XML
    {ord('"'): "&#34;", ord("'"): "&#39;"},  # Go, Jinja
    {ord('"'): "&#34;", ord("'"): "&#39;", ord("+"): "&#43;"},  # Go in attributes
    {ord('"'): "&quot;", ord("'"): "&#39;", ord("/"): "&#x2F;", ord("`"): "&#x60;", ord("="): "&#x3D;"},  # Mustache
)


@lru_cache(maxsize=1024)  # loading a configuration makes several redactors of the same secrets
def list_forms(secret: str) -> frozenset[str]:
    """Return the forms of a secret, itself among them: quoted once, and for URLs and JSON also twice.

    One with letters, digits and hyphens alone has no other. Their number has a limit; most secrets have less than ten.
    """
    if _PLAIN.fullmatch(secret):
        return frozenset({secret})
    quoted = _list_url_forms(secret) | _list_html_forms(secret) | _list_json_forms(secret)
    return quoted | frozenset({secret, repr(secret)[1:-1]})


def list_common_forms(secret: str) -> frozenset[str]:
    """Return the commonest forms of a secret, itself among them: for one that a server chooses, whatever its length."""
    if _PLAIN.fullmatch(secret):
        return frozenset({secret})
    text = secret.encode("utf-8", "replace")
    in_urls = _in_both_cases([quote(text), quote(text, safe=""), quote_plus(text), quote(text, safe=punctuation)])
    in_json = {json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)}
    in_json |= {each.replace("/", "\\/") for each in in_json}
    in_html = {html.escape(secret, quote=has_quotes) for has_quotes in (True, False)}
    return frozenset(in_urls | in_json | in_html | {secret, repr(secret)[1:-1]})


def _list_url_forms(secret: str) -> frozenset[str]:
    text = secret.encode("utf-8", "replace")
    by_yarl = (quote_plus(text, safe=safe) for safe in (_YARL, _YARL + ";"))  # earlier versions leave the semicolon
    # As probes send what stands in URLs: only what cannot be sent is quoted.
    once = _in_both_cases(
        [quote(text), quote(text, safe=""), quote_plus(text), quote(text, safe=punctuation), *by_yarl]
    )
    return frozenset(once | _in_both_cases(quote(each, safe=safe) for each in once for safe in ("", "/", _YARL)))


def _in_both_cases(quoted: Iterable[str]) -> set[str]:
    """Return percent-encoded texts, and the same with lower-case digits."""
    upper = set(quoted)
    return upper | {_PERCENT.sub(lambda match: match[0].lower(), each) for each in upper}


def _list_html_forms(secret: str) -> frozenset[str]:
    escaped = html.escape(secret, quote=False)
    return frozenset(escaped.translate(table) for table in _HTML)


def _list_json_forms(secret: str) -> frozenset[str]:
    once = _quote_for_json([secret])
    return frozenset(once | _quote_for_json(once))


def _quote_for_json(texts: Iterable[str]) -> set[str]:
    quoted = {json.dumps(text, ensure_ascii=is_ascii)[1:-1] for text in texts for is_ascii in (True, False)}
    forms = {each.translate(table) for each in quoted for table in _JSON}
    return forms | {_ESCAPED_QUOTE.sub(_escape_quote, each) for each in forms}


def _escape_quote(match: re.Match[str]) -> str:
    return "\\u0022" if match[1] == '"' else match[0]
