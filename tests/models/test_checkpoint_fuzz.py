"""Damaged, foreign and hostile files: a UserError before the first write, or a whole model; never an execution."""

import contextlib
import io
import json
import pickle
import random
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import open_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from blipds.errors import UserError
from blipds.models.checkpoints import load_into

EMBEDDINGS = "text_decoder.bert.embeddings.word_embeddings.weight"
SHAPES = {
    "visual_encoder.cls_token": (1, 1, 8),
    "visual_encoder.pos_embed": (1, 5, 8),
    "visual_encoder.norm.weight": (8,),
    EMBEDDINGS: (20, 8),
    "text_decoder.cls.predictions.bias": (20,),
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def zip_file(path: Path) -> None:
    torch.save({"model": tensors(), "config": {"image_size": 16}, "epoch": 3}, path)


def legacy_file(path: Path) -> None:
    torch.save({"model": tensors()}, path, _use_new_zipfile_serialization=False)


def safetensors_file(path: Path) -> None:
    save_file(tensors(), path, metadata={"format": "blipds", "config": "{}"})


FORMATS: dict[str, Callable[[Path], None]] = {"zip": zip_file, "legacy": legacy_file, "safetensors": safetensors_file}


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that every bomb tries to write. It must not be there at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def judge(path: Path) -> bool:
    """True: a whole model of finite values was loaded; False: refused before the first write."""
    written: dict[str, Tensor] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_into(SHAPES, open_checkpoint(path), lambda name, tensor: written.update({name: tensor.clone()}))
    except UserError as error:
        assert written == {}
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == SHAPES
    assert all(tensor.isfinite().all() for tensor in written.values())
    return True


def equals_original(path: Path) -> bool:
    found = open_checkpoint(path).tensors
    return all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("kind", FORMATS)
def test_the_undamaged_files_load(kind: str, tmp_path: Path) -> None:
    FORMATS[kind](tmp_path / "file")
    assert judge(tmp_path / "file") and equals_original(tmp_path / "file")


@pytest.mark.parametrize("place", range(30))
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated(kind: str, place: int, tmp_path: Path) -> None:
    """30 places over the whole file, among them 0, 1, and one byte short."""
    FORMATS[kind](tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    length = {0: 0, 1: 1, 29: len(data) - 1}.get(place, len(data) * place // 30)
    (tmp_path / "cut").write_bytes(data[:length])
    assert not judge(tmp_path / "cut")


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("kind", FORMATS)
def test_bit_flipped(kind: str, seed: int, tmp_path: Path, marker: Path) -> None:
    """One to four flipped bits. torch.save's zip has checksums: what loads is what was saved. Neither the format before
    torch 1.6 nor safetensors has any: a flip among the numbers that leaves them finite loads as a valid model."""
    FORMATS[kind](tmp_path / "file")
    data = bytearray((tmp_path / "file").read_bytes())
    draw = random.Random(f"{kind}{seed}")
    header = len(data) if seed % 2 else min(len(data), 600)  # every other case aims at the header
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(header)] ^= 1 << draw.randrange(8)
    (tmp_path / "file").write_bytes(data)
    if judge(tmp_path / "file") and kind == "zip":
        assert equals_original(tmp_path / "file")


class Bomb:
    """Unpickled in earnest, it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def bombs(marker: Path) -> dict[str, Any]:
    import os
    import subprocess

    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Bomb(os.system, f"touch {marker}"),
        "eval": Bomb(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "exec": Bomb(exec, write),
        "popen": Bomb(subprocess.check_call, ["touch", str(marker)]),
        "open": Bomb(open, str(marker), "w"),
        "getattr": Bomb(getattr, Bomb(__import__, "os"), "system"),
        "path": Bomb(Path.touch, marker),
        "torch.load": Bomb(torch.load, str(marker)),
        "torch.save": Bomb(torch.save, 1, str(marker)),
        "function": Bomb(torch.hub.load, "x", "y"),
    }


BOMBS = sorted(bombs(Path("x")))


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "popen", "open", "path", "torch.save"])
def test_the_bombs_are_live(name: str, tmp_path: Path) -> None:
    """The other three call what needs no marker (getattr, torch.load, torch.hub.load): they must be refused, too."""
    torch.save(bombs(tmp_path / "executed")[name], tmp_path / "bomb.pth")
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["model", "tensor", "config", "whole", "after"])
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_bombs(name: str, place: str, zipped: bool, tmp_path: Path, marker: Path) -> None:
    bomb = bombs(marker)[name]
    content: Any = {
        "model": {"model": bomb},
        "tensor": {"model": tensors() | {"visual_encoder.norm.weight": bomb}},
        "config": {"model": tensors(), "config": bomb},
        "whole": bomb,
        "after": {"model": tensors(), "scaler": [bomb]},
    }[place]
    torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=zipped)
    assert not judge(tmp_path / "bomb.pth")


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_as_a_bare_pickle_and_as_pytorch_model_bin(name: str, tmp_path: Path, marker: Path) -> None:
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": bombs(marker)[name]}))
    assert not judge(tmp_path / "bare.pth")
    torch.save(bombs(marker)[name], tmp_path / "pytorch_model.bin")
    assert not judge(tmp_path)


def test_the_refusal_says_why_and_does_not_tell_how_to_execute(tmp_path: Path, marker: Path) -> None:
    torch.save(bombs(marker)["os.system"], tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"refused, its pickle asks for more.*system") as caught:
        open_checkpoint(tmp_path / "bomb.pth")
    assert "weights_only=False" not in str(caught.value) and "add_safe_globals" not in str(caught.value)


def rezipped(
    path: Path, change: Callable[[str, bytes], dict[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    """A zip with sound checksums whose members are what `change(name, data)` says."""
    zip_file(path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            for new_name, new_data in change(name, data).items():
                archive.writestr(new_name, new_data)


def keep(name: str, data: bytes) -> dict[str, bytes]:
    return {name: data}


def drop(end: str) -> Callable[[str, bytes], dict[str, bytes]]:
    return lambda name, data: {} if name.endswith(end) else {name: data}


def replace(end: str, new: Callable[[bytes], bytes]) -> Callable[[str, bytes], dict[str, bytes]]:
    return lambda name, data: {name: new(data) if name.endswith(end) else data}


def replace_name(end: str, new_end: str) -> Callable[[str, bytes], dict[str, bytes]]:
    return lambda name, data: {name.removesuffix(end) + new_end if name.endswith("/" + end) else name: data}


ZIPS: dict[str, tuple[Callable[[str, bytes], dict[str, bytes]], int]] = {
    "deflated": (keep, zipfile.ZIP_DEFLATED),
    "bzip2": (keep, zipfile.ZIP_BZIP2),
    "no pickle": (drop("data.pkl"), zipfile.ZIP_STORED),
    "no storage": (drop("data/2"), zipfile.ZIP_STORED),
    "no version": (drop("version"), zipfile.ZIP_STORED),
    "short storage": (replace("data/2", lambda data: data[:-4]), zipfile.ZIP_STORED),
    "empty storage": (replace("data/0", lambda data: b""), zipfile.ZIP_STORED),
    "empty pickle": (replace("data.pkl", lambda data: b""), zipfile.ZIP_STORED),
    "half a pickle": (replace("data.pkl", lambda data: data[: len(data) // 2]), zipfile.ZIP_STORED),
    "other byte order": (replace("byteorder", lambda data: b"middle"), zipfile.ZIP_STORED),
    "big endian": (replace("byteorder", lambda data: b"big"), zipfile.ZIP_STORED),
    "storage of ints": (replace("data.pkl", lambda data: data.replace(b"FloatStorage", b"LongStorage\n")), 0),
    "storage of int32": (replace("data.pkl", lambda data: data.replace(b"FloatStorage", b"IntStorage")), 0),
    "torchscript": (replace_name("version", "constants.pkl"), zipfile.ZIP_STORED),
    "upwards": (lambda name, data: {name.replace("file/", "../../file/"): data}, zipfile.ZIP_STORED),
    "no folder": (lambda name, data: {name.partition("/")[2]: data}, zipfile.ZIP_STORED),
    "two folders": (lambda name, data: {name: data, "b/" + name: data}, zipfile.ZIP_STORED),
    "huge shape": (replace("data.pkl", lambda data: data.replace(b"K\x14K\x08", b"J\xff\xff\xff\x7fK\x08")), 0),
    "shape past the storage": (replace("data.pkl", lambda data: data.replace(b"K\x14K\x08", b"K\x15K\x08")), 0),
    "negative shape": (replace("data.pkl", lambda data: data.replace(b"K\x14K\x08", b"J\xff\xff\xff\xffK\x08")), 0),
    "memo overflow": (replace("data.pkl", lambda data: data[:2] + b"j\xff\xff\xff\xff" + data[2:]), 0),
    "giant string": (replace("data.pkl", lambda data: data[:2] + b"X\xff\xff\xff\x7f" + data[2:]), 0),
    "deep nesting": (replace("data.pkl", lambda data: b"\x80\x02" + b"]" * 90000 + b"a" * 89999 + b"."), 0),
}


@pytest.mark.parametrize("name", ZIPS)
def test_odd_zips(name: str, tmp_path: Path, marker: Path) -> None:
    change, compression = ZIPS[name]
    rezipped(tmp_path / "file", change, compression)
    if judge(tmp_path / "file"):
        assert equals_original(tmp_path / "file")


CONTENTS: dict[str, Any] = {
    "list": [1, 2],
    "number": 3,
    "none": None,
    "tensor": torch.ones(3),
    "empty": {},
    "empty model": {"model": {}},
    "model of a list": {"model": [torch.ones(3)]},
    "model of numbers": {"model": dict.fromkeys(SHAPES, 1.0)},
    "numbered names": {"model": dict(enumerate(tensors().values()))},
    "nested": {"model": {"model": tensors()}},
    "sparse": {"model": tensors() | {EMBEDDINGS: torch.eye(20)[:, :8].to_sparse()}},
    "meta": {"model": tensors() | {EMBEDDINGS: torch.empty(20, 8, device="meta")}},
    "bool": {"model": tensors() | {EMBEDDINGS: torch.ones(20, 8).bool()}},
    "float8": {"model": tensors() | {EMBEDDINGS: torch.ones(20, 8).to(torch.float8_e4m3fn)}},
    "nan": {"model": tensors() | {EMBEDDINGS: torch.full((20, 8), float("nan"))}},
    "negative zero dims": {"model": tensors() | {EMBEDDINGS: torch.ones(0, 8)}},
    "scalar": {"model": tensors() | {EMBEDDINGS: torch.tensor(1.0)}},
    "foreign": {"model": {"layer.weight": torch.ones(2)}},
    "newline in a name": {"model": tensors() | {"visual_encoder.a\nb": torch.ones(2)}},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_are_no_state_dict(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(CONTENTS[name], tmp_path / "file.pth")
    assert not judge(tmp_path / "file.pth")


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"visual_encoder.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def whole_model(dtype: str, number: bytes, start: int = 0) -> bytes:
    """Every name and shape is right; each number is `number`, and each tensor begins `start` bytes before its place."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in SHAPES.items():
        begin, end = max(end - start, 0), end + torch.Size(shape).numel() * len(number)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return raw_safetensors(header, number * (end // len(number)))


SAFETENSORS: dict[str, bytes] = {
    "header longer than the file": raw_safetensors({}, length=1 << 20),
    "header of 2**63 bytes": raw_safetensors({}, length=1 << 63),
    "header of 2**64-1 bytes": raw_safetensors({}, length=(1 << 64) - 1),
    "header of no bytes": raw_safetensors({}, length=0),
    "no tensors": raw_safetensors({}),
    "metadata only": raw_safetensors({"__metadata__": {"format": "blipds"}}),
    "metadata of numbers": raw_safetensors({"__metadata__": {"format": 1}}),
    "config is no json": raw_safetensors({"__metadata__": {"format": "blipds", "config": "{"}}),
    "config is a list": raw_safetensors({"__metadata__": {"format": "blipds", "config": "[]"}}),
    "config too deep": raw_safetensors({"__metadata__": {"format": "blipds", "config": "[" * 99999}}),
    "not json": raw_safetensors(b"{not json}"),
    "a list": raw_safetensors([1]),
    "not utf-8": raw_safetensors(b'{"\xff\xfe": 1}'),
    "too deep": raw_safetensors(b'{"a":' * 50000),
    "offsets past the end": raw_safetensors(entry("F32", [8], [0, 32]), b"\0" * 31),
    "offsets backwards": raw_safetensors(entry("F32", [8], [32, 0]), b"\0" * 32),
    "offsets huge": raw_safetensors(entry("F32", [8], [0, 1 << 62]), b"\0" * 32),
    "offsets negative": raw_safetensors(entry("F32", [8], [-32, 0]), b"\0" * 32),
    "offsets missing": raw_safetensors(entry("F32", [8], []), b"\0" * 32),
    "a hole": raw_safetensors(entry("F32", [8], [8, 40]), b"\0" * 40),
    "bytes left over": raw_safetensors(entry("F32", [8], [0, 32]), b"\0" * 40),
    "shape and length disagree": raw_safetensors(entry("F32", [9], [0, 32]), b"\0" * 32),
    "shape overflows": raw_safetensors(entry("F32", [1 << 62, 8], [0, 32]), b"\0" * 32),
    "shape negative": raw_safetensors(entry("F32", [-8], [0, 32]), b"\0" * 32),
    "shape of words": raw_safetensors(entry("F32", ["8"], [0, 32]), b"\0" * 32),
    "unknown dtype": raw_safetensors(entry("F33", [8], [0, 32]), b"\0" * 32),
    "dtype is a number": raw_safetensors(entry(32, [8], [0, 32]), b"\0" * 32),
    "integers": whole_model("I32", b"\1\0\0\0"),
    "booleans": whole_model("BOOL", b"\1"),
    "float8": whole_model("F8_E4M3", b"\x38"),
    "nan": whole_model("F32", b"\xff" * 4),
    "infinity": whole_model("BF16", b"\x80\x7f"),
    "overlap": whole_model("F32", b"\0" * 4, start=4),
    "the same name twice": raw_safetensors(
        json.dumps(entry("F32", [8], [0, 32]))[:-1].encode()
        + b","
        + json.dumps(entry("F32", [4], [0, 16]))[1:].encode(),
        b"\0" * 32,
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_odd_safetensors(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[name])
    assert not judge(tmp_path / "model.safetensors")
    assert not judge(tmp_path)


@pytest.mark.parametrize(("dtype", "one"), [("F32", b"\0\0\x80\x3f"), ("BF16", b"\x80\x3f"), ("F16", b"\0\x3c")])
def test_the_hand_made_safetensors_file_loads_with_sound_numbers(dtype: str, one: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(whole_model(dtype, one))
    assert judge(tmp_path / "model.safetensors")
    assert all((tensor == 1).all() for tensor in open_checkpoint(tmp_path).tensors.values())


def tar(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))
    return stream.getvalue()


FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"P",
    "text": b"hello, this is not a checkpoint at all",
    "json": b'{"model": 1}',
    "web page": b"<!DOCTYPE html><html>404</html>",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
    "tar": tar("storages"),
    "tar upwards": tar("../../../../tmp/blipds_fuzz"),
    "zip without members": b"PK\x05\x06" + b"\0" * 18,
    "zip magic alone": b"PK\x03\x04",
    "legacy magic alone": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "zeros": b"\0" * 4096,
    "noise": random.Random(0).randbytes(4096),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(FOREIGN[name])
    assert not judge(tmp_path / "file.pth")
    shutil.copy(tmp_path / "file.pth", tmp_path / "model.safetensors")
    assert not judge(tmp_path)


FOLDERS: dict[str, dict[str, bytes]] = {
    "empty": {},
    "config alone": {"config.json": b'{"model_type": "blip"}'},
    "config is empty": {"config.json": b""},
    "config is a list": {"config.json": b"[]"},
    "config is not utf-8": {"config.json": b"\xff\xfe\xff"},
    "config too deep": {"config.json": b"[" * 99999},
    "another model": {"config.json": b'{"model_type": "blip-2"}'},
    "model type is a list": {"config.json": b'{"model_type": ["blip"]}'},
    "index is empty": {"model.safetensors.index.json": b""},
    "index without map": {"model.safetensors.index.json": b"{}"},
    "index with an empty map": {"model.safetensors.index.json": b'{"weight_map": {}}'},
    "index to nowhere": {"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'},
    "index upwards": {"model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}'},
    "index absolute": {"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/passwd"}}'},
    "index to a number": {"model.safetensors.index.json": b'{"weight_map": {"a": 1}}'},
    "index to this folder": {"model.safetensors.index.json": b'{"weight_map": {"a": ""}}'},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_foreign_folders(name: str, tmp_path: Path) -> None:
    for file, content in FOLDERS[name].items():
        (tmp_path / file).write_bytes(content)
    assert not judge(tmp_path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "gone.pth", tmp_path, tmp_path / "loop", tmp_path / ("x" * 300), Path("/dev/null")):
        assert not judge(path)
