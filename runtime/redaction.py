"""Redaction of secrets from all text that leaves the program."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import re2

from runtime.secret_forms import list_common_forms, list_forms

MASK = "***"
MIN_SECRET_LENGTH = 6  # masking every "prod" would make text unreadable
_PATTERN_MEMORY = 64 << 20  # bytes for a pattern of some hundred thousand starts
_NAMES = (
    r"passw(?:or)?d|passphrase|secret(?:[_-]?access)?(?:[_-]?key)?|token|"
    r"(?:api|access|account|private|signing|encryption)[_-]?key"
)
_VALUE = r"(?:(?<=\")(?:\\.|[^\"\\\r\n])+|(?<=')[^'\r\n]+|[^\s\"'&,;]+)"  # in quotes, or one word
_CREDENTIAL = re.compile(
    # `pass: 12` counts tests, `pass: ok` is a result, and PWD=/home is a folder.
    rf"((?:{_NAMES}|authorization|(?<![a-z])pass(?!\W{{1,5}}(?:\d{{1,4}}|true|false|yes|no|ok)\b)|(?<![a-z])pwd(?!=/))"
    rf"[\"']?\s{{0,3}}[=:]\s{{0,3}}[\"']?(?:(?:basic|bearer)\s{{1,3}})?){_VALUE}"
    r"|(cookie[\"']?\s{0,3}:\s{0,3}[\"']?)[^\r\n\"']+",
    re.IGNORECASE,
)
# `--password X`, but not "--password is required"; `curl -u USER:X`, but not `docker run -u 1000:1000`.
_ARGUMENT = re.compile(
    rf"(--[\w-]{{0,30}}?(?:{_NAMES}|pass|pwd)\s{{1,3}}[\"']?)"
    r"(?!-|(?:is|was|must|needs?|requires?|or|and|not|cannot|has|to|for|from|in|of|on|with|option|argument|flag)\b)"
    rf"{_VALUE}|(\bsshpass\s{{1,3}}-p\s{{0,3}}[\"']?){_VALUE}"
    rf"|((?:\s|^)(?:-u|-U|--user|--proxy-user)[\s=]{{0,3}}[^\s:\"'/]{{1,100}}:)(?!\d+(?:\s|$)){_VALUE}"
    r"|((?:\s|^)(?:-u|-U|--user|--proxy-user)[\s=]{0,3}[\"'][^:\"'\r\n]{1,100}:)[^\"'\r\n]+"
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----)(?:(?!-----END)[\s\S])+")
_KNOWN_TOKEN = re.compile(
    r"\b(gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|sk-(?:ant-|proj-)?|hooks\.slack\.com/services/)[\w/-]{16,}"
)
# A JSON web token if there is a group; what only begins like one is passed over, and not looked at again.
_WEB_TOKEN = re.compile(r"\beyJ[\w-]{10,}+(\.[\w-]{10,}+\.[\w-]*+)?")
_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ANY_UUID = b"[0-9a-f]{8}-[0-9a-f]{4}-"
_USER_INFO = re.compile(r"(://[^\s/:@]*:)[^\s/@]+(?=@)")


def _compile(pattern: bytes) -> Any:
    """Return a pattern that shows quickly whether there is anything in a text to look at. Raises re2.error."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1  # texts may be no UTF-8
    options.never_capture, options.log_errors, options.max_mem = True, False, _PATTERN_MEMORY
    return re2.compile(pattern, options)


def _has(pattern: Any, text: str) -> bool:
    return pattern.search(text.encode("utf-8", "surrogatepass")) is not None


_CREDENTIAL_START = _compile(
    b"(?i)pass|pwd|secret|token|key|authorization|cookie|eyj|://|-u|--user|--proxy-user"
    b"|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|sk-"
)


