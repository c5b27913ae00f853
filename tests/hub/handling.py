"""HTTP for the test Hub: the routes' table, tokens, bodies in chunks, answers in JSON, ranges of a file."""

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import store

ERRORS: dict[type[store.StoreError], tuple[int, str | None]] = {
    store.RepoNotFound: (404, "RepoNotFound"),
    store.RevisionNotFound: (404, "RevisionNotFound"),
    store.EntryNotFound: (404, "EntryNotFound"),
    store.StaleParent: (412, None),
    store.InvalidContent: (400, None),
}
Route = Callable[..., None]
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], bool, Route]] = []


def route(methods: str, pattern: str, write: bool = False) -> Callable[[Route], Route]:
    """Registers a method of ``Handler``; named groups of the pattern become its arguments, unquoted."""

    def register(function: Route) -> Route:
        ROUTES.append((tuple(methods.split()), re.compile(pattern), write, function))
        return function

    return register


class HttpError(Exception):
    """An answer other than success: status, X-Error-Code (which the client maps to an exception), message."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class LoggingServer(ThreadingHTTPServer):
    """The listening socket, with a log of requests and the token that may write."""

    daemon_threads = True

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler], token: str, log_path: Path) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        self.log_path, self.log_lock = log_path, threading.Lock()

    def log_request(self, line: str) -> None:
        with self.log_lock, open(self.log_path, "a") as log:
            log.write(f"{line}\n")


class RoutedHandler(BaseHTTPRequestHandler):
    """One connection, whose requests the routes answer."""

    server: LoggingServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """The log is written by ``handle_request``."""

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.server.log_request(f"{self.command} {unquote(url.path)}")
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with tempfile.SpooledTemporaryFile(max_size=1 << 20) as body:
            for chunk in self.read_chunks():
                body.write(chunk)
            body.seek(0)
            self.body = body
            try:
                self.dispatch(url.path)
            except store.StoreError as error:
                status, code = ERRORS[type(error)]
                self.send_error_message(HttpError(status, code, str(error)))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                self.send_error_message(HttpError(400, None, f"Malformed request: {error!r}"))
            except HttpError as error:
                self.send_error_message(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def dispatch(self, path: str) -> None:
        """Finds the route; a wrong token is refused everywhere, a missing one where something is written."""
        for methods, pattern, write, function in ROUTES:
            if self.command in methods and (match := pattern.fullmatch(path)):
                self.check_token(required=write)
                return function(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise HttpError(501, None, f"not implemented by the test Hub: {self.command} {path}")

    def check_token(self, required: bool) -> None:
        given = self.headers.get("Authorization")
        if given is None and not required:
            return
        if given != f"Bearer {self.server.token}":
            message = "Invalid credentials in Authorization header" if given else "Invalid username or password."
            raise HttpError(401, None, message, {"WWW-Authenticate": 'Bearer realm="Authentication required"'})

    def read_chunks(self) -> Iterator[bytes]:
        """The body of the request, whether its length was announced or it comes in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (chunk := self.rfile.read(min(left, 1 << 20))):
            left -= len(chunk)
            yield chunk

    def send(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value, default=str).encode()  # YAML has dates
        self.send(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error_message(self, error: HttpError) -> None:
        message = " ".join(str(error).split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        self.send_json({"error": str(error)}, error.status, headers)

    def json_body(self) -> Any:
        return json.load(self.body)

    def send_file(self, file: Path, size: int, headers: dict[str, str]) -> None:
        first, last, status = 0, size - 1, 200
        if self.command == "GET" and (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            first, last = byte_range(asked[1], asked[2], size)
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
        self.send(status, headers, last - first + 1)
        if self.command == "GET":
            with open(file, "rb") as content:
                content.seek(first)
                if last == size - 1:
                    shutil.copyfileobj(content, self.wfile)
                else:
                    self.wfile.write(content.read(last - first + 1))


def byte_range(first: str, last: str, size: int) -> tuple[int, int]:
    """The bounds of ``bytes=first-last``, either of which may be missing; 416 if nothing of it is in the file."""
    if first:
        start, stop = int(first), min(int(last), size - 1) if last else size - 1
    else:
        start, stop = max(size - int(last or 0), 0), size - 1
    if start > stop:
        raise HttpError(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{size}"})
    return start, stop
