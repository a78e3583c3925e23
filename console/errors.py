"""The page that people see instead of an error as JSON."""

from aiohttp import web

from console.rendering import PageRenderer
from runtime.errors import ApiError
from runtime.web import ERROR_PAGE


def add_error_page(app: web.Application, renderer: PageRenderer) -> None:
    async def show(request: web.Request, error: ApiError) -> web.Response:
        sent = {"message": error.message, "status": error.status}
        response = await renderer.respond(request, "error.html", sent, status=error.status)
        response.headers.update(error.headers or {})
        return response

    app[ERROR_PAGE] = show
