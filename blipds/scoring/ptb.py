"""PTB tokens without Java, equal to those of pycocoevalcap's PTBTokenizer for any text.

Stanford's tokenizer is a finite automaton that JFlex generated. Its tables are string constants of a class in the jar
that pycocoevalcap brings: they are read from there, and this file adds what version 3.4.1 does with each match. So all
of its rules are covered: contractions, quotes, numbers, dates, fractions, phone numbers, abbreviations, ellipses,
dashes, brackets, currency, addresses, tags, letters of all scripts. Compared with Java: 40,000 captions of Flickr8k,
73,137 of COCO and nocaps, and 700,000 made of hard cases and random characters, without a difference.

One thing depends on more than the caption in Java, which reads a file of captions as one text: a capital with a period
at the end of a caption ("Nintendo Wii U.") loses the period where the next caption starts with a word like "The". Here
each caption stands alone.
"""

import hashlib
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from blipds.errors import UserError

LEXER = "edu/stanford/nlp/process/PTBLexer.class"
LEXER_SHA256 = "715fdfb3652cc6796f90f28442378a0c71c92b5909f1fc934f698497987b6dd0"
START = 2  # the state in which the lexer begins each token
_PLAIN = re.compile(r"[A-Za-z]+(?=[ \n])")


def words(text: str) -> list[str]:
    """The tokens of a caption, lower case and without punctuation, as `score_captions` counts them.

    About 12 us. "A dog (can't swim)." gives a, dog, -lrb-, ca, n't, swim, -rrb-.
    """
    line = " ".join(text.split()) + "\n"
    if not line.isascii():
        line = _utf16(line)
    found: list[str] = []
    position = 0
    while position < len(line):
        if plain := _PLAIN.match(line, position):
            found += _plain_word(plain[0])
            position = plain.end() + 1
        else:
            token, position = _next(line, position)
            found += _split(token)
    return found


@lru_cache(maxsize=1 << 17)
def _plain_word(word: str) -> tuple[str, ...]:
    """No rule looks further than to the blank behind a word of plain letters: most words are tokenized once."""
    line, position = word + "\n", 0
    found: list[str] = []
    while position < len(line):
        token, position = _next(line, position)
        found += _split(token)
    return tuple(found)


# pycocoevalcap's list, but for its brackets: they are upper case there and lower case here, so it never drops them.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def _split(token: str) -> list[str]:
    """A token as words: a few hold blanks (phone numbers, fractions, tags), at which every metric splits them."""
    return [word for word in _from_utf16(token).lower().split() if word not in _DROPPED]


def _utf16(text: str) -> str:
    """Java's characters: two halves for each beyond the first 65,536."""
    halves = text.encode(errors="replace").decode().encode("utf-16-le")
    return "".join(map(chr, struct.unpack(f"<{len(halves) // 2}H", halves)))


def _from_utf16(text: str) -> str:
    if text.isascii():
        return text
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return whole.encode(errors="replace").decode()


# --- The actions of the lexer by number. Those not named here return the text that was matched.

_SKIP = {1, 5, 7, 23}  # white space, and what cannot be a token
_LONGER = {33, 47, 49}  # the token keeps its period, which also starts the next one
# Ends with a context that does not belong to the token: of this many characters ...
_CONTEXT = {25: 1, 26: 1, 32: 1, 34: 1, 36: 1, 42: 2, 46: 1, 48: 2, 50: 3, 51: 1, 53: 4}
# ... or found by two automata: states in which the token's and, from its end backwards, the context's begin.
_LOOKAHEAD = {24: (13, 14), 30: (3, 4), 40: (5, 6), 41: (16, 17), 43: (15, 14), 44: (9, 10), 47: (7, 8), 49: (11, 12)}

_QUOTES = (
    (re.compile("&apos;|[\x92\u2019\u203a]"), "'"),
    (re.compile("[\x91\u2018\u201b\u2039]"), "`"),
    (re.compile('"|&quot;|[\x94\u201d\xbb]'), "''"),
    (re.compile("[\x93\u201c\xab]"), "``"),
)


def _no_soft_hyphens(text: str) -> str:
    return text.replace("\xad", "") or "-"


def _quotes(text: str) -> str:
    """Left or right is guessed by the lexer and all the same here, where quotation marks are dropped."""
    for pattern, mark in _QUOTES:
        text = pattern.sub(mark, text)
    return text


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _fractions(text: str) -> str:
    return {"\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3"}.get(text, text)


def _currency(text: str) -> str:
    return re.sub("[\x80\xa4\u20a0\u20ac]", "$", text.replace("\xa2", "cents").replace("\xa3", "#"))


_REWRITE: dict[int, Callable[[str], str]] = {
    2: lambda text: "<",
    4: lambda text: "--" if len(text) in (3, 4) else text,
    10: lambda text: ">",
    11: lambda text: "--",
    13: lambda text: "...",
    14: _fractions,
    15: _currency,
    16: lambda text: "-RCB-",
    17: lambda text: "-LRB-",
    18: lambda text: "-RRB-",
    20: lambda text: "-LCB-",
    21: lambda text: "-RSB-",
    22: lambda text: "-LSB-",
    **dict.fromkeys((6, 12, 29, 30, 32, 40, 46), _no_soft_hyphens),
    **dict.fromkeys((8, 26, 35, 36), _quotes),
    **dict.fromkeys((28, 34, 54), _brackets),
    **dict.fromkeys((37, 51), _ampersand),
}


