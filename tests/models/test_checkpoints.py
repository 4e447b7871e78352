"""Checkpoints of every kind in and out. Reference values: the oracle (the original BLIP code) and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipds.errors import UserError
from blipds.models.checkpoint_names import from_transformers_name, to_transformers_name
from blipds.models.checkpoints import checkpoint_of, interpolate_pos_embed, load_into, open_checkpoint
from blipds.models.geometry import BlipGeometry, geometry_from_transformers_config, stated_vision_eps
from blipds.models.hf_export import save_blip, save_blipds, save_transformers, transformers_config

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


def export(folder: Path, tensors: dict[str, Tensor], geometry: BlipGeometry, **other: Any) -> None:
    settings: dict[str, Any] = {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "prompt": "a picture of ",
        "generation": {"num_beams": 1, "max_length": 20, "min_length": 5, "do_sample": False},
    }
    save_transformers(folder, tensors, geometry, tokenizer(), **(settings | other))


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


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict[str, Tensor]:
    """The oracle file read by plain torch, all its entries."""
    return torch.load(shared / "oracle" / "tiny_blip.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def oracle_shapes(oracle: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's named_parameters: ties once, no buffers."""
    skipped = (*dict(TIED), "text_decoder.bert.embeddings.position_ids")
    return shapes_of({name: tensor for name, tensor in oracle.items() if name not in skipped})


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A .pth of the tiny model, and its tensors."""
    tensors = tiny_tensors()
    save_blip(tmp_path / "tiny.pth", tensors, {"image_size": 32})
    return tmp_path / "tiny.pth", tensors


# Names


def test_names_map_one_to_one() -> None:
    theirs = [name for name in transformers_blip().state_dict() if "position_ids" not in name]
    ours = [from_transformers_name(name) for name in theirs]
    assert len(set(ours)) == len(theirs) and None not in ours
    assert [to_transformers_name(str(name)) for name in ours] == theirs
    assert from_transformers_name("vision_model.encoder.layers.11.self_attn.qkv.bias") == (
        "visual_encoder.blocks.11.attn.qkv.bias"
    )
    assert from_transformers_name("vision_model.post_layernorm.weight") == "visual_encoder.norm.weight"


@pytest.mark.parametrize("name", ["visual_encoder.blocks.0.ls1.gamma", "visual_encoder.reg_token", "itm_head.weight"])
def test_names_without_a_counterpart(name: str) -> None:
    assert to_transformers_name(name) is None
    assert from_transformers_name(name) is None


# BLIP in


def test_oracle_is_read_bit_by_bit(shared: Path, oracle: dict[str, Tensor], oracle_shapes: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(shared / "oracle" / "tiny_blip.pth")
    assert (checkpoint.kind, checkpoint.config) == ("blip", {"image_size": 96})
    assert checkpoint.left_aside == ["text_decoder.bert.embeddings.position_ids"]
    written: dict[str, Tensor] = {}
    report = load_into(oracle_shapes, checkpoint, written.__setitem__)
    assert_same(written, {name: oracle[name] for name in oracle_shapes})
    assert (report.missing, report.unexpected, report.notes) == ([], [], [])
    assert_same(dict(checkpoint), {name: oracle[name] for name in checkpoint.names()})


def test_pretraining_parts_are_left_aside_by_name(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    aside = {
        "visual_encoder_m.cls_token": torch.ones(1),
        "text_decoder_m.bert.embeddings.word_embeddings.weight": torch.ones(1),
        "text_encoder.embeddings.position_ids": torch.ones(1),
        "text_encoder_m.encoder.layer.0.output.dense.bias": torch.ones(1),
        "vision_proj.weight": torch.ones(1),
        "vision_proj_m.weight": torch.ones(1),
        "text_proj.weight": torch.ones(1),
        "text_proj_m.weight": torch.ones(1),
        "itm_head.bias": torch.ones(1),
        "image_queue": torch.full((2,), float("nan")),  # what is not used is not judged
        "text_queue": torch.ones(1),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "temp": torch.tensor(0.07),
    }
    torch.save({"model": tensors | aside, "optimizer": {"state": {}}, "epoch": 19}, tmp_path / "pretrain.pth")
    checkpoint = open_checkpoint(tmp_path / "pretrain.pth")
    assert checkpoint.left_aside == list(aside)
    written: dict[str, Tensor] = {}
    report = load_into(shapes_of(tensors), checkpoint, written.__setitem__)
    assert_same(written, tensors)
    assert report.left_aside == list(aside)


def test_files_of_torch_before_1_6(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    torch.save({"model": tensors}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "old.pth", shapes_of(tensors)), tensors)


def test_files_without_checksums(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": tensors}, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load(tmp_path / "unchecked.pth", shapes_of(tensors)), tensors)


# Strictness: the whole check comes before the first write


def refused(path: Path, shapes: dict[str, tuple[int, ...]], message: str, **options: Any) -> None:
    written: dict[str, Tensor] = {}
    with pytest.raises(UserError, match=message) as caught:
        load_into(shapes, open_checkpoint(path), written.__setitem__, **options)
    assert written == {}
    assert str(path) in str(caught.value)


def test_missing_unexpected_and_misshapen_are_all_listed(tiny: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = tiny
    shapes = shapes_of(tensors) | {"visual_encoder.blocks.0.ls1.gamma": (24,), "visual_encoder.norm.weight": (25,)}
    del shapes["visual_encoder.norm.bias"]
    refused(
        path,
        shapes,
        r"missing visual_encoder\.blocks\.0\.ls1\.gamma; unexpected visual_encoder\.norm\.bias; "
        r"of another shape: visual_encoder\.norm\.weight \(\(24,\) in the file, \(25,\) in the model\)",
    )


def test_patterns_allow_what_is_missing_or_unexpected(tiny: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = tiny
    shapes = shapes_of(tensors) | {"visual_encoder.blocks.0.ls1.gamma": (24,)}
    del shapes["visual_encoder.norm.bias"]
    written: dict[str, Tensor] = {}
    report = load_into(
        shapes,
        open_checkpoint(path),
        written.__setitem__,
        allow_missing=["*.ls?.gamma"],
        allow_unexpected=["visual_encoder.norm.*"],
    )
    assert report.missing == ["visual_encoder.blocks.0.ls1.gamma"]
    assert report.unexpected == ["visual_encoder.norm.bias"]
    assert_same(written, {name: tensor for name, tensor in tensors.items() if name != "visual_encoder.norm.bias"})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((24,), float("nan")), "NaN or infinite"),
        (torch.full((24,), float("inf")), "NaN or infinite"),
        (torch.ones(24, dtype=torch.int64), r"torch\.int64, weights are torch\.float32"),
        (torch.ones(24, dtype=torch.complex64), "complex64"),
    ],
)
def test_values_that_are_no_weights(tmp_path: Path, bad: Tensor, message: str) -> None:
    tensors = tiny_tensors()
    torch.save({"model": tensors | {"visual_encoder.norm.bias": bad}}, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", shapes_of(tensors), message)


def test_a_tie_explains_one_missing_name_and_both_must_be_equal(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    (decoder, embeddings), (decoder_bias, bias) = TIED
    shapes = shapes_of(tensors)
    both = shapes | {decoder: shapes[embeddings], decoder_bias: shapes[bias]}

    save_file(tensors, tmp_path / "owner.safetensors")
    assert_same(load(tmp_path / "owner.safetensors", shapes), tensors)
    assert torch.equal(load(tmp_path / "owner.safetensors", both)[decoder], tensors[embeddings])

    other = {decoder: tensors[embeddings], decoder_bias: tensors[bias]}
    save_file({k: v for k, v in tensors.items() if k not in (embeddings, bias)} | other, tmp_path / "tied.safetensors")
    assert_same(load(tmp_path / "tied.safetensors", shapes), tensors)

    torch.save({"model": tensors | {decoder_bias: tensors[bias] + 1}}, tmp_path / "differ.pth")
    refused(tmp_path / "differ.pth", shapes, r"decoder\.bias' and 'text_decoder\.cls\.predictions\.bias' differ")


def test_half_precision_is_loaded_as_stored(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tiny_tensors().items()}
    save_file(tensors, tmp_path / "bf16.safetensors")
    assert_same(load(tmp_path / "bf16.safetensors", shapes_of(tensors)), tensors)


# Positions of another grid


@pytest.mark.parametrize(("old", "new", "prefix"), [(5, 7, 1), (7, 5, 1), (6, 8, 0), (4, 6, 5)])
def test_positions_are_interpolated_as_the_original_does(old: int, new: int, prefix: int) -> None:
    positions = torch.randn(1, prefix + old * old, 12, generator=torch.Generator().manual_seed(1))
    found = interpolate_pos_embed(positions, prefix + new * new, prefix)
    assert torch.equal(found[:, :prefix], positions[:, :prefix])
    for channel in range(12):
        grid = positions[0, prefix:, channel].reshape(1, 1, old, old)
        by_hand = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        # one channel at a time takes another path through the kernel: equal but for rounding
        torch.testing.assert_close(found[0, prefix:, channel], by_hand.flatten(), rtol=0, atol=1e-6)


def test_positions_are_interpolated_while_loaded(tiny: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = tiny
    shapes = shapes_of(tensors) | {"visual_encoder.pos_embed": (1, 1 + 6 * 6, 24)}
    written: dict[str, Tensor] = {}
    report = load_into(shapes, open_checkpoint(path), written.__setitem__)
    expected = interpolate_pos_embed(tensors["visual_encoder.pos_embed"], 37)
    assert_same(written, tensors | {"visual_encoder.pos_embed": expected})
    assert report.notes == ["pos_embed interpolated from (1, 17, 24) to (1, 37, 24)"]


def test_positions_that_make_no_square_are_refused(tiny: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = tiny
    refused(path, shapes_of(tensors) | {"visual_encoder.pos_embed": (1, 31, 24)}, "30 grid positions are not a square")
    refused(path, shapes_of(tensors) | {"visual_encoder.pos_embed": (1, 37, 25)}, r"pos_embed \(\(1, 17, 24\) in the")


# transformers in and out


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
    save_blipds(tmp_path / "model.safetensors", ours, {"image_size": 96})
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


def test_exported_processor_and_pipeline(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor, pipeline

    export(tmp_path / "hf", tiny_tensors(), TINY, card_text="CIDEr 1.0")
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


def test_the_card_s_call_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    export(tmp_path / "captioner", tiny_tensors(), TINY, card_text="CIDEr 1.0")
    card = (tmp_path / "captioner" / "README.md").read_text()
    assert "CIDEr 1.0" in card
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    assert isinstance(scope["caption"], str)
    assert 5 <= scope["ids"].shape[1] <= 20
    assert scope["ids"][0, :4].tolist() == [30522, 1037, 3861, 1997]


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
    from dataclasses import replace

    tensors = tiny_tensors()
    with pytest.raises(UserError, match=r"image encoder's layer scale, 4 register tokens; export with --format blip"):
        export(tmp_path / "hf", tensors, replace(TINY, vision_features=("layer scale", "4 register tokens")))
    with pytest.raises(UserError, match=r"cannot express the parameters visual_encoder\.blocks\.0\.ls1\.gamma"):
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


# Parts for a warm start


def test_timm_encoder(tmp_path: Path) -> None:
    import timm

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=10, **arguments)
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    checkpoint = open_checkpoint(tmp_path / "vit.safetensors")
    assert (checkpoint.kind, checkpoint.left_aside) == ("timm", ["head.bias", "head.weight"])
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **arguments)
    expected = {"visual_encoder." + name: tensor for name, tensor in encoder.state_dict().items()}
    shapes = shapes_of(expected) | {"text_decoder.cls.predictions.bias": (30524,)}  # not asked of an encoder's file
    written: dict[str, Tensor] = {}
    load_into(shapes, checkpoint, written.__setitem__)
    assert_same(written, {name: whole.state_dict()[name.removeprefix("visual_encoder.")] for name in expected})


def test_small_encoder_of_the_quick_run(shared: Path) -> None:
    import timm

    path = shared / "weights" / "vit_small_patch14.fp16.safetensors"
    encoder = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0, global_pool="")
    shapes = {"visual_encoder." + name: tuple(p.shape) for name, p in encoder.named_parameters()}
    written: dict[str, Tensor] = {}
    report = load_into(shapes, open_checkpoint(path), written.__setitem__)
    assert report.notes == ["pos_embed interpolated from (1, 1370, 384) to (1, 257, 384)"]
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == shapes


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_bert_as_far_as_it_fits(tmp_path: Path, prefix: str) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=30522, num_hidden_layers=3, **sizes))
    (bert if prefix else bert.bert).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "bert"
    assert f"{prefix}embeddings.token_type_embeddings.weight" in checkpoint.left_aside

    ours = {name: tensor for name, tensor in tiny_tensors().items() if name.startswith("text_decoder.")}
    before = {name: tensor.clone() for name, tensor in ours.items()}
    report = load_into(shapes_of(ours), checkpoint, lambda name, tensor: ours[name][: len(tensor)].copy_(tensor))
    assert torch.equal(ours[EMBEDDINGS][:30522], bert.get_input_embeddings().weight)
    assert torch.equal(ours[EMBEDDINGS][30522:], before[EMBEDDINGS][30522:])
    head = [name for name in ours if ".cls." in name]
    assert all(("crossattention" in name) or name in head for name in report.missing)
    assert [name for name in head if name in report.missing] == ([] if prefix else head)
    assert all(name.startswith("text_decoder.bert.encoder.layer.2.") for name in report.unexpected)
    assert len(report.unexpected) == 16
    query = "bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(ours["text_decoder." + query], bert.state_dict()[query])


def test_a_bert_layer_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    bert = {name: tensor for name, tensor in tiny_tensors().items() if name.startswith("text_decoder.bert.")}
    given = {
        name.removeprefix("text_decoder."): tensor for name, tensor in bert.items() if "crossattention" not in name
    }
    whole = {name: tensor for name, tensor in given.items() if "layer.1." not in name}
    save_file(whole, tmp_path / "shallow.safetensors")
    assert load(tmp_path / "shallow.safetensors", shapes_of(bert)).keys() == {"text_decoder." + name for name in whole}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    save_file({name: tensor for name, tensor in given.items() if name != query}, tmp_path / "torn.safetensors")
    refused(tmp_path / "torn.safetensors", shapes_of(bert), r"missing text_decoder\." + query)


def test_a_bert_of_more_or_fewer_positions(tmp_path: Path) -> None:
    positions = "text_decoder.bert.embeddings.position_embeddings.weight"
    table = torch.arange(24.0).view(6, 4)
    stored = {"embeddings.word_embeddings.weight": torch.zeros(8, 4), "embeddings.position_embeddings.weight": table}
    save_file(stored, tmp_path / "bert.safetensors")
    for rows, taken in ((4, 4), (6, 6), (9, 6)):
        found = load(tmp_path / "bert.safetensors", {EMBEDDINGS: (8, 4), positions: (rows, 4)})[positions]
        assert torch.equal(found, table[:taken])


def test_what_is_left_out_is_in_neither_list_of_errors(tiny: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = tiny
    written = load(path, shapes_of(tensors), leave_out=["visual_encoder.blocks.*"])
    assert written.keys() == {name for name in tensors if ".blocks." not in name}


def test_tensors_in_memory_are_a_checkpoint() -> None:
    tensors = {"patch_embed.proj.weight": torch.ones(2, 3, 4, 4), "head.weight": torch.ones(2)}
    tensors["norm.bias"] = torch.zeros(2)
    checkpoint = checkpoint_of("timm's own", tensors)
    assert (checkpoint.kind, checkpoint.left_aside) == ("timm", ["head.weight"])
    written: dict[str, Tensor] = {}
    shapes = {"visual_encoder.patch_embed.proj.weight": (2, 3, 4, 4), "visual_encoder.norm.bias": (2,)}
    load_into(shapes, checkpoint, written.__setitem__)
    assert_same(written, {"visual_encoder." + name: t for name, t in tensors.items() if name != "head.weight"})


def test_a_bert_of_another_width_or_vocabulary_is_refused(tmp_path: Path) -> None:
    shapes = {EMBEDDINGS: (30524, 16)}
    save_file({"embeddings.word_embeddings.weight": torch.zeros(28996, 16)}, tmp_path / "cased.safetensors")
    refused(tmp_path / "cased.safetensors", shapes, "28996")
    save_file({"embeddings.word_embeddings.weight": torch.zeros(30522, 17)}, tmp_path / "wide.safetensors")
    refused(tmp_path / "wide.safetensors", shapes, r"\(30522, 17\) in the file")


def test_oldest_bert_names(tmp_path: Path) -> None:
    save_file(
        {
            "bert.embeddings.word_embeddings.weight": torch.zeros(8, 4),
            "bert.embeddings.LayerNorm.gamma": torch.ones(4),
            "bert.embeddings.LayerNorm.beta": torch.zeros(4),
            "cls.seq_relationship.bias": torch.zeros(2),
            "bert.pooler.dense.bias": torch.zeros(4),
        },
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.left_aside) == ["bert.pooler.dense.bias", "cls.seq_relationship.bias"]
    norm = "text_decoder.bert.embeddings.LayerNorm."
    assert sorted(checkpoint.names()) == [norm + "bias", norm + "weight", EMBEDDINGS]
    save_file(
        {
            "bert.embeddings.word_embeddings.weight": torch.ones(8, 4),
            "embeddings.word_embeddings.weight": torch.ones(8, 4),
        },
        tmp_path / "two.safetensors",
    )
    with pytest.raises(UserError, match="are the same parameter"):
        open_checkpoint(tmp_path / "two.safetensors")
