"""launch/caption.py: the oracle's words, whatever the images come from and wherever the captions go."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import REPOSITORY, kill, launch_as_typed, load_script, start_ranks
from PIL import Image

from blipds.captioning.captioner import caption_recipe
from blipds.captioning.confidence import Caption
from blipds.captioning.inputs import Names, named_images
from blipds.captioning.outputs import CaptionFile
from blipds.captioning.stream import caption_images
from blipds.data.processors import BlipImageEval
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip import published
from blipds.models.blip.config import BlipConfig
from blipds.models.protocol import keep_activations

Command = Callable[..., str]
PHOTOGRAPHS = 16


def words(golden: dict[str, Any], setting: str = "beam3_max20_min5") -> dict[str, str]:
    """What the original code says about each photograph, by file name."""
    return dict(zip(golden["images"], golden["captions"][setting], strict=True))


def by_file(lines: str) -> dict[str, str]:
    found = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert [line["image"] for line in found] == sorted(line["image"] for line in found)
    return {Path(line["image"]).name: line["caption"] for line in found}


def expected(golden: dict[str, Any], setting: str = "beam3_max20_min5") -> dict[str, str]:
    return {name: words(golden, setting)[name] for name in golden["images"][:PHOTOGRAPHS]}


# --- the words -------------------------------------------------------------------------------------------------------


def test_a_folder_gets_the_oracles_words(
    caption: Command, photographs: Path, oracle: list[object], golden: dict[str, Any]
) -> None:
    printed = caption(photographs, *oracle, "--batch-size", 5)
    assert by_file(printed) == expected(golden)
    assert printed.splitlines()[-1].startswith(f"{PHOTOGRAPHS} images captioned, 0 skipped (they cannot be read), 0 al")
    decoding = ("--num-beams", 5, "--max-len", 30, "--min-len", 10)
    assert by_file(caption(photographs, *oracle, *decoding)) == expected(golden, "beam5_max30_min10")


def test_a_prompt_of_the_same_tokens_gets_the_same_words(
    caption: Command, photographs: Path, oracle: list[object], golden: dict[str, Any]
) -> None:
    assert by_file(caption(photographs, *oracle, "--prompt", " A  picture   of")) == expected(golden)


def test_several_captions(
    caption: Command, photographs: Path, oracle: list[object], golden: dict[str, Any], tmp_path: Path
) -> None:
    """Beams best first; draws that depend on seed and image alone; one CSV row an image."""
    table = tmp_path / "captions.csv"
    caption(photographs, *oracle, "--num-captions", 3, "--output", table)
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "caption_1", "caption_2", "caption_3"]
    assert {Path(row[0]).name: row[1] for row in rows[1:]} == expected(golden)
    assert all(len(set(row)) == 4 for row in rows[1:])

    draw = ("--use-nucleus-sampling", "--num-captions", 2, *oracle)
    drawn = [json.loads(line) for line in caption(photographs, *draw, "--batch-size", 3).splitlines()[:PHOTOGRAPHS]]
    assert any(line["captions"][0] != line["captions"][1] for line in drawn)
    assert drawn == [json.loads(line) for line in caption(photographs, *draw).splitlines()[:PHOTOGRAPHS]]
    other = [json.loads(line) for line in caption(photographs, *draw, "--seed", 1).splitlines()[:PHOTOGRAPHS]]
    assert drawn != other
    with pytest.raises(UserError, match="4 captions an image need as many beams"):
        caption(photographs, *oracle, "--num-captions", 4)


def test_what_a_checkpoint_says_about_itself(
    caption: Command, photographs: Path, oracle: list[object], golden: dict[str, Any], tmp_path: Path
) -> None:
    """A run directory, a transformers folder and an exported .pth need no --cfg-path; the decoding comes along."""
    _, checkpoint, _, config = oracle
    given = yaml.safe_load(Path(str(config)).read_text())
    given["run"] = {"num_beams": 1}
    (tmp_path / "greedy.yaml").write_text(yaml.safe_dump(given))
    export = load_script("export")
    for kind, output in (("hf", tmp_path / "hf"), ("blip", tmp_path / "own.pth")):
        sys.argv = ["export.py", "--checkpoint", str(checkpoint), "--cfg-path", str(tmp_path / "greedy.yaml"),
                    "--format", kind, "--output", str(output)]  # fmt: skip
        export.main()
    run = tmp_path / "run"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "checkpoints" / "best").symlink_to("step_1")
    (run / "config.yaml").symlink_to(tmp_path / "greedy.yaml")
    os.link(tmp_path / "hf" / "model.safetensors", run / "checkpoints" / "step_1" / "model.safetensors")

    assert by_file(caption(photographs, "--checkpoint", run)) == expected(golden, "greedy_max20_min5")
    assert by_file(caption(photographs, "--checkpoint", tmp_path / "hf")) == expected(golden, "greedy_max20_min5")
    assert by_file(caption(photographs, "--checkpoint", tmp_path / "own.pth")) == expected(golden)
    with pytest.raises(UserError, match=r"tiny_blip\.pth: nothing beside it or in it says .* --cfg-path"):
        caption(photographs, "--checkpoint", checkpoint)
    with pytest.raises(UserError, match="--options change a run config, and there is none"):
        caption_recipe(str(checkpoint), None, ["run.num_beams=1"])


@pytest.mark.parametrize(("vit_type", "depth", "heads"), [("base", 12, 12), ("large", 24, 16)])
def test_blip_base_and_large_are_known_by_their_shapes(vit_type: str, depth: int, heads: int) -> None:
    with torch.device("meta"):
        model = build_model(BlipConfig(vit_type=vit_type, image_size=480), keep_activations)
    assert (len(model.image_encoder.blocks), model.image_encoder.blocks[0].attn.num_heads) == (depth, heads)
    weights = dict(model.named_parameters())
    assert published(weights) == BlipConfig(vit_type=vit_type, image_size=480)
    name = "text_decoder.bert.embeddings.word_embeddings.weight"
    assert published(weights | {name: weights[name][:30522]}) is None


# --- where images come from ------------------------------------------------------------------------------------------


@pytest.fixture
def served(photographs: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(photographs)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_standard_input_addresses_and_what_cannot_be_read(
    caption: Command,
    photographs: Path,
    served: str,
    oracle: list[object],
    golden: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, third = golden["images"][0], golden["images"][2]
    (tmp_path / "torn.jpg").write_bytes((photographs / first).read_bytes()[:2000])
    broken = [f"{served}/none.jpg", "ftp://host/x.jpg", tmp_path / "torn.jpg", tmp_path / "none.jpg", b"\xff\x00.jpg"]
    lines = [os.fsencode(name) for name in (photographs / first, *broken, f"{served}/{third}", photographs / first)]
    monkeypatch.setattr(sys, "stdin", Namespace(buffer=io.BytesIO(b"\n".join(lines) + b"\n\n")))
    printed = caption("-", *oracle, "--batch-size", 2).splitlines()
    assert [json.loads(line) for line in printed[:2]] == [
        {"image": str(photographs / first), "caption": words(golden)[first]},
        {"image": f"{served}/{third}", "caption": words(golden)[third]},
    ]
    skipped = [line for line in printed if line.startswith("skipped ")]
    assert len(skipped) == 5
    assert skipped[0] == f"skipped {served}/none.jpg: the server answers 404 File not found"
    assert "not an address" in skipped[1] and "truncated" in skipped[2]
    assert skipped[3] == f"skipped {tmp_path / 'none.jpg'}: No such file or directory"
    assert printed[-1].startswith("2 images captioned, 5 skipped (they cannot be read), 1 already captioned")
    with pytest.raises(UserError, match=r"none\.jpg: no such file or folder"):
        caption(tmp_path / "none.jpg", *oracle)


def test_a_command_that_captions_nothing_fails(
    caption: Command, oracle: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^no image was captioned \(0 cannot be read\)$"):
        caption(tmp_path, *oracle)
    for name in ("a.HEIC", "b.HEIC", "c.txt", "e.x", "f.y", "g.z", "d"):
        (tmp_path / name).touch()
    suffixes = r"(1 \.\w+, |1 without one, ){4}(1 \.\w+|1 without one)"
    listed = rf"{suffixes}; 2 files passed over, of formats that are not read: \.HEIC \(2\); .*"
    with pytest.raises(
        UserError, match=rf"^no image was captioned \(0 cannot be read; not read, by suffix: {listed}\)$"
    ):
        caption(tmp_path, *oracle)
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"^no image was captioned \(1 cannot be read; not read"):
        caption(tmp_path, *oracle, "--sidecar")
    Image.new("RGB", (8, 8)).save(tmp_path / "h.png")
    assert (
        "passed over, of formats that are not read: .HEIC (2); "
        in caption(tmp_path, *oracle, "--sidecar").splitlines()[-1]
    )
    assert "0 images captioned, 1 skipped" in caption(tmp_path, *oracle, "--sidecar")
    monkeypatch.setattr(sys, "stdin", Namespace(buffer=io.BytesIO()))
    assert "0 images captioned" in caption("-", *oracle)  # find found nothing new


def test_folders_are_read_in_order_and_circles_end(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/z.PNG", "a/deep/c.webp", "notes.txt", ".hidden.jpg", ".git/x.jpg", "empty/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "to_pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / os.fsdecode(b"\xff.jpg")).touch()
    (tmp_path / "IMG_0001.HEIC").touch()
    (tmp_path / "loop").symlink_to("loop")
    others: Counter[str] = Counter()
    found = [os.path.relpath(image.name, tmp_path) for image in named_images([f"{tmp_path}/"], others)]
    assert found == ["a/deep/c.webp", "a/z.PNG", "b.jpg", "gone.jpg", "loop.jpg", os.fsdecode(b"\xff.jpg")]
    assert others == {".txt": 2, ".HEIC": 1, "": 1}


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    """20,000 names, as a list 2.5 MB and more; 18,000 have captions. A model that says one word."""
    Image.new("RGB", (8, 8)).save(tmp_path / "pixel.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(20_000):
        os.symlink("../pixel.png", folder / f"{number:06}_{'long' * 10}.png")  # noqa: PTH211
    output = CaptionFile(tmp_path / "captions.jsonl", {}, 1)
    output.write((image, [Caption("a pixel")]) for image in islice(named_images([str(folder)], Counter()), 18_000))
    output.file.close()
    model: Any = Namespace(
        image_processor=BlipImageEval(8),
        device=torch.device("cpu"),
        captions=lambda images, names: [[Caption("a pixel")]] * len(names),
    )
    tracemalloc.start()
    output = CaptionFile(tmp_path / "captions.jsonl", {}, 1)
    counts = caption_images(model, named_images([str(folder)], Counter()), output, batch_size=64, num_workers=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (counts.captioned, counts.already) == (2000, 18_000)
    assert sum(1 for _ in (tmp_path / "captions.jsonl").open()) == 20_000
    assert peak < 1_000_000


def test_names_are_a_sorted_set() -> None:
    names = Names()
    assert [names.add(name) for name in ("b", "a", "b", os.fsdecode(b"\xff"), "a")] == [True, True, False, True, False]
    assert list(names) == ["a", "b", os.fsdecode(b"\xff")]


# --- going on --------------------------------------------------------------------------------------------------------


def test_killed_and_gone_on_with_by_two_ranks(
    photographs: Path, oracle: list[object], golden: dict[str, Any], caption: Command, tmp_path: Path
) -> None:
    """SIGKILL in the middle, a torn line on top, then two ranks: the file of a run that nothing disturbed."""
    caption(photographs, *oracle, "--output", tmp_path / "whole.jsonl")
    output = tmp_path / "captions.jsonl"
    arguments = ("launch/caption.py", photographs, *oracle, "--output", output, "--num-workers", 1)
    (process,) = start_ranks(1, tmp_path / "log", *arguments, "--batch-size", 1)
    while process.exitcode is None and (not output.exists() or output.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    kill([process])
    before = output.read_bytes()
    assert 3 <= before.count(b"\n") < PHOTOGRAPHS, (tmp_path / "log").read_text()
    with output.open("ab") as file:
        file.write(b'{"image": "torn')

    two = launch_as_typed(2, *arguments, "--batch-size", 2)
    assert two.returncode == 0, two.stdout
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert output.read_bytes().startswith(before)
    left = PHOTOGRAPHS - before.count(b"\n")
    assert (
        f"{left} images captioned, 0 skipped (they cannot be read), {before.count(chr(10).encode())} already"
        in two.stdout
    )


def test_sidecars(
    caption: Command, photographs: Path, oracle: list[object], golden: dict[str, Any], tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    first, second = golden["images"][:2]
    assert f"{PHOTOGRAPHS} images captioned" in caption(photographs, *oracle, "--sidecar", texts)
    assert (texts / first).with_suffix(".txt").read_text() == words(golden)[first] + "\n"
    assert (texts / "below" / second).with_suffix(".txt").read_text() == words(golden)[second] + "\n"
    (texts / first).with_suffix(".txt").write_text("mine\n")
    (texts / "below" / second).with_suffix(".txt").unlink()
    assert f"1 images captioned, 0 skipped (they cannot be read), {PHOTOGRAPHS - 1} already" in caption(
        photographs, *oracle, "--sidecar", texts
    )
    assert (texts / first).with_suffix(".txt").read_text() == "mine\n"
    with pytest.raises(UserError, match=r"texts holds captions with other settings \(num_beams 3, now 1\)"):
        caption(photographs, *oracle, "--sidecar", texts, "--num-beams", 1)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").symlink_to((photographs / first).resolve())
    caption(tmp_path / "mine" / "a.jpg", *oracle, "--sidecar")
    assert (tmp_path / "mine" / "a.txt").read_text() == words(golden)[first] + "\n"


def test_help_waits_for_nothing() -> None:
    code = (
        "import runpy, sys; sys.argv = ['caption.py', '--help']\n"
        "try: runpy.run_path('launch/caption.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--use-nucleus-sampling" in shown.stdout
