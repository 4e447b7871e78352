"""Builds a captioner whole and partitioned and writes down how they differ: partitions.py CHECKPOINT OUTPUT.json

CHECKPOINT is the oracle's, of images of 96 x 96; the model here takes 128 x 128, so that positions are interpolated.
"""

import json
import sys
from functools import partial
from pathlib import Path

from blipds import cli, distributed
from blipds.config.deepspeed import RunValues, resolve_ds_config
from blipds.engine import partitioned_init, write_parameter
from blipds.engine.partitions import gathered, is_partitioned
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.initialisation import initialise
from blipds.models.weights import load_weights, open_weights


def build(ds_config, checkpoint):
    config = BlipConfig(
        vit_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 4},
        image_size=128,
        med_config_path=str(checkpoint.parent / "med_config.json"),
        freeze_vit=True,
    )
    with partitioned_init(ds_config):
        return build_model(config, checkpoint_fn=lambda function, *inputs: function(*inputs))


def differences(whole, parts):
    """The largest difference of all values; every rank must call it."""
    largest = 0.0
    for (name, parameter), (other_name, partitioned) in zip(
        whole.named_parameters(), parts.named_parameters(), strict=True
    ):
        assert name == other_name
        with gathered([partitioned]):
            largest = max(largest, (parameter - partitioned).abs().max().item())
    return largest


def main():
    checkpoint, output = Path(sys.argv[-2]), Path(sys.argv[-1])
    distributed.initialise()
    values = RunValues(1, 1, learning_rate=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    configs = [
        resolve_ds_config(
            {"zero_optimization": {"stage": stage}},
            values,
            world_size=distributed.world_size(),
            default_precision="fp32",
            hidden_size=96,
            source="this test",
        )
        for stage in (2, 3)
    ]
    whole, parts = (build(config, checkpoint) for config in configs)
    result = {
        "partitioned": [any(map(is_partitioned, whole.parameters())), all(map(is_partitioned, parts.parameters()))],
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "frozen": [sum(not p.requires_grad for p in model.parameters()) for model in (whole, parts)],
    }
    for model in (whole, parts):
        initialise(model, 42, partial(write_parameter, model))
    result["after initialise"] = differences(whole, parts)
    for model in (whole, parts):
        load_weights(model, open_weights(str(checkpoint), Path()), lambda line: None, partial(write_parameter, model))
    result["after loading"] = differences(whole, parts)
    held = sum(parameter.numel() + parameter.ds_tensor.numel() for parameter in parts.parameters())
    result["held by each rank"] = distributed.gather(held)
    head, words = parts.text_decoder.cls.predictions.decoder, parts.text_decoder.bert.embeddings.word_embeddings
    result["tied"] = head.weight is words.weight
    with gathered([words.weight]):
        result["word embeddings"] = words.weight.double().sum().item()
    with gathered([parts.visual_encoder.pos_embed]):
        result["class position"] = parts.visual_encoder.pos_embed[0, 0].double().sum().item()
        result["positions"] = list(parts.visual_encoder.pos_embed.shape)
    if distributed.is_main():
        output.write_text(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
