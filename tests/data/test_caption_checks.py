"""How many captions are cut, and which words cannot be spelt; counted by hand."""

import pytest

from blipds.data.caption_checks import cut_lines, spelling, spelling_lines
from blipds.data.processors import CaptionProcessor
from blipds.data.tokenizer import CaptionTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """[DEC] a picture of = 4 tokens, and [SEP]: ten are left for the words."""
    return CaptionTokenizer(max_txt_len=15)


def test_which_key_cuts(tokenizer):
    captions = ["dog " * count for count in (8, 9, 11, 12)]
    processor = CaptionProcessor("a picture of ", max_words=8)
    assert cut_lines(captions, processor, tokenizer) == [
        "3 of 4 captions are longer than text_processor.train.max_words=8, and are cut"
    ]
    processor = CaptionProcessor("a picture of ", max_words=11)
    assert cut_lines(captions, processor, tokenizer) == [
        "1 of 4 captions are longer than text_processor.train.max_words=11, and are cut",
        "2 of 4 captions are longer than model.max_txt_len=15 tokens, the prompt's included, and are cut",
    ]
    assert cut_lines(captions[:2], CaptionProcessor("a picture of "), tokenizer) == []
    assert cut_lines([], CaptionProcessor("a picture of "), tokenizer) == []


def test_a_plugins_processor_has_no_max_words(tokenizer):
    assert len(cut_lines(["dog " * 11], lambda caption: "a picture of " + caption, tokenizer)) == 1


def test_many_captions_are_sampled(tokenizer):
    captions = ["dog " * 60, "a dog", "a dog"] * 2000
    assert cut_lines(captions, CaptionProcessor("a picture of "), tokenizer)[0] == (
        "2,000 of 2,000 captions looked at (of 6,000) are longer than text_processor.train.max_words=50, and are cut"
    )


@pytest.mark.parametrize(
    ("caption", "words", "changed"),
    [
        ("A well-known dog, don't: 2nd!", 7, {}),  # a well known dog don t 2nd
        ("Um cão, uma maçã.", 4, {"cão": "cao", "maçã": "maca"}),
        ("Um ca\u0303o", 2, {"cão": "cao"}),  # the same word, decomposed
        ("Ein Fußgänger", 2, {"fußgänger": "fußganger"}),
        ("一人", 1, {"一人": "一 人"}),  # a blank between signs
        ("狗", 1, {"狗": ""}),  # [UNK]
        ("🦄 !", 0, {}),  # no word
    ],
)
def test_words_that_cannot_be_spelt(tokenizer, caption, words, changed):
    found = spelling([caption], tokenizer)
    assert found.words == words
    assert {word: written for word, (written, _) in found.changed.items()} == changed


def test_what_is_said_about_references(tokenizer):
    assert spelling_lines([["a dog"], ["a cat"]], tokenizer) == []
    assert spelling_lines([], tokenizer) == []
    assert spelling_lines([["um cão corre"], ["um cão"]], tokenizer) == [
        "40.00% of 5 reference words cannot be generated as they are written (accents, other scripts), so they never "
        "match: the tokenizer makes 'cao' of 'cão'. Perfect captions score CIDEr 1.9 of 10 in Portuguese, 0 in "
        "Chinese: see model.tokenizer"
    ]
    assert spelling_lines([["a dog in a café"], *[["a dog in the snow"]] * 1000], tokenizer) == []  # 1 of 5,005
