"""The weights that a model starts from: a whole checkpoint of any kind, or parts (an image encoder, a BERT)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from blipds.config.run import Config, ModelConfig
from blipds.errors import UserError
from blipds.files.download import fetch
from blipds.models import BlipCaption
from blipds.models.blip.geometry import (
    apply_constants,
    differences,
    geometry_from_transformers_config,
    geometry_of,
    stated_vision_eps,
)
from blipds.models.checkpoints import (
    PART_PREFIX,
    Checkpoint,
    checkpoint_of,
    load_into,
    open_checkpoint,
    text_layer_differences,
)
from blipds.models.initialisation import initialise
from blipds.models.parameters import Write, copy_into, whole_shape
from blipds.models.vision import encoder_mean_std, pretrained_encoder, set_layer_norm_eps


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

    A run without a best checkpoint (nothing was scored) has a latest one.
    """
    path = Path(location).expanduser()
    for candidate in (path / "checkpoints" / link, path / link, path / "checkpoints" / "latest", path / "latest"):
        if candidate.exists():
            return str(candidate.resolve())
    return location


def load_initial_weights(
    model: BlipCaption, config: Config, say: Callable[[str], None], write: Write | None = None
) -> None:
    """What a new run starts from: a whole checkpoint if the config asks for one, else the parts that it names.

    `vit_pretrained` and `text_pretrained` fill in their part; what neither has (cross-attention always) is random.
    `write` fills an engine (Engine.filling): every rank calls it, in the same order.
    """
    section, cache_root = config.model, Path(config.env.cache_root).expanduser()
    location = initial_weights(section)
    if location is not None:
        load_weights(model, location, cache_root, say, write)
        for key in ("vit_pretrained", "text_pretrained"):
            if getattr(section, key):
                say(f"not used: model.{key}, since model.load_finetuned or load_pretrained asks for a whole checkpoint")
        return
    initialise(model, config.run.seed, write or partial(copy_into, model))
    if section.vit_pretrained:
        load_image_encoder(model, section.vit_type, section.vit_pretrained, cache_root, say, write)
    if section.text_pretrained:
        load_text_decoder(model, section.text_pretrained, cache_root, say, write)


def load_weights(
    model: BlipCaption,
    location: str,
    cache_root: Path,
    say: Callable[[str], None],
    write: Write | None = None,
) -> None:
    """Loads a whole checkpoint of any kind, from a path, a URL or a hub name: each tensor finds its parameter.

    Of a run directory it is the best checkpoint. With a transformers folder the model takes its vision LayerNorm
    epsilon. `write(name, tensor)` takes the tensors instead of the model's own parameters, which may then be on the
    meta device. Raises UserError for a folder of another geometry (heads are not seen in any tensor) and for a
    checkpoint of one part.
    """
    location = find_checkpoint(location, "best")
    checkpoint = open_checkpoint(locate(location, cache_root))
    if checkpoint.kind in PART_PREFIX:
        key = {"timm": "vit_pretrained", "bert": "text_pretrained"}[checkpoint.kind]
        raise UserError(f"{location}: holds one part only ({checkpoint.kind}); give it as model.{key} instead")
    if checkpoint.kind == "transformers" and checkpoint.config:
        stated = geometry_from_transformers_config(checkpoint.config)
        if wrong := differences(stated, geometry_of(model)):
            raise UserError(f"{location} does not fit the model: {'; '.join(wrong)}")
    load_strictly(model, checkpoint, location, say, write=write)
    if line := take_constants(model, checkpoint):
        say(f"  {line}")


def take_constants(model: BlipCaption, checkpoint: Checkpoint) -> str | None:
    """Sets the constants that no tensor shows (LayerNorm epsilon) as the checkpoint states them; a line about it."""
    if checkpoint.kind == "transformers":
        eps, line = stated_vision_eps(checkpoint.config)
        set_layer_norm_eps(model.visual_encoder, eps)
        return line
    return apply_constants(model, checkpoint.config)


