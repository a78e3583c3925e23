"""Long JSON responses, sent in chunks between which probes run."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from aiohttp import web

ITEMS_PER_CHUNK = 100


def render_object(value: Mapping[str, Any]) -> str:
    """Return an object as JSON. Items of lists are encoded one by one: other threads wait while one is encoded."""
    return f"{{{', '.join(f'{json.dumps(key)}: {_render(item)}' for key, item in value.items())}}}"


def _render(value: Any) -> str:
    return f"[{', '.join(map(json.dumps, value))}]" if isinstance(value, list) else json.dumps(value)


async def stream_list(
    request: web.Request, fields: Mapping[str, Any], name: str, items: Iterable[Mapping[str, Any]]
) -> web.StreamResponse:
    """Respond with an object of these fields, and under `name` the list of items, which are made chunk by chunk."""

    async def texts() -> AsyncIterator[str]:
        for item in items:
            yield json.dumps(item)

    return await stream_texts(request, fields, name, texts())


async def stream_texts(
    request: web.Request, fields: Mapping[str, Any], name: str, texts: AsyncIterator[str]
) -> web.StreamResponse:
    """Respond as `stream_list` does, with items that are JSON already."""
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in fields.items())
    chunk, separator = [f'{{{head}"{name}": ['], ""
    async for text in texts:
        chunk.append(f"{separator}{text}")
        separator = ", "
        if len(chunk) >= ITEMS_PER_CHUNK:
            await response.write("".join(chunk).encode())
            chunk.clear()
            await asyncio.sleep(0)
    await response.write(f"{''.join(chunk)}]}}".encode())
    await response.write_eof()
    return response
