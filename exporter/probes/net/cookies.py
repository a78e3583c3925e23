"""The cookies that servers set in the requests of one probe."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from yarl import URL

from exporter.probes.net.http_request import HttpRequest
from runtime.times import parse_http_date

if TYPE_CHECKING:
    from aiohttp import CookieJar

COOKIES_LIMIT = 200  # of one response; browsers keep about as many


class Cookies:
    """Keeps cookies from the responses of a probe, each for the URLs that it is meant for."""

    def __init__(self) -> None:
        self._jar: CookieJar | None = None
        self.values: list[str] = []  # which may be those of sessions

    def note(self, headers: Iterable[tuple[str, str]], url: URL) -> None:
        """Keep the cookies of a response, whose headers have names in lower case."""
        set_cookies = [value for name, value in headers if name == "set-cookie"]
        if set_cookies:
            self.values += list_values(set_cookies)
            self._jar = self._jar or _create_jar()
            self._jar.update_cookies_from_headers(list(map(_end_at_epoch, set_cookies[:COOKIES_LIMIT])), url)

    def add_to(self, request: HttpRequest) -> HttpRequest:
        """Return the request with the cookies for its URL."""
        return request.with_cookies(_select(self._jar, request.url)) if self._jar else request


def list_values(set_cookies: Iterable[str]) -> list[str]:
    """Return the values of cookies, as they are set by headers."""
    return [each.partition(";")[0].partition("=")[2].strip(' "') for each in set_cookies]


def _end_at_epoch(set_cookie: str) -> str:
    """Return a cookie that ends with 1970 or before, as those do that servers delete, in a form that the jar knows."""
    for attribute in set_cookie.split(";")[1:]:
        name, _, value = attribute.partition("=")
        if name.strip().lower() == "expires" and (date := parse_http_date(value.strip())) is not None and date <= 0:
            return f"{set_cookie}; Max-Age=0" if "max-age" not in set_cookie.lower() else set_cookie
    return set_cookie


def _create_jar() -> "CookieJar":
    from aiohttp import CookieJar

    return CookieJar(unsafe=True, quote_cookie=False)


def _select(jar: "CookieJar", url: URL) -> dict[str, str]:
    """Return the cookies for a URL, with their values as the server sent them: in quotes, if they were."""
    as_sent = {(cookie.key, cookie.value): cookie.coded_value for cookie in jar}
    return {name: as_sent.get((name, cookie.value), cookie.value) for name, cookie in jar.filter_cookies(url).items()}
