"""Keeping secrets out of whatever leaves the program as text."""

from collections.abc import Iterable

MASK = "***"
SHORTEST = 4  # masking every "a" would make all text unreadable and hide nothing


class Redactor:
    """Replaces every secret it was told of by `***`; a reload only ever adds to what it knows."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: list[str] = []
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        known = {*self._secrets, *(secret for secret in secrets if len(secret) >= SHORTEST)}
        # Longest first, or a secret that contains another would be left in part.
        self._secrets = sorted(known, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, MASK)
        return text
