"""Files of captions that are continued, byte by byte."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from blipds.captioning.confidence import Caption, Confidence
from blipds.captioning.inputs import NamedImage
from blipds.captioning.outputs import CaptionFile, CaptionLines, Sidecars
from blipds.errors import UserError

SETTINGS = {"num_beams": 3}
# what quoting is there for, and a file name that is no UTF-8
NAMES = ["plain.jpg", 'a "quoted", name.jpg', "two\nlines.jpg", "\u00e9\u2028.jpg", os.fsdecode(b"\xff\xfe.jpg")]


def write(path: Path, names: list[str], num_captions: int = 1) -> list[str]:
    """Captions what the file has not; returns those names."""
    output = CaptionFile(path, SETTINGS, num_captions)
    needed = [name for name in names if output.needs(NamedImage(name))]
    output.write(
        (NamedImage(name), [Caption(f"caption {k}, of {len(name)}") for k in range(num_captions)]) for name in needed
    )
    output.file.close()
    return needed


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("num_captions", [1, 2])
def test_torn_anywhere_and_gone_on_with(suffix: str, num_captions: int, tmp_path: Path) -> None:
    """Cut after each byte, which is what a kill may leave: the end is always the same file."""
    path = tmp_path / f"captions{suffix}"
    assert write(path, NAMES, num_captions) == NAMES
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        taken = write(path, NAMES, num_captions)
        assert path.read_bytes() == whole
        assert taken == NAMES[len(NAMES) - len(taken) :]
    assert write(path, NAMES, num_captions) == []


def test_the_lines(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", NAMES[:3])
    assert (tmp_path / "one.jsonl").read_text().splitlines() == [
        '{"image": "plain.jpg", "caption": "caption 0, of 9"}',
        '{"image": "a \\"quoted\\", name.jpg", "caption": "caption 0, of 20"}',
        '{"image": "two\\nlines.jpg", "caption": "caption 0, of 13"}',
    ]
    write(tmp_path / "two.csv", NAMES[:2], num_captions=2)
    assert (tmp_path / "two.csv").read_text() == (
        "image,caption_1,caption_2\n"
        'plain.jpg,"caption 0, of 9","caption 1, of 9"\n'
        '"a ""quoted"", name.jpg","caption 0, of 20","caption 1, of 20"\n'
    )


def test_scores_stand_beside_the_captions() -> None:
    """Of an image with two captions, and of one whose second is too long for the model."""
    sure = Caption("a dog", Confidence(-0.75, -0.25, (("a", -0.1), ("dog", -0.5))))
    unsure = Caption("a cat", Confidence(-3.0, -1.0, (("a", -0.1), ("cat", -2.0000001))))
    images = [(NamedImage("1.jpg"), [sure, unsure]), (NamedImage("2.jpg"), [unsure, Caption("too long")])]

    def written(*args: Any) -> str:
        file = io.BytesIO()
        lines = CaptionLines(file, *args)
        file.write(lines.header() if lines.is_csv else b"")
        lines.write([(image, captions[: args[1]]) for image, captions in images])
        return file.getvalue().decode()

    assert written(False, 1, True).splitlines()[0] == (
        '{"image": "1.jpg", "caption": "a dog", "log_prob": -0.75, "mean_log_prob": -0.25, '
        '"words": [["a", -0.1], ["dog", -0.5]]}'
    )
    assert [json.loads(line) for line in written(False, 2, True).splitlines()][1] == {
        "image": "2.jpg",
        "captions": ["a cat", "too long"],
        "log_prob": [-3.0, None],
        "mean_log_prob": [-1.0, None],
        "words": [[["a", -0.1], ["cat", -2.0]], None],
    }
    rows = list(csv.DictReader(io.StringIO(written(True, 2, True))))
    assert [row["log_prob_1"] for row in rows] == ["-0.75", "-3.0"]
    assert [row["log_prob_2"] for row in rows] == ["-3.0", ""]
    assert [row["caption_2"] for row in rows] == ["a cat", "too long"]
    assert json.loads(rows[0]["words_2"]) == [["a", -0.1], ["cat", -2.0]]
    assert list(rows[0]) == [
        "image",
        *(f"{key}_{k}" for key in ("caption", "log_prob", "mean_log_prob", "words") for k in (1, 2)),
    ]
    assert written(True, 1, False).splitlines() == ["image,caption", "1.jpg,a dog", "2.jpg,a cat"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    write(path, NAMES)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"other settings \(num_beams 3, now 5; seed None, now 1\)"):
        CaptionFile(path, {"num_beams": 5, "seed": 1}, 1)
    (tmp_path / "mine.jsonl").write_text('{"image": "a"}\n')
    with pytest.raises(
        UserError, match=r"mine\.jsonl was not written by this command \(mine\.jsonl\.settings\.json is missing\)"
    ):
        CaptionFile(tmp_path / "mine.jsonl", SETTINGS, 1)
    with pytest.raises(UserError, match=r"captions are written as \.jsonl or \.csv"):
        CaptionFile(tmp_path / "captions.txt", SETTINGS, 1)
    holder = CaptionFile(path, SETTINGS, 1)
    with pytest.raises(UserError, match="another process is writing it"):
        CaptionFile(path, SETTINGS, 1)
    holder.file.close()
    assert path.read_bytes() == before
    for line in (b"[1]\n", b"{}\n", b'{"image": 1}\n', b"image\n"):
        path.write_bytes(line + before)
        with pytest.raises(UserError, match="line 1 is not this command's"):
            CaptionFile(path, SETTINGS, 1)

    CaptionFile(path, {"num_beams": 5}, 1, force=True).file.close()
    assert path.read_bytes() == b""
    CaptionFile(path, {"num_beams": 5}, 1).file.close()


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    output = CaptionFile(tmp_path / "captions.jsonl", SETTINGS, 1)
    output.file.close()
    output.file = open("/dev/full", "wb")  # noqa: PTH123, SIM115
    with pytest.raises(UserError, match=r"the captions cannot be written: .*No space left on device"):
        output.write([(NamedImage("a.jpg"), [Caption("a")])])
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as nobody_reads, pytest.raises(BrokenPipeError):  # `| head`: cli.run ends
        CaptionLines(nobody_reads).write([(NamedImage("a.jpg"), [Caption("a")])])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the captions cannot be written: .*/file"):
        CaptionFile(tmp_path / "file" / "captions.jsonl", SETTINGS, 1)
    with pytest.raises(UserError, match=r"the captions cannot be written: .*/file"):
        Sidecars(tmp_path / "file", SETTINGS).needs(NamedImage("a.jpg"))


def test_where_sidecars_lie(tmp_path: Path) -> None:
    sidecars = Sidecars(tmp_path / "texts", SETTINGS)
    for image, path in (
        (NamedImage("photos/x/a.jpg", "photos"), "x/a.txt"),
        (NamedImage("photos/x/a.jpg"), "a.txt"),
        (NamedImage("http://host/b.png"), "fbd6908ad659-b.txt"),
    ):
        assert os.path.relpath(sidecars.path(image), tmp_path / "texts") == path
    assert sidecars.needs(NamedImage("photos/a.jpg", "photos"))
    assert not sidecars.needs(NamedImage("photos/a.png", "photos"))  # it would have the same text
    with pytest.raises(UserError, match="nothing lies beside an address; give --sidecar FOLDER"):
        Sidecars(None, SETTINGS).path(NamedImage("http://host/b.png"))
