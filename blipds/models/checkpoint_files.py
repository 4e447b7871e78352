"""Files and folders that hold tensors: safetensors and torch.save, read without executing or believing anything."""

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from blipds.errors import UserError

# A pickle of names and shapes takes some 100 kB; the limit stops one built to fill the memory.
MAX_PICKLE_BYTES = 256 << 20
# Where a state dict lies in what trainers save: BLIP and LAVIS; Lightning and torchvision; DeepSpeed; tutorials.
STATE_DICT_KEYS = ("model", "state_dict", "module", "model_state_dict")
# What stands before every name where a wrapper's state dict was saved: of DDP and DeepSpeed, of Lightning's attribute.
WRAPPERS = ("module.", "model.")
# What torch.compile and FSDP put anywhere in a name.
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.")
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: the pickled magic number


@dataclass(frozen=True)
class StoredTensors:
    """An opened file or folder: its tensors under the names that it gives them, and the config beside them.

    tensors: memory maps where the format allows it; nothing of them has been read. config: the transformers
    config.json, or the config that the file carries, or {}. is_own: this project wrote it. location: where the user
    said it is. cache_root: where files beside it would be downloaded to. base: where the weights are that adapters in
    it adapt, if not where it says.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    is_own: bool = False
    location: str = ""
    cache_root: Path = Path()
    base: str | None = None


def open_stored(path: Path, location: str = "") -> StoredTensors:
    """Opens a file or folder. UserError for whatever cannot be used."""
    path = Path(path)
    try:
        stored = _read_folder(path) if path.is_dir() else _read_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not stored.tensors:
        raise UserError(f"{path}: holds no tensors")
    return replace(stored, tensors=_unwrapped(stored.tensors), location=location or str(path))


def _read_folder(folder: Path) -> StoredTensors:
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # peft's
        stored = _read_file(folder / "adapter_model.safetensors")
        stated = _json_object(adapter, adapter.read_bytes(), "it")
        return replace(stored, path=folder, config={**stored.config, **stated})
    pickles = folder / "pytorch_model.bin.index.json"
    if (folder / "model.safetensors").is_file():
        stored = _read_file(folder / "model.safetensors")
    elif index.is_file():
        stored = StoredTensors(folder, _read_shards(folder, index))
    elif (folder / "pytorch_model.bin").is_file():
        stored = _read_file(folder / "pytorch_model.bin")
    elif pickles.is_file():
        stored = StoredTensors(folder, _read_shards(folder, pickles))
    else:
        raise UserError(f"{folder}: no model.safetensors, {index.name} or pytorch_model.bin in this folder")
    found = _json_object(config, config.read_bytes(), "it") if config.is_file() else {}
    return replace(stored, path=folder, config=found or stored.config)


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    weight_map = _json_object(index, index.read_bytes(), "it").get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no 'weight_map'")
    shards: dict[str, Mapping[str, Tensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: '{listed([name])}' points to {shard!r}, which is not a file name in this folder")
        if shard not in shards:
            shards[shard] = _read_file(folder / shard).tensors
        if name not in shards[shard]:
            raise UserError(f"{folder / shard}: lacks '{listed([name])}', which {index.name} says is in it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_file(path: Path) -> StoredTensors:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith((b"PK\x03\x04", LEGACY_MAGIC)):
        return _read_pickle(path)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: a web page, not a checkpoint; check the address that it came from")
    raise UserError(f"{path}: neither a torch.save nor a safetensors file")


def _read_safetensors(path: Path) -> StoredTensors:
    """Tensors that are views of a memory map; the library checks the header (lengths, offsets, overlaps)."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except Exception as error:  # whatever a hostile header makes the library raise is the file's fault
        raise UserError(
            f"{path}: not a readable safetensors file ({_line(error)}); download or save it again"
        ) from error
    config = _json_object(path, metadata.get("config", "{}"), "the config in its metadata")
    return StoredTensors(path, tensors, config, is_own=metadata.get("format") == "blipds")


def _read_pickle(path: Path) -> StoredTensors:
    """A `torch.save` file.

    The pickle is read by torch's restricted unpickler, which builds tensors and plain containers and executes nothing.
    The zip's checksums are verified first, since a memory map never looks at them (one pass over the file).
    """
    record_sizes = _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=record_sizes is not None)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, its pickle asks for more than tensors and plain containers, and running code out of a "
            f"checkpoint is never allowed ({_reason(error)}); save the state dict alone, "
            "torch.save(model.state_dict(), FILE), with the program that wrote it (DeepSpeed: the zero_to_fp32.py "
            "beside it writes one)"
        ) from error
    except Exception as error:
        raise UserError(f"{path}: not a readable torch checkpoint ({_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, a checkpoint is a dict with the key 'model'")
    wrapper = next((key for key in STATE_DICT_KEYS if key in content), None)
    tensors = content if wrapper is None else content[wrapper]
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: its '{wrapper}' is a {type(tensors).__name__}, not a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise UserError(f"{path}: entry {str(name)[:80]!r} of its state dict is not a plain dense tensor")
    # The map takes each storage's length from the pickle, not from the zip's record: a short record would be filled up
    # with its neighbour's bytes.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if record_sizes is not None and Counter(size for size in storages.values() if size) - record_sizes:
        raise UserError(f"{path}: its pickle and its storages disagree on their lengths; download or save it again")
    config = content.get("config")
    return StoredTensors(path, tensors, config if isinstance(config, dict) else {})


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


def _check_zip(path: Path) -> Counter[int] | None:
    """The record lengths of a torch.save zip, None for the format before torch 1.6; UserError for anything else."""
    with path.open("rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if head == LEGACY_MAGIC:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if not any(info.filename.endswith("/data.pkl") for info in infos):
                raise UserError(f"{path}: a zip file, but not one that torch.save wrote")
            if any(info.filename.endswith("/constants.pkl") for info in infos):
                raise UserError(f"{path}: a TorchScript program; save the model's state dict instead")
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED:  # torch would map the compressed bytes as numbers
                    raise UserError(f"{path}: '{info.filename}' is compressed; torch.save stores its parts as they are")
                if info.filename.endswith("/data.pkl") and info.file_size > MAX_PICKLE_BYTES:
                    raise UserError(f"{path}: its pickle takes {info.file_size} bytes, too many for a checkpoint")
                if info.CRC == 0:  # torch.serialization.set_crc32_options(False): the writer left the checksum out
                    continue
                with archive.open(info) as part:
                    while part.read(1 << 24):  # raises BadZipFile at the end where the checksum differs
                        pass
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: damaged or cut off ({_line(error)}); download or save it again") from error
    return Counter(info.file_size for info in infos)


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names without what DDP, DeepSpeed, Lightning, torch.compile or FSDP added to them."""
    for inserted in INSERTED:
        tensors = {name.replace(inserted, ""): tensor for name, tensor in tensors.items()}
    while prefix := next((w for w in WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _json_object(path: Path, text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not valid JSON ({_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is a JSON {type(value).__name__}, not an object")
    return value


def listed(names: Sequence[str], limit: int = 8) -> str:
    """For messages: the names come out of a file that may be anybody's, hence not for ever."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:120] for name in names[:limit]) + more


def _line(error: BaseException) -> str:
    """The error's first line: torch's messages run over many."""
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


def _reason(error: BaseException) -> str:
    """What torch refused. It stands amid advice to switch the protection off, which is not to be passed on."""
    found = re.search(r"(?:Trying to (?:load|call)|Unsupported|GLOBAL )[^\n]{0,160}", str(error))
    return found[0].split(". ")[0][:120] if found else "unsupported or damaged pickle"
