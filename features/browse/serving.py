"""A folder served on 127.0.0.1, only to browsers on this machine.

Only regular files below the folder with a known suffix are served; there are no listings and no links out of it. A page
from elsewhere can neither read (the Host header is checked, which refuses other names that resolve to this address) nor
write (a rating must come from this origin).
"""

import errno
import json
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from gsae.errors import InterruptedRun, UsageError

from .ratings import Ratings

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
}
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
RATINGS = "/ratings"
MAX_BODY = 1024  # bytes of a rating
SECONDS = 30  # that a connection may be silent


def serve(folder: Path, port: int, ready: Callable[[str], None], ratings: Ratings | None = None) -> None:
    """Serve `folder` until SIGINT or SIGTERM; `ready` gets the address once the server answers.

    port: 0 for any free one. ratings: read and written at /ratings, if given. Raises UsageError where the port is
    taken.
    """
    with Server(folder, port, ratings) as server:
        ready(server.url)
        try:
            server.serve_forever()
        except (KeyboardInterrupt, InterruptedRun):
            return  # the normal end of serving


class Server(ThreadingHTTPServer):
    """A server of one folder on 127.0.0.1."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, ratings: Ratings | None = None) -> None:
        """Bind to `port`, 0 for any free one. Raises UsageError where it cannot be used."""
        self.folder, self.ratings = folder.resolve(), ratings
        try:
            super().__init__(("127.0.0.1", port), partial(_Handler))
        except (OSError, OverflowError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "is taken; give another --port, or 0 for any" if taken else f"cannot be used: {error}"
            raise UsageError(f"Port {port} {why}.") from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, str]:
        """The Host headers that are accepted."""
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gsae", ""
    timeout = SECONDS

    @property
    def ours(self) -> Server:
        return cast(Server, self.server)

    def do_GET(self) -> None:
        if self._known_host():
            if self.ours.ratings is not None and self.path == RATINGS:
                self._answer_json(self.ours.ratings.current())
            else:
                self._answer_file()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Take a rating: {"trial": n, "rating": 0, 1 or 2}."""
        if not self._known_host():
            return
        if self.ours.ratings is None or self.path != RATINGS:
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        elif self.headers.get("Origin") not in {f"http://{host}" for host in self.ours.hosts}:
            self.send_error(HTTPStatus.FORBIDDEN, "Not from this origin")
        elif self.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not (length := self.headers.get("Content-Length", "")).isascii() or not length.isdecimal():
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
        elif int(length[:9]) > MAX_BODY:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._record(self.ours.ratings, self.rfile.read(int(length)))

    def _record(self, ratings: Ratings, body: bytes) -> None:
        try:
            found = json.loads(body)
            ratings.record(found["trial"], found["rating"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self.send_error(HTTPStatus.BAD_REQUEST)
        except OSError as error:
            self.send_error(HTTPStatus.INSUFFICIENT_STORAGE, f"Not written: {error.strerror}")
        else:
            self._answer_json(ratings.current())

    def _known_host(self) -> bool:
        known = self.headers.get("Host") in self.ours.hosts
        if not known:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        return known

    def _answer_file(self) -> None:
        path = _below(self.ours.folder, self.path)
        try:
            content = path.read_bytes() if path is not None else None
        except OSError:
            content = None
        if path is None or content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._answer(content, TYPES[path.suffix])

    def _answer_json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), TYPES[".json"])

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; the command prints the address."""


def _below(folder: Path, target: str) -> Path | None:
    """Return the file below `folder` (resolved) that a request names; None where none may be served."""
    name = unquote(urlsplit(target).path)
    parts = name.removeprefix("/").split("/")
    parts = [*parts[:-1], parts[-1] or "index.html"]
    if not name.startswith("/") or any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
        return None
    path = folder.joinpath(*filter(None, parts)).resolve()
    inside = path.is_relative_to(folder) and path.is_file() and path.suffix in TYPES
    return path if inside else None
