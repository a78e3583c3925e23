"""The web servers of the documentation's examples: a wiki, a transcoder, a chat that accepts everything, a ticket system."""

import http.server
import json
from pathlib import Path

STOPPED = Path("/var/lib/defib/wiki-stopped")  # while it exists, the wiki is down


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/status":
            self._answer(200, json.dumps({"channels": [{"name": "ch1", "state": "running"}]}).encode())
        elif self.path == "/" and STOPPED.exists():
            self._answer(503, b"")
        else:
            self._answer(200, b"<title>Wiki</title>Welcome")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/tickets":
            self._answer(204, b"")
        else:
            self._answer(200, json.dumps({"code": 0, "msg": "success"}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Page).serve_forever()
