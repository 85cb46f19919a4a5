"""An HTTP server on loopback that serves a folder and can inject faults."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.processes import HANG_SECONDS

Fault = Callable[["Handler", bytes], None]


class Server:
    """A server with its `url`.

    `faults` has the faults of the next requests by file name, one per request. `requests` counts the requests by file
    name. `closing` is set at shutdown and ends faults that wait.
    """

    def __init__(self, folder: Path, port: int, nested: bool) -> None:
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.nested = nested
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, self, folder))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/set"

    def next_fault(self, name: str) -> Fault | None:
        with self._lock:
            self.requests[name] += 1
            waiting = self.faults.get(name)
            return waiting.pop(0) if waiting else None


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, owner: Server, folder: Path, *arguments) -> None:
        self.owner, self.folder = owner, folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        whole = self.path.partition("?")[0]
        name = whole.rsplit("/", 1)[1]
        path = self.folder / (whole.lstrip("/") if self.owner.nested else name)
        fault = self.owner.next_fault(name)
        if whole == "/set" and not path.exists():
            links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in self.folder.iterdir())
            return self.answer(links.encode(), len(links))
        if not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        if fault:
            with contextlib.suppress(ConnectionError):
                fault(self, data)
            self.close_connection = True
        else:
            self.answer(data, len(data))

    def answer(self, data: bytes, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, port: int = 0, nested: bool = False) -> Iterator[Server]:
    """Serve the files of a folder, as URL/NAME, or with `nested` by their paths in it. port: 0 takes a free one."""
    server = Server(folder, port, nested)
    threading.Thread(target=server._server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server._server.shutdown()
        server._server.server_close()


# --- faults ----------------------------------------------------------------------------------------------------------


def stall(handler: Handler, data: bytes) -> None:
    """Send half of the body, then nothing."""
    handler.answer(data[: len(data) // 2], len(data))
    handler.wfile.flush()
    handler.owner.closing.wait(HANG_SECONDS)


def silence(handler: Handler, data: bytes) -> None:
    """Send nothing, not even a header."""
    handler.owner.closing.wait(HANG_SECONDS)


def reset(handler: Handler, data: bytes) -> None:
    handler.answer(data[: len(data) // 2], len(data))
    handler.wfile.flush()
    handler.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: close() sends a reset


def unavailable(handler: Handler, data: bytes) -> None:
    handler.send_error(503)


def wrong_bytes(handler: Handler, data: bytes) -> None:
    middle = len(data) // 2
    handler.answer(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], len(data))


def short_body(handler: Handler, data: bytes) -> None:
    """Send a truncated file with a matching Content-Length."""
    handler.answer(data[:-1000], len(data) - 1000)


def long_body(handler: Handler, data: bytes) -> None:
    handler.answer(data + bytes(100_000), len(data) + 100_000)


def wrong_length(handler: Handler, data: bytes) -> None:
    """Announce a larger Content-Length than is sent."""
    handler.answer(data, len(data) + 1000)


def login_page(handler: Handler, data: bytes) -> None:
    """Send the login page of a proxy instead of the file."""
    page = b"<html>please log in</html>"
    handler.answer(page, len(page))


def endless(handler: Handler, data: bytes) -> None:
    """Send one byte at a time: never stalled for long, but not finished either."""
    handler.answer(b"", len(data))
    for byte in data:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if handler.owner.closing.wait(0.1):
            return


def forbidden(handler: Handler, data: bytes) -> None:
    handler.send_error(403)


FAULTS: tuple[Fault, ...] = (
    stall,
    silence,
    reset,
    unavailable,
    wrong_bytes,
    short_body,
    long_body,
    wrong_length,
    login_page,
)
