"""Checkpoints of transformers in and out, bit by bit; an exported captioner does what the original code did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import (
    CLIP_MEAN,
    CLIP_STD,
    ORACLE,
    TINY,
    assert_same,
    export,
    in_folder,
    load,
    open_checkpoint,
    save_own,
    shapes_of,
    tiny_tensors,
    transformers_blip,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from blipds.captioning.captioner import Captioner
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.blip.export import save_blip, transformers_config
from blipds.models.blip.geometry import geometry_from_transformers_config, stated_vision_eps
from blipds.models.generation import GenerationConfig
from blipds.models.protocol import keep_activations


def test_transformers_in_and_out_bit_by_bit(tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration

    model = transformers_blip()
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    assert checkpoint.kind == "transformers"
    assert geometry_from_transformers_config(checkpoint.config) == TINY
    tensors = tiny_tensors()
    assert_same(load(tmp_path / "theirs", shapes_of(tensors)), tensors)
    # the lone file, without its folder's config
    assert_same(load(tmp_path / "theirs" / "model.safetensors", shapes_of(tensors)), tensors)

    export(tmp_path / "ours", tensors, TINY)
    assert_same(
        load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    )
    again, info = BlipForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[30522, 1037, 3861, 1997, 1037, 3899]] * 2)
    with torch.no_grad():
        assert torch.equal(
            again.eval()(pixel_values=pixels, input_ids=ids).logits, model(pixel_values=pixels, input_ids=ids).logits
        )


def test_sharded_transformers_folder(tmp_path: Path) -> None:
    transformers_blip().save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tensors = tiny_tensors()
    assert_same(load(tmp_path, shapes_of(tensors)), tensors)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file name in this folder"):
        open_checkpoint(tmp_path)


def test_pytorch_model_bin(tmp_path: Path) -> None:
    model = transformers_blip()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(TINY)))
    tensors = tiny_tensors()
    assert open_checkpoint(tmp_path).kind == "transformers"
    assert_same(load(tmp_path, shapes_of(tensors)), tensors)


def test_blip_to_blipds_to_transformers_and_back(
    tmp_path: Path, shared: Path, oracle: dict[str, Tensor], oracle_shapes: dict[str, Any]
) -> None:
    ours = load(shared / "oracle" / "tiny_blip.pth", oracle_shapes)
    save_own(tmp_path / "model.safetensors", ours, {"image_size": 96})
    own = open_checkpoint(tmp_path)
    assert (own.kind, own.config) == ("blipds", {"image_size": 96})
    export(tmp_path / "hf", load(tmp_path, oracle_shapes), ORACLE)
    save_blip(tmp_path / "back.pth", load(tmp_path / "hf", oracle_shapes), {"image_size": 96})
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert (back["config"], back["epoch"]) == ({"image_size": 96}, 0)
    assert_same(back["model"], oracle)


@pytest.fixture(scope="module")
def exported_oracle(
    tmp_path_factory: pytest.TempPathFactory, shared: Path, oracle_shapes: dict[str, Any]
) -> tuple[Any, Any]:
    """The oracle as transformers' model and processor, by way of an exported folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp("oracle") / "hf"
    export(folder, load(shared / "oracle" / "tiny_blip.pth", oracle_shapes), ORACLE)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval(), AutoProcessor.from_pretrained(folder, backend="pil")


def photographs(shared: Path, names: list[str]) -> list[Any]:
    from PIL import Image

    return [Image.open(shared / "data" / "flickr8k" / "images" / name) for name in names]


def test_exported_oracle_computes_what_the_original_code_computed(
    exported_oracle: tuple[Any, Any], shared: Path
) -> None:
    model, processor = exported_oracle
    golden = load_file(shared / "oracle" / "forward.safetensors")
    forward = json.loads((shared / "oracle" / "golden.json").read_text())["forward"]
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    pixels = processor.image_processor(photographs(shared, forward["images"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels, **inputs)
    real = golden["attention_mask"][:4].bool()  # what comes out at a pad is nobody's business
    differences = {
        "pixels": (pixels[:4] - golden["pixel_values"]).abs().max().item(),
        "features": (output.last_hidden_state[:4] - golden["image_embeds"]).abs().max().item(),
        "logits": (output.logits[:4, :, :2048] - golden["logits"]).abs()[real].max().item(),
        "loss": abs(output.loss.item() - forward["loss"]),
    }
    print("largest differences to the original:", {name: f"{value:.1e}" for name, value in differences.items()})
    assert differences["pixels"] < 1e-6
    assert differences["features"] < 1e-4
    assert differences["logits"] < 1e-4
    assert differences["loss"] < 1e-5
    everywhere = golden["attention_mask"].bool()
    assert torch.equal(output.logits.argmax(-1)[everywhere], golden["logits_argmax"][everywhere])


def test_exported_oracle_writes_the_original_s_greedy_captions(exported_oracle: tuple[Any, Any], shared: Path) -> None:
    model, processor = exported_oracle
    golden = json.loads((shared / "oracle" / "golden.json").read_text())["generate"]
    images, prompt = photographs(shared, golden["images"]), "a picture of "
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    ids = model.generate(**inputs, num_beams=1, do_sample=False, max_length=20, min_length=5)
    found = [text[len(prompt) :] for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert found == golden["captions"]["greedy_max20_min5"]


@pytest.mark.parametrize("prompt", ["a black-and-white photo of ", "an x-ray of ", "a  Picture of "])
def test_any_prompt_is_cut_by_its_tokens(
    exported_oracle: tuple[Any, Any], oracle_model: Any, shared: Path, prompt: str
) -> None:
    """The card's cut of what transformers generates, and what we caption with the same weights."""
    model, processor = exported_oracle
    golden = json.loads((shared / "oracle" / "golden.json").read_text())["generate"]
    inputs = processor(images=photographs(shared, golden["images"][:8]), text=[prompt] * 8, return_tensors="pt")
    ids = model.generate(**inputs, num_beams=1, do_sample=False, max_length=20, min_length=5)
    expected = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] - 1 :], skip_special_tokens=True)
    captioner = Captioner(CaptionTokenizer(prompt=prompt), GenerationConfig(num_beams=1), seed=0)
    with torch.no_grad():
        found = captioner.caption(oracle_model, {"pixel_values": inputs["pixel_values"]}, range(8))
        assert [caption.text for caption in found] == expected
    if prompt.split() == ["a", "Picture", "of"]:
        assert expected == golden["captions"]["greedy_max20_min5"][:8]


