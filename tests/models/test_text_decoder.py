import json
from dataclasses import replace

import pytest
import torch

from blipds.errors import UserError
from blipds.models import read_text_config
from blipds.models.text_decoder import TextConfig, TextDecoder

TINY = TextConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
    initializer_range=0.5,  # large, so that what should matter does
)
IMAGES, CAPTIONS, TOKENS, IMAGE_TOKENS, IMAGE_WIDTH = 2, 3, 5, 7, 24
ALL = torch.arange(IMAGES * CAPTIONS * TOKENS)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return TextDecoder(TINY, IMAGE_WIDTH).eval()


@pytest.fixture
def captions():
    torch.manual_seed(1)
    input_ids = torch.randint(50, (IMAGES, CAPTIONS, TOKENS))
    return input_ids, torch.randn(IMAGES, IMAGE_TOKENS, IMAGE_WIDTH)


@torch.no_grad()
def test_captions_that_share_an_image_equal_separate_pairs(decoder, captions):
    input_ids, image_embeds = captions
    shared = decoder(input_ids, image_embeds, ALL)
    pairs = decoder(input_ids.view(-1, 1, TOKENS), image_embeds.repeat_interleave(CAPTIONS, dim=0), ALL)
    torch.testing.assert_close(shared, pairs, rtol=1e-5, atol=1e-5)


def test_and_so_do_their_gradients(decoder, captions):
    input_ids, image_embeds = captions
    image_embeds.requires_grad_()
    weights = torch.randn(len(ALL), TINY.vocab_size)
    leaves = [image_embeds, *decoder.parameters()]
    shared = torch.autograd.grad((decoder(input_ids, image_embeds, ALL) * weights).sum(), leaves)
    repeated = image_embeds.repeat_interleave(CAPTIONS, dim=0)
    pairs = torch.autograd.grad((decoder(input_ids.view(-1, 1, TOKENS), repeated, ALL) * weights).sum(), leaves)
    torch.testing.assert_close(shared, pairs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(decoder, captions):
    input_ids, image_embeds = captions
    before = decoder(input_ids, image_embeds, ALL).view(IMAGES, CAPTIONS, TOKENS, -1)
    changed = input_ids.clone()
    changed[:, :, 3] = (changed[:, :, 3] + 1) % 50
    after = decoder(changed, image_embeds, ALL).view(IMAGES, CAPTIONS, TOKENS, -1)
    assert torch.equal(after[:, :, :3], before[:, :, :3])
    assert not torch.isclose(after[:, :, 3:], before[:, :, 3:]).all(-1).any()


@torch.no_grad()
def test_captions_see_only_their_own_image_and_text(decoder, captions):
    input_ids, image_embeds = captions
    before = decoder(input_ids, image_embeds, ALL).view(IMAGES, CAPTIONS, -1)
    other_image, other_text = image_embeds.clone(), input_ids.clone()
    other_image[1] += 1
    other_text[0, 1, 0] = (other_text[0, 1, 0] + 1) % 50
    after = decoder(other_text, other_image, ALL).view(IMAGES, CAPTIONS, -1)
    same = torch.isclose(after, before, atol=1e-5).all(-1)
    assert same.tolist() == [[True, False, True], [False, False, False]]


@torch.no_grad()
def test_the_head_runs_only_where_it_is_asked(decoder, captions):
    input_ids, image_embeds = captions
    everywhere = decoder(input_ids, image_embeds, ALL)
    seen = []
    decoder.cls.predictions.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))

    positions = torch.tensor([3, 4, 12, 29])
    torch.testing.assert_close(decoder(input_ids, image_embeds, positions), everywhere[positions])
    last = everywhere.view(IMAGES, CAPTIONS, TOKENS, -1)[:, :, -1]
    torch.testing.assert_close(decoder(input_ids, image_embeds), last)
    assert decoder(input_ids, image_embeds, torch.zeros(0, dtype=torch.long)).shape == (0, 50)
    assert seen == [(4, 16), (IMAGES, CAPTIONS, 16), (0, 16)]


def test_words_in_and_out_share_their_weights(decoder):
    predictions = decoder.cls.predictions
    assert predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    assert predictions.bias is predictions.decoder.bias


def test_dropout_only_in_training(captions):
    input_ids, image_embeds = captions
    torch.manual_seed(0)
    decoder = TextDecoder(replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5), IMAGE_WIDTH)
    first, second = (decoder(input_ids, image_embeds) for _ in range(2))
    assert not torch.allclose(first, second)
    decoder.eval()
    assert torch.equal(decoder(input_ids, image_embeds), decoder(input_ids, image_embeds))


# --- configuration ---


def test_defaults_are_bert_bases():
    assert read_text_config(None) == TextConfig()
    assert read_text_config("configs/models/med_config.json") == TextConfig()


def test_reads_a_bert_config(tmp_path):
    path = tmp_path / "bert.json"
    values = {"hidden_size": 64, "num_attention_heads": 4, "type_vocab_size": 2, "hidden_act": "gelu"}
    path.write_text(json.dumps(values))
    assert read_text_config(str(path)) == TextConfig(hidden_size=64, num_attention_heads=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_act": "relu"}', "hidden_act is 'relu', the decoder has only 'gelu'"),
        ('{"position_embedding_type": "relative_key"}', "position_embedding_type is 'relative_key'"),
        ('{"hidden_size": 100}', "hidden_size 100 is not a multiple of num_attention_heads 12"),
        ("[]", "expected a JSON object"),
        ("{", "model.med_config_path .*bert.json: "),
    ],
)
def test_bad_configs(tmp_path, text, message):
    path = tmp_path / "bert.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_text_config(str(path))


def test_missing_config():
    with pytest.raises(UserError, match=r"^model.med_config_path .*no\.json"):
        read_text_config("/nowhere/no.json")
