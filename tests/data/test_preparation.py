"""launch/prepare_data.py's standard sets, from a server that misbehaves, by hand, and on to a dataset that is read."""

import copy
import hashlib
import importlib.util
import io
import json
import random
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import REPOSITORY
from PIL import Image
from serving import Handler, Server, serving

from blipds.config.run import load_run_config, packaged_dataset
from blipds.config.sections import ArchiveConfig, Config, DatasetConfig, EnvConfig
from blipds.data import preparation
from blipds.data.datasets import build_dataset
from blipds.data.preparation import StandardSet, announcement, fetch_annotations
from blipds.errors import UserError
from blipds.files import download

NAMES = [f"train2014/COCO_train2014_{number:012}.jpg" for number in range(4)]


def photograph(number: int) -> bytes:
    """Noise, which no compression makes smaller: half a megabyte for all four."""
    noise = random.Random(number).randbytes(200 * 200 * 3)
    data = io.BytesIO()
    Image.frombytes("RGB", (200, 200), noise).save(data, "PNG")
    return data.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return data.getvalue()


PHOTOGRAPHS = {name: photograph(number) for number, name in enumerate(NAMES)}
ANNOTATIONS = json.dumps(
    [{"image": name, "caption": f"a photograph of {'noise ' * 9000}", "image_id": name[-7:-4]} for name in NAMES]
).encode()
ARCHIVE = packed(PHOTOGRAPHS)
FILES = {"/train.json": ANNOTATIONS, "/train2014.zip": ARCHIVE}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.files = dict(FILES)
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 0.5)


def coco(server: Server, known: bool = True) -> DatasetConfig:
    """COCO's config, cut down to what the server has. `known`: with checksums and sizes."""
    dataset = copy.deepcopy(packaged_dataset("coco_caption"))
    info = dataset.build_info
    train = info.annotations["train"]
    train.url = [server.address("/train.json")]
    train.md5 = [hashlib.md5(ANNOTATIONS).hexdigest()] if known else []
    info.annotations = {"train": train}
    archive = info.images.archives[0]
    archive.url = server.address("/train2014.zip")
    archive.md5, archive.size = (hashlib.md5(ARCHIVE).hexdigest(), len(ARCHIVE)) if known else (None, 0)
    info.images.archives = [archive]
    return dataset


def flickr8k(server: Server) -> DatasetConfig:
    """Its config, and on the server Karpathy's zip of four images: two of train, one of val, one of test."""
    splits = ["train", "train", "val", "test"]
    images = [
        {"filename": f"{k}.jpg", "imgid": k, "split": split, "sentences": [{"raw": f"Photograph {k}."}, {"raw": "It."}]}
        for k, split in enumerate(splits)
    ]
    karpathy = json.dumps({"dataset": "flickr8k", "images": images}).encode()
    server.files["/caption_datasets.zip"] = packed({"dataset_flickr8k.json": karpathy, "dataset_coco.json": b"{}"})
    dataset = packaged_dataset("flickr8k_caption")
    for files in dataset.build_info.annotations.values():
        files.url = [server.address("/caption_datasets.zip")]
    return dataset


def standard_set(server: Server, root: Path, known: bool = True) -> StandardSet:
    return StandardSet(coco(server, known), root)


def prepare(wanted: StandardSet) -> None:
    for step in wanted.steps(with_images=True):
        step.do()


# --- fifty faults and more -------------------------------------------------------------------------------------------

