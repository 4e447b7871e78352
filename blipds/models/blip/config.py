"""`model:` of the arch blip_caption, under LAVIS's names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from blipds.config.sections import ModelConfig, limited
from blipds.files.paths import find_config, user_path
from blipds.models.blip.text_decoder import TextConfig

CONFIGS = Path(__file__).with_name("configs")


@dataclass
class BlipConfig(ModelConfig):
    CHECKPOINTING: ClassVar[tuple[dict[str, Any], ...]] = (
        {"vit_grad_ckpt": False, "vit_ckpt_layer": None, "text_grad_ckpt": False},
        {"vit_grad_ckpt": True, "vit_ckpt_layer": None, "text_grad_ckpt": False},
        {"vit_grad_ckpt": True, "vit_ckpt_layer": None, "text_grad_ckpt": True},
    )

    model_type: str | None = "base_coco"
    vit_pretrained: bool | str | None = None
    text_pretrained: str | None = None
    vit_type: str = "base"
    vit_kwargs: dict[str, Any] = field(default_factory=dict)
    vit_grad_ckpt: bool = False
    vit_ckpt_layer: int | None = limited(None, "0 or more")
    text_grad_ckpt: bool = False
    med_config_path: str | None = None
    label_smoothing: float = limited(0.1, "0 or more, below 1")

    @property
    def recomputes(self) -> bool:
        return self.vit_grad_ckpt or self.text_grad_ckpt

    @property
    def hidden_size(self) -> int:
        return read_text_config(self.med_config_path).hidden_size

    def facts(self) -> list[tuple[str, str]]:
        return [("Image encoder", self.vit_type), ("Text decoder", self.med_config_path or "BERT-base")]

    def parts(self) -> dict[str, str]:
        encoder = "timm" if self.vit_pretrained is True else self.vit_pretrained
        given = {"image encoder": encoder, "text decoder": self.text_pretrained}
        return {part: source for part, source in given.items() if source}

    @property
    def encoder_name(self) -> str:
        return f"{self.vit_type} {sorted(self.vit_kwargs.items())}"


def read_text_config(path: str | None) -> TextConfig:
    """A path of the user's, a packaged one (run_configs/), or LAVIS's (configs/models/med_config.json)."""
    if path is None:
        return TextConfig()
    given, lavis = user_path(path), CONFIGS / Path(path).name
    if path.startswith("configs/models/") and lavis.exists() and not given.exists():
        return TextConfig.from_json(lavis)
    return TextConfig.from_json(find_config(given, "run_configs", ".json", "model.med_config_path"))
