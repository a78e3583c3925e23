"""Keeping secrets out of whatever leaves the program as text."""

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
_YARL = "!$'()*,/:;?@"  # what yarl leaves as it is in a form
MIN_SECRET_LENGTH = 4  # masking every "a" would make all text unreadable and hide nothing


class Redactor:
    """Replaces every secret it was told of by `***`; a reload only ever adds to what it knows.

    What it costs depends on the text, not on how many secrets there are.
    """

    def __init__(self, secrets: Iterable[str] = (), beside: "Redactor | None" = None) -> None:
        self._beside = beside
        self._known: set[str] = set()
        self._by_start: dict[str, list[str]] = {}  # the longest first
        self.longest: int = beside.longest if beside is not None else 0  # characters of a secret
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        plain = {secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}
        fresh = {form for secret in plain for form in _forms(secret)} - self._known
        for form in fresh:
            of_start = self._by_start.setdefault(form[:MIN_SECRET_LENGTH], [])
            of_start.append(form)
            of_start.sort(key=len, reverse=True)
        self._known |= fresh
        self.longest = max([self.longest, *map(len, fresh)])

    def __call__(self, text: str) -> str:
        if self._beside is not None:
            text = self._beside(text)
        if not self._by_start or len(text) < MIN_SECRET_LENGTH:
            return text
        kept: list[str] = []
        shown = ends = 0  # up to where the text is dealt with, and up to where a secret goes
        for at in range(len(text) - MIN_SECRET_LENGTH + 1):
            for secret in self._by_start.get(text[at : at + MIN_SECRET_LENGTH], ()):
                if text.startswith(secret, at):
                    if at >= ends:  # else it overlaps the one before, which its mask covers too
                        kept += [text[shown:at], MASK]
                    ends = shown = max(ends, at + len(secret))
                    break
        return "".join([*kept, text[shown:]]) if kept else text

    def with_secret(self, secret: str) -> "Redactor":
        """One that masks this secret too."""
        return Redactor([secret], beside=self)

    def redact_all(self, value: Any) -> Any:
        """The same maps and lists with every text in them masked."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self.redact_all(item) for key, item in value.items()}
        return [self.redact_all(item) for item in value] if isinstance(value, list | tuple) else value


def _forms(secret: str) -> tuple[str, ...]:
    """A secret as it is, and as it looks once it was quoted: in JSON, in Python, in a URL, in a form."""
    quoted = (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret))
    in_urls = (quote(secret), quote(secret, safe=""), quote_plus(secret), quote_plus(secret, safe=_YARL))
    return secret, *in_urls, *(each[1:-1] for each in quoted)
