"""Files by path or address: an address is downloaded once into the cache; a break is taken up where it happened."""

import email.utils
import fcntl
import hashlib
import http.client
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from blipds.errors import UserError
from blipds.files.paths import user_path

CHUNK = 1 << 20
MAX_WAIT = 30.0  # seconds between two attempts, at most, unless the server names more
MAX_RETRY_AFTER = 600.0  # seconds that a server may ask for
AGAIN = (408, 425, 429)  # client errors that pass by themselves; 5xx do, too
SLOWEST = 1000  # bytes a second; less, over the timeout, is a connection that stands still
PROGRESS = 1 << 16  # bytes that make an attempt worth its while: a server that breaks off sooner is asked no more

Check = Callable[[Path], None]


def fetch(
    location: str,
    cache_dir: Path,
    *,
    md5: str | None = None,
    size: int | None = None,
    check: Check | None = None,
    timeout: float = 60.0,
    attempts: int = 5,
    backoff: float = 1.0,
    progress: bool = True,
) -> Path:
    """A local file for `location`: a path is returned as it is, an http(s) address is downloaded to `cache_dir` once.

    md5: hex digest that the download must have. size: bytes that it must have. check(path): raises UserError where the
    content cannot be what was wanted. timeout: seconds after which a connection is given up that brings nothing, or
    less than SLOWEST. attempts: how many in a row may bring nothing new, with `backoff`, twice that, ... seconds
    between them, or what the server asks for (Retry-After).
    One process downloads while others on the node wait for its lock; on several nodes call it once per node.
    UserError: no such path, another scheme, refused by the server, wrong content, disk full.
    """
    if "://" not in location:
        path = user_path(location)
        if not path.exists():
            raise UserError(f"{location}: no such file or folder")
        return path
    _check_address(location)
    target = user_path(cache_dir) / cache_name(location)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if target.exists() and (md5 is None or file_md5(target) == md5.lower()):
                return target
            target.unlink(missing_ok=True)
            part = target.with_name(target.name + ".part")
            _Download(location, part, size, timeout, progress).run(attempts, backoff)
            try:
                if md5 is not None and (found := file_md5(part)) != md5.lower():
                    raise UserError(f"{location}: the download's md5 is {found}, not {md5}; it was removed")
                if check is not None:
                    check(part)
            except UserError:
                part.unlink()
                raise
            part.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def read(address: str, *, max_bytes: int, timeout: float = 20.0, attempts: int = 3, backoff: float = 1.0) -> bytes:
    """What lies at an http(s) address, in memory; each attempt may take `timeout` seconds and what SLOWEST allows.

    UserError as of `fetch`, and for more than `max_bytes`.
    """
    _check_address(address)
    for attempt in range(1, attempts + 1):
        try:
            with _request(address, {}, timeout) as response:
                content, announced = bytearray(), _length(response)
                for chunk in _chunks(response, timeout):
                    content += chunk
                    if len(content) > max_bytes:
                        raise UserError(f"{address}: more than {max_bytes:,} bytes")
            if announced is not None and len(content) != announced:
                raise _Broken(f"the connection ended after {len(content)} of {announced} bytes")
            return bytes(content)
        except _Broken as error:
            if attempt == attempts:
                raise UserError(f"{address}: failed {attempts} times in a row ({error})") from error
            time.sleep(error.wait or min(MAX_WAIT, backoff * 2 ** (attempt - 1)))
    raise AssertionError("attempts is 1 or more")


def stream(
    address: str, *, timeout: float = 60.0, attempts: int = 5, backoff: float = 1.0
) -> Generator[bytes, None, None]:
    """What lies at an http(s) address, piece by piece, none of it kept; a break is taken up where it happened.

    timeout, attempts, backoff and UserError as of `fetch`; UserError, too, where the file changes meanwhile.
    """
    _check_address(address)
    have, total, validator, fruitless = 0, None, "", 0
    while True:
        begin = have
        headers = {"Range": f"bytes={have}-", "If-Range": validator} if have and validator else {}
        try:
            with _request(address, headers, timeout) as response:
                start, length = _span(response, have)
                found = _validator(response)
                if (total and length and length != total) or (validator and found and found != validator):
                    raise UserError(f"{address}: the file changed while it was read")
                total, validator = total or length, validator or found
                for chunk in _chunks(response, timeout):
                    fresh = chunk[max(have - start, 0) :]  # a server without Range sends the beginning again
                    start, have = start + len(chunk), have + len(fresh)
                    if total is not None and have > total:
                        raise UserError(f"{address}: the server sends more than the {total} bytes it announced")
                    if fresh:
                        yield fresh
            if total is None or have == total:
                return
            raise _Broken(f"the connection ended after {have} of {total} bytes")
        except _Broken as error:
            fruitless = 0 if have >= begin + PROGRESS else fruitless + 1
            if fruitless >= attempts:
                raise UserError(f"{address}: failed {attempts} times in a row ({error})") from error
            time.sleep(error.wait or min(MAX_WAIT, backoff * 2 ** max(fruitless - 1, 0)))


