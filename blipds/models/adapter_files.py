"""Adapters in files: a run's checkpoints, and peft's adapter_config.json with adapter_model.safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from blipds.errors import UserError
from blipds.models.adapters import A, Adapters, adapter_names, described, is_adapter
from blipds.models.checkpoint_files import StoredTensors, listed
from blipds.models.checkpoints import CheckpointFormat
from blipds.models.exporting import new_folder, on_host

PREFIX = "base_model.model."  # what peft's names begin with
BASE, BASE_HASH = "base", "base_hash"  # in the config that our files carry
# What would make an adapter compute something else than W x + alpha / r x B A x.
PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern"), None),
    **{"peft_type": "LORA", "bias": "none"},
}


@dataclass(frozen=True)
class StoredAdapters:
    """Adapters and what learnt beside them, under the model's names.

    base: where the weights are that they adapt; base_hash: of those (checkpoints.weights_hash), where the file has it.
    """

    stored: StoredTensors  # under the model's names
    r: int
    alpha: float
    dropout: float
    base: str
    base_hash: str | None

    @property
    def modules(self) -> list[str]:
        return [name.removesuffix(A) for name in self.stored.tensors if name.endswith(A)]

    @property
    def learnt(self) -> list[str]:
        return [name for name in self.stored.tensors if not is_adapter(name)]

    def fit(self, injected: Adapters) -> bool:
        """Whether they are those of a model's layers."""
        sizes = (injected.config.r, injected.config.alpha, {*injected.modules}, {*injected.learnt})
        return sizes == (self.r, self.alpha, {*self.modules}, {*self.learnt})

    def __str__(self) -> str:
        return described(self.r, self.alpha, self.modules, self.learnt)


def holds_adapters(stored: StoredTensors) -> bool:
    return "peft_type" in stored.config or (stored.is_own and "lora" in stored.config)


def base_location(stored: StoredTensors) -> str:
    base = stored.base or stored.config.get(BASE if stored.is_own else "base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{stored.location}: does not say which weights its adapters adapt; give --base")
    return base


def read_adapters(stored: StoredTensors, layout: CheckpointFormat) -> StoredAdapters:
    """UserError for what is no plain LoRA, and where adapters are incomplete. Reads no tensor."""
    config = stored.config
    tensors: dict[str, Tensor] = dict(stored.tensors)
    if stored.is_own:
        sizes = config["lora"]
    else:
        if strange := [key for key, plain in PLAIN.items() if (config.get(key) or None) != plain]:
            raise UserError(f"{stored.location}: {strange[0]} is {config.get(strange[0])}; only plain LoRA can be read")
        ours = {name: layout.our_name("transformers", name.removeprefix(PREFIX)) for name in tensors}
        tensors = {new: tensors[old] for old, new in ours.items() if new is not None}
        sizes = {"r": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout", 0.0)}
    try:
        r, alpha, dropout = int(sizes["r"]), float(sizes["alpha"]), float(sizes["dropout"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{stored.location}: says no rank, alpha and dropout of its adapters ({error})") from error
    own = replace(stored, tensors=tensors, is_own=True)
    found = StoredAdapters(own, r, alpha, dropout, base_location(stored), config.get(BASE_HASH))
    if lacking := sorted(set(adapter_names(found.modules)) ^ {name for name in tensors if is_adapter(name)}):
        raise UserError(f"{stored.location}: half of an adapter is missing: {listed(lacking)}")
    return found


def write_peft(folder: Path, adapters: StoredAdapters, model: Any, overwrite: bool) -> None:
    """`launch/export.py --format lora`: what peft's `PeftModel.from_pretrained` loads onto transformers' model.

    `model`: a CaptioningModel, for its layout; it may be on the meta device. UserError where transformers has no such
    model, or where peft's files cannot hold what learnt: they hold whole modules.
    """
    try:
        import peft
    except ImportError:
        raise UserError('--format lora needs peft: pip install -e ".[lora]"') from None
    layout, stored = model.checkpoint_format(), adapters.stored

    def renamed(name: str) -> str:
        theirs = layout.transformers_name(name)
        if theirs is None:
            raise UserError(f"--format lora: transformers has no {type(model).__name__}")
        return str(theirs)

    wholes = whole_modules(model, adapters.learnt)
    config = peft.LoraConfig(
        r=adapters.r,
        lora_alpha=int(adapters.alpha),
        lora_dropout=adapters.dropout,
        target_modules=[renamed(name) for name in adapters.modules],
        modules_to_save=[renamed(name) for name in wholes] or None,
        base_model_name_or_path=adapters.base,
        inference_mode=True,
    )
    tensors = {PREFIX + renamed(name): on_host(tensor).float() for name, tensor in stored.tensors.items()}
    stated = {key: value for key, value in stored.config.items() if key != "lora"}
    with new_folder(folder, overwrite, "LORA", ("adapter_config.json", "peft_type")) as temporary:
        config.save_pretrained(str(temporary))
        metadata = {"format": "pt", "config": json.dumps(stated)}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata=metadata)


def whole_modules(model: Any, learnt: list[str]) -> list[str]:
    """The largest modules all of whose parameters are `learnt`; UserError where a parameter is in none."""
    left, found = set(learnt), []
    for name, module in model.named_modules():
        parameters = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if name and parameters and parameters <= left:
            found.append(name)
            left -= parameters
    if left:
        raise UserError(
            f"--format lora: {listed(sorted(left), 3)} learnt beside the adapters, and peft's files hold whole "
            "modules; export with --format hf --merge"
        )
    return found
