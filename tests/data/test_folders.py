"""Folders of images, of metadata and of splits: which captions they give, and what is said about the rest."""

import pytest
from packing import LAYOUTS, link_images, read, shards, written

from blipds.errors import UserError


def test_a_folder_of_splits(tmp_path, photographs):
    for name, members in {"train": photographs[:2], "validation": photographs[2:3]}.items():
        LAYOUTS["image folder"](members, tmp_path / name)
    (path, captions) = photographs[2]
    assert read(tmp_path, "val")[0] == [(path.name, f"validation/{path.stem}", tuple(captions))]
    assert len(read(tmp_path, "train")[0]) == 2
    with pytest.raises(UserError, match=r"no split 'test'; it has train, val$"):
        read(tmp_path, "test")


@pytest.mark.parametrize("folders", [("train", "test"), ("data/train", "data/test"), ("train2017", "test2015")])
@pytest.mark.parametrize("layout", ["image folder", "shards"])
def test_where_folders_of_splits_may_lie(tmp_path, photographs, folders, layout):
    for name, photograph in zip(folders, photographs, strict=False):
        LAYOUTS[layout]([photograph], tmp_path / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "info.json").write_text("{}")
    for split, (path, _) in zip(("train", "test"), photographs, strict=False):
        assert [name for name, _, _ in read(tmp_path, split)[0]] == [path.name]


@pytest.mark.parametrize("split", ["train", None])
def test_images_beside_folders_of_splits_are_named(tmp_path, photographs, split):
    for name, photograph in zip(("train", "data/dogs"), photographs, strict=False):
        LAYOUTS["image folder"]([photograph], tmp_path / name)
    with pytest.raises(UserError, match=r"splits train, and images that are in none of them \(data/dogs\)"):
        read(tmp_path, split)


def test_a_metadata_file_may_name_splits(tmp_path, photographs):
    link_images(photographs[:2], tmp_path / "images")
    first, second = (path.name for path, _ in photographs[:2])
    text = f"file_name,text,split\nimages/{first},one,train\nimages/{second},two,test\n"
    written(tmp_path, "metadata.csv", text)
    assert [name for name, _, _ in read(tmp_path, "test")[0]] == [second]


def test_a_folder_without_some_captions(tmp_path, photographs):
    link_images(photographs[:2], tmp_path)
    first, second = (path for path, _ in photographs[:2])
    (tmp_path / f"{second.stem}.txt").write_text("one\n\n...\n")
    (tmp_path / "._x.jpg").write_text("what macOS leaves behind")
    records, notices = read(tmp_path)
    assert records == [(second.name, second.stem, ("one",))]
    assert notices == (
        f"2 captions without a word left out; the first: {tmp_path / second.name}",
        f"1 images without a caption left out; the first: {tmp_path / first.name}",
    )


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption", "{image}.txt", "{image}.caption"])
def test_sidecars_that_tools_write(tmp_path, photographs, suffix):
    """kohya's scripts write a.caption, others a.jpg.txt."""
    link_images(photographs[:1], tmp_path)
    image = photographs[0][0]
    name = f"{image.stem}{suffix}" if "{" not in suffix else suffix.format(image=image.name)
    (tmp_path / name).write_text("one\ntwo\n")
    assert read(tmp_path) == ([(image.name, image.stem, ("one", "two"))], ())


def test_files_beside_the_images_that_are_not_read(tmp_path, photographs):
    link_images(photographs[:2], tmp_path)
    first, second = (path for path, _ in photographs[:2])
    for name in (f"{first.stem}.txt", f"{first.stem}.caption", f"{second.stem}.npz", f"{second.stem}.tags"):
        (tmp_path / name).write_text("one")
    records, notices = read(tmp_path)
    assert records == [(first.name, first.stem, ("one",))]
    assert notices[0] == (
        f"{tmp_path}: other files, which are not read: .caption (1), .npz (1), .tags (1); an image's captions are "
        "in one file"
    )
    (tmp_path / f"{first.stem}.txt").unlink()
    (tmp_path / f"{first.stem}.caption").unlink()
    with pytest.raises(UserError, match=r"no image has a caption .*which are not read: \.npz \(1\), \.tags \(1\)"):
        read(tmp_path)


def test_a_metadata_file_that_misses_images(tmp_path, photographs):
    link_images(photographs[:3], tmp_path)
    name = photographs[1][0].name
    written(tmp_path, "metadata.csv", f"file_name,text\n{name},one\n")
    records, notices = read(tmp_path)
    assert [record[0] for record in records] == [name]
    assert notices == (f"{tmp_path}: 2 images are in no metadata file; the first is {photographs[0][0].name}",)


def test_unclear_folders(tmp_path, photographs):
    with pytest.raises(UserError, match=r"a folder without images, metadata or tar files\); what"):
        read(tmp_path)
    written(tmp_path, "captions.json", "[]")
    with pytest.raises(UserError, match=r"it holds captions\.json: give that file"):
        read(tmp_path)
    link_images(photographs[:1], tmp_path)
    shards(photographs[:1], tmp_path, count=1)
    with pytest.raises(UserError, match="a folder with images and tar files"):
        read(tmp_path)
