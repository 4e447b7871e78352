"""Adapters compute what LoRA's paper says (arXiv 2106.09685), and what a user can get wrong is one line."""

import builtins
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from blipds.config.sections import LoraConfig
from blipds.data.caption_rows import caption_rows
from blipds.errors import UserError
from blipds.models import build_model, build_trained
from blipds.models.blip.config import BlipConfig
from blipds.models.protocol import keep_activations
from blipds.models.weights import load_weights, open_weights

LAYER = "text_decoder.bert.encoder.layer.0.attention.self.query"
QKV = "visual_encoder.blocks.0.attn.qkv"


@pytest.fixture(scope="module")
def section(shared):
    """section(r=..., freeze_vit=...) is the oracle's model section, with adapters unless `lora` is None."""

    def section(freeze_vit=False, **lora):
        return BlipConfig(
            vit_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 4},
            image_size=96,
            med_config_path=str(shared / "oracle" / "med_config.json"),
            freeze_vit=freeze_vit,
            lora=LoraConfig(**{"r": 4, "alpha": 8} | lora),
        )

    return section


@pytest.fixture(scope="module")
def adapted(section, shared):
    """adapted(r=..., ...) gives the oracle's captioner with new adapters."""

    def adapted(**keys):
        model = build_trained(section(**keys), keep_activations)
        load_weights(model, open_weights(str(shared / "oracle" / "tiny_blip.pth"), shared), lambda line: None)
        return model.eval()

    return adapted


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    rows = caption_rows([[[101, 5, 7, 8, 102], [101, 5, 9, 102]], [[101, 5, 3, 102]]], [101, 5], pad_token_id=0)
    return {"pixel_values": torch.randn(2, 3, 96, 96), **rows.to(torch.device("cpu"))}


