"""Files by path or address: an address is downloaded once into the cache, and a broken transfer resumes."""

import email.utils
import fcntl
import hashlib
import http.client
import os
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from blipds.errors import UserError
from blipds.files.paths import user_path

CHUNK = 1 << 20
HEADERS = {"User-Agent": "blipds", "Accept-Encoding": "identity"}
TIMEOUT = 30.0  # seconds after which a connection is given up that brings nothing, or less than MIN_RATE
MIN_RATE = 1000  # bytes a second
ATTEMPTS = 5  # that may fail in a row
PROGRESS = 1 << 16  # new bytes after which an attempt does not count as failed
BACKOFF = 1.0  # seconds before the second attempt, twice that before the third, ...
MAX_WAIT = 30.0  # seconds between two attempts, at most, unless the server names more (Retry-After)
MAX_RETRY_AFTER = 600.0  # seconds that a server may ask for
TRANSIENT = (408, 425, 429)  # client errors that are worth another attempt; so is every 5xx


def fetch(
    location: str,
    cache_dir: Path,
    *,
    md5: str | None = None,
    size: int | None = None,
) -> Path:
    """A local file for `location`: a path is returned as it is, an http(s) address is downloaded to `cache_dir` once.

    md5: hex digest that the download must have. size: bytes that it must have.
    One process downloads while others on the node wait for its lock; on several nodes call it once per node.
    UserError: no such path, another scheme, refused by the server, wrong content, disk full.
    """
    if "://" not in location:
        path = user_path(location)
        if not path.exists():
            raise UserError(f"{location}: no such file or folder")
        return path
    check_address(location)
    target = user_path(cache_dir) / cache_name(location)
    part = target.with_name(target.name + ".part")
    try:
        with locked(target.with_name(target.name + ".lock")):
            if target.exists() and (md5 is None or file_md5(target) == md5.lower()):
                return target
            target.unlink(missing_ok=True)
            _download(location, part, size)
            if md5 is not None and (found := file_md5(part)) != md5.lower():
                part.unlink()
                raise UserError(f"{location}: the download's md5 is {found}, not {md5}; it was removed")
            part.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def read(address: str, *, max_bytes: int) -> bytes:
    """The content of an http(s) address, in memory. UserError as of `fetch`, and for more than `max_bytes`."""
    content = bytearray()
    for piece in stream(address, attempts=3):
        content += piece
        if len(content) > max_bytes:
            raise UserError(f"{address}: more than {max_bytes:,} bytes")
    return bytes(content)


def stream(address: str, attempts: int = ATTEMPTS) -> Generator[bytes, None, None]:
    """The content of an http(s) address, piece by piece, none of it kept; a broken transfer resumes.

    UserError as of `fetch`, and where the file changes meanwhile.
    """
    check_address(address)
    yield from _Transfer(address).pieces(attempts)


def cache_name(address: str) -> str:
    """The file's name in the cache: a hash of the whole address, then the address's last part made harmless."""
    name = unquote(urlsplit(address).path).rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[-100:] or "file"
    return f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable or re.search(r"[\s\x00-\x1f\x7f\ud800-\udfff]", address):
        raise UserError(f"{address!r}: not an address that can be downloaded; http://... or https://... is")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclusive over the node's processes. The kernel frees it when its holder dies: a leftover file locks nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- one transfer, over as many requests as it takes -----------------------------------------------------------------


class _Broken(Exception):
    """The connection ended early or the server is busy: worth another attempt, in `wait` seconds if it says so."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Transfer:
    """The bytes at an address from number `have` on; `validator` stands for the file that the first `have` are of.

    `size`: how many it must have. `restarts`: begins anew where the server's file is another one, else UserError.
    """

    def __init__(
        self, address: str, have: int = 0, validator: str = "", size: int | None = None, restarts: bool = False
    ) -> None:
        self.address, self.have, self.validator = address, have, validator
        self.size, self.total, self.restarts = size, size, restarts
        self.confirmed = not have  # whether the server still has that file

    def pieces(self, attempts: int) -> Generator[bytes, None, None]:
        """In order; each ends at byte `have`. UserError after `attempts` in a row without progress."""
        failed, furthest = 0, self.have
        while True:
            try:
                yield from self._rest()
                return
            except _Broken as error:
                failed = 0 if self.have >= furthest + PROGRESS else failed + 1
                furthest = max(self.have, furthest)
                if failed >= attempts:
                    raise UserError(f"{self.address}: failed {failed} times in a row ({error})") from error
                wait = max(error.wait, min(MAX_WAIT, BACKOFF * 2 ** max(failed - 1, 0)))
                if wait >= 5:
                    tqdm.write(f"{self.address}: {error}; next attempt in {wait:.0f} s", file=sys.stderr)
                time.sleep(wait)

    def _rest(self) -> Generator[bytes, None, None]:
        """One request. If-Range: the server sends the rest of that very file, else all of it (RFC 9110, 13.1.5)."""
        resume = self.have > 0 and self.validator != ""
        headers = {"Range": f"bytes={self.have}-", "If-Range": self.validator} if resume else {}
        with _request(self.address, headers) as response:
            _check_answer(self.address, response)
            if response.status == 416 and resume:
                if response.headers.get("Content-Range", "").replace(" ", "") == f"bytes*/{self.have}":
                    return  # nothing follows: all of it is here
                self._restart("the server's file is shorter than what is here")
            position = self._accept(response, resume)
            for chunk in _chunks(response):
                fresh = chunk[max(self.have - position, 0) :]  # a server without Range sends the beginning again
                position += len(chunk)
                if self.total is not None and position > self.total:
                    self._restart(f"the server sends more than the {self.total} bytes it announced")
                if fresh:
                    self.have += len(fresh)
                    yield fresh
        if not self.have:
            raise _Broken("an answer without a byte")
        # Without a total (neither length nor chunks) an early end cannot be told from the end; a checksum can.
        if self.total is not None and self.have < self.total:
            raise _Broken(f"the connection ended after {self.have} of {self.total} bytes")

    def _accept(self, response: Any, resumed: bool) -> int:
        """The position of the answer's first byte. It must be of the file that is here so far."""
        position, size = 0, response.headers.get("Content-Length", "")
        if response.status != 200:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if not resumed or response.status != 206 or found is None or int(found[1]) != self.have:
                raise _Broken("the server sent another range than asked for")
            position, size = self.have, found[2]
        total = int(size) if re.fullmatch(r"[0-9]{1,19}", size) else self.total
        if self.total not in (None, total):
            self._restart(f"the server's file has {total:,} bytes instead of {self.total:,}: another file")
        etag = response.headers.get("ETag", "")
        strong = etag.startswith('"')  # a weak one does not promise equal bytes
        validator = etag if strong else response.headers.get("Last-Modified", "")
        other = self.validator != "" and validator not in ("", self.validator)
        if self.have and (other or (position == 0 and not self.confirmed)):
            self._restart("the file changed while it was read")
        self.confirmed, self.total = True, total
        if not self.have:
            self.validator = validator
        return position

    def _restart(self, reason: str) -> NoReturn:
        if not self.restarts:
            raise UserError(f"{self.address}: {reason}")
        self.have, self.validator, self.total = 0, "", self.size
        raise _Broken(reason)


