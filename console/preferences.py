"""What a reader chooses for their browser: language and colours. It is stored in cookies."""

from aiohttp import web

from console.languages import COOKIE, LANGUAGES
from console.rendering import THEME_COOKIE, THEMES
from runtime.access.browser import read_form
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.web import add_route, parse_local_path, relative_path

KEPT_FOR = 365 * 86400
_CHOICES = {"language": (COOKIE, (*LANGUAGES, "")), "theme": (THEME_COOKIE, (*THEMES, ""))}


def add_routes(app: web.Application) -> None:
    add_route(app, "POST", "/preferences", _choose, AccessRequirement.VIEWER)


async def _choose(request: web.Request) -> web.Response:
    form = await read_form(request)
    location = relative_path(request, parse_local_path(form.get("next", "")))
    response = web.Response(status=303, headers={"Location": location})
    for field, (cookie, values) in _CHOICES.items():
        if field in form:
            if form[field] not in values:
                raise ApiError(400, "bad_request", f"{field} is one of {', '.join(filter(None, values))}, or empty")
            response.set_cookie(cookie, form[field], max_age=KEPT_FOR, path="/", samesite="Lax", secure=request.secure)
    return response
