"""Expectations of texts that several probe kinds share, and how they are checked."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, ParamSpec, TypeVar

from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.units import compile_pattern

EXCERPT_LENGTH = 120  # characters
EXAMINED = 10_000  # characters of a text that become evidence
# The encodings of the WHATWG's Encoding Standard, by Python's names. Python has others, some very slow, and caches
# every name that was ever looked up.
_ISO_8859 = (*range(1, 12), *range(13, 17))
_CHARSETS = {
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "ascii", "gbk", "gb2312", "gb18030", "big5", "big5hkscs", "euc_jp",
    "euc_kr", "cp949", "shift_jis", "cp932", "iso2022_jp", "koi8-r", "koi8-u", "cp866", "mac-roman",
    *(f"iso8859-{number}" for number in _ISO_8859), *(f"cp{number}" for number in range(1250, 1259)), "cp874",
}  # fmt: skip
_ALIASES = {
    **{name.replace("_", "").replace("-", ""): name for name in _CHARSETS},
    **{f"windows{number}": f"cp{number}" for number in (*range(1250, 1259), 874)},
    **{f"latin{number}": f"iso8859-{part}" for number, part in enumerate((1, 2, 3, 4, 9, 10), 1)},
    **{f"iso8859{number}": f"iso8859-{number}" for number in _ISO_8859},
    "usascii": "ascii", "sjis": "shift_jis", "mskanji": "cp932", "windows31j": "cp932", "xgbk": "gbk", "cp936": "gbk",
    "ms936": "gbk", "eucjp": "euc_jp", "euckr": "euc_kr", "ksc56011987": "cp949", "uhc": "cp949", "ibm866": "cp866",
    "macintosh": "mac-roman", "utf16": "utf-16", "tis620": "cp874",
}  # fmt: skip


P = ParamSpec("P")
T = TypeVar("T")
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="expectations")


async def run_in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread pool of its own, so that it blocks neither the event loop nor other users of threads.

    It cannot be cancelled once it runs, so it must be bounded; work that still waits is cancelled with the probe.
    """
    return await asyncio.get_running_loop().run_in_executor(_THREADS, partial(work, *args, **kwargs))


@lru_cache(maxsize=50_000)
def compile_cached(pattern: str) -> Any:
    """Compile an RE2 pattern, or return the cached result."""
    return compile_pattern(pattern)


def check_matches(patterns: Iterable[str], text: bytes, name: str, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless every pattern matches `text` (UTF-8)."""
    for pattern in patterns:
        if compile_cached(pattern).search(text) is None:
            raise ProbeFailure(
                "body", f"{name} does not match {pattern!r}; it begins with {quote_excerpt(text, details)}"
            )


def check_lacks(patterns: Iterable[str], text: bytes, name: str, details: ProbeDetails) -> None:
    """Raise ProbeFailure if any pattern matches `text` (UTF-8)."""
    for pattern in patterns:
        if compile_cached(pattern).search(text) is not None:
            # Redact the whole text first: the match may be a part of a secret.
            match = compile_cached(pattern).search(details.redact(text.decode("utf-8", "replace")).encode())
            matched = quote_excerpt(match.group(), details) if match is not None else "a secret"
            raise ProbeFailure("body", f"{name} must not match {pattern!r}, but contains {matched}")


def quote_excerpt(text: bytes, details: ProbeDetails) -> str:
    """Return the beginning of `text`, quoted; secrets are redacted before it is cut."""
    limit = 4 * (EXCERPT_LENGTH + details.redact.longest)  # bytes; a character takes up to 4
    redacted = details.redact(text[:limit].decode("utf-8", "replace"))
    return repr(redacted[:EXCERPT_LENGTH]) + ("…" if len(redacted) > EXCERPT_LENGTH else "")


def recode_as_utf8(content_type: str | None, body: bytes) -> bytes:
    """Return the body in UTF-8, in which patterns are matched. An unknown charset is taken for UTF-8."""
    _, found, charset = (content_type or "").lower().partition("charset=")
    name = charset.split(";")[0][:40].strip(" \"'").replace("_", "").replace("-", "") if found else ""
    return body.decode(_ALIASES.get(name, "utf-8"), "replace").encode("utf-8", "replace")
