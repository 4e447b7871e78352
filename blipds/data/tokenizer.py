"""Captions as token ids: what stands in front of the words and behind them, by the kind of decoder that reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blipds.config.sections import ModelConfig
from blipds.errors import UserError
from blipds.files.paths import find_config

VOCABULARY = Path(__file__).with_name("bert-base-uncased-vocab.txt")


class CaptionTokenizer:
    """Of a BERT-style decoder. `source`: None (the vocabulary in the package), a folder or vocabulary file, a hub name.

    A caption becomes `prompt_ids` ([DEC] + prompt), its own ids and [SEP], cut to `max_txt_len` tokens. Training and
    generation share `prompt_ids`: prompt and caption are tokenized apart, so that no token reaches over their border,
    and the prompt is counted in tokens, never in characters, which decoding need not give back as they were.
    """

    closes_cut = True  # a caption that is cut still ends with the closing token
    counts_prompt = True  # `run.max_len` counts the prompt's tokens
    continues_prompt = True  # the prompt stands before the caption

    def __init__(self, source: str | None = None, prompt: str = "a picture of ", max_txt_len: int = 40) -> None:
        if source is not None and source.endswith(".txt"):
            source = str(find_config(Path(source), "run_configs", ".txt", "model.tokenizer, a vocabulary file"))
            if not Path(source).is_file():
                raise UserError(f"model.tokenizer: no such vocabulary file: {source}")
        try:
            self.tokenizer: Any = self.open(source)
        except (OSError, ValueError) as error:
            raise UserError(f"model.tokenizer '{source}': {' '.join(str(error).split())}") from error
        start, self.eos_token_id, self.pad_token_id = self.special_ids(source)
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.prompt_ids: list[int] = [*start, *(self._ids(prompt.rstrip()) if self.continues_prompt else [])]
        if len(self.prompt_ids) + 2 > max_txt_len:  # a caption has a word and a closing token at least
            raise UserError(f"model.prompt '{prompt}' fills model.max_txt_len ({max_txt_len} tokens)")

    def open(self, source: str | None) -> Any:
        """The tokenizer of transformers."""
        from transformers import AutoTokenizer, BertTokenizer

        if source is None or source.endswith(".txt"):
            return BertTokenizer(vocab=str(source or VOCABULARY), do_lower_case=True)
        return AutoTokenizer.from_pretrained(source)

    def special_ids(self, source: str | None) -> tuple[list[int], int, int]:
        """What begins every text, the token that ends a caption, and that of padding."""
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        if self.tokenizer.sep_token_id is None or self.tokenizer.pad_token_id is None:
            raise UserError(f"model.tokenizer '{source}' has no separator or no padding token, as BERT's has")
        return [self.tokenizer.bos_token_id], self.tokenizer.sep_token_id, self.tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.tokenizer)

    def _ids(self, text: str, **truncation: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **truncation)["input_ids"]

    def encode(self, text: str, longest: int | None = None) -> list[int]:
        """Token ids of a text that begins with the prompt: `prompt_ids`, the caption's, the closing token.

        Cut to `longest` tokens (None: `max_txt_len`). UserError without the prompt.
        """
        if not text.startswith(self.prompt):
            raise UserError(
                f"'{text[:60]}' does not begin with model.prompt, '{self.prompt}': a text processor adds it"
            )
        # behind a blank, which tokenizers other than BERT's put into the first token
        caption, room = " " + text[len(self.prompt) :], (longest or self.max_txt_len) - len(self.prompt_ids)
        words = self._ids(caption, truncation=True, max_length=room - self.closes_cut)
        return [*self.prompt_ids, *[*words, self.eos_token_id][:room]]

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of a generated sequence, which begins with `prompt_ids`; special tokens are left out."""
        caption = ids[len(self.prompt_ids) :]
        return self.tokenizer.decode(caption, skip_special_tokens=True, clean_up_tokenization_spaces=True).strip()

    def words(self, ids: Sequence[int]) -> tuple[list[str], list[int]]:
        """The words of `decode(ids)`, which blanks part, and for each token behind the prompt the place of its word.

        A token belongs to the last word of what is written up to it: "skate", "##board" to one, the comma that
        decoding moves to the word before it to that one. A token that writes nothing goes with the word before it.
        Without a word there are no places.
        """
        start, words = len(self.prompt_ids), self.decode(ids).split()
        if len(words) == len(ids) - start:  # one each, as no token writes two; most captions end here, 20 times faster
            return words, list(range(len(words)))
        places, last = [], len(words)
        for end in range(len(ids), start, -1):
            last = min(last, len(self.decode(ids[:end]).split()))  # a later token may join words: "don", "'", "t"
            places.append(max(last - 1, 0))
        return words, places[::-1] if words else []

    def longest(self, max_len: int) -> int:
        """The most tokens of a generated sequence, its prompt included, where `run.max_len` is `max_len`."""
        return max_len if self.counts_prompt else max_len + len(self.prompt_ids)


class CausalTokenizer(CaptionTokenizer):
    """Of a causal language model, whose text LAVIS writes so: the tokenizer's own start, prompt, caption, a line's end.

    A caption that is cut has no end there, and `run.max_len` counts what follows the prompt.
    """

    closes_cut = False
    counts_prompt = False

    def open(self, source: str | None) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source)

    def special_ids(self, source: str | None) -> tuple[list[int], int, int]:
        end = self._ids("\n")
        closing = end[0] if len(end) == 1 else self.tokenizer.eos_token_id
        if closing is None:
            raise UserError(f"model.tokenizer '{source}' has no token for a line's end and none that ends a text")
        pad = self.tokenizer.pad_token_id
        return self.tokenizer("")["input_ids"], closing, closing if pad is None else pad

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids[len(self.prompt_ids) :], skip_special_tokens=True)
        # no blank before a comma, as transformers 4 wrote it for every tokenizer, published captions too
        return self.tokenizer.clean_up_tokenization(text).strip()


class Seq2SeqTokenizer(CausalTokenizer):
    """Of an encoder and a decoder, as T5 has them: the encoder reads the prompt, the decoder begins with the padding
    token, which `max_txt_len` does not count, and writes the caption and the tokenizer's end, cut or not.
    """

    closes_cut = True
    continues_prompt = False

    def __init__(self, source: str | None, prompt: str, max_txt_len: int) -> None:
        super().__init__(source, prompt, max_txt_len + 1)

    def special_ids(self, source: str | None) -> tuple[list[int], int, int]:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if pad is None or end is None:
            raise UserError(f"model.tokenizer '{source}' has no padding token or none that ends a text, as T5's has")
        return [pad], end, pad


TOKENIZERS = {"bert": CaptionTokenizer, "causal": CausalTokenizer, "seq2seq": Seq2SeqTokenizer}


def caption_tokenizer(config: ModelConfig) -> CaptionTokenizer:
    """The tokenizer of a model section."""
    return TOKENIZERS[config.TEXT](config.tokenizer_source, config.prompt, config.max_txt_len)
