"""Headers that a proxy passes on, and those that it does not (RFC 9110, section 7.6.1)."""

from multidict import CIMultiDict, CIMultiDictProxy

PRIORITY, UPSTREAM = "X-Priority", "X-Upstream"  # for the gateway itself
_HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "http2-settings",
    }
)  # fmt: skip
# Credentials of the client, what belongs to its connection with the gateway, and what the gateway sets itself.
_OF_REQUESTS = frozenset(
    {"host", "authorization", "api-key", "x-api-key", "cookie", "expect", "content-length"}
    | {PRIORITY.lower(), UPSTREAM.lower()}
)  # fmt: skip
# What browsers apply to all of the gateway's origin or host name.
_OF_RESPONSES = frozenset({"set-cookie", "strict-transport-security", "alt-svc", "clear-site-data"})


def request_headers(headers: CIMultiDictProxy[str], api_key: str | None) -> CIMultiDict[str]:
    """Return the headers of a request for an upstream, with the upstream's key in place of the client's."""
    passed = _without(headers, _OF_REQUESTS)
    if api_key is not None:
        passed["Authorization"] = f"Bearer {api_key}"
    return passed


def response_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the headers of an upstream's response for the client."""
    return _without(headers, _OF_RESPONSES)


def _without(headers: CIMultiDictProxy[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for value in headers.getall("Connection", []) for name in value.split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in _HOP_BY_HOP and name.lower() not in dropped and name.lower() not in named
    )
