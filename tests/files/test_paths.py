"""The home directory where there is none, packaged configs, and links where the file system has none."""

import errno
import os
import pwd
from pathlib import Path

import pytest

from blipds.errors import UserError
from blipds.files.paths import find_config, packaged, point, target, user_path


@pytest.fixture
def homeless(monkeypatch):
    """As in docker --user: a user that no table knows, and no HOME."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def refuse_symlinks(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(Path, "symlink_to", refuse)


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/a") == Path("/home/somebody/a")
    assert user_path(Path("b/~")) == Path("b/~")


def test_no_home(homeless):
    assert user_path("/data") == Path("/data")
    with pytest.raises(
        UserError, match=r"^~/\.cache/blipds: no home directory is known; set HOME, or .*env.cache_root"
    ):
        user_path("~/.cache/blipds")


@pytest.mark.parametrize("given", ["zero2", "zero2.json", "ds_configs/zero2.json"])
def test_a_packaged_config_is_found_by_its_name_unless_there_is_such_a_file(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert find_config(Path(given), "ds_configs", ".json") == packaged("ds_configs") / "zero2.json"
    if "/" not in given:
        (tmp_path / given).mkdir()  # a folder is no config
        assert find_config(Path(given), "ds_configs", ".json") == packaged("ds_configs") / "zero2.json"
        (tmp_path / given).rmdir()
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / given).touch()
    assert find_config(Path(given), "ds_configs", ".json") == Path(given)


def test_a_config_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packs = "no such JSON: {}; did you mean 'zero2_nvlink'\\? packaged: zero0, zero1, zero2, zero2_nvlink, "
    for given in ("zero2_nvlnk", "ds_configs/zero2_nvlnk.json"):
        with pytest.raises(UserError, match=packs.format(given)):
            find_config(Path(given), "ds_configs", ".json", "JSON")
    assert find_config(tmp_path / "mine.json", "ds_configs", ".json") == tmp_path / "mine.json"


@pytest.mark.parametrize("symlinks", [True, False])
def test_links(tmp_path, monkeypatch, symlinks):
    if not symlinks:
        refuse_symlinks(monkeypatch)
    link = tmp_path / "latest"
    for name in ("step_1", "step_2"):
        (tmp_path / name).mkdir()
        point(link, name)
        assert target(link) == tmp_path / name
        assert link.is_symlink() == symlinks
    (tmp_path / "step_2").rmdir()
    assert target(link) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]


def test_what_is_no_link(tmp_path):
    assert target(tmp_path) == tmp_path
    for name, content in {"weights": b"\xff" * 9, "long": b"a" * 999, "empty": b"", "gone": b"a"}.items():
        (tmp_path / name).write_bytes(content)
        assert target(tmp_path / name) is None
    (tmp_path / "loop").symlink_to("loop")
    assert target(tmp_path / "loop") is None
