"""A service of the prepared fleet: `prepared_program.py NAME PORT [URL…]` serves a page on loopback.

With URLs it asks those services first, and answers without them after a while, as a site with a cache does.
"""

import http.client
import http.server
import sys
from urllib.parse import urlsplit

PATIENCE = 1.5  # seconds for each of the other services


class Page(http.server.BaseHTTPRequestHandler):
    name = ""
    others: tuple[str, ...] = ()

    def do_GET(self) -> None:
        for url in self.others:
            if not _answers(url):
                _log("WARNING", f"no answer from {url} within {PATIENCE} s, using the cache")
        text = f"{self.name} is well\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_request(self, code: int | str = "-", _size: int | str = "-") -> None:
        _log("INFO", f"{self.command} {self.path} {code}")


def _answers(url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def _log(level: str, text: str) -> None:
    sys.stdout.write(f"{level} {Page.name}: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    Page.name, Page.others = sys.argv[1], tuple(sys.argv[3:])
    _log("INFO", "ready")
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Page).serve_forever()
