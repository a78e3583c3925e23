"""Keeping secrets out of whatever leaves the program as text."""

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST = 4  # masking every "a" would make all text unreadable and hide nothing


class Redactor:
    """Replaces every secret it was told of by `***`; a reload only ever adds to what it knows."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: list[str] = []
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        plain = {secret for secret in secrets if len(secret) >= SHORTEST}
        known = {*self._secrets, *(form for secret in plain for form in _forms(secret))}
        # Longest first, or a secret that contains another would be left in part.
        self._secrets = sorted(known, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, MASK)
        return text

    def also(self, secret: str) -> "Redactor":
        """One that masks this secret too."""
        return Redactor([*self._secrets, secret])

    def within(self, value: Any) -> Any:
        """The same maps and lists with every text in them masked."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self.within(item) for key, item in value.items()}
        return [self.within(item) for item in value] if isinstance(value, list | tuple) else value


def _forms(secret: str) -> tuple[str, ...]:
    """A secret as it is, and as it looks once it was quoted."""
    quoted = (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret))
    return secret, quote(secret), *(each[1:-1] for each in quoted)
