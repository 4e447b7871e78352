"""PTB tokens without Java against those of Java."""

import json
import random

import pytest

from blipds.errors import UserError
from blipds.scoring import metrics, ptb
from blipds.scoring.ptb import words

# As Java's tokenizer answers; the test below asks it again.
HARD_CASES = {
    "": "",
    "...": "",
    "A dog, running!": "a dog running",
    # contractions
    "he can't, won't and shouldn't've": "he ca n't wo n't and should n't 've",
    "it's the dogs' ball, they're I'm we'll he'd": "it 's the dogs ball they 're i 'm we 'll he 'd",
    "I cannot, gonna, wanna, gotta, lemme": "i can not gon na wan na got ta lem me",
    "'tis o'clock slip 'n' slide rock'n'roll y'all": "'t is o'clock slip 'n' slide rock 'n' roll y' all",
    "it\u2019s a man\u2019s don\u2019t": "it 's a man 's do n't",
    # quotes
    "\"Stop\" \u201cstop\u201d \u2018stop\u2019 `stop' ''stop``": "stop stop stop stop stop",
    "5'10\" and the '90s in '99": "5 10 and the '90s in '99",
    # numbers
    "1,000.5 3.14 .5 -5 10:30 1st 50% #7": "1,000.5 3.14 .5 -5 10:30 1st 50 % # 7",
    "3 1/2 or 1/4 of 12/25/2012 \xbd": "3 1/2 or 1/4 of 12/25/2012 1/2",
    "call (212) 555-1234 or 212.555.1234": "call -lrb-212-rrb- 555-1234 or 212.555.1234",
    # abbreviations
    "Mr. Smith of the U.S. at 5 p.m.": "mr. smith of the u.s. at 5 p.m.",
    "Dale Jr. on 5th Ave. near St. Mary": "dale jr. on 5th ave. near st. mary",
    "letter P. on a wall. The end": "letter p. on a wall the end",
    "route A. The end": "route a the end",
    # ellipses and dashes
    "wait.... what . . . then \u2026 ok": "wait what then ok",
    "a -- b --- c \u2014 d \u2013 e ----- f": "a b c d e ----- f",
    "t-shirt mother-in-law 3-year-old": "t-shirt mother-in-law 3-year-old",
    # brackets, currency, slashes
    "a (b) [c] {d} <e>": "a -lrb- b -rrb- -lsb- c -rsb- -lcb- d -rcb- <e>",
    "$5 US$20 \xa35 \u20ac10 5\xa2 \xa5100": "$ 5 us$ 20 # 5 $ 10 5 cents \xa5 100",
    "and/or red/white/blue w/o a / b": "and/or red/white/blue w/o a / b",
    # the web
    "see foo.com or http://a.b/c?d=1, me@x.org @you #tag": "see foo.com or http://a.b/c?d=1 me@x.org @you #tag",
    "AT&T &amp; R&amp;D &quot;x&quot;": "at&t & r&d x",
    # unicode
    "caf\xe9 Z\xdcRICH \u732b \u0434\u0430": "caf\xe9 z\xfcrich \u732b \u0434\u0430",
    "dog\U0001f436cat http://x.y/\U0001f436z \ud83d": "dog cat http://x.y/\U0001f436z",
    "soft\xadhyphen zero\u200bwidth no\xa0break": "softhyphen zero width no break",
}


def differing(texts):
    """(text, Java's tokens, ours), Java reading each text on its own: a word stands between it and the next."""
    java = metrics._tokenize([line for text in texts for line in (text, "and")])[::2]
    ours = [" ".join(words(text)) for text in texts]
    return [row for row in zip(texts, java, ours, strict=True) if row[1] != row[2]]


def test_hard_cases():
    assert {text: " ".join(words(text)) for text in HARD_CASES} == HARD_CASES


def test_hard_cases_and_random_texts_are_as_in_java():
    draw = random.Random(0)
    pieces = [piece for text in HARD_CASES for piece in text.split(" ")]
    common = [chr(code) for code in (*range(0x20, 0x7F), *range(0xA0, 0x180), *range(0x2010, 0x2040))]
    mixtures = [
        "".join(draw.choice((*pieces, " ", draw.choice(common))) for _ in range(draw.randrange(2, 12)))
        for _ in range(4000)
    ]
    any_script = ["".join(chr(draw.randrange(1, 0x11000)) for _ in range(8)) for _ in range(1000)]
    assert differing([*HARD_CASES, *mixtures, *any_script]) == []


def test_all_of_flickr8k_is_as_in_java(shared):
    folder = shared / "data" / "flickr8k" / "annotations"
    entries = [
        entry for split in ("train", "val", "test") for entry in json.loads((folder / f"{split}.json").read_text())
    ]
    captions = [entry["caption"] for entry in entries]
    texts = [text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)]
    assert len(texts) == 40_000
    assert [" ".join(words(text)) for text in texts] == metrics._tokenize(texts)


def test_another_jar_is_refused(monkeypatch):
    monkeypatch.setattr(ptb, "LEXER_SHA256", "0")
    with pytest.raises(UserError, match=r"3\.4\.1\.jar: is not the tokenizer of pycocoevalcap 1\.2"):
        ptb._tables.__wrapped__()
