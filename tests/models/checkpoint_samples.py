"""Small captioners with drawn weights, and ways to write, read and compare their checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blipds.models.blip import build_from_geometry
from blipds.models.blip.checkpoints import BlipFormat
from blipds.models.blip.config import BlipConfig
from blipds.models.blip.export import export_transformers, transformers_config
from blipds.models.blip.geometry import BlipGeometry
from blipds.models.blip.model import BlipCaption
from blipds.models.blip.names import from_transformers_name
from blipds.models.checkpoint_files import open_stored
from blipds.models.checkpoints import Checkpoint, load_into
from blipds.models.protocol import Export

VOCAB = Path(__file__).parents[2] / "blipds" / "data" / "bert-base-uncased-vocab.txt"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TINY = BlipGeometry(
    image_size=32,
    patch_size=8,
    vision_width=24,
    vision_depth=2,
    vision_heads=4,
    vision_mlp_dim=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    vocab_size=30524,
)
ORACLE = BlipGeometry(
    image_size=96,
    patch_size=16,
    vision_width=96,
    vision_depth=4,
    vision_heads=4,
    vision_mlp_dim=384,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
TIED = (
    ("text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
    ("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias"),
)
EMBEDDINGS = TIED[0][1]


def transformers_blip(geometry: BlipGeometry = TINY) -> Any:
    """transformers' BLIP with random weights: every tensor is drawn, so that none equals another by its first value."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(**transformers_config(geometry))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def tokenizer() -> Any:
    from transformers import BertTokenizer

    tokens = BertTokenizer(vocab=str(VOCAB))
    tokens.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokens


def export(folder: Path, tensors: dict[str, Tensor], model: BlipGeometry | BlipCaption, **other: Any) -> None:
    """As `launch/export.py --format hf`; `model`, or one of a geometry, says what the tensors are of."""
    if isinstance(model, BlipGeometry):
        with torch.device("meta"):
            model = build_from_geometry(model)
    settings: dict[str, Any] = {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "config": BlipConfig(prompt="a picture of "),
        "generation": {"num_beams": 1, "max_length": 20, "min_length": 5, "do_sample": False},
        "card": "",
        "overwrite": False,
    }
    export_transformers(folder, Export(model, tensors, tokenizer=tokenizer(), **(settings | other)))


def tiny_tensors() -> dict[str, Tensor]:
    """The tiny model under our names, ties once."""
    state = transformers_blip().state_dict()
    named = {str(from_transformers_name(name)): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if name not in dict(TIED)}


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load(path: Path, shapes: dict[str, tuple[int, ...]], **options: Any) -> dict[str, Tensor]:
    written: dict[str, Tensor] = {}
    load_into(shapes, open_checkpoint(path), written.__setitem__, **options)
    return written


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def save_own(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Weights as a run's checkpoint has them (engine/checkpoints.py)."""
    own = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items() if name not in dict(TIED)}
    own = {name: tensor for name, tensor in own.items() if not name.endswith(".position_ids")}
    save_file(own, path, metadata={"format": "blipds", "config": json.dumps(config)})


def open_checkpoint(path: Path) -> Checkpoint:
    """A file or folder as a checkpoint of BLIP."""
    return Checkpoint(open_stored(path), BlipFormat())