def cache_name(address: str) -> str:
    """The file's name in the cache: the last part of the address made harmless, behind a hash of the whole address."""
    name = unquote(urlsplit(address).path).rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[-100:] or "file"
    return f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable or re.search(r"[\s\x00-\x1f\x7f\ud800-\udfff]", address):
        raise UserError(f"{address!r}: not an address that can be downloaded; http://... or https://... is")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclusive over the node's processes; the kernel frees it when a holder dies: a left-over file locks nothing."""
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- one request -----------------------------------------------------------------------------------------------------


class _Broken(Exception):
    """The connection ended early or the server is busy: worth another attempt, in `wait` seconds if it says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would follow to ftp, too, and from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new, old = urlsplit(newurl).scheme, urlsplit(req.full_url).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise UserError(f"{req.full_url}: the server redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Connections:
    """The sockets of a request and its redirects, for a timer that ends them: urllib's timeout begins anew with every
    byte, so that a server that drips its headers would hold the caller for ever."""

    def __init__(self) -> None:
        self.open: list[socket.socket] = []
        self.ended = False

    def handlers(self) -> list[urllib.request.BaseHandler]:
        connections = self

        def noted(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
            class Noted(kind):  # type: ignore[misc, valid-type]
                def connect(self) -> None:
                    super().connect()
                    connections.open.append(self.sock)

            return Noted

        class Http(urllib.request.HTTPHandler):
            def http_open(self, req):
                return self.do_open(noted(http.client.HTTPConnection), req)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, req):
                return self.do_open(noted(http.client.HTTPSConnection), req, context=ssl.create_default_context())

        return [Http(), Https()]

    def end(self) -> None:
        self.ended = True
        for connection in self.open:
            with suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)


def _request(address: str, headers: dict[str, str], timeout: float) -> Any:
    """The answer (200, 206, or 416 as an HTTPError, which is one too) once its headers are there, within 2 timeouts.

    _Broken where another attempt may help, else UserError.
    """
    connections = _Connections()
    opener = urllib.request.build_opener(_SafeRedirects, *connections.handlers())
    request = urllib.request.Request(
        address, headers={"User-Agent": "blipds", "Accept-Encoding": "identity", **headers}
    )
    timer = threading.Timer(2 * timeout, connections.end)
    timer.daemon = True
    timer.start()
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        if error.code in AGAIN or error.code >= 500:
            raise _Broken(f"HTTP {error.code} {error.reason}", _retry_after(address, error)) from error
        raise UserError(f"{address}: the server answers {error.code} {' '.join(str(error.reason).split())}") from error
    except http.client.InvalidURL as error:
        raise UserError(f"{address}: not a valid address ({error})") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(f"{address}: the server's certificate is not trusted ({error.reason})") from error
        raise _Broken("the answer did not begin in time" if connections.ended else str(error.reason)) from error
    except UserError:  # of a redirect
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(str(error) or type(error).__name__) from error
    finally:
        timer.cancel()
    if connections.ended:  # in the middle of the headers, which look whole
        response.close()
        raise _Broken("the answer did not begin in time")
    if response.status not in (200, 206):
        response.close()
        raise UserError(f"{address}: the server answers {response.status} {response.reason}")
    _check_kind(address, response)
    return response


def _check_kind(address: str, response: http.client.HTTPResponse) -> None:
    problem = None
    is_page = "text/html" in response.headers.get("Content-Type", "").lower()
    if response.headers.get("Content-Encoding", "identity") != "identity":
        problem = "the server sends the file compressed although asked not to"
    elif is_page and not urlsplit(address).path.lower().endswith((".html", ".htm")):
        problem = "the server sends a web page, not the file (a login, a licence, or a notice that it moved?)"
    if problem is not None:
        response.close()
        raise UserError(f"{address}: {problem}")


def _retry_after(address: str, error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3: a number, or a date). UserError for too many."""
    given = error.headers.get("Retry-After", "").strip()
    if given.isascii() and given.isdigit():
        seconds = float(given[:12])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    if seconds > MAX_RETRY_AFTER:
        raise UserError(f"{address}: the server answers {error.code} and asks to come back in {seconds:.0f} seconds")
    return max(seconds, 0.0)


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None


