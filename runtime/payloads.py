"""Bodies of HTTP requests and responses: reading and parsing them within limits, without blocking the event loop."""

import asyncio
import json
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from json import scanner
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
ACCEPT_ENCODING = "gzip"  # what `read_body` can decode
SHORT = 256 * 1024  # bytes of a body that is parsed in the event loop
_CONTAINERS_LIMIT = 150_000  # lists and objects of a document: the garbage collector blocks all threads
_MEMBERS_LIMIT = 50_000  # of an object
_STEP = 256 * 1024  # bytes that are decoded in one turn of the event loop
# A string without an end is one to the end: looking for it again from each quote in it would take hours.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{]', re.DOTALL)
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="payloads")


async def read_body(response: httpx.Response, body: bytearray, limit: int) -> bool:
    """Append the decoded body of a streamed response to `body`; return whether it has at most `limit` bytes.

    httpx itself would decode every part at once, to a thousand times its size. Raises httpx.HTTPError.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise httpx.DecodingError("unsupported content encoding", request=response.request)
    decoder = None if encoding == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 16)
    received = 0
    async for part in response.aiter_raw():
        received += len(part)
        if decoder is None:
            body += part
        else:
            await _decode(decoder, part, body, limit)
        if len(body) > limit or received > limit:
            del body[limit:]
            return False
        await asyncio.sleep(0)  # a peer that never stops sending must not block the event loop
    return True


async def _decode(decoder: "zlib._Decompress", part: bytes, body: bytearray, limit: int) -> None:
    while part and len(body) <= limit:
        try:
            body += decoder.decompress(part, _STEP)
        except zlib.error as error:
            raise httpx.DecodingError("the body is not valid gzip") from error
        part = decoder.unconsumed_tail
        await asyncio.sleep(0)


async def parse_body(parse: Callable[[bytes], T], body: bytes) -> T:
    """Return `parse(body)`, which for a long body runs in a thread."""
    if len(body) <= SHORT:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, parse, body)


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which are valid in JSON but cannot be stored or sent."""
    return text.encode("utf-8", "replace").decode()


def load_json(text: str | bytes) -> Any:
    """Parse a short JSON document from elsewhere; its texts can be stored and sent, since lone surrogates are replaced.

    Raises ValueError, also if it has too many levels.
    """
    try:
        return _replace_all_surrogates(json.loads(text))
    except RecursionError:
        raise ValueError("the JSON document has too many levels") from None


def _replace_all_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, dict):
        return {replace_surrogates(key): _replace_all_surrogates(item) for key, item in value.items()}
    return [_replace_all_surrogates(item) for item in value] if isinstance(value, list) else value


class TooManyValuesError(ValueError):
    """A JSON document has so many values that it would block all threads."""


class _InterruptibleDecoder(json.JSONDecoder):
    """Decodes with Python's own code for objects and arrays, so that other threads can run meanwhile."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_build_object)
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def _build_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members) > _MEMBERS_LIMIT:
        raise TooManyValuesError(f"a JSON object has more than {_MEMBERS_LIMIT} members")
    return dict(members)


def decode_json(body: bytes) -> Any:
    """Parse a JSON document; a long one slowly, for a thread. Raises ValueError and RecursionError.

    The decoder in C blocks all threads until its end, which takes up to 0.2 s for each MiB.
    """
    if len(body) <= SHORT:
        return json.loads(body)
    if _has_too_many_containers(body):
        raise TooManyValuesError(f"the JSON document has more than {_CONTAINERS_LIMIT} lists and objects")
    return _InterruptibleDecoder().decode(body.decode("utf-8-sig", "surrogatepass"))  # others take long to decode


def _has_too_many_containers(body: bytes) -> bool:
    """Whether there are more lists and objects than the limit, without brackets in strings."""
    if body.count(b"[") + body.count(b"{") <= _CONTAINERS_LIMIT:
        return False
    # One by one, so that other threads can run meanwhile.
    brackets = (match for match in _STRING_OR_BRACKET.finditer(body) if match.end() - match.start() == 1)
    return any(number > _CONTAINERS_LIMIT for number, _ in enumerate(brackets, 1))