def mask_credentials(text: str) -> str:
    """Replace what looks like a credential in output of programs.

    Such as `password=…`, `--password …`, `curl -u user:…`, `Cookie: …`, `://user:…@`, `eyJ….…` and private keys.
    """
    if not text or not _has(_CREDENTIAL_START, text):
        return text
    for pattern, mask in (
        (_PRIVATE_KEY, rf"\1{MASK}"), (_ARGUMENT, rf"\1\2\3\4{MASK}"), (_CREDENTIAL, rf"\1\2{MASK}"),
        (_USER_INFO, rf"\1{MASK}"), (_KNOWN_TOKEN, rf"\1{MASK}"),
    ):  # fmt: skip
        text = pattern.sub(mask, text)
    return _WEB_TOKEN.sub(lambda found: MASK if found[1] else found[0], text)


def _write_pattern(secret: str) -> bytes:
    """Return a pattern for the start of a secret; that for UUIDs, of which there may be thousands, finds any."""
    if _UUID.fullmatch(secret):
        return _ANY_UUID
    escaped: bytes = re2.escape(secret[:MIN_SECRET_LENGTH].encode("utf-8", "surrogatepass"))
    return escaped


def _compile_any(patterns: Iterable[bytes]) -> Any:
    """Return a pattern for any of these; one that is always found if they are too many."""
    try:
        return _compile(b"|".join(sorted(patterns)))
    except re2.error:
        return _compile(b"")


@dataclass(frozen=True, slots=True)
class _Group:
    """The secrets with one start, sorted, and for each the lengths of the secrets that it begins with."""

    secrets: tuple[str, ...]
    shorter: tuple[tuple[int, ...], ...]
    longest: int

    @classmethod
    def of(cls, secrets: Iterable[str]) -> "_Group":
        ordered = tuple(sorted(set(secrets)))
        shorter: list[tuple[int, ...]] = []
        beginnings: list[str] = []  # of the secret before, itself among them
        for secret in ordered:
            while beginnings and not secret.startswith(beginnings[-1]):
                beginnings.pop()
            shorter.append(tuple(map(len, beginnings)))
            beginnings.append(secret)
        return cls(ordered, tuple(shorter), max(map(len, ordered)))

    def find_longest(self, text: str, at: int) -> int:
        """Return the length of the longest secret at a position; 0 if there is none.

        It is the last one that is not greater than the text, or the longest one that this begins with, and the text
        too. So the time hardly depends on the number of secrets, which a server may choose.
        """
        here = text[at : at + self.longest]
        index = bisect_right(self.secrets, here) - 1
        if index < 0:
            return 0
        found = self.secrets[index]
        if here.startswith(found):
            return len(found)
        lengths = self.shorter[index]
        position = bisect_right(lengths, _count_common(found, here)) if lengths else 0
        return lengths[position - 1] if position else 0


