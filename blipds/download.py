"""Files by path or address: an address is downloaded once into the cache; a break is taken up where it happened."""

import fcntl
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from blipds.errors import UserError

CHUNK = 1 << 20
MAX_WAIT = 30.0  # seconds between two attempts, at most
AGAIN = (408, 425, 429)  # client errors that pass by themselves; 5xx do, too


def fetch(
    location: str,
    cache_dir: Path,
    *,
    md5: str | None = None,
    timeout: float = 60.0,
    attempts: int = 5,
    backoff: float = 1.0,
    progress: bool = True,
) -> Path:
    """A local file for `location`: a path is returned as it is, an http(s) address is downloaded to `cache_dir` once.

    md5: hex digest that the download must have. timeout: seconds without a byte after which a connection is given up.
    attempts: how many in a row may bring nothing new, with `backoff`, twice that, ... seconds between them.
    One process downloads while others on the node wait for its lock; on several nodes call it once per node.
    UserError: no such path, another scheme, refused by the server, wrong md5, disk full.
    """
    if "://" not in location:
        path = Path(location).expanduser()
        if not path.exists():
            raise UserError(f"{location}: no such file or folder")
        return path
    _check_address(location)
    target = Path(cache_dir).expanduser() / cache_name(location)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if target.exists() and (md5 is None or _md5(target) == md5.lower()):
                return target
            target.unlink(missing_ok=True)
            part = target.with_name(target.name + ".part")
            _Download(location, part, timeout, progress).run(attempts, backoff)
            if md5 is not None and (found := _md5(part)) != md5.lower():
                part.unlink()
                raise UserError(f"{location}: the download's md5 is {found}, not {md5}; it was removed")
            part.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def cache_name(address: str) -> str:
    """The file's name in the cache: the last part of the address made harmless, behind a hash of the whole address."""
    name = unquote(urlsplit(address).path).rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[-100:] or "file"
    return f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable or re.search(r"[\s\x00-\x1f\x7f]", address):
        raise UserError(f"{address!r}: not an address that can be downloaded; http://... or https://... is")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclusive over the node's processes; the kernel frees it when a holder dies: a left-over file locks nothing."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would follow to ftp, too, and from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new, old = urlsplit(newurl).scheme, urlsplit(req.full_url).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise UserError(f"{req.full_url}: the server redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Broken(Exception):
    """The connection ended early or the server is busy: worth another attempt."""


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """`read1` hands over what has arrived, so that a stall loses nothing of it."""
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


class _Download:
    """`part` grows over the attempts. `part`.validator keeps the server's ETag (or date) of what `part` began with: a
    later attempt continues only if the server still has that very file (If-Range, RFC 9110 section 13.1.5)."""

    def __init__(self, address: str, part: Path, timeout: float, progress: bool) -> None:
        self.address, self.part, self.timeout, self.progress = address, part, timeout, progress
        self.validator_file = part.with_name(part.name + ".validator")
        self.opener = urllib.request.build_opener(_SafeRedirects)

    def run(self, attempts: int, backoff: float) -> None:
        furthest, fruitless = self._have(), 0
        while True:
            try:
                self._attempt()
                break
            except _Broken as error:
                # Only bytes further than ever before count as progress: a server that ignores Range and breaks off
                # at the same place each time would be asked for ever.
                fruitless = 0 if self._have() > furthest else fruitless + 1
                furthest = max(furthest, self._have())
                if fruitless >= attempts:
                    raise UserError(
                        f"{self.address}: download failed {attempts} times in a row ({error}); "
                        f"{furthest} bytes are kept, start again to go on from there"
                    ) from error
                time.sleep(min(MAX_WAIT, backoff * 2 ** max(fruitless - 1, 0)))
        self.validator_file.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> None:
        have = self._have()
        validator = self.validator_file.read_text() if self.validator_file.exists() else ""
        headers = {"User-Agent": "blipds", "Accept-Encoding": "identity"}
        if have and validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        request = urllib.request.Request(self.address, headers=headers)
        try:
            response = self.opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and "Range" in headers:
                # Nothing after the last byte that we have: all of it is here, or the part belongs to another file.
                if error.headers.get("Content-Range", "").replace(" ", "") == f"bytes*/{have}":
                    return
                self.part.unlink()
                raise _Broken("the server's file is shorter than the part here; starting anew") from error
            if error.code in AGAIN or error.code >= 500:
                raise _Broken(f"HTTP {error.code} {error.reason}") from error
            raise UserError(f"{self.address}: the server answers {error.code} {error.reason}") from error
        except http.client.InvalidURL as error:
            raise UserError(f"{self.address}: not a valid address ({error})") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(f"{self.address}: the server's certificate is not trusted ({error.reason})") from error
            raise _Broken(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(str(error) or type(error).__name__) from error
        with response:
            self._receive(response, have if "Range" in headers else 0)

    def _receive(self, response: http.client.HTTPResponse, have: int) -> None:
        start = 0
        total: int | None = None
        if response.status == 206:
            content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if content_range is None or int(content_range[1]) != have or not have:
                self.part.unlink(missing_ok=True)
                raise _Broken("the server sent another range than asked for; starting anew")
            start = have
            total = int(content_range[2]) if content_range[2] != "*" else None
        elif response.status != 200:
            raise UserError(f"{self.address}: the server answers {response.status} {response.reason}")
        elif (length := response.headers.get("Content-Length", "")).isdigit():
            total = int(length)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(f"{self.address}: the server sends the file compressed although asked not to")
        if start == 0:  # the server ignores Range, its file changed, or this is the beginning
            etag = response.headers.get("ETag", "")
            # A weak ETag does not promise equal bytes; a file without either is fetched from the start after a break.
            strong = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
            self.part.unlink(missing_ok=True)  # before the new validator: they must never be of different files
            self.validator_file.write_text(strong)
        received = start
        with (
            self.part.open("ab" if start else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=self.part.name.removesuffix(".part"),
                disable=not self.progress,
            ) as bar,
        ):
            for chunk in _chunks(response):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        # Without a total (neither length nor chunks) an early end cannot be told from the end; the md5 can.
        if total is not None and received < total:
            raise _Broken(f"the connection ended after {received} of {total} bytes")
        if total is not None and received > total:
            self.part.unlink()
            raise _Broken(f"the server sent {received} bytes, {total} were announced; starting anew")
