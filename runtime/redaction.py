"""Redaction of secrets from all text that leaves the program."""

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
_YARL = "!$'()*,/:;?@"  # not quoted by yarl in forms
MIN_SECRET_LENGTH = 6  # masking every "prod" would make text unreadable


class Redactor:
    """Replaces known secrets by `***`; secrets are only ever added.

    The time it takes depends on the length of the text, not on the number of secrets.
    """

    def __init__(self, secrets: Iterable[str] = (), base: "Redactor | None" = None) -> None:
        self._base = base
        self._known: set[str] = set()
        self._by_start: dict[str, list[str]] = {}  # the longest first
        self.longest: int = base.longest if base is not None else 0  # characters of a secret
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Add secrets; those shorter than `MIN_SECRET_LENGTH` are ignored."""
        long_enough = {secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}
        new = {form for secret in long_enough for form in _list_forms(secret)} - self._known
        for form in new:
            same_start = self._by_start.setdefault(form[:MIN_SECRET_LENGTH], [])
            same_start.append(form)
            same_start.sort(key=len, reverse=True)
        self._known |= new
        self.longest = max([self.longest, *map(len, new)])

    def __call__(self, text: str) -> str:
        if self._base is not None:
            text = self._base(text)
        if not self._by_start or len(text) < MIN_SECRET_LENGTH:
            return text
        parts: list[str] = []
        done = end = 0  # where the processed text ends, and where the last secret ends
        for at in range(len(text) - MIN_SECRET_LENGTH + 1):
            for secret in self._by_start.get(text[at : at + MIN_SECRET_LENGTH], ()):
                if text.startswith(secret, at):
                    if at >= end:  # an overlap with the secret before is covered by its mask
                        parts += [text[done:at], MASK]
                    end = done = max(end, at + len(secret))
                    break
        return "".join([*parts, text[done:]]) if parts else text

    def redact_head(self, text: str, limit: int) -> str:
        """Return at most `limit` characters of the beginning, redacted; the time does not depend on the whole text."""
        part = text[: limit + self.longest]
        redacted = self(part)
        if len(part) < len(text):  # the end may be a part of a secret
            redacted = redacted[: max(0, len(redacted) - self.longest)]
        return redacted[:limit]

    def redact_tail(self, text: str, limit: int) -> str:
        """Return at most `limit` characters of the end, redacted; the time does not depend on the whole text."""
        part = text[-(limit + self.longest) :]
        redacted = self(part)
        if len(part) < len(text):  # the beginning may be a part of a secret
            redacted = redacted[self.longest :]
        return redacted[-limit:]

    def with_secret(self, secret: str) -> "Redactor":
        """Return a redactor that also masks this secret."""
        return Redactor([secret], base=self)

    def redact_all(self, value: Any) -> Any:
        """Return a copy of maps and lists with every string in them redacted."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self.redact_all(item) for key, item in value.items()}
        return [self.redact_all(item) for item in value] if isinstance(value, list | tuple) else value


def _list_forms(secret: str) -> tuple[str, ...]:
    """Return the forms that a secret may have in text: as it is, and quoted for JSON, Python, URLs and HTML forms."""
    quoted = (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret))
    in_urls = (quote(secret), quote(secret, safe=""), quote_plus(secret), quote_plus(secret, safe=_YARL))
    return secret, *in_urls, *(each[1:-1] for each in quoted)
