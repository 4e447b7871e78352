"""Token ids against the oracle (the original code) and bert-base-uncased's vocabulary."""

import json

import pytest
from safetensors.torch import load_file

from blipds.data.processors import CaptionProcessor
from blipds.data.tokenizer import VOCABULARY, CaptionTokenizer, caption_tokenizer
from blipds.errors import UserError
from blipds.models.blip2.config import OptConfig

DEC, SEP = 30522, 102
A, PICTURE, OF, DOG, DOGS = 1037, 3861, 1997, 3899, 6077


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer()


def test_special_tokens(tokenizer):
    assert len(tokenizer) == 30524
    assert (tokenizer.tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (DEC, SEP, 0)
    assert tokenizer.tokenizer.convert_tokens_to_ids("[ENC]") == 30523


def test_the_vocabulary_in_the_package_is_berts(shared):
    assert VOCABULARY.read_bytes() == (shared / "vocab" / "bert-base-uncased-vocab.txt").read_bytes()


def test_prompt(tokenizer):
    assert tokenizer.prompt_ids == [DEC, A, PICTURE, OF]
    assert CaptionTokenizer(prompt="").prompt_ids == [DEC]


def test_ids_equal_the_oracles(tokenizer, shared):
    captions = json.loads((shared / "oracle" / "golden.json").read_text())["forward"]["captions"]
    oracle = load_file(shared / "oracle" / "forward.safetensors")
    assert len(captions) == 16
    for caption, ids, mask in zip(captions, oracle["input_ids"], oracle["attention_mask"], strict=True):
        assert tokenizer.encode(caption) == ids[mask.bool()].tolist()


def test_truncation_keeps_the_closing_token():
    tokenizer = CaptionTokenizer(max_txt_len=6)
    assert tokenizer.encode("a picture of a dog") == [DEC, A, PICTURE, OF, A, SEP]
    assert tokenizer.encode("a picture of dogs") == [DEC, A, PICTURE, OF, DOGS, SEP]


def test_a_text_without_its_prompt(tokenizer):
    """As a text processor of a plugin may give it: the loss would leave out its first words."""
    with pytest.raises(UserError, match="'a dog' does not begin with model\\.prompt, 'a picture of '"):
        tokenizer.encode("a dog")


def test_decoding_cuts_prompt_and_special_tokens(tokenizer):
    assert tokenizer.decode([DEC, A, PICTURE, OF, A, DOG, SEP, 0, 0]) == "a dog"
    assert tokenizer.decode([DEC, A, PICTURE, OF, A, DOG]) == "a dog"
    assert tokenizer.decode([DEC, A, PICTURE, OF]) == ""
    assert CaptionTokenizer(prompt="").decode([DEC, A, DOG, SEP]) == "a dog"


PROMPTS = [
    "a black-and-white photo of ",
    "an x-ray of ",
    "a  picture  of ",
    "  A Picture of  ",
    "caf\u00e9, d'\u00e9t\u00e9: ",
    " ",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_that_do_not_come_back_as_they_were(prompt):
    """Hyphens, blanks, upper case and accents: decoded, the prompt has another number of characters."""
    tokenizer = CaptionTokenizer(prompt=prompt)
    assert tokenizer.decode([*tokenizer.prompt_ids, A, DOG, SEP]) == "a dog"
    assert tokenizer.encode(prompt + "a dog") == [*tokenizer.prompt_ids, A, DOG, SEP]
    assert tokenizer.tokenizer(prompt + "a dog")["input_ids"][1:] == [*tokenizer.prompt_ids[1:], A, DOG, SEP]


@pytest.mark.parametrize("kind", ["bytes", "blanks"])
@pytest.mark.parametrize("prompt", ["a picture of ", "an x-ray  of ", ""])
def test_tokenizers_that_keep_blanks(kind, prompt, tmp_path):
    """As RoBERTa's, whose tokens begin with a blank, and as SentencePiece's; learnt from a few words here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<unk>"]
    if kind == "bytes":
        own = Tokenizer(models.BPE())
        own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        own = Tokenizer(models.Unigram())
        own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>", show_progress=False)
    own.train_from_iterator(["a picture of a dog", "an x-ray of a cat, two dogs"] * 9, trainer)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=own, **names).save_pretrained(tmp_path)

    tokenizer = CaptionTokenizer(str(tmp_path), prompt)
    in_one = tokenizer.tokenizer(f"{' '.join(prompt.split())} a dog", add_special_tokens=False)["input_ids"]
    ids = tokenizer.encode(f"{prompt}a dog")
    assert ids[: len(tokenizer.prompt_ids)] == tokenizer.prompt_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids) == "a dog"
    if "  " not in prompt:  # which these keep
        assert ids[1:-1] == in_one  # as in running text


def test_other_sources(tokenizer, tmp_path):
    """A vocabulary file, and a folder that knows nothing of [DEC]."""
    from transformers import BertTokenizer

    BertTokenizer(vocab=str(VOCABULARY)).save_pretrained(tmp_path)
    for source in (str(VOCABULARY), str(tmp_path)):
        other = CaptionTokenizer(source)
        assert len(other) == 30524
        assert other.encode("a picture of a dog") == tokenizer.encode("a picture of a dog")


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"no such vocabulary file: /nowhere/vocab\.txt"):
        CaptionTokenizer("/nowhere/vocab.txt")
    with pytest.raises(UserError, match=f"^model.tokenizer '{tmp_path}': "):
        CaptionTokenizer(str(tmp_path))
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^model.tokenizer '{tmp_path}' has no separator or no padding token"):
        CaptionTokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"model.prompt 'a picture of ' fills model.max_txt_len \(5 tokens\)"):
        CaptionTokenizer(max_txt_len=5)


@pytest.fixture(scope="module")
def causal(shared):
    source = str(shared / "oracle_blip2" / "opt")
    return caption_tokenizer(OptConfig(opt_model=source, prompt="a photo of"))


def test_text_of_a_causal_language_model(causal, shared):
    """Against the ids that LAVIS's code fed its OPT: </s> in front, the end of a line behind."""
    captions = json.loads((shared / "oracle_blip2" / "golden.json").read_text())["forward"]["captions"]
    clean = CaptionProcessor(prompt=causal.prompt)
    oracle = load_file(shared / "oracle_blip2" / "forward.safetensors")
    for caption, ids, mask in zip(captions, oracle["input_ids"], oracle["attention_mask"], strict=True):
        assert causal.encode(clean(caption)) == ids[mask.bool()].tolist()
    assert (len(causal.prompt_ids), causal.prompt_ids[0], causal.eos_token_id, causal.pad_token_id) == (4, 2, 202, 1)
    assert causal.longest(30) == 34 and CaptionTokenizer().longest(20) == 20


@pytest.mark.parametrize(
    ("text", "words", "places"),
    [
        ("", [], []),
        ("two dogs", ["two", "dogs"], [0, 1]),
        # skate ##board ##er | doesn ' t | jump , | a | x | - | ray
        (
            "skateboarder doesn't jump, a x-ray",
            ["skateboarder", "doesn't", "jump,", "a", "x", "-", "ray"],
            [0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6],
        ),
        ("[PAD] two [PAD] dogs", ["two", "dogs"], [0, 0, 0, 1]),  # as a model may write them
    ],
)
def test_words_and_their_tokens(tokenizer, text, words, places):
    assert tokenizer.words(tokenizer.encode(tokenizer.prompt + text)[:-1]) == (words, places)


def test_words_of_a_causal_tokenizer(causal):
    """OPT's tokens carry the blank before a word: " skate" "board" "er" | " does" "n't" | " jump" "," | " now"."""
    ids = causal.encode(f"{causal.prompt} skateboarder doesn't jump, now")[:-1]
    words, places = causal.words(ids)
    assert words == ["skateboarder", "doesn't", "jump,", "now"]
    pieces = causal.tokenizer.convert_ids_to_tokens(ids[len(causal.prompt_ids) :])
    joined = ["".join(p for p, place in zip(pieces, places, strict=True) if place == k) for k in range(len(words))]
    assert [word.replace("\u0120", "") for word in joined] == words


def test_a_causal_caption_that_is_cut_has_no_end(causal):
    long = causal.encode("a photo of " + "a dog " * 40)
    assert len(long) == 32 and causal.eos_token_id not in long
    exact = causal.encode("a photo of " + " ".join(["a"] * 27))
    assert len(exact) == 32 and exact[-1] == causal.eos_token_id
    assert causal.decode([*causal.prompt_ids, *exact[4:]]) == " ".join(["a"] * 27)


def test_a_language_model_without_its_tokenizer(tmp_path):
    with pytest.raises(UserError, match=f"^model.tokenizer '{tmp_path}': "):
        caption_tokenizer(OptConfig(opt_model=str(tmp_path)))
