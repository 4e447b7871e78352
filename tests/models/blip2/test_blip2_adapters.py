"""Adapters in BLIP-2's language model, the Q-Former beside them: in transformers with peft, and merged."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from test_blip2_weights import eva, exporting, folder, lavis  # noqa: F401
from transformers import Blip2ForConditionalGeneration

from blipds.config.sections import LoraConfig
from blipds.errors import UserError
from blipds.models import build_model, build_trained
from blipds.models.adapter_files import read_adapters, write_peft
from blipds.models.blip2.export import export_lavis, export_transformers
from blipds.models.blip2.model import LN_VISION_EPS
from blipds.models.protocol import keep_activations
from blipds.models.weights import load_weights, open_weights


def quiet(line):
    pass


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The oracle with drawn adapters and a changed Q-Former."""
    model = build_trained(replace(config.model, lora=LoraConfig(r=4, alpha=8)), keep_activations).eval()
    load_weights(model, open_weights(config.model.finetuned, tmp_path_factory.mktemp("cache")), quiet)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    tensors = {name: p.detach() for name, p in trained.named_parameters() if not trained.is_elsewhere(name)}
    assert {name.split(".")[0] for name in tensors} == {"language_model", "bridge"}
    assert all(".lora_" in name for name in tensors if name.startswith("language_model."))
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "blipds", "config": json.dumps(trained.checkpoint_config())})
    return path


@pytest.fixture(scope="module")
def given(tensors):
    ids = tensors["input_ids"][:4]
    places = torch.arange(ids.shape[1]).expand(4, -1)
    return tensors["pixel_values"], ids, places


@torch.no_grad()
def our_logits(model, given):
    pixels, ids, places = given
    return model.logits(model.bridge(model.image_encoder(pixels)), ids, places, places * 0)


@torch.no_grad()
def their_logits(model, given, post_layernorm="vision_model.post_layernorm"):
    pixels, ids, _ = given
    everything = torch.cat([torch.full((4, 8), model.config.image_token_index), ids], 1)
    model.eval().get_submodule(post_layernorm).eps = LN_VISION_EPS  # transformers has 1e-6: 2e-5 of the logits
    return model(pixel_values=pixels, input_ids=everything, attention_mask=torch.ones_like(everything)).logits[:, 8:]


def test_targets(trained):
    layers = trained.language_model.config.num_hidden_layers
    assert len(trained.lora.modules) == 2 * layers
    assert {name.rpartition(".")[2] for name in trained.lora.modules} == {"q_proj", "v_proj"}
    assert trained.freeze_vit  # nothing in it learns


def test_peft_loads_what_is_exported(trained, checkpoint, folder, given, tmp_path):  # noqa: F811
    stored = open_weights(str(checkpoint), tmp_path)
    write_peft(tmp_path / "adapters", read_adapters(stored, trained.checkpoint_format()), trained, False)
    theirs = PeftModel.from_pretrained(Blip2ForConditionalGeneration.from_pretrained(folder), tmp_path / "adapters")
    found = their_logits(theirs, given, "base_model.model.vision_model.post_layernorm")[..., :2000]
    expected = our_logits(trained, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_merged(trained, checkpoint, config, exporting, given, tmp_path):  # noqa: F811
    model = build_model(config.model, keep_activations).eval()
    load_weights(model, open_weights(str(checkpoint), tmp_path), quiet)
    expected = our_logits(trained, given)
    torch.testing.assert_close(our_logits(model, given), expected, rtol=0, atol=1e-5)
    assert not model.is_elsewhere("language_model.model.decoder.embed_tokens.weight")  # checkpoints must hold it now
    export_transformers(tmp_path / "hf", exporting(model))
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(their_logits(theirs, given)[..., :2000], expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"adapters are merged into it: take --format hf"):
        export_lavis(tmp_path / "merged.pth", exporting(model))
