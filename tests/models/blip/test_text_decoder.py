import copy
import json
from dataclasses import replace

import pytest
import torch

from blipds.data.caption_rows import caption_rows
from blipds.errors import UserError
from blipds.models.attention import visibility
from blipds.models.blip.config import read_text_config
from blipds.models.blip.text_decoder import TextConfig, TextDecoder

TINY = TextConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
    initializer_range=0.5,  # large, so that what should matter does
)
IMAGES, CAPTIONS, IMAGE_TOKENS, IMAGE_WIDTH = 2, 3, 7, 24
PROMPT, SEP, PAD = [1, 2], 3, 0
# of different lengths, one without words; the second image has one caption less
WORDS = [[[11, 12, 13], [14], [15, 16]], [[17, 18, 19, 20], []]]
TEXTS = [[[*PROMPT, *words, SEP] for words in image] for image in WORDS]


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return TextDecoder(TINY, IMAGE_WIDTH).eval()


@pytest.fixture
def image_embeds():
    torch.manual_seed(1)
    return torch.randn(IMAGES, IMAGE_TOKENS, IMAGE_WIDTH)


def shared_logits(decoder, image_embeds, texts=TEXTS):
    """At every label, from rows that hold all captions of an image."""
    rows = caption_rows(texts, PROMPT, PAD)
    return decoder(
        rows.input_ids,
        image_embeds,
        position_ids=rows.position_ids,
        segment_ids=rows.segment_ids,
        label_positions=rows.label_positions,
    )


def separate_logits(decoder, image_embeds, texts=TEXTS):
    """The same, each caption in a row of its own, its prompt and [SEP] with it, and its image once more."""
    found = []
    for image, captions in zip(image_embeds, texts, strict=True):
        for ids in captions:
            everywhere = torch.arange(len(ids))
            logits = decoder(torch.tensor([ids]), image.unsqueeze(0), label_positions=everywhere)
            found.append(logits[len(PROMPT) - 1 : -1])
    return torch.cat(found)


def labels_of(image, caption):
    """Which of the labels belong to a caption."""
    counts = [len(words) + 1 for captions in WORDS for words in captions]
    number = image * CAPTIONS + caption
    return slice(sum(counts[:number]), sum(counts[: number + 1]))


@torch.no_grad()
def test_captions_that_share_an_image_and_a_prompt_equal_separate_pairs(decoder, image_embeds):
    shared, separate = (logits(decoder, image_embeds) for logits in (shared_logits, separate_logits))
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)


def test_and_so_do_their_gradients(decoder, image_embeds):
    image_embeds.requires_grad_()
    leaves = [image_embeds, *decoder.parameters()]
    shared, separate = (logits(decoder, image_embeds) for logits in (shared_logits, separate_logits))
    weights = torch.randn_like(shared)
    shared, separate = (torch.autograd.grad((logits * weights).sum(), leaves) for logits in (shared, separate))
    torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_visibility_by_hand(dtype):
    """A prompt of two tokens, two captions, padding."""
    seen = visibility(torch.tensor([[0, 0, 1, 1, 2, 3]]), dtype) == 0
    assert seen.int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 0, 0, 1, 0],
                [1, 1, 0, 0, 0, 1],
            ]
        ]
    ]


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(decoder, image_embeds):
    input_ids = torch.tensor([[*PROMPT, 11, 12, 13], [*PROMPT, 14, 15, 16]])
    everywhere = torch.arange(input_ids.numel())
    before = decoder(input_ids, image_embeds, label_positions=everywhere).view(2, 5, -1)
    input_ids[:, 3] += 1
    after = decoder(input_ids, image_embeds, label_positions=everywhere).view(2, 5, -1)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.isclose(after[:, 3:], before[:, 3:]).all(-1).any()


@torch.no_grad()
def test_captions_see_only_their_own_image_and_text(decoder, image_embeds):
    before = shared_logits(decoder, image_embeds)
    other_image, other_text = image_embeds.clone(), copy.deepcopy(TEXTS)
    other_image[1] += 1
    other_text[0][0][len(PROMPT)] = 40  # the first word: what predicts it does not see it
    after = shared_logits(decoder, other_image, other_text)
    same = torch.isclose(after, before, atol=1e-5).all(-1)
    assert same[labels_of(0, 0)].tolist() == [True, False, False, False]
    assert same[labels_of(0, 1)].all() and same[labels_of(0, 2)].all()
    assert not same[labels_of(1, 0)].any() and not same[labels_of(1, 1)].any()


@torch.no_grad()
def test_the_head_runs_only_where_it_is_asked(decoder, image_embeds):
    input_ids = torch.tensor([[*PROMPT, 11, 12, 13], [*PROMPT, 14, 15, 16]])
    everywhere = decoder(input_ids, image_embeds, label_positions=torch.arange(10))
    seen = []
    decoder.cls.predictions.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))

    positions = torch.tensor([3, 4, 4, 9])
    torch.testing.assert_close(decoder(input_ids, image_embeds, label_positions=positions), everywhere[positions])
    torch.testing.assert_close(decoder(input_ids, image_embeds), everywhere[[4, 9]])
    nothing = torch.zeros(0, dtype=torch.long)
    assert decoder(input_ids, image_embeds, label_positions=nothing).shape == (0, 50)
    assert seen == [(4, 16), (2, 16), (0, 16)]


def test_words_in_and_out_share_their_weights(decoder):
    predictions = decoder.cls.predictions
    assert predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    assert predictions.bias is predictions.decoder.bias


def test_dropout_only_in_training(image_embeds):
    torch.manual_seed(0)
    decoder = TextDecoder(replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5), IMAGE_WIDTH)
    first, second = (shared_logits(decoder, image_embeds) for _ in range(2))
    assert not torch.allclose(first, second)
    decoder.eval()
    assert torch.equal(shared_logits(decoder, image_embeds), shared_logits(decoder, image_embeds))


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


@pytest.mark.parametrize("length", [7, 8, 13])
def test_the_mask_is_aligned_for_cuda_s_attention(length):
    """torch's preprocess_mask copies a mask in every layer unless all strides but the last are multiples of 8."""
    mask = visibility(torch.zeros(3, length, dtype=torch.long), torch.bfloat16)
    assert mask.shape == (3, 1, length, length)
    assert mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask[0, 0] == 0, torch.ones(length, length).tril().bool())
