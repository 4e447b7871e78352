"""The weights that a model starts from: a whole checkpoint of any kind, adapters and their base, or parts of one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

from torch import Tensor

from blipds.config.sections import Config, ModelConfig
from blipds.errors import UserError
from blipds.files.download import fetch
from blipds.files.paths import target, user_path
from blipds.models import adapters
from blipds.models.adapter_files import BASE, BASE_HASH, base_location, holds_adapters, read_adapters
from blipds.models.checkpoint_files import StoredTensors, open_stored
from blipds.models.checkpoints import Checkpoint, lasting, load_into, weights_hash
from blipds.models.initialisation import initialise
from blipds.models.parameters import Write, copy_into, whole_shape
from blipds.models.protocol import CaptioningModel
from blipds.models.vision import hub_name_of
from blipds.registry import ARCHS


def initial_weights(config: ModelConfig) -> str | None:
    """Where the weights come from, as in LAVIS: `finetuned` if load_finetuned, else `pretrained` if load_pretrained."""
    for wanted, key in ((config.load_finetuned, "finetuned"), (config.load_pretrained, "pretrained")):
        if wanted:
            location: str | None = getattr(config, key)
            if location is None:
                raise UserError(f"model.load_{key} is true, but model.{key} names no checkpoint; give it, or say false")
            return location
    return None


def find_checkpoint(location: str, link: str) -> str:
    """The checkpoint meant by a run directory or its `checkpoints` folder: where `link` points. Others as they are.

    A run without a best checkpoint (nothing was scored) has a latest one; a copy that lost its links, a newest one.
    """
    path = user_path(location)
    links = [path / "checkpoints" / link, path / link, path / "checkpoints" / "latest", path / "latest"]
    links += [path] if path.is_file() else []  # perhaps a link, where the file system has none
    steps = sorted([*path.glob("step_*[0-9]"), *path.glob("checkpoints/step_*[0-9]")], reverse=True)
    return next((str(found) for place in [*links, *steps] if (found := target(place)) is not None), location)


def base_of(config: ModelConfig) -> str | None:
    """Where the run config says that the weights are which adapters adapt; None: where the adapters say."""
    return config.lora.base if config.lora else None


def open_weights(location: str, cache_root: Path, base: str | None = None) -> StoredTensors:
    """Opens a checkpoint of any kind: a path, a URL or a hub name; of a run directory the best.

    base: where the weights are that adapters in it adapt, if not where it says. Raises UserError where it cannot be had
    or read.
    """
    location = find_checkpoint(location, "best")
    return replace(open_stored(locate(location, cache_root), location), cache_root=cache_root, base=base)


def open_base(stored: StoredTensors) -> StoredTensors:
    """The weights that adapters adapt, with what the adapters' file says of them."""
    base = open_weights(base_location(stored), stored.cache_root)
    if holds_adapters(base):
        raise UserError(f"{stored.location}: {base.location} holds adapters itself; give --base")
    return replace(base, config={**stored.config, **base.config})


def load_initial_weights(
    model: CaptioningModel, config: Config, say: Callable[[str], None], write: Write | None = None
) -> None:
    """What a new run starts from: a whole checkpoint if the config asks for one, else random weights and parts.

    The parts that the config names fill in their share; what none has stays random (BLIP's cross-attention always).
    `write` fills an engine (Engine.filling): every rank calls it, in the same order.
    """
    cache_root = user_path(config.env.cache_root)
    location = initial_weights(config.model)

    def load_part(source: str | StoredTensors, kind: str) -> None:
        if location is not None:
            _, key = model.checkpoint_format().parts[kind]
            say(f"not used: {key}, since model.load_finetuned or load_pretrained asks for a whole checkpoint")
            return
        stored = source if isinstance(source, StoredTensors) else open_weights(source, cache_root)
        load_weights(model, stored, say, write, part=kind)

    if location is not None:
        load_weights(model, open_weights(location, cache_root, base_of(config.model)), say, write, seed=config.run.seed)
    else:
        initialise(model, config.run.seed, write or partial(copy_into, model))
    model.load_parts(config.model, load_part)


def load_weights(
    model: CaptioningModel,
    stored: StoredTensors,
    say: Callable[[str], None],
    write: Write | None = None,
    part: str | None = None,
    seed: int = 0,
) -> None:
    """Loads what the checkpoint's kind should hold, all of it or (UserError) nothing, and says what was done.

    Constants that no tensor shows are taken over. `write(name, tensor)` takes the tensors instead of the model's own
    parameters, which may then be on the meta device. part: the kind of part that it must be (None: a whole checkpoint).
    Adapters in the checkpoint are loaded on their base; a model without adapters gets both merged. A model with
    adapters gets new ones, by `seed`, where the checkpoint has none. Raises UserError for another kind or geometry.
    """
    write = write or partial(copy_into, model)
    if holds_adapters(stored):
        load_adapters(model, stored, say, write)
        return
    checkpoint = load_base(model, stored, say, write, part)
    if model.lora is not None:
        adapters.start(model, seed, write)
        model.lora.base = {BASE: lasting(stored.location), BASE_HASH: weights_hash(checkpoint.tensors)}


