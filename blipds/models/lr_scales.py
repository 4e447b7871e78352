"""How much of the learning rate each parameter gets: by name prefix, and by depth in the image encoder."""

import difflib
import re
from collections.abc import Iterable, Mapping

from blipds.errors import UserError


def lr_scales(names: Iterable[str], prefixes: Mapping[str, float], layer_decay: float | None) -> dict[str, float]:
    """name -> factor on the learning rate, 1.0 where nothing is said.

    prefixes (`run.lr_scale`): whole parts of names ("visual_encoder.blocks.1" is not "visual_encoder.blocks.10"); the
    longest that matches counts, and one that matches no name is a UserError. layer_decay (`run.lr_layer_decay`): see
    `layer_decay_scale`. Where both apply they multiply.
    """
    names = list(names)
    known = {part for name in names for part in _prefixes(name)}
    if unknown := [prefix for prefix in prefixes if prefix not in known]:
        close = difflib.get_close_matches(unknown[0], sorted(known), n=1, cutoff=0.0)
        tops = ", ".join(sorted({name.partition(".")[0] for name in names}))
        raise UserError(
            f"run.lr_scale.{unknown[0]} matches no parameter; did you mean '{close[0]}'? names begin with {tops}"
        )
    blocks = [int(match[1]) for name in names if (match := BLOCK.match(name))]
    depth = max(blocks, default=-1) + 1
    scales = {}
    for name in names:
        scale = next((prefixes[prefix] for prefix in reversed(_prefixes(name)) if prefix in prefixes), 1.0)
        scales[name] = scale if layer_decay is None else scale * layer_decay_scale(name, depth, layer_decay)
    return scales


ENCODER = "visual_encoder."
BLOCK = re.compile(re.escape(ENCODER) + r"blocks\.(\d+)\.")
# What comes before the first block; `norm_pre` is CLIP's.
EMBEDDINGS = tuple(ENCODER + part for part in ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre."))


def layer_decay_scale(name: str, depth: int, decay: float) -> float:
    """decay^(depth + 1) for the image encoder's embeddings, decay^(depth - i) for its block i, 1 for all else.

    As in BEiT's finetuning (arXiv 2106.08254, optim_factory.py: get_num_layer_for_vit) and MAE's (arXiv 2111.06377,
    util/lr_decay.py), where all that follows the blocks, here the final norm and the text decoder, has the full rate.
    """
    if block := BLOCK.match(name):
        return decay ** (depth - int(block[1]))
    return decay ** (depth + 1) if name.startswith(EMBEDDINGS) else 1.0


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
