"""Style sheets, scripts and icons. Their addresses contain a digest of them, so that browsers keep them."""

from mimetypes import guess_type

from aiohttp import web

from console.rendering import STATIC
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.web import add_route


def add_routes(app: web.Application) -> None:
    files = {
        path.name: (path.read_bytes(), guess_type(path.name)[0] or "application/octet-stream")
        for path in STATIC.iterdir()
    }

    async def read(request: web.Request) -> web.Response:
        if (found := files.get(request.match_info["name"])) is None:
            raise ApiError(404, "not_found", "there is no such file")
        body, content_type = found
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "Content-Type": content_type}
        response = web.Response(body=body, headers=headers)
        response.enable_compression()
        return response

    add_route(app, "GET", "/static/{version}/{name}", read, AccessRequirement.PUBLIC)