def load_adapters(model: CaptioningModel, stored: StoredTensors, say: Callable[[str], None], write: Write) -> None:
    """Adapters onto the model's, or merged into its weights: W + alpha / r x B A, in fp32."""
    given, injected = read_adapters(stored, model.checkpoint_format()), model.lora
    shapes = {name: tuple(whole_shape(parameter)) for name, parameter in model.named_parameters()}
    if injected is not None and not given.fit(injected):
        raise UserError(f"{stored.location}: holds other adapters ({given}) than model.lora asks for ({injected})")
    wanted = {name: shapes[name] for name in given.learnt if name in shapes}
    for module in given.modules:
        if (weight := shapes.get(f"{module}.weight")) is not None:
            wanted |= {module + adapters.A: (given.r, weight[1]), module + adapters.B: (weight[0], given.r)}
    found: dict[str, Tensor] = {}
    load_into(wanted, Checkpoint(given.stored, model.checkpoint_format()), found.__setitem__)

    def write_base(name: str, tensor: Tensor) -> None:
        tensor, module = found.get(name, tensor), name.removesuffix(".weight")
        if injected is None and module + adapters.A in found:
            first, second = (found[key].float() for key in adapters.adapter_names([module]))
            tensor = tensor.float() + given.alpha / given.r * (second @ first)
        write(name, tensor)

    base = open_base(stored)
    checkpoint = load_base(model, base, say, write_base, expected=given.base_hash)
    if injected is not None:
        injected.base = {BASE: lasting(base.location), BASE_HASH: weights_hash(checkpoint.tensors)}
        for name in filter(adapters.is_adapter, found):
            write(name, found[name])
    elif any(model.is_elsewhere(f"{module}.weight") for module in given.modules):
        model.elsewhere = None  # it is no longer what the file elsewhere holds
    how = "merged" if injected is None else "kept apart"
    say(f"adapters: {stored.location}, {given}, {how}")


def load_base(
    model: CaptioningModel,
    stored: StoredTensors,
    say: Callable[[str], None],
    write: Write,
    part: str | None = None,
    expected: str | None = None,
) -> Checkpoint:
    """`load_weights` without adapters. expected: the hash that the weights must have."""
    stored = model.completed(stored, partial(open_weights, cache_root=stored.cache_root))
    checkpoint = Checkpoint(stored, model.checkpoint_format())
    kind, location = checkpoint.kind, stored.location
    if part is not None and kind != part:
        raise UserError(f"{checkpoint.layout.parts[part][1]} {location}: a {kind} checkpoint, not a {part} one")
    if part is None and checkpoint.part:
        raise UserError(f"{location}: holds one part only ({kind}); give it as {checkpoint.part_key} instead")
    if expected not in (None, weights_hash(checkpoint.tensors)):
        raise UserError(f"{location}: other weights than the adapters were trained on; give their base (--base)")
    leave_out, line = model.check_geometry(checkpoint)
    if line:
        say(line)
    parameters = model.named_parameters()
    shapes = {name: tuple(whole_shape(p)) for name, p in parameters if not adapters.is_adapter(name)}
    report = load_into(shapes, checkpoint, write, leave_out=leave_out)
    fresh = sum(prod(shapes[name]) for name in report.missing)
    say(
        f"weights: {kind} checkpoint {location}, {len(report.written)} tensors"
        + (f"; {len(report.missing)} of its part of the model ({fresh:,} numbers) stay random" if fresh else "")
    )
    for note in [*report.notes, model.take_constants(checkpoint)]:
        if note:
            say(f"  {note}")
    return checkpoint


def fill_image_statistics(config: Config) -> list[str]:
    """Gives image processors without mean and std those of the pretrained encoder in the config; lines about it.

    What the run config states stays. Evaluation needs them as training does, so the resolved config carries them.
    UserError where a whole checkpoint is asked for, too: nothing says then which of the two the statistics are of.
    """
    section = config.model
    processors = [
        processor
        for dataset in config.datasets.values()
        for processor in (dataset.vis_processor.train, dataset.vis_processor.eval)
        if processor.mean is None or processor.std is None
    ]
    found = ARCHS[section.arch]().image_statistics(section) if processors else None
    if found is None:
        return []
    mean, std = found
    if section.load_finetuned or section.load_pretrained:
        raise UserError(
            "the config names a pretrained image encoder (model.vit_pretrained), but load_finetuned or load_pretrained "
            "asks for a whole checkpoint: drop one, or give mean and std to all vis_processors (the encoder's: "
            f"{mean} and {std})"
        )
    for processor in processors:
        processor.mean = mean if processor.mean is None else processor.mean
        processor.std = std if processor.std is None else processor.std
    return [f"images: mean {mean}, std {std}, those of the pretrained image encoder"]


def locate(location: str, cache_root: Path) -> Path:
    """A path as it is; a URL downloaded once; a hub name (owner/name) by huggingface_hub's cache."""
    if hub_name_of(location) is None:
        return fetch(location, cache_root / "checkpoints")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt"]
    try:
        folder = Path(snapshot_download(location, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):  # only some repositories have both
            snapshot_download(location, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{location}: no such file, and not to be had from the hub ({reason})") from error
