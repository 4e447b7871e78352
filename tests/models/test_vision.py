"""Geometry: what is built for a name; parameter counts from the papers' checkpoints (shared/reference.md)."""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blipds.config.run import load_run_config
from blipds.data.caption_rows import caption_rows
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.vision import build_vision_transformer, checkpoint_last


def direct(function, *inputs):
    return function(*inputs)


def meta_model(tmp_path, model_type):
    """The packaged model without memory or random numbers."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{model_type: {model_type}}}")
    with torch.device("meta"):
        return build_model(load_run_config(path)[0].model, checkpoint_fn=direct)


@pytest.mark.parametrize(("model_type", "count"), [("base_coco", 223_971_644), ("large_coco", 446_290_492)])
def test_parameter_counts(tmp_path, model_type, count):
    model = meta_model(tmp_path, model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_papers_encoders(tmp_path):
    base = meta_model(tmp_path, "base_coco").visual_encoder
    large = meta_model(tmp_path, "large_coco").visual_encoder
    assert (base.embed_dim, len(base.blocks), base.blocks[0].attn.num_heads) == (768, 12, 12)
    assert (large.embed_dim, len(large.blocks), large.blocks[0].attn.num_heads) == (1024, 24, 16)
    for encoder in (base, large):
        assert encoder.pos_embed.shape[1] == 1 + (384 // 16) ** 2
        assert encoder.norm.eps == encoder.blocks[0].norm1.eps == 1e-6
        assert encoder.blocks[0].attn.qkv.bias is not None

    def rates(encoder):
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]

    assert rates(base) == [0.0] * 12
    assert rates(large) == pytest.approx([0.1 * block / 23 for block in range(24)])


@pytest.mark.parametrize(
    ("vit_type", "image_size", "vit_kwargs", "tokens", "positions"),
    [
        ("base", 32, {}, 1 + 4, 1 + 4),
        ("base", 32, {"patch_size": 8}, 1 + 16, 1 + 16),
        ("vit_tiny_patch16_224", 48, {"num_heads": 4}, 1 + 9, 1 + 9),
        # four registers beside the class token, and positions for the patches alone
        ("vit_small_patch14_reg4_dinov2", 28, {}, 1 + 4 + 4, 4),
        # an attention pool and no class token: all patches, unpooled
        ("vit_base_patch16_siglip_224", 32, {}, 4, 4),
    ],
)
def test_all_tokens_come_out(vit_type, image_size, vit_kwargs, tokens, positions):
    encoder = build_vision_transformer(vit_type, image_size, depth=1, **vit_kwargs)
    with torch.no_grad():
        embeds = encoder(torch.randn(2, 3, image_size, image_size))
    assert embeds.shape == (2, tokens, encoder.embed_dim)
    assert encoder.pos_embed.shape[1] == positions


@pytest.mark.parametrize(
    ("vit_type", "vit_kwargs", "message"),
    [
        ("vit_hgue", {}, "^model.vit_type 'vit_hgue' is neither base, large nor a model of timm's$"),
        ("resnet18", {}, "^model.vit_type 'resnet18'"),
        ("base", {"detph": 3}, "detph"),
        ("base", {"embed_dim": 100}, "^model.vit_type 'base' with image_size 32, {'embed_dim': 100, 'depth': 1}: "),
    ],
)
def test_what_cannot_be_built(vit_type, vit_kwargs, message):
    with pytest.raises(UserError, match=message):
        build_vision_transformer(vit_type, 32, **vit_kwargs, depth=1)


def test_more_text_than_positions():
    config = BlipConfig(max_txt_len=513)
    message = "max_txt_len is 513, but the text decoder has 512 positions"
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_model(config, checkpoint_fn=direct)


# --- freezing and activation checkpointing ---


@pytest.mark.parametrize(("count", "recomputed"), [(None, 4), (0, 0), (1, 1), (3, 3), (9, 4)])
def test_checkpointing_the_last_blocks_gives_equal_gradients(count, recomputed):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def gradients(encoder):
        encoder(images).square().sum().backward()
        return {name: parameter.grad for name, parameter in encoder.named_parameters()}

    torch.manual_seed(0)
    encoder = build_vision_transformer("base", 32, embed_dim=32, depth=4, num_heads=2)
    expected = {name: gradient.clone() for name, gradient in gradients(encoder).items()}
    encoder.zero_grad()
    calls = []

    def checkpoint_fn(function, *inputs):
        calls.append(function)
        return checkpoint(function, *inputs, use_reentrant=False)

    checkpoint_last(encoder.blocks, count, checkpoint_fn)
    found = gradients(encoder)
    assert len(calls) == recomputed
    assert [function.__self__ for function in calls] == list(encoder.blocks)[4 - recomputed :]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.2,
}


def tiny(folder, checkpoint_fn=direct, **changes):
    """Four blocks and three layers, the same weights every time."""
    (folder / "bert.json").write_text(json.dumps(TEXT))
    torch.manual_seed(0)
    config = BlipConfig(
        vit_kwargs={"embed_dim": 32, "depth": 4, "num_heads": 2, "drop_path_rate": 0.5},
        image_size=32,
        med_config_path=str(folder / "bert.json"),
        **changes,
    )
    return build_model(config, checkpoint_fn)


def gradients_of(model):
    torch.manual_seed(1)
    captions = [[torch.randint(30522, (6,)).tolist()] for _ in range(2)]
    rows = caption_rows(captions, captions[0][0][:3], pad_token_id=0).to(torch.device("cpu"))
    loss = model(**rows, pixel_values=torch.randn(2, 3, 32, 32))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_checkpointing_by_config_gives_equal_gradients(tmp_path):
    """In training mode: the same dropout and the same dropped paths when the activations are computed again."""
    calls = []

    def checkpoint_fn(function, *inputs):
        calls.append(type(function.__self__).__name__)
        return checkpoint(function, *inputs, use_reentrant=False)

    expected = gradients_of(tiny(tmp_path).train())
    model = tiny(tmp_path, checkpoint_fn, vit_grad_ckpt=True, vit_ckpt_layer=2, text_grad_ckpt=True).train()
    found = gradients_of(model)
    assert calls == ["Block", "Block", "Layer", "Layer", "Layer"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_frozen_encoder_neither_learns_nor_drops(tmp_path):
    model = tiny(tmp_path, freeze_vit=True).train()
    assert not any(module.training for module in model.visual_encoder.modules())
    assert model.text_decoder.training
    found = gradients_of(model)
    assert all(name.startswith("text_decoder.") for name in found)
    assert len(found) == len(list(model.text_decoder.parameters()))