PASSING = [
    *(Handler.break_off, Handler.stall, Handler.no_range_and_break_off, Handler.chunked_and_break_off),
    *(Handler.wrong_range, Handler.busy, Handler.server_error, Handler.hang_up, Handler.too_many, Handler.redirect),
    *(Handler.too_many_until_a_date, Handler.busy_with_nonsense, Handler.whole_as_the_rest, Handler.never_a_range),
    *(Handler.bad_chunks, Handler.no_http, Handler.drip_headers, Handler.drip_bytes, Handler.part_unasked),
    *(Handler.redirect_to_nobody,),
]
HARMLESS = (Handler.break_off, Handler.stall, Handler.redirect, Handler.whole_as_the_rest)  # each attempt brings more
# what every attempt meets -> what is said
LASTING: dict[Callable[[Handler], None], str | None] = {
    **dict.fromkeys(HARMLESS),
    **dict.fromkeys(set(PASSING) - set(HARMLESS), r"failed 5 times in a row \(.*\)"),
    Handler.gone: "answers 404",
    Handler.forbidden: "answers 403",
    Handler.no_content: "answers 204",
    Handler.come_back_tomorrow: "asks to come back in 86400 seconds",
    Handler.web_page: "a web page .* instead of the file",
    Handler.compressed: "compressed",
    Handler.redirect_for_ever: "answers 302",
    Handler.redirect_nowhere: "answers 302|failed 5 times",
    Handler.redirect_to_ftp: "which is not followed",
    Handler.redirect_to_a_file: "answers 302",
    Handler.other_bytes: "md5 is",
    Handler.cut: "md5 is|another file",
    Handler.nothing: "an answer without a byte|another file",
    Handler.cut_without_a_length: "md5 is|failed 5 times",
    Handler.bad_length: "md5 is|failed 5 times",
    Handler.longer: "md5 is|failed 5 times",
}
CASES = [(path, [fault], line) for path in ("/train.json", "/train2014.zip") for fault, line in LASTING.items()]
CASES += [
    (path, [*random.Random(seed).choices(PASSING, k=2), Handler.proper], None)
    for seed, path in enumerate(["/train.json", "/train2014.zip"] * 15)
]


def test_server_faults(tmp_path: Path) -> None:
    """Each ends in the right files or in one line; under the final names there is nothing or all."""
    assert len(CASES) > 90
    with ThreadPoolExecutor(4) as pool:  # most of the time is waiting for servers that stand still
        list(pool.map(lambda numbered: try_case(tmp_path / str(numbered[0]), *numbered[1]), enumerate(CASES)))


def try_case(root: Path, path: str, plan: list[Callable[[Handler], None]], line: str | None) -> None:
    case = f"{path} {[fault.__name__ for fault in plan]}"
    with serving() as server:
        server.files = FILES
        server.plan, server.faulty = list(plan), path
        wanted = standard_set(server, root)
        try:
            prepare(wanted)
            assert line is None, case
        except UserError as error:
            assert line is not None, f"{case}: {error}"
            assert "\n" not in str(error) and "Where there is no network, put it at" in str(error)
            assert re.search(line, str(error)), f"{case}: {error}"
            said = re.search(r"(\d+) bytes are kept", str(error))
            kept = sum(part.stat().st_size for part in wanted.downloads.glob("*.part"))
            assert (int(said[1]) if said else 0) == kept, f"{case}: {error}"
    annotations, images = wanted.root / "coco" / "annotations", wanted.images
    for folder, files in ((annotations, {"coco_karpathy_train.json": ANNOTATIONS}), (images, PHOTOGRAPHS)):
        found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        complete = line is None or (folder is annotations and path == "/train2014.zip")
        assert found == (files if complete else {}), case


def test_without_a_checksum_the_content_is_looked_at(server: Server, tmp_path: Path) -> None:
    server.faulty = "/train.json"
    for fault, line in ((Handler.cut, "the server sent no JSON"), (Handler.other_bytes, "the server sent no JSON")):
        server.plan = [fault]
        with pytest.raises(UserError, match=line):
            prepare(standard_set(server, tmp_path, known=False))
    server.faulty = "/train2014.zip"
    for fault, line in (
        (Handler.cut, "neither a zip nor a tar|damaged"),
        (Handler.nothing, "an answer without a byte"),
    ):
        server.plan = [fault]
        with pytest.raises(UserError, match=line):
            prepare(standard_set(server, tmp_path, known=False))
        assert not list(tmp_path.rglob("*.jpg"))
    server.plan = [Handler.proper]
    prepare(standard_set(server, tmp_path, known=False))
    assert (tmp_path / "coco" / "images" / NAMES[0]).read_bytes() == PHOTOGRAPHS[NAMES[0]]


# --- on first use ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(server: Server, tmp_path: Path) -> Callable[..., Config]:
    """run_config(option, ...) is a LAVIS run config whose addresses are the server's, with an image folder."""
    md5 = hashlib.md5(ANNOTATIONS).hexdigest()
    files = {split: {"url": server.address("/train.json"), "md5": md5} for split in ("train", "val", "test")}
    given = {"model": {"load_finetuned": False, "image_size": 16}}
    given["datasets"] = {"coco_caption": {"build_info": {"annotations": files}}}
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    (tmp_path / "coco" / "images").mkdir(parents=True)

    def load(*options: str) -> Config:
        return load_run_config(tmp_path / "run.yaml", [f"env.cache_root={tmp_path}", *options])[0]

    return load


