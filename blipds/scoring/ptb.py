"""PTB tokens without Java, equal to those of pycocoevalcap's PTBTokenizer."""

import re

# Longest first: contractions, words with inner hyphens or apostrophes, numbers, abbreviations, anything else alone.
_TOKEN = re.compile(
    r"can(?=not\b)"
    r"|[a-z]+(?='(?:s|m|d|re|ve|ll)\b)|[a-z]*?[a-mo-z](?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b"
    r"|(?:[a-z]\.)+[a-z]\.?(?![a-z])|(?:mr|mrs|ms|dr|st|mt)\."
    r"|\d+(?:[.,:]\d+)+|[a-z0-9]+(?:[-_][a-z0-9]+)*"
    r"|\.{3,}|--+|\S"
)
_DROPPED = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def words(text: str) -> list[str]:
    """The tokens of a caption, lower case and without punctuation."""
    return [token for token in _TOKEN.findall(text.lower()) if token not in _DROPPED]
