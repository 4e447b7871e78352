"""Learning rates by name prefix and by depth, and the optimizer's groups that carry them: exact values."""

import json
from types import SimpleNamespace

import pytest
from launching import launch

from blipds.engine import Engine, parameter_groups
from blipds.errors import UserError
from blipds.models.blip.model import BlipCaption
from blipds.models.blip.text_decoder import TextConfig, TextDecoder
from blipds.models.lr_scales import lr_scales
from blipds.models.vision import build_vision_transformer


def captioner() -> BlipCaption:
    """Three blocks, with all the parts that timm's encoders have before and after them."""
    visual_encoder = build_vision_transformer(
        "base", 16, embed_dim=8, depth=3, num_heads=2, patch_size=8, reg_tokens=2, pre_norm=True, init_values=1e-5
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text_decoder = TextDecoder(TextConfig(vocab_size=20, max_position_embeddings=8, **sizes), 8)
    return BlipCaption(visual_encoder, text_decoder)


def names() -> list[str]:
    return [name for name, _ in captioner().named_parameters()]


def layers() -> dict[str, int | None]:
    model = captioner()
    return {name: model.encoder_layer(name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("visual_encoder.cls_token", 4),
        ("visual_encoder.reg_token", 4),
        ("visual_encoder.pos_embed", 4),
        ("visual_encoder.patch_embed.proj.weight", 4),
        ("visual_encoder.norm_pre.bias", 4),
        ("visual_encoder.blocks.0.ls1.gamma", 3),
        ("visual_encoder.blocks.1.attn.qkv.weight", 2),
        ("visual_encoder.blocks.2.mlp.fc2.bias", 1),
        ("visual_encoder.norm.weight", 0),
        ("text_decoder.bert.embeddings.word_embeddings.weight", 0),
    ],
)
def test_layer_decay_is_beit_s(name, power):
    assert name in names()
    assert lr_scales(layers(), {}, 0.5)[name] == 0.5**power


def test_layer_decay_at_the_depth_of_vit_base():
    """BEiT's own numbers: layer id i of 12 + 2 has decay^(13 - i); embeddings are 0, block i is i + 1, the rest 13."""
    found = lr_scales({"cls_token": 0, **{f"block {i}": i + 1 for i in range(12)}, "norm": None}, {}, 0.65)
    assert list(found.values()) == [0.65**13, *(0.65 ** (13 - (i + 1)) for i in range(12)), 1.0]


def test_layer_decay_needs_layers():
    with pytest.raises(UserError, match=r"run\.lr_layer_decay: this arch does not say which layers"):
        lr_scales({"a": None}, {}, 0.5)


def test_prefixes_are_whole_parts_and_the_longest_counts():
    given = ["visual_encoder.blocks.1.a", "visual_encoder.blocks.10.a", "visual_encoder.norm.weight", "text_decoder.b"]
    found = lr_scales(dict.fromkeys(given), {"visual_encoder": 0.1, "visual_encoder.blocks.1": 0.02}, None)
    assert list(found.values()) == [0.02, 0.1, 0.1, 1.0]


def test_prefix_and_depth_multiply():
    found = lr_scales(layers(), {"visual_encoder": 0.1, "text_decoder.cls": 2.0}, 0.5)
    assert found["visual_encoder.blocks.2.norm1.weight"] == 0.1 * 0.5
    assert found["visual_encoder.norm.weight"] == 0.1
    assert found["text_decoder.cls.predictions.bias"] == 2.0
    assert found["text_decoder.bert.embeddings.word_embeddings.weight"] == 1.0


def test_a_prefix_without_parameters_names_the_nearest():
    message = (
        r"run\.lr_scale\.visual_encodr matches no parameter; did you mean 'visual_encoder'\? "
        r"names begin with text_decoder, visual_encoder"
    )
    with pytest.raises(UserError, match=message):
        lr_scales(layers(), {"visual_encodr": 0.1}, None)
    with pytest.raises(UserError, match=r"did you mean 'visual_encoder\.blocks\.\d'"):
        lr_scales(layers(), {"visual_encoder.blocks.7": 0.1}, None)


def test_without_scales_there_is_a_group_with_decay_and_one_without():
    model = captioner()
    decayed, others = parameter_groups(model, 0.05, "matrices")
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert decayed["lr_scale"] == others["lr_scale"] == 1.0
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() < 2 for parameter in others["params"])
    assert [group["weight_decay"] for group in parameter_groups(model, 0.05, "all")] == [0.05]
    assert len(parameter_groups(model, 0.0, "matrices")) == 1


def test_one_group_for_each_pair_and_each_parameter_once():
    model = captioner()
    model.visual_encoder.patch_embed.requires_grad_(False)
    scales = lr_scales(layers(), {"visual_encoder": 0.1}, 0.5)
    groups = parameter_groups(model, 0.05, "matrices", scales)
    pairs = [(group["weight_decay"], group["lr_scale"]) for group in groups]
    steps = [1.0, 0.1, *(0.1 * 0.5**power for power in (1, 2, 3, 4))]
    # the norm of the encoder has no matrix; norm_pre is among the embeddings' vectors
    assert pairs == [(0.05, scale) for scale in steps if scale != 0.1] + [(0.0, scale) for scale in steps]
    grouped = {id(parameter): (g["weight_decay"], g["lr_scale"]) for g in groups for parameter in g["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(trainable) == len(grouped)
    for name, parameter in trainable.items():
        assert grouped[id(parameter)] == (0.05 if parameter.dim() >= 2 else 0.0, scales[name]), name


def test_the_step_sets_each_group_s_rate():
    groups = [{"lr": 0.0, "lr_scale": 1.0}, {"lr": 0.0, "lr_scale": 0.25}]
    engine = Engine.__new__(Engine)
    engine.checks_gradients = False
    engine._deepspeed = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups), step=lambda: None)
    engine.step(8e-4, measure=False)
    assert [group["lr"] for group in groups] == [8e-4, 2e-4]


def test_under_every_zero_stage_adam_s_first_step_is_the_scaled_rate(tmp_path):
    """The first step of Adam moves each weight by its learning rate, whatever the gradient (weight decay 0)."""
    scales = {"visual_encoder.weight": 0.1, "text_decoder.weight": 1.0, "text_decoder.bias": 0.25}
    process = launch(1, "tests/engine/first_steps.py", json.dumps(scales), tmp_path / "moved.json")
    assert process.returncode == 0, process.stdout[-4000:]
    moved = json.loads((tmp_path / "moved.json").read_text())
    assert moved.keys() == {"0", "1", "2", "3"}
    for stage, by_name in moved.items():
        assert by_name.keys() == scales.keys()
        for name, distance in by_name.items():
            assert distance == pytest.approx(2e-3 * scales[name], rel=1e-3), (stage, name)
