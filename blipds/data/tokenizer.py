"""bert-base-uncased with BLIP's two extra tokens, and the prompt that stands before every caption."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blipds.errors import UserError
from blipds.files.paths import find_config

VOCABULARY = Path(__file__).with_name("bert-base-uncased-vocab.txt")


class CaptionTokenizer:
    """`source`: None (the vocabulary in the package), a folder or vocabulary file, or a hub name.

    A caption becomes `prompt_ids` ([DEC] + prompt), its own ids and [SEP], cut to `max_txt_len` tokens. Training and
    generation share `prompt_ids`: prompt and caption are tokenized apart, so that no token reaches over their border,
    and the prompt is counted in tokens, never in characters, which decoding need not give back as they were.
    """

    def __init__(self, source: str | None = None, prompt: str = "a picture of ", max_txt_len: int = 40) -> None:
        from transformers import AutoTokenizer, BertTokenizer

        if source is not None and source.endswith(".txt"):
            source = str(find_config(Path(source), "run_configs", ".txt", "model.tokenizer, a vocabulary file"))
            if not Path(source).is_file():
                raise UserError(f"model.tokenizer: no such vocabulary file: {source}")
        try:
            if source is None or source.endswith(".txt"):
                self.tokenizer: Any = BertTokenizer(vocab=str(source or VOCABULARY), do_lower_case=True)
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"model.tokenizer '{source}': {' '.join(str(error).split())}") from error
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        if self.tokenizer.sep_token_id is None or self.tokenizer.pad_token_id is None:
            raise UserError(f"model.tokenizer '{source}' has no separator or no padding token, as BERT's has")
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.bos_token_id: int = self.tokenizer.bos_token_id
        self.eos_token_id: int = self.tokenizer.sep_token_id
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self.prompt_ids: list[int] = [self.bos_token_id, *self._ids(prompt.rstrip())]
        if len(self.prompt_ids) + 2 > max_txt_len:  # a caption has a word and [SEP] at least
            raise UserError(f"model.prompt '{prompt}' fills model.max_txt_len ({max_txt_len} tokens)")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def _ids(self, text: str, **truncation: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **truncation)["input_ids"]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that begins with the prompt: `prompt_ids`, the caption's, [SEP]. UserError without it."""
        if not text.startswith(self.prompt):
            raise UserError(
                f"'{text[:60]}' does not begin with model.prompt, '{self.prompt}': a text processor adds it"
            )
        # behind a blank, which tokenizers other than BERT's put into the first token
        caption, room = " " + text[len(self.prompt) :], self.max_txt_len - len(self.prompt_ids) - 1
        return [*self.prompt_ids, *self._ids(caption, truncation=True, max_length=room), self.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of a generated sequence, which begins with `prompt_ids`; special tokens are left out."""
        caption = ids[len(self.prompt_ids) :]
        return self.tokenizer.decode(caption, skip_special_tokens=True, clean_up_tokenization_spaces=True).strip()
