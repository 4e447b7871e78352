"""bert-base-uncased with BLIP's two extra tokens, and the prompt that stands before every caption."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blipds.errors import UserError

VOCABULARY = Path(__file__).with_name("bert-base-uncased-vocab.txt")


class CaptionTokenizer:
    """`source`: None (the vocabulary in the package), a folder or vocabulary file, or a hub name.

    A caption becomes [DEC] + prompt + caption + [SEP], cut to `max_txt_len` tokens; `prompt_ids` is [DEC] + prompt.
    """

    def __init__(self, source: str | None = None, prompt: str = "a picture of ", max_txt_len: int = 40) -> None:
        from transformers import AutoTokenizer, BertTokenizer

        if source is not None and source.endswith(".txt") and not Path(source).is_file():
            raise UserError(f"model.tokenizer: no such vocabulary file: {source}")
        try:
            if source is None or source.endswith(".txt"):
                self.tokenizer: Any = BertTokenizer(vocab=str(source or VOCABULARY), do_lower_case=True)
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"model.tokenizer '{source}': {' '.join(str(error).split())}") from error
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.bos_token_id: int = self.tokenizer.bos_token_id
        self.eos_token_id: int = self.tokenizer.sep_token_id
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self.prompt_ids: list[int] = [self.bos_token_id, *self.tokenizer(prompt)["input_ids"][1:-1]]
        if len(self.prompt_ids) + 2 > max_txt_len:  # a caption has a word and [SEP] at least
            raise UserError(f"model.prompt '{prompt}' fills model.max_txt_len ({max_txt_len} tokens)")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that has its prompt in front already, [DEC] ... [SEP]."""
        if not text.startswith(self.prompt):
            raise UserError(
                f"'{text[:60]}' does not begin with model.prompt, '{self.prompt}': a text processor adds it"
            )
        ids = self.tokenizer(text, truncation=True, max_length=self.max_txt_len)["input_ids"]
        return [self.bos_token_id, *ids[1:]]

    def decode(self, ids: Sequence[int]) -> str:
        """The caption, without special tokens and without the prompt's characters."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        return text[len(self.prompt) :].strip()