def _span(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """(the first byte that an answer holds, how many the file has). _Broken for another range than from `have`."""
    if response.status == 200:
        return 0, _length(response)
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or found is None or int(found[1]) != have or not have:
        raise _Broken("the server sent another range than asked for")
    return have, int(found[2]) if found[2] != "*" else None


def _validator(response: http.client.HTTPResponse) -> str:
    """What tells the versions of a file apart, for If-Range: a weak ETag does not promise equal bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _chunks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """`read1` hands over what has arrived, so that a stall loses nothing of it."""
    begin, received = time.monotonic(), 0
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
            received += len(chunk)
            if (seconds := time.monotonic() - begin) > timeout:
                if received < SLOWEST * seconds:
                    raise _Broken(f"{received} bytes in {seconds:.0f} seconds")
                begin, received = time.monotonic(), 0
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(str(error) or type(error).__name__) from error


# --- a download over several requests --------------------------------------------------------------------------------


class _Download:
    """`part` grows over the attempts. `part`.validator keeps the server's ETag (or date) of what `part` began with: a
    later attempt continues only if the server still has that very file (If-Range, RFC 9110 section 13.1.5)."""

    def __init__(self, address: str, part: Path, size: int | None, timeout: float, progress: bool) -> None:
        self.address, self.part, self.size, self.timeout, self.progress = address, part, size, timeout, progress
        self.validator_file = part.with_name(part.name + ".validator")

    def run(self, attempts: int, backoff: float) -> None:
        furthest, fruitless = self._have(), 0
        while True:
            try:
                self._attempt()
                break
            except _Broken as error:
                # Only bytes further than ever before count as progress: a server that ignores Range and breaks off
                # at the same place each time, or after a few bytes, would be asked for ever.
                fruitless = 0 if self._have() >= furthest + PROGRESS else fruitless + 1
                furthest = max(furthest, self._have())
                if fruitless >= attempts:
                    raise UserError(
                        f"{self.address}: download failed {attempts} times in a row ({error}); "
                        f"{self._have()} bytes are kept, start again to go on from there"
                    ) from error
                self._wait(error, min(MAX_WAIT, backoff * 2 ** max(fruitless - 1, 0)))
        self.validator_file.unlink(missing_ok=True)

    def _wait(self, error: _Broken, seconds: float) -> None:
        if error.wait is not None:
            seconds = max(error.wait, seconds)
        if self.progress and seconds >= 5:
            tqdm.write(f"{self.part.name.removesuffix('.part')}: {error}; again in {seconds:.0f} s")
        time.sleep(seconds)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> None:
        have = self._have()
        validator = self.validator_file.read_text("utf-8") if self.validator_file.exists() else ""
        headers = {"Range": f"bytes={have}-", "If-Range": validator} if have and validator else {}
        with _request(self.address, headers, self.timeout) as response:
            if response.status == 416:
                # Nothing after the last byte that we have: all of it is here, or the part belongs to another file.
                if headers and response.headers.get("Content-Range", "").replace(" ", "") == f"bytes*/{have}":
                    return
                self.part.unlink(missing_ok=True)
                raise _Broken("the server's file is shorter than the part here; starting anew")
            self._receive(response, have if headers else 0)

    def _receive(self, response: http.client.HTTPResponse, have: int) -> None:
        try:
            start, total = _span(response, have)
        except _Broken:
            self.part.unlink(missing_ok=True)
            raise
        if self.size is not None and total is not None and total != self.size:
            raise UserError(f"{self.address}: the server has {total:,} bytes, {self.size:,} are expected: another file")
        if start == 0:  # the server ignores Range, its file changed, or this is the beginning
            self.part.unlink(missing_ok=True)  # before the new validator: they must never be of different files
            self.validator_file.write_text(_validator(response), "utf-8")  # without one a break begins from the start
        expected = total if self.size is None else self.size
        received = start
        with (
            self.part.open("ab" if start else "wb") as file,
            tqdm(
                total=expected,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=self.part.name.removesuffix(".part"),
                disable=not self.progress,
            ) as bar,
        ):
            for chunk in _chunks(response, self.timeout):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if expected is not None and received > expected:
                    break  # a server may go on for ever
            file.flush()
            os.fsync(file.fileno())
        if expected is None and not received:
            raise _Broken("an answer without a byte")
        # Without a total (neither length nor chunks) an early end cannot be told from the end; the md5 can.
        if expected is not None and received < expected:
            raise _Broken(f"the connection ended after {received} of {expected} bytes")
        if expected is not None and received > expected:
            self.part.unlink()
            raise _Broken(f"the server sent {received} bytes, {expected} were announced; starting anew")