def test_annotations_are_fetched_on_first_use(
    server: Server, run_config: Callable[..., Config], tmp_path: Path
) -> None:
    said: list[str] = []
    fetch_annotations(run_config(), ["train"], said.append)
    path = tmp_path / "coco" / "annotations" / "coco_karpathy_train.json"
    assert path.read_bytes() == ANNOTATIONS
    assert said == [f"data       {path}: 0.2 MB from {server.address('/train.json')}"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text("[]")  # an existing file is neither checked nor downloaded
    fetch_annotations(run_config(), ["train"], said.append)
    assert path.read_text() == "[]" and server.paths == ["/train.json"] and len(said) == 1


def test_a_split_is_made_on_first_use(server: Server, tmp_path: Path) -> None:
    """Flickr8k's annotations are splits of one zip, which is downloaded once for all of them."""
    config = Config(datasets={"flickr8k_caption": flickr8k(server)}, env=EnvConfig(cache_root=str(tmp_path)))
    (tmp_path / "flickr8k" / "images").mkdir(parents=True)
    fetch_annotations(config, ["train", "val"], lambda line: None)
    annotations = tmp_path / "flickr8k" / "annotations"
    entries = json.loads((annotations / "val.json").read_text())
    assert entries == [{"image": "2.jpg", "caption": ["Photograph 2.", "It."], "image_id": "2"}]
    assert sorted(file.name for file in annotations.iterdir()) == ["train.json", "val.json"]
    assert server.paths == ["/caption_datasets.zip"]


def test_a_download_that_fails_is_one_line(server: Server, run_config: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "coco" / "annotations" / "coco_karpathy_train.json"
    nobody = "datasets.coco_caption.build_info.annotations.train.url=http://127.0.0.1:1/train.json"
    cases = [
        ([Handler.break_off, Handler.busy], [], f"HTTP 503.*; {len(ANNOTATIONS) // 3} bytes are kept, start again"),
        ([Handler.other_bytes], [], r"train\.json: the download's md5 is \w+, not \w+; it was removed"),
        ([Handler.proper], [nobody], r"^http://127\.0\.0\.1:1/train\.json: failed 5 times in a row \(.*refused\)"),
    ]
    for plan, options, line in cases:
        server.plan = plan
        with pytest.raises(UserError, match=line) as caught:
            fetch_annotations(run_config(*options), ["train"], print)
        assert str(caught.value).endswith(f". Where there is no network, put it at {path}")
        assert not path.exists()
    server.plan = [Handler.break_off, Handler.busy]
    with pytest.raises(UserError):
        fetch_annotations(run_config(), ["train"], print)
    server.plan, server.ranges = [Handler.proper], []
    fetch_annotations(run_config(), ["train"], print)
    assert path.read_bytes() == ANNOTATIONS and server.ranges == [f"bytes={len(ANNOTATIONS) // 3}-"]


def test_only_files_with_an_address_are_fetched(run_config: Callable[..., Config], tmp_path: Path) -> None:
    """A path of one's own drops the packaged address, which is of another file."""
    files = "datasets.coco_caption.build_info.annotations"
    (tmp_path / "packaged.yaml").write_text("datasets: {coco_caption: {}}")
    for storage in ("mine.json", "{storage: mine.json}", "'pipe:cat shards.tar'", "'http://localhost/{0..3}.tar'"):
        config, _ = load_run_config(tmp_path / "packaged.yaml", [f"{files}.train={storage}"])
        train = config.datasets["coco_caption"].build_info.annotations["train"]
        assert (train.url, train.md5, train.member) == ([], [], None) and len(train.storage) == 1
        fetch_annotations(config, ["train"], print)
    with pytest.raises(UserError, match="1 url, 1 md5, 2 storage; allowed: as many of each"):
        run_config(f"{files}.train={{url: http://localhost/a, md5: b, storage: [a, b]}}")
    with pytest.raises(UserError, match=r"'/etc/passwd': not an address that can be downloaded"):
        fetch_annotations(run_config(f"{files}.train.url=/etc/passwd"), ["train"], print)


def test_missing_images_name_the_command(server: Server, run_config: Callable[..., Config], tmp_path: Path) -> None:
    command = rf"python launch/prepare_data\.py coco --root {tmp_path} gets them"
    with pytest.raises(UserError, match=f"no such images: {tmp_path}/nowhere; {command}"):
        fetch_annotations(run_config("datasets.coco_caption.images=nowhere"), ["train"], print)
    assert server.paths == []
    fetch_annotations(run_config(), ["train"], print)
    with pytest.raises(UserError, match=f"no such images: {tmp_path}/coco/images/{NAMES[0]}; {command}"):
        build_dataset("coco_caption", run_config(), "train", training=True)
    (tmp_path / "coco" / "images" / "train2014").mkdir()
    (tmp_path / "coco" / "images" / NAMES[2]).write_bytes(PHOTOGRAPHS[NAMES[2]])
    assert len(build_dataset("coco_caption", run_config(), "train", training=True)) == 4  # one is there


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """command(standard set, "coco", ...) runs the command line in this process; returns what it printed."""
    spec = importlib.util.spec_from_file_location("prepare_data", REPOSITORY / "launch" / "prepare_data.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(dataset: DatasetConfig, *arguments: object) -> str:
        monkeypatch.setattr(script, "packaged_dataset", lambda name: dataset)
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        try:
            script.main()
        except UserError as error:
            return capsys.readouterr().out + f"error: {error}"
        return capsys.readouterr().out

    return run


def test_a_run_with_the_datasets_name_finds_it(server: Server, command: Callable[..., str], tmp_path: Path) -> None:
    dataset = coco(server)
    refused = command(dataset, "coco", "--root", tmp_path / "data")
    assert refused.splitlines()[-1].endswith("give --yes to start")
    assert f"train2014  from {server.address('/train2014.zip')}" in refused and "GB free" in refused
    assert not (tmp_path / "data").exists()

    server.plan, server.faulty = [Handler.break_off, Handler.busy], "/train2014.zip"
    assert "bytes are kept, start again" in command(dataset, "coco", "--root", tmp_path / "data", "--yes")
    server.plan, server.ranges = [Handler.proper], []
    assert "ready      --options env.cache_root=" in command(dataset, "coco", "--root", tmp_path / "data", "--yes")
    assert set(server.ranges) == {f"bytes={len(ARCHIVE) // 3}-"}
    server.ranges = []
    assert {path.suffix for path in (tmp_path / "data" / "downloads").iterdir()} == {".lock"}
    assert "start?" not in command(dataset, "coco", "--root", tmp_path / "data")  # nothing is left to do
    assert server.ranges == []

    (tmp_path / "run.yaml").write_text("datasets: {coco_caption: {}}\nmodel: {load_finetuned: false}\n")
    config, _ = load_run_config(tmp_path / "run.yaml", [f"env.cache_root={tmp_path / 'data'}", "model.image_size=16"])
    train = build_dataset("coco_caption", config, "train", training=True)
    assert len(train) == 4 and train[0].image is not None and train[0].captions[0].startswith("a picture of a photo")


def test_images_that_nobody_has(server: Server, command: Callable[..., str], tmp_path: Path) -> None:
    dataset = coco(server, known=False)
    server.files["/train2014.zip"] = packed({NAMES[0]: PHOTOGRAPHS[NAMES[0]]})
    said = command(dataset, "coco", "--root", tmp_path, "--yes")
    assert f"missing    3 images, such as {tmp_path}/coco/images/{NAMES[1]}; they are not in http" in said
    assert "error: coco: the annotations are there, but images are missing" in said
    assert "ready" in command(dataset, "coco", "--root", tmp_path, "--yes", "--no-images")


def test_a_disk_that_is_too_small(server: Server, tmp_path: Path) -> None:
    wanted = standard_set(server, tmp_path)
    wanted.archives[0].size = 10**15
    with pytest.raises(UserError, match=r"2000000\.1 GB are needed, \d+\.\d GB are free; give another --root"):
        announcement(wanted.steps(with_images=True), tmp_path / "not" / "there")


def test_another_file_under_an_annotations_name_is_not_touched(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "coco" / "annotations" / "coco_karpathy_train.json"
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"its md5 is \w+, not \w+ as published; remove it to download it again"):
        standard_set(server, tmp_path).steps(with_images=True)
    assert path.read_text() == "[]"


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_flickr8k_by_hand(server: Server, command: Callable[..., str], tmp_path: Path) -> None:
    """Karpathy's file gives the splits; the photographs are recognised and unpacked where the command says."""
    dataset = flickr8k(server)
    said = command(dataset, "flickr8k", "--root", tmp_path, "--yes")
    place = tmp_path / "flickr8k" / "Flickr8k_Dataset.zip"
    assert f"request Flickr8k_Dataset.zip at https://forms.illinois.edu/sec/1713398, put it at {place} and run" in said
    assert len(server.ranges) == 1
    train = json.loads((tmp_path / "flickr8k" / "annotations" / "train.json").read_text())
    assert [(entry["image"], entry["caption"]) for entry in train] == [
        ("0.jpg", ["Photograph 0.", "It."]),
        ("1.jpg", ["Photograph 1.", "It."]),
    ]

    place.write_bytes(packed({f"Flicker8k_Dataset/{k}.jpg": photograph(k) for k in range(4)} | {"__MACOSX/x": b""}))
    said = command(dataset, "flickr8k", "--root", tmp_path, "--yes")
    assert f"flickr8k/images  from {place}, which stays" in said and "ready" in said
    assert sorted(path.name for path in (tmp_path / "flickr8k" / "images").iterdir()) == [f"{k}.jpg" for k in range(4)]


def test_what_to_do_without_a_network(command: Callable[..., str], tmp_path: Path) -> None:
    dataset = packaged_dataset("flickr30k_caption")
    for files in dataset.build_info.annotations.values():
        files.url = ["http://127.0.0.1:1/flickr30k.json"]
    path = tmp_path / "flickr30k" / "annotations" / "train.json"
    assert f"Where there is no network, put it at {path}" in command(dataset, "flickr30k", "--root", tmp_path, "--yes")
    for split in ("train", "val", "test"):
        entry = {"image": f"flickr30k-images/{split}.jpg", "caption": ["One."], "image_id": split}
        path.with_name(f"{split}.json").parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{split}.json").write_text(json.dumps([entry]))
    said = command(dataset, "flickr30k", "--root", tmp_path)
    assert f"put it at {tmp_path}/flickr30k/flickr30k-images.tar.gz and run this command again" in said
    for split in ("train", "val", "test"):
        (tmp_path / "flickr30k" / "images" / "flickr30k-images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "flickr30k" / "images" / "flickr30k-images" / f"{split}.jpg").write_bytes(photograph(0))
    assert "ready" in command(dataset, "flickr30k", "--root", tmp_path)


def test_the_packaged_configs_are_consistent() -> None:
    """Every set has a source for its annotations, and every archive a source or a page."""
    for name in preparation.DATASETS.values():
        info = packaged_dataset(name).build_info
        assert all(len(files.url) == len(files.storage) == 1 for files in info.annotations.values())
        assert info.images.archives and all((a.url and a.size and a.md5) or a.request for a in info.images.archives)
    assert isinstance(info.images.archives[0], ArchiveConfig)


def test_spices_models(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pycocoevalcap.spice import get_stanford_models

    (tmp_path / "spice" / "lib").mkdir(parents=True)
    (tmp_path / "spice" / "lib" / "other.jar").touch()
    monkeypatch.setattr(get_stanford_models, "__file__", str(tmp_path / "spice" / "get_stanford_models.py"))
    monkeypatch.setattr(preparation, "CORENLP", server.address("/corenlp.zip"))
    folder, jar = get_stanford_models.CORENLP, get_stanford_models.JAR
    names = [f"{jar}.jar", f"{jar}-models.jar", "README.txt"]
    server.files["/corenlp.zip"] = packed({f"{folder}/{name}": name.encode() for name in names})
    (step,) = preparation.spice_steps(tmp_path / "downloads")
    step.do()
    found = sorted(path.name for path in (tmp_path / "spice" / "lib").iterdir())
    assert found == sorted([*names[:2], "other.jar"])
    assert preparation.spice_steps(tmp_path / "downloads") == []
