"""LoRA (arXiv 2106.09685): small matrices beside a model's own, injected by peft.

An adapted layer computes W x + alpha / r x B A x. W is frozen; A (r, in) and B (out, r) learn, B from 0. peft wraps
the layer, so that its weight becomes `x.base_layer.weight` beside `x.lora_A.default.weight`. Everybody else sees
`x.weight`, `x.lora_A.weight` and `x.lora_B.weight`: `CaptioningModel.named_parameters` and `get_parameter` translate.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from blipds.config.sections import LoraConfig
from blipds.errors import UserError
from blipds.models.checkpoints import matches
from blipds.models.initialisation import generator_for, uniform_by_fan_in
from blipds.models.parameters import Write, whole_shape

A, B = ".lora_A.weight", ".lora_B.weight"  # behind the name of the adapted layer


@dataclass
class Adapters:
    """What `inject` did to a model. base: where the weights come from that it adapts, and their hash (`Origin`)."""

    config: LoraConfig
    modules: list[str]
    learnt: list[str]  # parameters that learn beside the adapters
    injected_names: dict[str, str]  # our name of a parameter -> peft's
    base: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What checkpoints carry of it, as JSON."""
        sizes = {key: value for key, value in asdict(self.config).items() if key in ("r", "alpha", "dropout")}
        return {"lora": sizes, **self.base}

    def __str__(self) -> str:
        return described(self.config.r, self.config.alpha, self.modules, self.learnt)


def described(r: int, alpha: float, modules: Sequence[str], learnt: Sequence[str]) -> str:
    beside = f", {len(learnt)} tensors beside" if learnt else ""
    return f"rank {r}, alpha {alpha:g} in {len(modules)} layers{beside}"


def own_name(name: str) -> str:
    """Our name of a parameter that peft renamed or added."""
    return re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.replace(".base_layer.", "."))


def is_adapter(name: str) -> bool:
    return name.endswith((A, B))


def inject(model: Any, lora: LoraConfig) -> None:
    """Puts adapters into a CaptioningModel; nothing else learns, but for `train_also`. Their values are random.

    UserError: no peft, a pattern that matches nothing, a rank above the layer's, an encoder that `freeze_vit` freezes.
    """
    modules = adapted_layers(model, lora)
    try:
        import peft
    except ImportError:
        raise UserError('model.lora needs peft: pip install -e ".[lora]" (or pip install peft accelerate)') from None

    encoder = {id(parameter) for parameter in model.image_encoder.parameters()}
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    targets = "|".join(map(re.escape, modules))
    # peft's own start reads and writes values, which partitioned parameters have not: `start` comes afterwards
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        init_lora_weights=False,
    )
    peft.inject_adapter_in_model(config, model)
    learnt = chosen(lora.train_also, model.lora_train_also, "train_also", own, "parameter")
    if lora.train_also is None and model.freeze_vit:
        learnt = [name for name in learnt if own[name] not in encoder]
    for name in learnt:
        if name.rpartition(".")[0] in modules:
            raise UserError(f"model.lora.train_also: {name} is adapted; leave it out here or in target_modules")
        if model.freeze_vit and own[name] in encoder:
            raise UserError(f"model.freeze_vit is true, and model.lora.train_also trains {name}: drop one")
    names = {own_name(name): name for name, _ in model.named_parameters()}
    model.lora = Adapters(lora, modules, learnt, names)
    for name in learnt:
        model.get_parameter(name).requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.image_encoder.parameters()):
        model.freeze_image_encoder()


def adapted_layers(model: Any, lora: LoraConfig) -> list[str]:
    """Names of the linear layers that get adapters, in the model's order."""
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    found = chosen(lora.target_modules, model.lora_targets, "target_modules", layers, "linear layer")
    encoder = set(model.image_encoder.modules())
    if lora.target_modules is None and model.freeze_vit:
        found = [name for name in found if layers[name] not in encoder]
    if not found:
        raise UserError(f"model.lora.target_modules is missing; layers there are: {', '.join(kinds(layers))}")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in found:
        weight = layers[name].weight
        rows, columns = whole_shape(weight)
        if layers[name] in encoder and model.freeze_vit:
            raise UserError(f"model.freeze_vit is true, and model.lora.target_modules adapts {name}: drop one")
        if uses[id(weight)] > 1:
            raise UserError(f"model.lora.target_modules: {name} shares its weight with the embeddings; leave it out")
        if lora.r > min(rows, columns):
            size = f"{rows} x {columns}"
            raise UserError(f"model.lora.r is {lora.r}, but {name} is {size}; allowed: at most {min(rows, columns)}")
    return found


def chosen(given: Sequence[str] | None, default: Sequence[str], key: str, names: Iterable[str], what: str) -> list[str]:
    """The names that match a pattern of model.lora.<key>, whole or from behind a dot.

    UserError where a given pattern matches none.
    """
    names = list(names)
    found = set()
    for pattern in default if given is None else given:
        matching = [name for name in names if matches(name, [pattern, f"*.{pattern}"])]
        if not matching and given is not None:
            raise UserError(f"model.lora.{key}: '{pattern}' matches no {what}; {nearest_names(pattern, names)}")
        found.update(matching)
    return [name for name in names if name in found]


def nearest_names(pattern: str, names: Iterable[str]) -> str:
    whole = kinds(names)
    close = difflib.get_close_matches(pattern, [*{name.rpartition(".")[2] for name in whole}, *whole], n=3, cutoff=0.5)
    return f"the nearest: {', '.join(close)}" if close else f"there are: {', '.join(whole)}"


def kinds(names: Iterable[str]) -> list[str]:
    """The names, with * for the number of a layer, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def start(model: Any, seed: int, write: Write) -> None:
    """The adapters of a new run: B is 0, A drawn as peft does, within 1 / sqrt(in), by seed and name."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            tensor = torch.zeros(whole_shape(parameter), device="cpu")
            if name.endswith(A):
                uniform_by_fan_in(tensor.shape[1])(tensor, generator=generator_for(seed, name))
            write(name, tensor)


def adapter_names(modules: Iterable[str]) -> Iterator[str]:
    for module in modules:
        yield from (module + A, module + B)
