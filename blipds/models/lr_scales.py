"""How much of the learning rate each parameter gets: by name prefix, and by depth in the image encoder."""

import difflib
from collections.abc import Mapping

from blipds.errors import UserError


def lr_scales(
    layers: Mapping[str, int | None], prefixes: Mapping[str, float], layer_decay: float | None = None
) -> dict[str, float]:
    """{name of a parameter: factor on the learning rate}, 1.0 where nothing is said.

    layers: {name: its layer of the image encoder} of all parameters (`CaptioningModel.encoder_layer`).
    prefixes (`run.lr_scale`): whole parts of names ("visual_encoder.blocks.1" is not "visual_encoder.blocks.10"); the
    longest that matches counts, and one that matches no name is a UserError. layer_decay (`run.lr_layer_decay`):
    decay^(depth + 1) for what comes before the image encoder's first block, decay^(depth - i) for its block i (from 0),
    1 for all else, as in BEiT's finetuning (arXiv 2106.08254, optim_factory.py: get_num_layer_for_vit) and MAE's (arXiv
    2111.06377, util/lr_decay.py). Where both apply they multiply.
    """
    known = {part for name in layers for part in _prefixes(name)}
    if unknown := [prefix for prefix in prefixes if prefix not in known]:
        close = difflib.get_close_matches(unknown[0], sorted(known), n=1, cutoff=0.0)
        tops = ", ".join(sorted({name.partition(".")[0] for name in layers}))
        raise UserError(
            f"run.lr_scale.{unknown[0]} matches no parameter; did you mean '{close[0]}'? names begin with {tops}"
        )
    depth = max((layer for layer in layers.values() if layer is not None), default=None)
    if layer_decay is not None and depth is None:
        raise UserError("run.lr_layer_decay: this arch does not say which layers its image encoder has")
    scales = {}
    for name, layer in layers.items():
        scale = next((prefixes[prefix] for prefix in reversed(_prefixes(name)) if prefix in prefixes), 1.0)
        if layer_decay is not None and depth is not None and layer is not None:
            scale *= layer_decay ** (depth + 1 - layer)
        scales[name] = scale
    return scales


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
