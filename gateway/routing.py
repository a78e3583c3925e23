"""Which upstream a request goes to, and under which name it knows the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

PREFIX = "/v1"  # of the paths that OpenAI's API has


@dataclass(frozen=True)
class Route:
    """An upstream and, for requests with an alias, the model that the alias stands for."""

    upstream: str
    model: str | None = None


@dataclass(frozen=True)
class UpstreamModels:
    """What an upstream has: patterns of models, in which `*` stands for any characters, and aliases."""

    match: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    fallback: Sequence[str] = ()


def is_versioned(path: str) -> bool:
    """Whether a path, which may have a query, is below `/v1`."""
    return path.startswith((f"{PREFIX}/", f"{PREFIX}?")) or path == PREFIX


def _matches(parts: Sequence[str], model: str) -> bool:
    """Whether a name has the parts of a pattern, in their order. The time is linear: clients choose the name."""
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return model == first
    at, end = len(first), len(model) - len(last)
    if at > end or not (model.startswith(first) and model.endswith(last)):
        return False
    for part in parts[1:-1]:
        found = model.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


class UnknownUpstreamError(Exception):
    """A request names an upstream that does not exist."""


class Router:
    def __init__(self, upstreams: Mapping[str, UpstreamModels], default: str | None) -> None:
        self._upstreams, self._default = upstreams, default
        self._patterns = [
            (pattern.split("*"), name) for name, upstream in upstreams.items() for pattern in upstream.match
        ]

    def find(self, model: str | None, named: str | None = None) -> list[Route]:
        """Return the upstream of a request, and those that replace it when it fails; none if no upstream has the model.

        `named` is the upstream that the request names itself. Raises UnknownUpstreamError.
        """
        if named is not None and named not in self._upstreams:
            raise UnknownUpstreamError(named)
        name = named or self._match(model)
        return [] if name is None else list(self._with_fallback(name, model))

    def _match(self, model: str | None) -> str | None:
        if model is not None:
            for name, upstream in self._upstreams.items():
                if model in upstream.aliases:
                    return name
            for parts, name in self._patterns:
                if _matches(parts, model):
                    return name
        return self._default

    def _with_fallback(self, name: str, model: str | None) -> Iterator[Route]:
        for each in (name, *self._upstreams[name].fallback):
            yield Route(each, self._upstreams[each].aliases.get(model) if model is not None else None)