def test_exported_processor_and_pipeline(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor, pipeline

    export(tmp_path / "hf", tiny_tensors(), TINY, card="CIDEr 1.0")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(images=Image.new("RGB", (50, 40)), text="a picture of ", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["input_ids"].tolist() == [[101, 1037, 3861, 1997, 102]]
    assert processor.tokenizer.bos_token_id == 30522 and len(processor.tokenizer) == 30524
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(inputs["pixel_values"][0, :, 0, 0], black)
    answer = pipeline("image-text-to-text", model=str(tmp_path / "hf"))(
        images=Image.new("RGB", (50, 40)), text="a picture of ", generate_kwargs={"max_length": 8, "num_beams": 1}
    )
    assert answer[0]["generated_text"].startswith("a picture of")


@pytest.mark.parametrize(
    ("prompt", "prompt_ids"),
    [
        ("a picture of ", [30522, 1037, 3861, 1997]),
        ("an X-ray  of ", [30522, 2019, 1060, 1011, 4097, 1997]),
    ],
)
def test_the_card_s_call_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, prompt_ids: list[int]
) -> None:
    from PIL import Image

    export(tmp_path / "captioner", tiny_tensors(), TINY, config=BlipConfig(prompt=prompt), card="CIDEr 1.0")
    card = (tmp_path / "captioner" / "README.md").read_text()
    assert "CIDEr 1.0" in card
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    ids = scope["ids"][0].tolist()
    assert 5 <= len(ids) <= 20
    assert ids[: len(prompt_ids)] == prompt_ids
    assert scope["caption"] == scope["processor"].decode(ids[len(prompt_ids) :], skip_special_tokens=True)


def test_nothing_is_left_to_a_default_that_differs(tmp_path: Path) -> None:
    export(tmp_path / "hf", tiny_tensors(), TINY)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_config"]["layer_norm_eps"] == 1e-6
    text = config["text_config"]
    assert (text["num_attention_heads"], text["label_smoothing"], text["hidden_dropout_prob"]) == (4, 0.1, 0.1)
    assert [text[f"{name}_token_id"] for name in ("bos", "eos", "sep", "pad")] == [30522, 102, 102, 0]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["max_length"] == 20
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert in_folder(tmp_path) == ["hf"]


def test_geometry_that_transformers_cannot_express(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    config = BlipConfig(vit_type="vit_small_patch14_reg4_dinov2", image_size=28)
    with torch.device("meta"):
        model = build_model(config, keep_activations)
    with pytest.raises(
        UserError, match=r"image encoder's layer scale, 4 register tokens, .*; export with --format blip"
    ):
        export(tmp_path / "hf", tensors, model)
    with pytest.raises(UserError, match=r"cannot express these tensors: .*ls1\.gamma \(is \(24,\), should be None"):
        export(tmp_path / "hf", tensors | {"visual_encoder.blocks.0.ls1.gamma": torch.ones(24)}, TINY)
    with pytest.raises(UserError, match=r"qkv\.bias \(is None, should be \(72,\)\)"):
        export(tmp_path / "hf", {k: v for k, v in tensors.items() if "qkv.bias" not in k}, TINY)
    assert in_folder(tmp_path) == []


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "hf", tiny_tensors(), TINY)
    assert in_folder(tmp_path) == ["hf"] and in_folder(tmp_path / "hf") == ["mine.txt"]


def test_the_epsilon_that_a_config_states_is_kept() -> None:
    config = transformers_config(TINY)
    config["vision_config"]["layer_norm_eps"] = 1e-5
    assert geometry_from_transformers_config(config).vision_eps == 1e-5
    assert "1e-05: config.json states it" in stated_vision_eps(config)[1]
    del config["vision_config"]["layer_norm_eps"]
    assert geometry_from_transformers_config(config).vision_eps == 1e-6
    assert "1e-06: no config.json states one, and the original has 1e-6" in stated_vision_eps(config)[1]


def test_what_a_config_leaves_out_has_transformers_default() -> None:
    geometry = geometry_from_transformers_config({"model_type": "blip", "vision_config": {}, "text_config": {}})
    assert (geometry.num_attention_heads, geometry.label_smoothing, geometry.image_size) == (8, 0.0, 384)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "blip-2"},
        {"model_type": "blip", "vision_config": {}},
        {"model_type": "blip", "vision_config": {"hidden_act": "quick_gelu"}, "text_config": {}},
        {"model_type": "blip", "vision_config": {"image_size": [384, 224]}, "text_config": {}},
        {"model_type": "blip", "vision_config": {"layer_norm_eps": "tiny"}, "text_config": {}},
    ],
)
def test_configs_that_describe_no_captioner(config: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        geometry_from_transformers_config(config)
