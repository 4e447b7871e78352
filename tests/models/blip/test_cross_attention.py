"""Where the decoder looks, against the attention weights that transformers' BLIP gives out."""

import torch
from checkpoint_samples import ORACLE
from safetensors.torch import load_file

from blipds.models.blip.cross_attention import cross_attention
from blipds.models.blip.export import transformers_config
from blipds.models.blip.names import to_transformers_name


def test_cross_attention_is_that_of_transformers(oracle_model, shared):
    from transformers import BlipConfig, BlipForConditionalGeneration

    theirs = BlipForConditionalGeneration(BlipConfig(**transformers_config(ORACLE))).eval()
    theirs.set_attn_implementation("eager")  # the other kinds keep no weights either
    weights = {to_transformers_name(name): tensor for name, tensor in oracle_model.state_dict().items()}
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    golden = load_file(shared / "oracle" / "forward.safetensors")
    pixel_values, input_ids = golden["pixel_values"][:1], golden["input_ids"][0]
    with torch.no_grad():
        image_embeds = theirs.vision_model(pixel_values).last_hidden_state
        output = theirs.text_decoder(
            input_ids[None], encoder_hidden_states=image_embeds, output_attentions=True, is_decoder=True
        )
    layers = torch.stack(output.cross_attentions)  # (layers, 1, heads, T, 1 + 36): a class token, then 6 x 6 patches
    expected = layers.mean(dim=(0, 2)).squeeze(0)[:, 1:].unflatten(-1, (6, 6))
    found = cross_attention(oracle_model, pixel_values, input_ids)
    assert found.shape == (len(input_ids), 6, 6)
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.std() > 1e-3  # the oracle does look somewhere


def test_the_model_is_left_as_it_was(oracle_model):
    images = torch.zeros(1, 3, 96, 96)
    ids, place = torch.tensor([30522, 1037, 3861]), torch.tensor([2])
    before = oracle_model.text_decoder(ids.unsqueeze(0), oracle_model.visual_encoder(images), label_positions=place)
    cross_attention(oracle_model, images, ids)
    assert not any(module._forward_pre_hooks for module in oracle_model.modules())
    after = oracle_model.text_decoder(ids.unsqueeze(0), oracle_model.visual_encoder(images), label_positions=place)
    assert torch.equal(before, after)
