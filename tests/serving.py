"""An HTTP server that misbehaves on demand (http.server in a thread)."""

import email.utils
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTENT = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `files` by path, and `content` under any other. `plan` holds one behaviour a request; the last one stays.

    With `faulty`, requests for other paths are answered properly.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[Callable[[Handler], None]] = [Handler.proper]
        self.paths: list[str] = []  # of each request
        self.ranges: list[str | None] = []  # the Range header of each request
        self.content, self.etag = CONTENT, '"one"'
        self.files: dict[str, bytes] = {}
        self.faulty: str | None = None
        self.released = threading.Event()

    def address(self, path: str = "/model.pth") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.ranges.append(self.headers["Range"])
        if self.server.faulty not in (None, self.path):
            return self.proper()
        plan = self.server.plan
        (plan.pop(0) if len(plan) > 1 else plan[0])(self)

    @property
    def content(self) -> bytes:
        return self.server.files.get(self.path.removeprefix("/elsewhere"), self.server.content)

    def log_message(self, *_: Any) -> None: ...

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def wanted(self) -> int:
        """The first byte that this request should get: Range counts only if If-Range names the present file."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        return int(asked[1]) if asked and self.headers["If-Range"] == self.server.etag else 0

    def proper(self, stop: int | None = None) -> None:
        content, start = self.content, self.wanted()
        if start >= len(content):
            self.head(416, 0, Content_Range=f"bytes */{len(content)}")
        elif start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.head(206, len(content) - start, ETag=self.server.etag, Content_Range=span)
            self.wfile.write(content[start:stop])
        else:
            self.head(200, len(content), ETag=self.server.etag)
            self.wfile.write(content[:stop])

    def break_off(self) -> None:
        """A third further, then the connection ends."""
        self.proper(stop=self.wanted() + len(self.content) // 3)

    def stall(self) -> None:
        self.break_off()
        self.wfile.flush()
        self.server.released.wait(20)

    def no_range(self, stop: int | None = None) -> None:
        self.head(200, len(self.content))
        self.wfile.write(self.content[:stop])

    def no_range_and_break_off(self) -> None:
        self.no_range(len(self.content) // 3)

    def wrong_range(self) -> None:
        content = self.content
        self.head(
            206, len(content) - 5, ETag=self.server.etag, Content_Range=f"bytes 5-{len(content) - 1}/{len(content)}"
        )
        self.wfile.write(content[5:])

    def busy(self) -> None:
        self.head(503, 0)

    def gone(self) -> None:
        self.head(404, 0)

    def hang_up(self) -> None:
        self.close_connection = True

    def redirect(self) -> None:
        if self.path.startswith("/elsewhere"):
            return self.proper()
        self.head(302, 0, Location=f"/elsewhere{self.path}")

    def redirect_to_a_file(self) -> None:
        self.head(302, 0, Location="file:///etc/passwd")

    def redirect_to_ftp(self) -> None:
        self.head(302, 0, Location="ftp://127.0.0.1/model.pth")

    def redirect_for_ever(self) -> None:
        self.head(302, 0, Location=self.path)

    def chunked_and_break_off(self) -> None:
        self.protocol_version = "HTTP/1.1"
        self.head(200, None, Transfer_Encoding="chunked", ETag=self.server.etag)
        self.wfile.write(b"%x\r\n" % len(self.content) + self.content[: len(self.content) // 3])
        self.close_connection = True

    def compressed(self) -> None:
        self.head(200, 3, Content_Encoding="gzip")
        self.wfile.write(b"abc")

    def server_error(self) -> None:
        self.head(500, 0)

    def too_many(self) -> None:
        self.head(429, 0, Retry_After="0")

    def too_many_until_a_date(self) -> None:
        self.head(429, 0, Retry_After=email.utils.formatdate(time.time() + 0.2, usegmt=True))

    def busy_with_nonsense(self) -> None:
        self.head(503, 0, Retry_After="when it suits")

    def come_back_tomorrow(self) -> None:
        self.head(429, 0, Retry_After="86400")

    def forbidden(self) -> None:
        self.head(403, 0)

    def no_content(self) -> None:
        self.head(204, None)

    def web_page(self) -> None:
        self.head(200, 20, Content_Type="text/html; charset=utf-8")
        self.wfile.write(b"<html>Log in, please")

    def other_bytes(self) -> None:
        self.head(200, len(self.content))
        self.wfile.write(self.content[::-1])

    def nothing(self) -> None:
        self.head(200, 0)

    def cut(self) -> None:
        """The server's own copy is half a file, and it says so."""
        half = self.content[: len(self.content) // 2]
        self.head(200, len(half))
        self.wfile.write(half)

    def cut_without_a_length(self) -> None:
        self.head(200, None)
        self.wfile.write(self.content[: len(self.content) // 2])

    def longer(self) -> None:
        self.head(200, None)
        self.wfile.write(self.content + b"and more")

    def for_ever(self) -> None:
        self.head(200, None)
        while not self.server.released.is_set():
            self.wfile.write(bytes(100_000))

    def part_unasked(self) -> None:
        """206 for the whole, to a request without a range."""
        self.head(206, len(self.content), Content_Range=f"bytes 0-{len(self.content) - 1}/{len(self.content)}")
        self.wfile.write(self.content)

    def rest_as_the_whole(self) -> None:
        """200, but only what the range asked for."""
        rest = self.content[self.wanted() :]
        self.head(200, len(rest))
        self.wfile.write(rest)

    def whole_as_the_rest(self) -> None:
        """206 and the right header, but all bytes from the first."""
        content, start = self.content, self.wanted()
        if not start:
            return self.proper()
        self.head(206, None, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.wfile.write(content)

    def never_a_range(self) -> None:
        self.head(416, 0, Content_Range="bytes */17")

    def bad_length(self) -> None:
        self.head(200, None, Content_Length="-1")
        self.wfile.write(self.content[:1000])

    def bad_chunks(self) -> None:
        self.protocol_version = "HTTP/1.1"
        self.head(200, None, Transfer_Encoding="chunked")
        self.wfile.write(b"zz\r\n" + self.content[:1000])
        self.close_connection = True

    def no_http(self) -> None:
        self.wfile.write(b"220 ready for mail\r\n")
        self.close_connection = True

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server.released.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def drip_bytes(self) -> None:
        self.head(200, len(self.content))
        while not self.server.released.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def redirect_to_nobody(self) -> None:
        self.head(302, 0, Location="http://127.0.0.1:1/x")

    def redirect_nowhere(self) -> None:
        self.head(302, 0)


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
