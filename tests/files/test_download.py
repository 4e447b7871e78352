"""Downloads from servers that behave and from servers that do not (http.server in a thread)."""

import hashlib
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import CONTENT, Handler, Server, serving

from blipds.errors import UserError
from blipds.files import download
from blipds.files.download import cache_name, fetch, read, stream

MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts, and a connection stalls within a moment."""
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    monkeypatch.setattr(download, "TIMEOUT", 0.3)


def get(server: Server, cache: Path, **checks: Any) -> Path:
    return fetch(server.address(), cache, **checks)


def left_over(cache: Path) -> list[str]:
    """File endings in the cache, beside the lock that stays."""
    return sorted(path.name.partition("model.pth")[2] for path in cache.iterdir() if path.suffix != ".lock")


def test_a_path_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "here.pth").write_bytes(b"x")
    assert fetch(str(tmp_path / "here.pth"), tmp_path / "cache") == tmp_path / "here.pth"
    assert fetch(str(tmp_path), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        fetch(str(tmp_path / "gone.pth"), tmp_path / "cache")


@pytest.mark.parametrize(
    "address",
    ["ftp://host/x", "file:///etc/passwd", "s3://bucket/x", "http://", "http:///x", "http://h:port/x", "http://[::1/x",
     "http://host/a b", "http://host/a\r\nX: y", "://x"],
)  # fmt: skip
def test_addresses_that_are_none(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an address"):
        fetch(address, tmp_path)


def test_names_in_the_cache_are_harmless() -> None:
    for address in ("http://h/../../etc/passwd", "http://h/%2e%2e%2f%2e%2e%2fx", "http://h/..", "http://h/a/", "http://h",
                    "http://h/" + "n" * 4000, "http://h/x%00y", "http://h/.ssh", "http://h/a?b=/../c#/d"):  # fmt: skip
        assert re.fullmatch(r"[0-9a-f]{12}-[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", cache_name(address)), address
    assert cache_name("http://one/model.pth").endswith("-model.pth")
    assert cache_name("http://one/model.pth") != cache_name("http://two/model.pth")


def test_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = get(server, tmp_path / "cache", md5=MD5.upper())
    assert path.read_bytes() == CONTENT
    assert get(server, tmp_path / "cache", md5=MD5) == get(server, tmp_path / "cache") == path
    assert server.ranges == [None]
    assert left_over(tmp_path / "cache") == [""]


def test_the_bar_shows_bytes(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get(server, tmp_path)
    assert "300k/300k" in capsys.readouterr().err


@pytest.mark.parametrize("behaviour", [Handler.break_off, Handler.stall])
@pytest.mark.usefixtures("hurried")
def test_broken_transfers_resume(behaviour: Callable[[Handler], None], server: Server, tmp_path: Path) -> None:
    server.plan = [behaviour, behaviour, Handler.proper]
    begin = time.monotonic()
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert time.monotonic() - begin < 10
    assert left_over(tmp_path) == [""]


@pytest.mark.usefixtures("hurried")
def test_a_later_run_resumes(server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.break_off, Handler.busy]
    with pytest.raises(UserError, match=r"failed 2 times in a row \(HTTP 503.*100000 bytes are kept"):
        get(server, tmp_path)
    assert left_over(tmp_path) == [".part", ".part.validator"]
    server.plan = [Handler.proper]
    assert get(server, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=100000-"]


def test_a_server_that_ignores_range(server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.break_off, Handler.no_range]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_a_server_without_validator_is_asked_from_the_start(server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.no_range_and_break_off, Handler.no_range]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, None]


@pytest.mark.usefixtures("hurried")
def test_the_same_beginning_again_is_no_progress(server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.no_range_and_break_off]
    with pytest.raises(
        UserError, match=r"failed 2 times in a row \(the connection ended after 100000 of 300000 bytes\)$"
    ):
        get(server, tmp_path)
    assert len(server.ranges) == 3  # the first one did bring something
    assert left_over(tmp_path) == []  # without a validator nothing can be resumed


@pytest.mark.parametrize(
    "behaviour",
    [
        *(Handler.busy, Handler.hang_up, Handler.wrong_range, Handler.chunked_and_break_off, Handler.too_many),
        *(Handler.too_many_until_a_date, Handler.busy_with_nonsense, Handler.no_http, Handler.whole_as_the_rest),
    ],
)
def test_transient_failures(behaviour: Callable[[Handler], None], server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.break_off, behaviour, Handler.proper]
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.usefixtures("hurried")
def test_the_file_changed_in_between(server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.break_off, Handler.busy]
    with pytest.raises(UserError):
        get(server, tmp_path)
    server.plan = [Handler.proper]
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert get(server, tmp_path).read_bytes() == CONTENT[::-1]


def test_416_of_a_complete_part_and_of_one_too_long(server: Server, tmp_path: Path) -> None:
    part = tmp_path / (cache_name(server.address()) + ".part")
    part.with_name(part.name + ".validator").write_text('"one"')
    part.write_bytes(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]

    get(server, tmp_path).unlink()
    part.write_bytes(CONTENT + b"more")
    part.with_name(part.name + ".validator").write_text('"one"')
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges[1:] == ["bytes=300004-", None]


def test_a_weak_etag_is_not_trusted(server: Server, tmp_path: Path) -> None:
    server.etag = 'W/"one"'
    server.plan = [Handler.break_off, Handler.proper]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_wrong_bytes(server: Server, tmp_path: Path) -> None:
    server.content = b"x" + CONTENT[1:]
    with pytest.raises(UserError, match=rf"md5 is [0-9a-f]{{32}}, not {MD5}; it was removed"):
        get(server, tmp_path, md5=MD5)
    assert left_over(tmp_path) == []
    server.content = CONTENT
    assert get(server, tmp_path, md5=MD5).read_bytes() == CONTENT


def test_a_cached_file_of_another_md5_is_fetched_again(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path).write_bytes(b"damaged")
    assert get(server, tmp_path, md5=MD5).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Handler.gone, "answers 404"),
        (Handler.web_page, "a web page .* instead of the file"),
        (Handler.come_back_tomorrow, "answers 429 and asks to come back in 86400 seconds"),
        (Handler.no_content, "answers 204"),
        (Handler.compressed, "compressed"),
        (Handler.redirect_to_a_file, "302"),
        (Handler.redirect_to_ftp, "which is not followed"),
        (Handler.redirect_for_ever, "302"),
    ],
)
def test_answers_that_more_attempts_do_not_mend(
    behaviour: Callable[[Handler], None], message: str, server: Server, tmp_path: Path
) -> None:
    server.plan = [behaviour]
    with pytest.raises(UserError, match=message):
        get(server, tmp_path)
    assert behaviour is Handler.redirect_for_ever or len(server.ranges) == 1
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("behaviour", [Handler.drip_headers, Handler.drip_bytes])
@pytest.mark.usefixtures("hurried")
def test_a_drip_is_no_progress(behaviour: Callable[[Handler], None], server: Server, tmp_path: Path) -> None:
    server.plan = [behaviour]
    with pytest.raises(UserError, match="failed 2 times in a row"):
        get(server, tmp_path)


@pytest.mark.usefixtures("hurried")
def test_of_another_size_than_expected(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the server's file has 300,000 bytes instead of 300,001: another file"):
        get(server, tmp_path, size=300_001)
    server.plan = [Handler.for_ever]
    with pytest.raises(UserError, match="sends more than the 300000 bytes it announced"):
        get(server, tmp_path, size=300_000)
    assert left_over(tmp_path) == []


def test_read_into_memory(server: Server) -> None:
    server.plan = [Handler.break_off, Handler.busy, Handler.proper]
    assert read(server.address(), max_bytes=300_000) == CONTENT
    with pytest.raises(UserError, match="more than 299,999 bytes"):
        read(server.address(), max_bytes=299_999)
    server.plan = [Handler.no_range_and_break_off]
    with pytest.raises(UserError, match=r"failed 3 times in a row \(the connection ended after 100000 of 300000 bytes"):
        read(server.address(), max_bytes=300_000)


def streamed(server: Server, attempts: int = 5) -> bytes:
    return b"".join(stream(server.address(), attempts))


@pytest.mark.parametrize(
    "behaviour",
    [
        *(Handler.break_off, Handler.stall, Handler.no_range, Handler.no_range_and_break_off, Handler.wrong_range),
        *(Handler.busy, Handler.hang_up, Handler.redirect, Handler.chunked_and_break_off, Handler.bad_chunks),
        *(Handler.too_many, Handler.too_many_until_a_date, Handler.no_http, Handler.drip_headers),
    ],
)
@pytest.mark.usefixtures("hurried")
def test_a_broken_stream_resumes(behaviour: Callable[[Handler], None], server: Server) -> None:
    """As the first answer, and in the middle: every byte once, in order."""
    server.plan = [behaviour, Handler.break_off, behaviour, Handler.proper]
    assert streamed(server) == CONTENT


def test_a_stream_resumes_by_range(server: Server) -> None:
    server.plan = [Handler.break_off, Handler.break_off, Handler.proper]
    assert streamed(server) == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_a_stream_that_gets_no_further(server: Server) -> None:
    server.plan = [Handler.no_range_and_break_off]
    with pytest.raises(UserError, match=r"failed 3 times in a row \(the connection ended after 100000 of 300000 bytes"):
        streamed(server, attempts=3)
    server.plan = [Handler.gone]
    with pytest.raises(UserError, match="the server answers 404"):
        streamed(server)


def test_a_stream_of_another_file_than_before(server: Server) -> None:
    def another(handler: Handler) -> None:
        server.etag = '"two"'
        handler.proper()

    server.plan = [Handler.break_off, another]
    with pytest.raises(UserError, match="the file changed while it was read"):
        streamed(server)
    server.etag, server.plan = '"one"', [Handler.break_off, Handler.cut]
    with pytest.raises(UserError, match="the server's file has 150,000 bytes instead of 300,000"):
        streamed(server)
    server.plan = [Handler.break_off, Handler.whole_as_the_rest]
    with pytest.raises(UserError, match="sends more than the 300000 bytes it announced"):
        streamed(server)


def test_redirects_are_followed(server: Server, tmp_path: Path) -> None:
    server.plan = [Handler.redirect, Handler.break_off, Handler.redirect, Handler.proper]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, None, "bytes=100000-", "bytes=100000-"]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"failed 5 times in a row \(.*refused\)$"):
        fetch("http://127.0.0.1:1/x", tmp_path)


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        get(server, tmp_path / "file" / "cache")


def fetch_in_a_process(address: str, cache: Path, answers: Any) -> None:
    answers.put(hashlib.md5(fetch(address, cache).read_bytes()).hexdigest())


def test_processes_of_a_node_download_once(server: Server, tmp_path: Path) -> None:
    def slowly(handler: Handler) -> None:
        time.sleep(0.5)
        handler.proper()

    server.plan = [slowly]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=fetch_in_a_process, args=(server.address(), tmp_path, answers)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [MD5] * 3
    for process in processes:
        process.join()
    assert len(server.ranges) == 1
