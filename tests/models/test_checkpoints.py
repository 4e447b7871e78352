"""Checkpoints of every kind are read. Reference values: the oracle (the original BLIP code) and transformers."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_samples import (
    EMBEDDINGS,
    TIED,
    TINY,
    assert_same,
    load,
    open_checkpoint,
    shapes_of,
    tiny_tensors,
    transformers_blip,
)
from safetensors.torch import save_file
from torch import Tensor

from blipds.errors import UserError
from blipds.models.blip import build_from_geometry
from blipds.models.blip.checkpoints import BlipFormat, interpolate_pos_embed
from blipds.models.blip.export import save_blip
from blipds.models.blip.names import from_transformers_name, to_transformers_name
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.checkpoints import Checkpoint, load_into


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A .pth of the tiny model, and its tensors."""
    tensors = tiny_tensors()
    save_blip(tmp_path / "tiny.pth", tensors, {"image_size": 32})
    return tmp_path / "tiny.pth", tensors


# Names


def test_names_map_one_to_one() -> None:
    theirs = list(transformers_blip().state_dict())
    ours = [from_transformers_name(name) for name in theirs]
    assert set(ours) == build_from_geometry(TINY).state_dict().keys()
    assert [to_transformers_name(name) for name in ours] == theirs
    assert from_transformers_name("vision_model.encoder.layers.11.self_attn.qkv.bias") == (
        "visual_encoder.blocks.11.attn.qkv.bias"
    )
    assert from_transformers_name("vision_model.post_layernorm.weight") == "visual_encoder.norm.weight"


# BLIP in


def test_oracle_is_read_bit_by_bit(shared: Path, oracle: dict[str, Tensor], oracle_shapes: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(shared / "oracle" / "tiny_blip.pth")
    assert (checkpoint.kind, checkpoint.config) == ("blip", {"image_size": 96})
    assert checkpoint.left_aside == ["text_decoder.bert.embeddings.position_ids"]
    written: dict[str, Tensor] = {}
    report = load_into(oracle_shapes, checkpoint, written.__setitem__)
    assert_same(written, {name: oracle[name] for name in oracle_shapes})
    assert (report.missing, report.unexpected, report.notes) == ([], [], [])
    assert_same(checkpoint.tensors, {name: oracle[name] for name in oracle_shapes})


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
    load_into(shapes_of(tensors), checkpoint, written.__setitem__)
    assert_same(written, tensors)


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


def wrapped(tensors: dict[str, Tensor], before: str = "", after: str = "") -> dict[str, Tensor]:
    return {before + name.replace("blocks.0.", f"blocks.0.{after}"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": wrapped(tensors, "module.")},  # DDP, saved as torchvision's scripts do
        lambda tensors: {"state_dict": wrapped(tensors, "model."), "epoch": 3, "pytorch-lightning_version": "2.6"},
        lambda tensors: {"model": wrapped(tensors, "_orig_mod.")},  # torch.compile of the whole
        lambda tensors: wrapped(tensors, "module._orig_mod."),  # compiled, then DDP
        lambda tensors: {"model": wrapped(tensors, after="_orig_mod.")},  # torch.compile of layers
        lambda tensors: wrapped(tensors, "_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
        lambda tensors: {"module": tensors, "global_steps": 7, "dp_world_size": 2},  # DeepSpeed's stages 0 to 2
        lambda tensors: {"model_state_dict": wrapped(tensors, "module."), "loss": 2.5},
    ],
)
def test_what_trainers_wrap_around_weights_is_taken_off(wrap: Any, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    torch.save(wrap(tensors), tmp_path / "wrapped.pth")
    assert_same(load(tmp_path / "wrapped.pth", shapes_of(tensors)), tensors)
    assert open_checkpoint(tmp_path / "wrapped.pth").kind == "blip"


def test_a_pickle_with_other_objects_is_refused_with_the_line_that_unwraps_it(tmp_path: Path) -> None:
    torch.save({"module": tiny_tensors(), "args": Namespace(lr=1e-5)}, tmp_path / "mp_rank_00_model_states.pt")
    message = (
        r"never allowed .*; save the state dict alone, torch\.save\(model\.state_dict\(\), FILE\), with the program"
    )
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "mp_rank_00_model_states.pt")


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
    save_file(tensors, tmp_path / "owner.safetensors")
    assert_same(load(tmp_path / "owner.safetensors", shapes), tensors)

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
    checkpoint = Checkpoint(StoredTensors(Path("timm's own"), tensors), BlipFormat())
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
    assert sorted(checkpoint.tensors) == [norm + "bias", norm + "weight", EMBEDDINGS]


def test_two_names_of_one_parameter_must_hold_the_same_values(tmp_path: Path) -> None:
    twice = {prefix + "embeddings.word_embeddings.weight": torch.ones(8, 4) for prefix in ("", "bert.")}
    save_file(twice, tmp_path / "two.safetensors")
    assert torch.equal(load(tmp_path / "two.safetensors", {EMBEDDINGS: (8, 4)})[EMBEDDINGS], torch.ones(8, 4))
    twice["bert.embeddings.word_embeddings.weight"][0, 0] = 2
    save_file(twice, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", {EMBEDDINGS: (8, 4)}, "differ, but the model has one tensor for both")
