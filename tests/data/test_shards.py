"""Tar shards: which members make a sample, what is left out, and the index that is kept."""

import json
import tarfile
from pathlib import Path

import pytest
from packing import LAYOUTS, add, read, shards

from blipds.data.annotations import read_annotations
from blipds.data.processors import BlipImageTrain, CaptionProcessor
from blipds.data.streams import CaptionStream
from blipds.errors import UserError


def test_a_member_may_name_its_split(tmp_path, photographs):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for split in ("train", "test"):
            add(tar, f"{split}.jpg", photographs[0][0].read_bytes())
            add(tar, f"{split}.json", json.dumps({"caption": "one", "split": split}).encode())
    assert [image_id for _, image_id, _ in read(tmp_path / "a.tar", "test")[0]] == ["test"]
    processors = BlipImageTrain(8), CaptionProcessor()
    stream = CaptionStream("custom_caption", [f"pipe:cat {tmp_path}/a.tar"], *processors, "all", 1, print, ["test"])
    assert [record.image_id for record, _ in stream.share(0, 1)] == ["test"]


def test_members_are_read_in_place(tmp_path, photographs):
    """Any order of members in a shard; the captions of .txt go before those of .json."""
    (path, captions) = photographs[0]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "d/1.json", b'{"caption": "not this", "image_id": 5}')
        add(tar, "d/1.cls", b"3")
        add(tar, "d/2.JPG", path.read_bytes())
        add(tar, "d/1.txt", "\n".join(captions).encode())
        add(tar, "d/1.jpg", path.read_bytes())
        add(tar, "d/2.json", b'{"text": "two"}')
    found = read_annotations([tmp_path / "a.tar"], None, True)
    assert [(str(r.image), r.image_id, r.captions) for r in found.records] == [
        (f"{tmp_path}/a.tar/d/1.jpg", 5, tuple(captions)),
        (f"{tmp_path}/a.tar/d/2.JPG", "d/2", ("two",)),
    ]
    whole = [LAYOUTS["list"](photographs[:1], tmp_path / "list")]
    (record,) = read_annotations(whole, None, True).records
    assert [r.image.open().tobytes() for r in found.records] == [record.image.open().tobytes()] * 2


def test_dots_in_the_names_of_members(tmp_path, photographs):
    """The key of `2.edit.jpg` is `2`; an image with captions under its whole name is a sample of its own."""
    members = {
        "1.jpg": b"", "1.txt": b"one", "1.mask.jpg": b"", "1.cls": b"3",
        "2.edit.jpg": b"", "2.edit.txt": b"two",
        "3.jpg": b"", "3.txt": b"three", "3.v1.5.jpg": b"", "3.v1.5.json": b'{"caption": "three and a half"}',
        "v1.0/4.right.jpg": b"", "v1.0/4.txt": b"four",
        "5.jpg": b"", "5.jpg.txt": b"five",
        "6.a.jpg": b"", "6.b.jpg": b"", "6.caption": b"six",
        "7.jpg": b"", "7.caption": b"seven", "7.txt": b"seven, again",
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    expected = [
        ("1.jpg", "1", ("one",)),
        ("2.edit.jpg", "2.edit", ("two",)),
        ("3.jpg", "3", ("three",)),
        ("3.v1.5.jpg", "3.v1.5", ("three and a half",)),
        ("4.right.jpg", "v1.0/4.right", ("four",)),
        ("5.jpg", "5", ("five",)),
        ("6.a.jpg", "6.a", ("six",)),
        ("7.jpg", "7", ("seven, again",)),
    ]
    line = f"{tmp_path / 'a.tar'}: 2 members left out, a second image under one key; the first is '1.mask.jpg'"
    assert read(tmp_path / "a.tar") == (expected, (line,))

    said: list[str] = []
    processors = BlipImageTrain(8), CaptionProcessor()
    streamed = CaptionStream("s", [f"pipe:cat {tmp_path}/a.tar"], *processors, "all", 1, said.append)
    records = [record for record, _ in streamed.share(0, 1)]
    assert [(Path(str(r.image)).name, r.image_id, r.captions) for r in records] == expected
    assert [line.partition(";")[0] for line in said] == ["s: a second image under one key are left out"]


def test_what_a_shard_should_not_hold(tmp_path, photographs):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../1.jpg", "/etc/2.jpg", "3.jpg", "3.png"):
            add(tar, name, photographs[0][0].read_bytes())
        add(tar, "3.txt", b"three")
        add(tar, "4.txt", b"\xff")
        for name, kind in (("5.jpg", tarfile.SYMTYPE), ("6.txt", tarfile.LNKTYPE), ("7.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    records, notices = read(tmp_path / "a.tar")
    assert records == [("3.jpg", "3", ("three",))]
    assert [notice.partition(": ")[2] for notice in notices] == [
        "2 members left out, names that lead out of the archive or hold control characters; the first is '../1.jpg'",
        "1 members left out, a second image under one key; the first is '3.png'",
        "1 members left out, texts that are no UTF-8 or no JSON; the first is '4.txt'",
        "3 members left out, links and special files; the first is '5.jpg'",
        "1 keys have no image",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]  # nothing is ever written beside a shard


def test_damaged_shards_are_named(tmp_path, photographs):
    path = shards(photographs[:4], tmp_path, count=1).with_name("000.tar")
    whole = path.read_bytes()
    for damage in (
        whole[: len(whole) // 2],  # cut short
        whole[:1024] + whole[1500:],  # a piece is missing
        b"no tar file" * 100,
    ):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"^shard {path} is damaged or no tar file: "):
            read(path)
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match=r"b\.tar\.gz is compressed: unpack it first"):
        read(tmp_path / "b.tar.gz")


def test_joined_shards_are_read_as_one(tmp_path, photographs):
    """As `cat` joins them; tarfile would read the first alone."""
    braces = shards(photographs[:4], tmp_path, count=2)
    joined = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    (tmp_path / "all.tar").write_bytes(joined)
    assert read(tmp_path / "all.tar") == read(braces)


def test_the_index_is_kept_until_the_shard_changes(tmp_path, photographs, monkeypatch):
    path = shards(photographs[:4], tmp_path / "data", count=1).with_name("000.tar")
    first = read_annotations([path], None, True, index_cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # would fail
        assert read_annotations([path], None, True, index_cache=tmp_path / "cache") == first

    kept.write_text("{")
    assert read_annotations([path], None, True, index_cache=tmp_path / "cache") == first
    shards(photographs[:3], tmp_path / "data", count=1)
    assert len(read_annotations([path], None, True, index_cache=tmp_path / "cache").records) == 3
    assert list((tmp_path / "cache").iterdir()) == [kept]
