"""Rows by hand. That packed captions compute what separate ones do is tests/models/blip/test_text_decoder.py's."""

import torch
from safetensors.torch import load_file

from blipds.data.caption_rows import caption_rows

DEC, SEP, PAD = 30522, 102, 0
A, PICTURE, OF, DOG, CAT, RUNS = 1037, 3861, 1997, 3899, 4937, 3216
PROMPT = [DEC, A, PICTURE, OF]


def rows(*captions):
    return caption_rows(captions, PROMPT, PAD)


def test_one_caption():
    found = rows([[*PROMPT, A, DOG, SEP]])
    assert found.input_ids.tolist() == [[*PROMPT, A, DOG]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert found.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1]]
    # the prompt's last token, at 3, predicts the caption's first word; the last word, at 5, the end
    assert found.label_positions.tolist() == [3, 4, 5]
    assert found.labels.tolist() == [A, DOG, SEP]


def test_two_captions_stand_behind_one_prompt_and_rows_are_padded_once():
    found = rows([[*PROMPT, A, DOG, SEP], [*PROMPT, DOG, RUNS, SEP]], [[*PROMPT, CAT, SEP]])
    assert found.input_ids.tolist() == [[*PROMPT, A, DOG, DOG, RUNS], [*PROMPT, CAT, PAD, PAD, PAD]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5], [0, 1, 2, 3, 4, 0, 0, 0]]
    assert found.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 2, 2, 2]]
    # rows of eight tokens: the second begins at 8; the prompt's last token has a label for each caption
    assert found.label_positions.tolist() == [3, 4, 5, 3, 6, 7, 8 + 3, 8 + 4]
    assert found.labels.tolist() == [A, DOG, SEP, DOG, RUNS, SEP, CAT, SEP]


def test_an_image_without_captions_is_its_prompt():
    assert rows([], [[*PROMPT, CAT, SEP]]).input_ids.tolist() == [[*PROMPT, PAD], [*PROMPT, CAT]]
    nothing = rows([], [])
    assert nothing.input_ids.tolist() == [PROMPT, PROMPT]
    assert len(nothing.label_positions) == len(nothing.labels) == 0
    assert nothing.label_positions.dtype == nothing.labels.dtype == nothing.input_ids.dtype == torch.int64


def test_a_caption_without_words_ends_behind_its_prompt():
    found = rows([[*PROMPT, SEP], [*PROMPT, CAT, SEP]])
    assert found.input_ids.tolist() == [[*PROMPT, CAT]]
    assert found.segment_ids.tolist() == [[0, 0, 0, 0, 2]]
    assert (found.label_positions.tolist(), found.labels.tolist()) == ([3, 3, 4], [SEP, CAT, SEP])


def test_labels_equal_the_oracles(shared):
    oracle = load_file(shared / "oracle" / "forward.safetensors")
    lengths = oracle["attention_mask"].sum(dim=1).tolist()
    ids = [row[:length] for row, length in zip(oracle["input_ids"].tolist(), lengths, strict=True)]
    found = rows(*([caption] for caption in ids))

    predicted = torch.full_like(oracle["labels"], -100)  # the oracle's labels lie at their own tokens
    image, place = found.label_positions // found.input_ids.shape[1], found.label_positions % found.input_ids.shape[1]
    predicted[image, place + 1] = found.labels
    assert torch.equal(predicted, oracle["labels"])


def test_rows_give_their_captions_back():
    captions = [[[*PROMPT, A, DOG, SEP], [*PROMPT, SEP]], [], [[*PROMPT, CAT]]]  # the last was cut
    assert rows(*captions).captions(PROMPT) == captions
