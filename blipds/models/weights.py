"""The weights that a model starts from: a whole checkpoint of any kind, or parts of one over random weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

from blipds.config.sections import Config, ModelConfig
from blipds.errors import UserError
from blipds.files.download import fetch
from blipds.files.paths import target, user_path
from blipds.models.checkpoint_files import StoredTensors, open_stored
from blipds.models.checkpoints import Checkpoint, load_into
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


def open_weights(location: str, cache_root: Path) -> StoredTensors:
    """Opens a checkpoint of any kind: a path, a URL or a hub name; of a run directory the best.

    Raises UserError where it cannot be had or read.
    """
    location = find_checkpoint(location, "best")
    return replace(open_stored(locate(location, cache_root), location), cache_root=cache_root)


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
        load_weights(model, open_weights(location, cache_root), say, write)
    else:
        initialise(model, config.run.seed, write or partial(copy_into, model))
    model.load_parts(config.model, load_part)


def load_weights(
    model: CaptioningModel,
    stored: StoredTensors,
    say: Callable[[str], None],
    write: Write | None = None,
    part: str | None = None,
) -> None:
    """Loads what the checkpoint's kind should hold, all of it or (UserError) nothing, and says what was done.

    Constants that no tensor shows are taken over. `write(name, tensor)` takes the tensors instead of the model's own
    parameters, which may then be on the meta device. part: the kind of part that it must be (None: a whole checkpoint).
    Raises UserError for another kind or geometry.
    """
    stored = model.completed(stored, partial(open_weights, cache_root=stored.cache_root))
    checkpoint = Checkpoint(stored, model.checkpoint_format())
    kind, location = checkpoint.kind, stored.location
    if part is not None and kind != part:
        raise UserError(f"{checkpoint.layout.parts[part][1]} {location}: a {kind} checkpoint, not a {part} one")
    if part is None and checkpoint.part:
        raise UserError(f"{location}: holds one part only ({kind}); give it as {checkpoint.part_key} instead")
    leave_out, line = model.check_geometry(checkpoint)
    if line:
        say(line)
    shapes = {name: tuple(whole_shape(parameter)) for name, parameter in model.named_parameters()}
    report = load_into(shapes, checkpoint, write or partial(copy_into, model), leave_out=leave_out)
    fresh = sum(prod(shapes[name]) for name in report.missing)
    say(
        f"weights: {kind} checkpoint {location}, {len(report.written)} tensors"
        + (f"; {len(report.missing)} of its part of the model ({fresh:,} numbers) stay random" if fresh else "")
    )
    for note in [*report.notes, model.take_constants(checkpoint)]:
        if note:
            say(f"  {note}")


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