def _download(address: str, part: Path, size: int | None) -> None:
    """Completes `part`, in which an earlier process may have left the beginning.

    `part`.validator keeps the ETag or date of the file that it is the beginning of; without one it is worth nothing.
    """
    validator_file = part.with_name(part.name + ".validator")
    validator = validator_file.read_text("utf-8") if validator_file.exists() else ""
    have = part.stat().st_size if validator and part.exists() else 0
    transfer = _Transfer(address, have, validator, size, restarts=True)
    with part.open("ab") as file, tqdm(desc=part.stem, initial=have, unit="B", unit_scale=True) as bar:
        try:
            for piece in transfer.pieces(ATTEMPTS):
                if transfer.have == len(piece):  # the beginning, or another one
                    file.truncate(0)
                    validator_file.write_text(transfer.validator, "utf-8")
                file.write(piece)
                bar.total = transfer.total
                bar.update(transfer.have - bar.n)
        except UserError as error:
            if transfer.have and transfer.validator:
                raise UserError(f"{error}; {transfer.have} bytes are kept, start again to continue") from error
            part.unlink()
            validator_file.unlink(missing_ok=True)
            raise
        file.flush()
        os.fsync(file.fileno())
    validator_file.unlink()


# --- one request -----------------------------------------------------------------------------------------------------


def _request(address: str, headers: dict[str, str]) -> Any:
    """The answer, whatever its status, once its headers are there.

    urllib's timeout begins anew with every byte, so that a server that drips its headers would hold the caller forever:
    a thread waits for the headers, and is left behind after two timeouts.
    """
    answer: Future[Any] = Future()

    def ask() -> None:
        request = urllib.request.Request(address, headers={**HEADERS, **headers})
        try:
            answer.set_result(urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            answer.set_result(error)
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(2 * TIMEOUT)
    except FutureTimeout:
        raise _Broken("the answer did not begin in time") from None
    except UserError:  # of a redirect
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)  # of a URLError: what happened below it
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(f"{address}: the server's certificate is not trusted ({reason})") from error
        raise _Broken(str(reason) or type(reason).__name__) from error


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would follow to ftp, too, and from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new, old = urlsplit(newurl).scheme, urlsplit(req.full_url).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise UserError(f"{req.full_url}: the server redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_answer(address: str, response: Any) -> None:
    """_Broken where another attempt may help, UserError where none can."""
    status, headers = response.status, response.headers
    answer = f"{status} {' '.join(str(response.reason).split())}"
    if status in TRANSIENT or status >= 500:
        wait = _retry_after(headers.get("Retry-After", ""))
        if wait > MAX_RETRY_AFTER:
            raise UserError(f"{address}: the server answers {status} and asks to come back in {wait:.0f} seconds")
        raise _Broken(f"HTTP {answer}", wait)
    if status not in (200, 206, 416):
        raise UserError(f"{address}: the server answers {answer}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{address}: the server sends the file compressed although asked not to")
    is_page = "text/html" in headers.get("Content-Type", "").lower()
    if is_page and not urlsplit(address).path.lower().endswith((".html", ".htm")):
        raise UserError(f"{address}: the server sends a web page (login? licence? moved?) instead of the file")


def _retry_after(given: str) -> float:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3: a number, or a date); 0 for nonsense."""
    with suppress(ValueError, TypeError, OverflowError):
        if given.strip().isdigit():
            return float(given)
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    return 0.0


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """`read1` hands over what has arrived, so that a stall loses nothing of it."""
    begin, received = time.monotonic(), 0
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
            received += len(chunk)
            if (seconds := time.monotonic() - begin) > TIMEOUT:
                if received < MIN_RATE * seconds:
                    raise _Broken(f"{received} bytes in {seconds:.0f} seconds")
                begin, received = time.monotonic(), 0
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(str(error) or type(error).__name__) from error
