"""Archives that lead outside, lie about themselves or are damaged."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from blipds.errors import UserError
from blipds.files.archives import unpack

FILES = {"set/a.jpg": b"a" * 1000, "set/below/b.jpg": b"b" * 10, "set/.DS_Store": b"x", "other/c.jpg": b"c"}


def zipped(path: Path, files: dict[str, bytes], **kinds: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = kinds.get("mode", stat.S_IFREG | 0o644) << 16
            file.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def tarred(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            file.addfile(info, io.BytesIO(content))
    return path


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_folder_of_it_comes_out(pack, tmp_path):
    archive = pack(tmp_path / "archive", FILES)
    unpack(archive, tmp_path / "out" / "train", "set", max_bytes=2000)
    assert below(tmp_path / "out") == {"train/a.jpg": b"a" * 1000, "train/below/b.jpg": b"b" * 10}


def test_what_is_there_stays_and_the_rest_is_added(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jpg").write_bytes(b"mine")
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking" / "half.jpg").write_bytes(b"of an unpacking that was killed")
    unpack(zipped(tmp_path / "archive", FILES), tmp_path / "out", "set", max_bytes=2000)
    assert below(tmp_path / "out") == {"a.jpg": b"mine", "below/b.jpg": b"b" * 10}
    assert not (tmp_path / ".out.unpacking").exists()


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["../out.jpg", "set/../../out.jpg", "/tmp/out.jpg", "..\\out.jpg", "c:/x", "a\nb"])
def test_names_that_lead_outside(pack, name, tmp_path):
    archive = pack(tmp_path / "archive", {"a.jpg": b"a", name: b"evil"})
    refused(archive, "leads outside of the folder; nothing was unpacked")


def refused(archive: Path, message: str, max_bytes: int = 10_000, source: str = "") -> None:
    """In one line, and nothing is left of it."""
    before = set(archive.parent.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        unpack(archive, archive.parent / "out", source, max_bytes=max_bytes)
    assert set(archive.parent.parent.rglob("*")) == before


def test_links_and_devices(tmp_path):
    refused(zipped(tmp_path / "z", {"a": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777), "is a link or a device")
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
        refused(tarred(tmp_path / f"t{number}", {"a": b""}, kind), "is a link or a device")


def test_bombs(tmp_path):
    bomb = zipped(tmp_path / "bomb", {f"{k}.jpg": bytes(1_000_000) for k in range(20)})
    assert bomb.stat().st_size < 50_000
    refused(bomb, "more than 10,000,000 bytes", max_bytes=10_000_000)
    liar = bytearray(zipped(tmp_path / "liar", {"a.jpg": bytes(100_000)}).read_bytes())
    size = (100_000).to_bytes(4, "little")
    assert liar.count(size) == 2  # in the file's own header and in the directory
    (tmp_path / "liar").write_bytes(liar.replace(size, (100).to_bytes(4, "little")))
    refused(tmp_path / "liar", "is damaged|longer than it says")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_damage_at_any_place(pack, tmp_path):
    """Cut after every 37th byte, or with that byte flipped: right, or refused; never something in between."""
    whole = pack(tmp_path / "whole", FILES).read_bytes()
    expected = {"a.jpg": b"a" * 1000, "below/b.jpg": b"b" * 10}
    refusals = 0
    for number in range(0, len(whole), 37):
        for damaged in (whole[:number], whole[:number] + bytes([whole[number] ^ 0x40]) + whole[number + 1 :]):
            folder = tmp_path / "work"
            folder.mkdir()
            (folder / "archive").write_bytes(damaged)
            try:
                unpack(folder / "archive", folder / "out", "set", max_bytes=2000)
                found = below(folder / "out")
                assert found.items() <= expected.items() or sorted(found.values()) == sorted(expected.values())
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error)
                assert [path.name for path in folder.iterdir()] == ["archive"]
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
    assert refusals > len(whole) // 37


def test_what_is_not_an_archive(tmp_path):
    (tmp_path / "page").write_text("<html>")
    refused(tmp_path / "page", "neither a zip nor a tar")
    refused(zipped(tmp_path / "z", FILES), "not what was expected, train2014 is not in it", source="train2014")
    twice = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(twice, "w") as file:
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    (tmp_path / "twice").write_bytes(twice.getvalue())
    refused(tmp_path / "twice", "has a twice")