def load_image_encoder(
    model: BlipCaption,
    vit_type: str,
    source: bool | str,
    cache_root: Path,
    say: Callable[[str], None],
    write: Write | None = None,
) -> None:
    """Loads `visual_encoder` alone: `source` is true (timm's own weights), a hub name, or a path or URL."""
    hub_name = hub_name_of(source)
    if source is True or hub_name:
        location = hub_name or f"timm's {vit_type}"
        checkpoint = checkpoint_of(location, pretrained_encoder(vit_type, hub_name))
    else:
        location = str(source)
        checkpoint = open_checkpoint(locate(location, cache_root))
        if checkpoint.kind != "timm":
            raise UserError(
                f"model.vit_pretrained {location}: a {checkpoint.kind} checkpoint, not a ViT in timm's layout"
            )
    load_strictly(model, checkpoint, location, say, write=write)


def load_text_decoder(
    model: BlipCaption, location: str, cache_root: Path, say: Callable[[str], None], write: Write | None = None
) -> None:
    """Loads a BERT into `text_decoder` as far as it fits: embeddings; layers, each whole; the head where it has one."""
    checkpoint = open_checkpoint(locate(location, cache_root))
    if checkpoint.kind != "bert":
        raise UserError(f"model.text_pretrained {location}: a {checkpoint.kind} checkpoint, not a BERT")
    leave_out: list[str] = []
    if wrong := text_layer_differences(checkpoint.config, model.text_decoder.config):
        leave_out = ["text_decoder.bert.encoder.layer.*"]
        say(f"text_pretrained: its layers do not fit and are left out, {'; '.join(wrong)}")
    load_strictly(model, checkpoint, location, say, leave_out, write)


def load_strictly(
    model: BlipCaption,
    checkpoint: Checkpoint,
    location: str,
    say: Callable[[str], None],
    leave_out: tuple[str, ...] | list[str] = (),
    write: Write | None = None,
) -> None:
    """Loads what the checkpoint's kind should hold, all of it or (UserError) nothing, and says what was done."""
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    encoder = model.visual_encoder
    report = load_into(
        {name: tuple(shape) for name, shape in shapes.items()},
        checkpoint,
        write or partial(copy_into, model),
        leave_out=leave_out,
        num_prefix_positions=0 if encoder.no_embed_class else encoder.num_prefix_tokens,
    )
    fresh = sum(shapes[name].numel() for name in report.missing)
    say(
        f"weights: {report.kind} checkpoint {location}, {len(report.written)} tensors"
        + (f"; {len(report.missing)} of its part of the model ({fresh:,} numbers) stay random" if fresh else "")
    )
    for note in report.notes:
        say(f"  {note}")


def fill_image_statistics(config: Config) -> list[str]:
    """Gives image processors without mean and std those of the encoder named by `vit_pretrained`; lines about it.

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
    if not section.vit_pretrained or not processors:
        return []
    found = encoder_mean_std(section.vit_type, hub_name_of(section.vit_pretrained))
    if found is None:
        return []
    mean, std = found
    if section.load_finetuned or section.load_pretrained:
        raise UserError(
            "model.vit_pretrained is given, but load_finetuned or load_pretrained asks for a whole checkpoint: "
            f"drop one, or give mean and std to all vis_processors (the encoder's by timm's table: {mean} and {std})"
        )
    for processor in processors:
        processor.mean = mean if processor.mean is None else processor.mean
        processor.std = std if processor.std is None else processor.std
    return [f"images: mean {mean}, std {std}, from timm's table for {section.vit_type}"]


def hub_name_of(source: bool | str | None) -> str | None:
    """owner/name, where that is not a path that exists."""
    if not isinstance(source, str) or "://" in source or source.count("/") != 1 or source[0] in "./~":
        return None
    return None if Path(source).exists() or Path(source).suffix in (".safetensors", ".pth", ".pt", ".bin") else source


def locate(location: str, cache_root: Path) -> Path:
    """A path as it is; a URL downloaded once; a hub name (owner/name) by huggingface_hub's cache."""
    if hub_name_of(location) is None:
        return fetch(location, cache_root / "checkpoints")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{location}: no such file, and not to be had from the hub ({reason})") from error
