"""What the original BLIP code computes with its small captioner, on this device: shared/oracle."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.measuring import Row
from safetensors.torch import load_file
from torch import Tensor

from blipds.captioning.captioner import Captioner
from blipds.config.run import load_run_config
from blipds.data.datasets import CaptionDataset, Sample, build_dataset
from blipds.data.loader import Collator, EvalLoader
from blipds.data.tokenizer import CaptionTokenizer
from blipds.distributed import allow_tf32
from blipds.engine import DTYPES
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.generation import GenerationConfig
from blipds.models.protocol import CaptioningModel, keep_activations
from blipds.models.weights import load_weights, open_weights

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {
    "beam3_max20_min5": GenerationConfig(),
    "greedy_max20_min5": GenerationConfig(num_beams=1),
    "beam5_max30_min10": GenerationConfig(num_beams=5, max_len=30, min_len=10),
    "beam3_max20_min5_rep1.5": GenerationConfig(repetition_penalty=1.5),
}
TOLERANCE = 1e-4  # of features and logits, as on the CPU (tests/models/blip/test_oracle.py); the loss's is 1e-5


def shared_folder() -> Path | None:
    """Beside the clone, or in it where it was copied along."""
    return next((path for path in (REPOSITORY.parent / "shared", REPOSITORY / "shared") if path.is_dir()), None)


def build_oracle(shared: Path) -> CaptioningModel:
    config = BlipConfig(
        vit_type="base",
        vit_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 4},
        image_size=96,
        med_config_path=str(shared / "oracle" / "med_config.json"),
    )
    model = build_model(config, keep_activations)
    load_weights(model, open_weights(str(shared / "oracle" / "tiny_blip.pth"), shared), say=lambda line: None)
    return model.eval()


def photographs_of(shared: Path, folder: Path) -> CaptionDataset:
    run_config = folder / "run.yaml"
    processors = "vis_processor: {train: {name: blip_image_eval}}, text_processor: {train: {max_words: 30}}"
    run_config.write_text(
        f"model: {{image_size: 96}}\ndatasets: {{flickr8k_caption: {{captions_per_image: all, {processors}}}}}\n"
    )
    config, _ = load_run_config(run_config, [f"env.cache_root={shared / 'data'}"])
    return build_dataset("flickr8k_caption", config, "val", training=True)


def row(what: str, difference: float, tolerance: float, judged: bool) -> Row:
    details = {"difference": difference, "good": difference <= tolerance if judged else None}
    against = f"{tolerance:.0e} allowed" if judged else "-"
    return Row("oracle", what, f"{difference:.1e}", against, None, None, details)


def rows(device: torch.device, folder: Path, dry: bool) -> Iterator[Row]:
    shared = shared_folder()
    if shared is None:
        yield Row("oracle", "no folder shared beside or in the repository", "skipped", "-", None, None)
        return
    allow_tf32(False)
    golden = json.loads((shared / "oracle" / "golden.json").read_text())
    expected = {
        name: tensor.to(device) for name, tensor in load_file(shared / "oracle" / "forward.safetensors").items()
    }
    tokenizer, photographs = CaptionTokenizer(), photographs_of(shared, folder)
    samples = [photographs[index] for index in range(16)]
    batch = Collator(tokenizer, photographs)([Sample(sample.image, sample.captions[:1]) for sample in samples])
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = build_oracle(shared).to(device, dtype)
        yield from forward(name, model, batch.model_inputs(device, dtype), expected, golden["forward"]["loss"])
        for setting in SETTINGS:
            yield captions(name, setting, model, tokenizer, photographs, device, golden["generate"]["captions"], dry)


@torch.no_grad()
def forward(
    name: str, model: CaptioningModel, inputs: dict[str, Tensor], expected: dict[str, Tensor], golden_loss: float
) -> Iterator[Row]:
    judged = name == "fp32"
    loss = (model(**inputs) / len(inputs["labels"])).item()
    yield row(f"loss, {name}", abs(loss - golden_loss), 1e-5, judged)
    embeds = model.image_encoder(inputs["pixel_values"])
    difference = (embeds[:4].float() - expected["image_embeds"]).abs().max().item()
    yield row(f"image features, largest difference, {name}", difference, TOLERANCE, judged)
    everywhere = torch.arange(expected["input_ids"].numel(), device=embeds.device)
    logits = model.text_decoder(expected["input_ids"], embeds, label_positions=everywhere)
    logits = logits.view(*expected["input_ids"].shape, -1)[:4, :, :2048].float()
    mask = expected["attention_mask"][:4].bool()
    difference = (logits[mask] - expected["logits"][mask]).abs().max().item()
    yield row(f"logits, largest difference, {name}", difference, TOLERANCE, judged)


def captions(
    name: str,
    setting: str,
    model: CaptioningModel,
    tokenizer: CaptionTokenizer,
    photographs: CaptionDataset,
    device: torch.device,
    golden: dict[str, list[str]],
    dry: bool,
) -> Row:
    captioner = Captioner(tokenizer, SETTINGS[setting], seed=0)
    found: list[str] = []
    some = range(16 if dry else len(golden[setting]))
    for batch in EvalLoader(photographs, some, batch_size=32, num_workers=0):
        images = batch.images.model_inputs(device, DTYPES[name])
        found += [caption.text for caption in captioner.caption(model, images, batch.indices)]
    equal = sum(map(str.__eq__, found, golden[setting]))
    good = None if name == "bf16" else equal == len(found)
    details = {"equal": equal, "of": len(found), "good": good}
    return Row("oracle", f"captions equal, {setting}, {name}", f"{equal} of {len(found)}", "-", None, None, details)