def _next(text: str, start: int) -> tuple[str, int]:
    """The token at `start`, "" for what is skipped, and where the next one begins."""
    tables = _tables()
    end, action = tables.longest_match(text, start)
    if action in _SKIP:
        return "", end
    if action in _LOOKAHEAD:
        end = tables.without_context(text, start, end, *_LOOKAHEAD[action])
        if action in (44, 47):
            end = start + len(text[start:end].rstrip())
    elif action == 35:  # a quotation mark before a word
        end = start + 1
    end -= _CONTEXT.get(action, 0)
    token = text[start:end]
    if action in _LONGER:
        end -= 1
        if action == 47 and len(token) == 2:  # one letter and the period that ends a sentence
            token = token[0]
    return _REWRITE[action](token) if action in _REWRITE else token, end


@dataclass(frozen=True)
class _Tables:
    classes: list[int]  # of each character
    rows: list[int]  # of each state, in `transitions`
    transitions: list[int]  # row + class -> the next state, or -1
    attributes: list[int]  # of each state: 1 accepts, 8 goes nowhere
    actions: list[int]  # of each accepting state

    def step(self, state: int, character: str) -> int:
        return self.transitions[self.rows[state] + self.classes[ord(character)]]

    def longest_match(self, text: str, start: int) -> tuple[int, int]:
        """Its end and its action."""
        state, end, accepted = START, start, -1
        for position in range(start, len(text)):
            state = self.step(state, text[position])
            if state < 0:
                break
            if self.attributes[state] & 1:
                end, accepted = position + 1, state
        return end, self.actions[accepted]

    def without_context(self, text: str, start: int, end: int, token: int, context: int) -> int:
        """The last place where a token may end and a context, read backwards from `end`, may begin."""
        ends = set()
        state = token
        for position in range(start, end + 1):
            if self.attributes[state] & 1:
                ends.add(position)
            if position == end or (state := self.step(state, text[position])) < 0:
                break
        state = context
        while not (end in ends and self.attributes[state] & 1):
            end -= 1
            state = self.step(state, text[end])
        return end


@cache
def _tables() -> _Tables:
    """Unpacks the tables: 60 ms, once. UserError where the jar is another one."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    assert ptbtokenizer.__file__ is not None
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with zipfile.ZipFile(jar) as archive:
        lexer = archive.read(LEXER)
    if hashlib.sha256(lexer).hexdigest() != LEXER_SHA256:
        raise UserError(f"{jar}: is not the tokenizer of pycocoevalcap 1.2, the only one known; install that version")
    constants = dict(_string_constants(lexer))
    rows = constants["ZZ_ROWMAP_PACKED_0"]
    return _Tables(
        _runs(constants["ZZ_CMAP_PACKED"]),
        [ord(high) << 16 | ord(low) for high, low in zip(rows[::2], rows[1::2], strict=True)],
        [state - 1 for part in range(9) for state in _runs(constants[f"ZZ_TRANS_PACKED_{part}"])],
        _runs(constants["ZZ_ATTRIBUTE_PACKED_0"]),
        _runs(constants["ZZ_ACTION_PACKED_0"]),
    )


def _runs(packed: str) -> list[int]:
    """Pairs of a count and a value."""
    return [ord(value) for count, value in zip(packed[::2], packed[1::2], strict=True) for _ in range(ord(count))]


# Bytes behind the tag of each kind of constant but text (The Java Virtual Machine Specification, 4.4).
_CONSTANT_BYTES = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4}


def _string_constants(java_class: bytes) -> Iterator[tuple[str, str]]:
    """(name, value) of the fields of a class file that are string constants (specification, 4.1 and 4.5)."""
    pool: dict[int, bytes] = {}
    place, index = 10, 1
    (size,) = struct.unpack_from(">H", java_class, 8)
    while index < size:
        tag = java_class[place]
        if tag == 1:
            (length,) = struct.unpack_from(">H", java_class, place + 1)
            pool[index] = java_class[place + 3 : place + 3 + length]
            place += 3 + length
        else:
            pool[index] = java_class[place + 1 : place + 1 + _CONSTANT_BYTES[tag]]
            place += 1 + _CONSTANT_BYTES[tag]
        index += 2 if tag in (5, 6) else 1  # a number of 8 bytes counts twice
    (interfaces,) = struct.unpack_from(">H", java_class, place + 6)
    (fields,) = struct.unpack_from(">H", java_class, place + 8 + 2 * interfaces)
    place += 10 + 2 * interfaces
    for _ in range(fields):
        _, name, kind, attributes = struct.unpack_from(">4H", java_class, place)
        place += 8
        for _ in range(attributes):
            attribute, length = struct.unpack_from(">HI", java_class, place)
            if pool[attribute] == b"ConstantValue" and pool[kind] == b"Ljava/lang/String;":
                (constant,) = struct.unpack_from(">H", java_class, place + 6)
                (string,) = struct.unpack(">H", pool[constant])
                value = pool[string].replace(b"\xc0\x80", b"\0").decode(errors="surrogatepass")
                yield pool[name].decode(), value
            place += 6 + length