def with_drawn_adapters(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    return model


def save_adapters(path, model):
    """As a run's checkpoint has them (engine/checkpoints.py)."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if not model.is_elsewhere(name)}
    metadata = {"format": "blipds", "config": json.dumps(model.checkpoint_config())}
    save_file(tensors, path, metadata=metadata)
    return str(path)


def quiet(line):
    pass


def test_new_adapters_change_nothing(adapted, oracle_model, inputs):
    model = adapted()
    assert model(**inputs).item() == oracle_model(**inputs).item()
    first, second = (model.get_parameter(f"{QKV}.lora_{name}.weight") for name in "AB")
    assert first.shape == (4, 96) and second.shape == (288, 4)
    assert not second.any() and 0.9 / 96**0.5 < first.abs().max() <= 1 / 96**0.5


def test_all_but_the_adapters_keeps_its_name_and_is_frozen(adapted, oracle_model):
    model = adapted()
    shapes = {name: p.shape for name, p in oracle_model.named_parameters()}
    found = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    assert {name: p.shape for name, p in found.items()} == shapes
    assert not any(p.requires_grad for p in found.values())
    adapters = [p for name, p in model.named_parameters() if name not in shapes]
    # 4 encoder layers of width 96, and in each decoder layer queries and values of both attentions
    layers = [name for name, _ in model.named_modules() if re.search(r"attn\.qkv$|\.self\.(query|value)$", name)]
    assert model.lora.modules == layers and len(adapters) == 2 * len(layers)
    assert all(p.requires_grad for p in adapters)
    assert all(model.get_parameter(name) is p for name, p in model.named_parameters())
    assert [name for name, _ in model.named_parameters() if not model.is_elsewhere(name)] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]


def test_gradients_follow_from_those_of_merged_weights(adapted, build_oracle, inputs):
    """dL/dB = alpha / r x G A^T and dL/dA = alpha / r x B^T G, with G of the merged weight W + alpha / r x B A."""
    model, merged = with_drawn_adapters(adapted()), build_oracle()
    factors = {
        name: [model.get_parameter(f"{name}.lora_{side}.weight") for side in "AB"] for name in model.lora.modules
    }
    with torch.no_grad():
        for name, (first, second) in factors.items():
            merged.get_parameter(f"{name}.weight").add_(8 / 4 * second @ first)
    losses = model(**inputs), merged(**inputs)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for name, (first, second) in factors.items():
        gradient = merged.get_parameter(f"{name}.weight").grad
        for found, expected in (
            (second.grad, 2 * gradient @ first.detach().T),
            (first.grad, 2 * second.detach().T @ gradient),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_checkpoint_of_adapters_comes_back_apart_and_merged(adapted, section, inputs, tmp_path):
    trained = with_drawn_adapters(adapted(train_also=["cls.*", "visual_encoder.norm.*"]))
    with torch.no_grad():
        trained.visual_encoder.norm.weight.add_(0.5)
    path = save_adapters(tmp_path / "model.safetensors", trained)
    again = build_trained(section(train_also=["cls.*", "visual_encoder.norm.*"]), keep_activations)
    merged = build_model(section(), keep_activations)
    for model in (again, merged):
        load_weights(model.eval(), open_weights(path, tmp_path), quiet)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in trained.named_parameters())
    assert again.checkpoint_config() == trained.checkpoint_config()
    assert merged.lora is None
    assert merged(**inputs).item() == pytest.approx(trained(**inputs).item(), rel=1e-6)


def test_large_has_less_than_20_megabytes():
    with torch.device("meta"):
        model = build_trained(BlipConfig(vit_type="large", lora=LoraConfig()), keep_activations)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # 24 encoder layers of 1024 -> 3072; 12 decoder layers: two queries and a value of 768, a value of 1024 -> 768
    assert learning == 16 * (24 * (1024 + 3072) + 12 * (3 * (768 + 768) + 1024 + 768)) == 2_801_664
    assert 4 * learning < 20e6  # 11.2 MB; a checkpoint has two moments of each, too


def test_a_frozen_encoder_gets_no_adapters_unless_asked(adapted):
    model = adapted(freeze_vit=True)
    assert not any(name.startswith("visual_encoder.") for name in model.lora.modules) and model.lora.modules
    assert not adapted(target_modules=["value"]).train().visual_encoder.training  # nothing in it learns


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target_modules": ["attn.qvk"]}, r"target_modules: 'attn\.qvk' matches no linear layer; .*attn\.qkv"),
        ({"target_modules": []}, r"target_modules is missing; layers there are: visual_encoder\.blocks\.\*\.attn\.qkv"),
        ({"train_also": ["clz.predictions.*"]}, r"train_also: 'clz\.predictions\.\*' matches no parameter; .*"),
        ({"train_also": [LAYER + ".bias"]}, r"train_also: .*query\.bias is adapted; leave it out"),
        ({"r": 97}, r"model\.lora\.r is 97, but visual_encoder\..*qkv is 288 x 96; allowed: at most 96"),
        ({"target_modules": ["predictions.decoder"]}, "decoder shares its weight with the embeddings"),
        ({"target_modules": ["qkv"], "freeze_vit": True}, "freeze_vit is true, and .*target_modules adapts visual_enc"),
        ({"train_also": ["norm.weight"], "freeze_vit": True}, "freeze_vit is true, and .*train_also trains visual_enc"),
    ],
)
def test_what_cannot_be_adapted(section, keys, said):
    with pytest.raises(UserError, match=said):
        build_trained(section(**keys), keep_activations)


def test_without_peft(section, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **keys):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r'model\.lora needs peft: pip install -e "\.\[lora\]"'):
        build_trained(section(), keep_activations)


def test_random_weights_are_not_adapted():
    with pytest.raises(UserError, match=r"model\.lora adapts a whole checkpoint"):
        BlipConfig(load_pretrained=False, load_finetuned=False, lora=LoraConfig())


def test_an_adapter_of_another_base_or_of_other_layers(adapted, section, oracle, tmp_path):
    path = save_adapters(tmp_path / "model.safetensors", adapted())
    torch.save({"model": {name: tensor.clone() for name, tensor in oracle.items()}}, tmp_path / "same.pth")
    oracle = {name: tensor * 1.5 if name == f"{LAYER}.weight" else tensor for name, tensor in oracle.items()}
    torch.save({"model": oracle}, tmp_path / "other.pth")
    model = build_model(section(), keep_activations)
    load_weights(model, open_weights(path, tmp_path, str(tmp_path / "same.pth")), quiet)
    with pytest.raises(UserError, match=r"other\.pth: other weights than the adapters were trained on; .*--base"):
        load_weights(model, open_weights(path, tmp_path, str(tmp_path / "other.pth")), quiet)
    with pytest.raises(UserError, match=r"safetensors holds adapters itself"):
        load_weights(model, open_weights(path, tmp_path, path), quiet)
    said = r"holds other adapters \(rank 4, alpha 8 in \d+ layers\) than model\.lora asks for \(rank 5, alpha 8 in \d+"
    with pytest.raises(UserError, match=said):
        load_weights(build_trained(section(r=5), keep_activations), open_weights(path, tmp_path), quiet)