def _count_common(one: str, other: str) -> int:
    """Return how many characters at the beginning of two texts are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Redactor:
    """Replaces known secrets by `***`; secrets are only ever added.

    The time it takes depends on the length of the text, not on the number of secrets. Most text has none: one search
    for the starts of all of them shows that in a fiftieth of the time.
    """

    def __init__(self, secrets: Iterable[str] = (), base: "Redactor | None" = None) -> None:
        self._base = base
        self._groups: dict[str, str | _Group] = {}  # by their start; most have one secret
        self._patterns: set[bytes] = set()  # for the starts of the known ones
        self._starts: Any = None  # the pattern for any of these
        self.longest: int = base.longest if base is not None else 0  # characters of a secret
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Add secrets; those shorter than `MIN_SECRET_LENGTH` are ignored."""
        self._add(secrets, list_forms)

    def add_from_server(self, secrets: Iterable[str]) -> None:
        """Add secrets that a server has chosen, in their commonest forms alone: all forms could take minutes."""
        self._add(secrets, list_common_forms)

    def _add(self, secrets: Iterable[str], list_forms_of: Callable[[str], Iterable[str]]) -> None:
        long_enough = {secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}
        new = {form for secret in long_enough for form in list_forms_of(secret)}
        by_start: dict[str, list[str]] = {}
        for form in new:
            by_start.setdefault(form[:MIN_SECRET_LENGTH], []).append(form)
        for start, forms in by_start.items():
            known = self._groups.get(start, ())
            together = {*forms, *((known,) if isinstance(known, str) else known.secrets if known else ())}
            self._groups[start] = _Group.of(together) if len(together) > 1 else next(iter(together))
        patterns = set(map(_write_pattern, new)) - self._patterns
        if patterns:  # after the rest: a search in another thread has either all of the new secrets, or none
            self._patterns |= patterns
            self._starts = _compile_any(self._patterns)
        self.longest = max([self.longest, *map(len, new)])

    def __call__(self, text: str) -> str:
        return self.redact_part(text, 0, len(text))

    def redact_part(self, text: str, start: int, end: int) -> str:
        """Return the characters from `start` to `end`, with a mask for each secret that is there, also in part."""
        parts: list[str] = []
        done = start
        for begins, ends in self._find_secrets(text):
            if begins >= end:
                break
            if ends > start:
                parts += [text[done:begins], MASK]
                done = ends
        return "".join([*parts, text[done:end]]) if parts else text[start:end]

    def _find_secrets(self, text: str) -> list[tuple[int, int]]:
        """Return where secrets are, in order; those that overlap are one."""
        found = self._base._find_secrets(text) if self._base is not None else []  # noqa: SLF001 - of the same class
        if len(text) < MIN_SECRET_LENGTH or self._starts is None or not _has(self._starts, text):
            return found
        own = ((at, at + self._find_longest(text, at)) for at in range(len(text) - MIN_SECRET_LENGTH + 1))
        merged: list[tuple[int, int]] = []
        for begins, ends in sorted([*found, *(each for each in own if each[1] > each[0])]):
            if merged and begins < merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], ends)
            else:
                merged.append((begins, ends))
        return merged

    def _find_longest(self, text: str, at: int) -> int:
        """Return the length of the longest secret at a position of a text; 0 if there is none."""
        found = self._groups.get(text[at : at + MIN_SECRET_LENGTH])
        if found is None:
            return 0
        if isinstance(found, str):
            return len(found) if text.startswith(found, at) else 0
        return found.find_longest(text, at)

    def redact_head(self, text: str, limit: int, *, is_cut: bool = False) -> str:
        """Return the first `limit` characters, redacted; the time does not depend on the whole text.

        Where `text` itself is cut, its end may be a part of a secret, and is left out.
        """
        end = min(limit, max(0, len(text) - self.longest)) if is_cut else limit
        return self.redact_part(text[: limit + self.longest], 0, min(end, len(text)))[:limit]

    def redact_tail(self, text: str, limit: int) -> str:
        """Return the last `limit` characters, redacted; the time does not depend on the whole text."""
        part = text[-(limit + self.longest) :]
        return self.redact_part(part, max(0, len(part) - limit), len(part))[-limit:]

    def with_secret(self, secret: str) -> "Redactor":
        """Return a redactor that also masks this secret."""
        return Redactor([secret], base=self)

    def with_secret_from_server(self, secret: str) -> "Redactor":
        """Return a redactor that also masks this secret, which a server has chosen."""
        made = Redactor(base=self)
        made.add_from_server([secret])
        return made

    def redact_all(self, value: Any) -> Any:
        """Return maps and lists with every string in them redacted; the same ones if there is no secret."""
        return self._redact_all(value) if self._may_be_in("\0".join(_list_texts(value))) else value

    def _may_be_in(self, text: str) -> bool:
        if self._base is not None and self._base._may_be_in(text):  # noqa: SLF001 - of the same class
            return True
        return self._starts is not None and _has(self._starts, text)

    def _redact_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self._redact_all(item) for key, item in value.items()}
        return [self._redact_all(item) for item in value] if isinstance(value, list | tuple) else value


def _list_texts(value: Any) -> Iterator[str]:
    """Yield the strings in maps and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _list_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _list_texts(item)
