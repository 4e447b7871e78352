"""Builds a captioner whole and partitioned and writes down how they differ: partitions.py CHECKPOINT OUTPUT.json

CHECKPOINT is the oracle's, of images of 96 x 96; the model here takes 128 x 128, so that positions are interpolated.
"""

import json
import sys
from pathlib import Path

from blipds import cli, distributed
from blipds.config.deepspeed import resolve_ds_config
from blipds.config.sections import Config, RunConfig
from blipds.engine import Engine, parameter_groups, partitioned_init
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.initialisation import initialise
from blipds.models.weights import load_weights, open_weights


def ds_config(stage, config):
    raw = {"zero_optimization": {"stage": stage}, "optimizer": {"params": {"torch_adam": True}}}  # no op to compile
    machine = {"world_size": distributed.world_size(), "default_precision": "fp32"}
    return resolve_ds_config(raw, config, **machine, source="this test")


def model_config(checkpoint):
    return BlipConfig(
        vit_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 4},
        image_size=128,
        med_config_path=str(checkpoint.parent / "med_config.json"),
        freeze_vit=True,
    )


def run(stage, checkpoint):
    """(what is to be said of the model, its random weights, the checkpoint's); every rank must call it."""
    section = model_config(checkpoint)
    config = ds_config(stage, Config(model=section, run=RunConfig(batch_size_train=1, init_lr=1e-3, weight_decay=0.0)))
    with partitioned_init(config):
        model = build_model(section, checkpoint_fn=lambda function, *inputs: function(*inputs))
    parameters = list(model.parameters())
    head, words = model.text_decoder.cls.predictions.decoder, model.text_decoder.bert.embeddings.word_embeddings
    facts = {
        "partitioned": all(hasattr(parameter, "ds_tensor") for parameter in parameters),
        "frozen": sum(not parameter.requires_grad for parameter in parameters),
        "tied": head.weight is words.weight,
    }
    held = sum(p.numel() + (p.ds_tensor.numel() if stage == 3 else 0) for p in parameters)
    facts["held by each rank"] = distributed.gather(held)
    engine = Engine(model, config, parameter_groups(model, 0.0, "all"), "fp32")
    with engine.filling() as write:
        initialise(model, 42, write)
    drawn = dict(engine.weights())
    with engine.filling() as write:
        load_weights(model, open_weights(str(checkpoint), Path()), lambda line: None, write)
    loaded = dict(engine.weights())
    engine.close()
    return facts, drawn, loaded


def largest_difference(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def main():
    checkpoint, output = Path(sys.argv[-2]), Path(sys.argv[-1])
    distributed.initialise()
    (whole, drawn, loaded), (parts, drawn_in_parts, loaded_in_parts) = (run(stage, checkpoint) for stage in (2, 3))
    positions = loaded_in_parts["visual_encoder.pos_embed"]
    words = loaded_in_parts["text_decoder.bert.embeddings.word_embeddings.weight"]
    result = {
        "whole": whole,
        "parts": parts,
        "after initialise": largest_difference(drawn, drawn_in_parts),
        "after loading": largest_difference(loaded, loaded_in_parts),
        "word embeddings": words.double().sum().item(),
        "class position": positions[0, 0].double().sum().item(),
        "positions": list(positions.shape),
    }
    if distributed.is_main():
        output.write_text(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
