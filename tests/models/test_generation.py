"""Searches over tables of probabilities that can be worked out by hand, and over the oracle model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from syncs import Syncs

from blipds.data.images import Images
from blipds.data.processors import BlipImageEval, load_image
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.models.blip.model import CachedDecoder
from blipds.models.generation import (
    NUCLEUS_TOP_K,
    GenerationConfig,
    Hypotheses,
    Lockstep,
    beam_search,
    penalise_repetition,
    sample_nucleus,
    single_search,
)

START, END, A, B = range(4)
PROMPT = torch.tensor([START])


class TableDecoder:
    """One table an image: what has been said (a string of a and b) -> probabilities of END, A and B.

    `offset` is added to the logits, which changes no probability.
    """

    def __init__(self, *tables, offset=0.0):
        self.tables, self.offset = list(tables), offset

    def logits(self):
        # START never comes again
        rows = [[[0.0, *table[said]] for said in beams] for table, beams in zip(self.tables, self.said, strict=True)]
        return torch.tensor(rows).log() + self.offset

    def start(self, prompt_ids, beams):
        self.steps = 0
        self.said = [[""] for _ in self.tables]
        logits = self.logits().squeeze(1)
        self.said = [[""] * beams for _ in self.tables]
        return logits

    def step(self, tokens):
        self.steps += 1
        self.said = [
            [said + "??ab"[token] for said, token in zip(beams, row, strict=True)]
            for beams, row in zip(self.said, tokens.tolist(), strict=True)
        ]
        return self.logits()

    def reorder(self, parents):
        self.said = [[beams[k] for k in row] for beams, row in zip(self.said, parents.tolist(), strict=True)]

    def keep(self, images):
        self.tables = [self.tables[j] for j in images.tolist()]
        self.said = [self.said[j] for j in images.tolist()]


def spoken(sequences):
    assert all(sequence[0] == START for sequence in sequences)
    return ["".join("??ab"[token] for token in sequence[1:]) for sequence in sequences]


def beam(*tables, offset=0.0, **config):
    config = GenerationConfig(**{"num_beams": 2, "max_len": 4, "min_len": 1, **config})
    return spoken(beam_search(TableDecoder(*tables, offset=offset), PROMPT, len(tables), END, config))


def greedy(*tables, offset=0.0, **config):
    config = GenerationConfig(**{"num_beams": 1, "max_len": 4, "min_len": 1, **config})
    return spoken(single_search(TableDecoder(*tables, offset=offset), PROMPT, len(tables), END, config))


# --- by hand ---
# Two beams. Probabilities of whole sequences (END included where they end), with the length that their score is
# divided by, START counted and END not:
#   step 1: a .6      b .4
#   step 2: b END .36 (2), a END .30 (2), and on with aa .288 and ba .028
#   step 3: aa END .2592 (3), and on with aaa .01728 and aab .01152; ba END .014 is third: not among the best two
TABLE = {
    "": (0.0, 0.6, 0.4),
    "a": (0.50, 0.48, 0.02),
    "b": (0.90, 0.07, 0.03),
    "aa": (0.90, 0.06, 0.04),
    "ba": (0.50, 0.30, 0.20),
    "bb": (0.50, 0.30, 0.20),
    "ab": (0.50, 0.30, 0.20),
}


def test_greedy_takes_the_likeliest_token():
    assert greedy(TABLE) == ["a"]


@pytest.mark.parametrize(
    ("length_penalty", "best"),
    [
        (0.0, "b"),  # log .36 = -1.02 is the best sum
        (0.5, "b"),  # -1.0217 / 2^.5 = -.722 against -1.3502 / 3^.5 = -.780
        (1.0, "aa"),  # -.511 against -1.3502 / 3 = -.450
        (2.0, "aa"),  # -.255 against -.150, and aaa -4.058 / 16 = -.254
        (4.0, "aaa"),  # -.01667 against aaa, unfinished at the maximum length: -4.058 / 256 = -.01585
    ],
)
def test_length_penalty(length_penalty, best):
    assert beam(TABLE, length_penalty=length_penalty) == [best]


@pytest.mark.parametrize(("min_len", "best"), [(1, "b"), (2, "b"), (3, "aa"), (4, "aaa")])
def test_minimum_length_counts_the_prompt(min_len, best):
    assert beam(TABLE, length_penalty=0.0, min_len=min_len) == [best]


def test_minimum_length_of_greedy_search():
    assert [greedy(TABLE, min_len=min_len)[0] for min_len in (2, 3, 4)] == ["a", "aa", "aaa"]


def test_several_captions_come_best_first():
    # by the table above: aa END -.450, b END -.511; a END, log .30 / 2 = -.602, fell out of the best two
    assert beam(TABLE, num_captions=2) == ["aa", "b"]
    assert beam(TABLE, Always(), num_captions=2)[:2] == ["aa", "b"]
    with pytest.raises(UserError, match=r"3 captions an image need as many beams \(num_beams is 2\)"):
        beam(TABLE, num_captions=3)


def test_maximum_length():
    # at length 3 the unfinished aa scores log .288 / 3 = -.415, b -.511
    assert beam(TABLE, max_len=3) == ["aa"]
    # without division it is log .288 = -1.245 against b -1.022
    assert beam(TABLE, max_len=3, length_penalty=0.0) == ["b"]
    assert beam(TABLE, max_len=2) == ["a"]
    assert greedy(TABLE, max_len=2) == ["a"]


def test_an_ending_counts_only_among_the_best_beams():
    """Step 2: a END .295, aa .2832, b END .2788, ba .123. b END is third: left out, or the search would be over.

    Then its -.639 would be the worst of two that are kept, and step 3's best, aab .1416, has -1.955 / 3 = -.652. So
    step 4 finds aab END .1388, -1.975 / 4 = -.494, better than a END, -.610.
    """
    table = {
        "": (0.0, 0.59, 0.41),
        "a": (0.50, 0.48, 0.02),
        "b": (0.68, 0.30, 0.02),
        "aa": (0.02, 0.48, 0.50),
        "ba": (0.02, 0.50, 0.48),
        "aaa": (0.98, 0.012, 0.008),
        "aab": (0.98, 0.012, 0.008),
    }
    assert beam(table, max_len=5) == ["aab"]


def test_a_search_stops_when_nothing_can_become_better():
    # after step 3 the sums -1.02 and -1.20 are kept and the best candidate has -1.35: nobody asks for what follows aaa
    assert beam(TABLE, length_penalty=0.0, max_len=10) == ["b"]
    # divided by the lengths -.511 is the worst that is kept, the best candidate has -1.35 / 3 = -.450: it goes on
    with pytest.raises(KeyError, match="aaa"):
        beam(TABLE, length_penalty=1.0, max_len=10)


def test_the_bound_divides_by_the_length_before_the_new_token():
    # kept after step 2: a END .295, -.610, and b END .287, -.624. Step 3's best, aab .1416: -1.955 / 3 = -.652 ends it,
    # -1.955 / 4 = -.489 would not
    table = {
        "": (0.0, 0.59, 0.41),
        "a": (0.50, 0.40, 0.10),
        "b": (0.70, 0.20, 0.10),
        "aa": (0.02, 0.38, 0.60),
        "ba": (0.02, 0.50, 0.48),
    }
    assert beam(table, max_len=10) == ["a"]


def test_the_best_hypotheses_are_kept():
    hypotheses = Hypotheses(size=2, length_penalty=1.0)
    for sequence, log_probability in (([0, 1], -2.0), ([0, 2, 3], -6.0), ([0, 3], -3.0), ([0, 4], -5.0)):
        hypotheses.add(sequence, log_probability, [log_probability])
    assert sorted(hypotheses.finished) == [(-1.5, [0, 3], [-3.0]), (-1.0, [0, 1], [-2.0])]
    # of equal scores the later, as the original's stable sort gives
    hypotheses.add([0, 5], -2.0, [])
    assert hypotheses.best(1) == [([0, 5], [])]
    assert hypotheses.best(2) == [([0, 5], []), ([0, 1], [-2.0])]


# --- repetition ---


def test_repetition_penalty_by_hand():
    scores = torch.tensor([[2.0, -2.0, 1.0, 3.0]])
    seen = torch.tensor([[0, 1, 1]])
    assert penalise_repetition(scores, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 3.0]]
    assert penalise_repetition(scores, seen, 1.0) is scores


class Always(dict):
    """The same probabilities whatever was said."""

    def __missing__(self, said):
        return (0.1, 0.6, 0.3)


def test_repetition_penalty_on_logits_for_greedy_search():
    # logits with offset 3: END 3 + log .1 = .697, a 2.489, b 1.796. Divided by 1.5 a gets 1.659: b is next. Then b has
    # 1.197, and a is best again
    assert greedy(Always(), offset=3.0) == ["aaa"]
    assert greedy(Always(), offset=3.0, repetition_penalty=1.5) == ["aba"]
    # without the offset a's logit -.511 times 1.5 is -.766, still above b's -1.204; times 2.5 it is -1.277
    assert greedy(Always(), repetition_penalty=1.5) == ["aaa"]
    assert greedy(Always(), repetition_penalty=2.5) == ["aba"]


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_repetition_penalty_on_log_probabilities_for_beams(offset):
    # one beam takes the same turns as greedy search without the offset, whatever the offset is
    assert beam(Always(), offset=offset, num_beams=1, repetition_penalty=1.5) == ["aaa"]
    assert beam(Always(), offset=offset, num_beams=1, repetition_penalty=2.5) == ["aba"]


def test_repetition_penalty_counts_the_prompt():
    prompt = torch.tensor([START, A])
    for search, beams in ((beam_search, 1), (single_search, 1)):
        config = GenerationConfig(num_beams=beams, max_len=3, min_len=1, repetition_penalty=2.5)
        assert search(TableDecoder(Always()), prompt, 1, END, config) == [[START, A, B]]


# --- log-probabilities ---


def told(search, *tables, **config):
    """{what was said of the last table: the probabilities of its tokens}, best first."""
    found = []
    config = GenerationConfig(**{"num_beams": 2, "max_len": 4, "min_len": 1, **config})
    uniform = (torch.zeros(len(tables), config.max_len),) if config.use_nucleus_sampling else ()
    sequences = search(TableDecoder(*tables, offset=2.0), PROMPT, len(tables), END, config, *uniform, log_probs=found)
    of_each = config.num_captions if search is beam_search else 1
    pairs = list(zip(spoken(sequences), [torch.tensor(one).exp().tolist() for one in found], strict=True))
    return {said: pytest.approx(chances, rel=1e-5) for said, chances in pairs[-of_each:]}


def test_log_probabilities_are_those_of_the_tokens_and_of_what_ended_them():
    assert told(beam_search, TABLE, num_captions=2) == {"aa": [0.6, 0.48, 0.9], "b": [0.4, 0.9]}
    assert told(beam_search, Always(), TABLE, num_captions=2) == {"aa": [0.6, 0.48, 0.9], "b": [0.4, 0.9]}
    assert told(beam_search, TABLE, max_len=3) == {"aa": [0.6, 0.48]}  # nothing ended it
    assert told(single_search, Always(), TABLE) == {"a": [0.6, 0.5]}
    assert told(single_search, TABLE, max_len=2) == {"a": [0.6]}


def test_log_probabilities_are_the_model_s_before_anything_changes_them():
    """Of 0.1, 0.6 and 0.3: without END the search would have 2/3 and 1/3 of what is left."""
    for search in (beam_search, single_search):
        assert told(search, Always(), num_beams=1, min_len=4) == {"aaa": [0.6, 0.6, 0.6]}
        assert told(search, Always(), num_beams=1, repetition_penalty=2.5) == {"aba": [0.6, 0.3, 0.6]}
    drawn = {"use_nucleus_sampling": True, "temperature": 3.0, "top_p": 0.5}
    assert told(single_search, Always(), **drawn) == {"aaa": [0.6, 0.6, 0.6]}


# --- several images ---


def test_images_do_not_disturb_each_other():
    """Three images that finish after different numbers of steps, in every order."""
    short = {"": (0.98, 0.01, 0.01)} | dict.fromkeys(["a", "b", "aa", "ab", "ba", "bb"], (0.98, 0.01, 0.01))
    tables = {"short": short, "middle": TABLE, "long": Always()}
    alone = {name: beam(table) + greedy(table) for name, table in tables.items()}
    assert alone["middle"] == ["aa", "a"]
    assert alone["long"][1] == "aaa"
    for names in (["short", "middle", "long"], ["long", "short", "middle", "short"]):
        together = [tables[name] for name in names]
        assert list(map(list, zip(beam(*together), greedy(*together), strict=True))) == [alone[n] for n in names]


# --- nucleus sampling ---


def test_ranks_in_lockstep_step_alike():
    """Two ranks, as threads: one says "a" and ends, the other "aaa"; both step three times."""
    sooner, later = {"": (0, 1, 0)}, dict.fromkeys(("", "a", "aa"), (0, 1, 0))
    barrier, wishes = threading.Barrier(2), [False, False]

    def search(rank):
        def any_rank(wish):
            wishes[rank] = wish
            barrier.wait(timeout=30)
            answer = any(wishes)
            barrier.wait(timeout=30)
            return answer

        tables = TableDecoder(Ending((sooner, later)[rank]))
        decoder = Lockstep(tables, any_rank)
        config = GenerationConfig(num_beams=1, max_len=10, min_len=1)
        sequences = single_search(decoder, PROMPT, 1, END, config)
        decoder.finish()
        return spoken(sequences), tables.steps

    with ThreadPoolExecutor() as ranks:
        assert list(ranks.map(search, range(2))) == [(["a"], 3), (["aaa"], 3)]


class Ending(dict):
    """END wherever nothing else is said."""

    def __missing__(self, said):
        return (1.0, 0.0, 0.0)


def test_nucleus_by_hand():
    """.5 and .3 reach .7; among them the first has .5 / .8 = .625."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.999])
    assert sample_nucleus(logits.expand(4, -1), top_p=0.7, uniform=uniform).tolist() == [1, 1, 3, 3]
    # a nucleus that one token fills
    assert sample_nucleus(logits.expand(4, -1), top_p=0.4, uniform=uniform).tolist() == [1, 1, 1, 1]
    # all: .5, .8, .95, 1
    uniform = torch.tensor([0.49, 0.51, 0.79, 0.81, 0.94, 0.96])
    assert sample_nucleus(logits.expand(6, -1), top_p=1.0, uniform=uniform).tolist() == [1, 3, 3, 0, 0, 2]


def test_nucleus_takes_from_the_fifty_likeliest():
    logits = -0.001 * torch.arange(1000.0).view(1, -1)
    drawn = sample_nucleus(logits.expand(2, -1), top_p=1.0, uniform=torch.tensor([0.0, 0.999999]))
    assert drawn.tolist() == [0, NUCLEUS_TOP_K - 1] == [0, 49]


# --- the oracle model ---


@pytest.fixture(scope="module")
def pixel_values(shared, golden):
    """Eight photographs."""
    folder, processor = shared / "data" / "flickr8k" / "images", BlipImageEval(96)
    pixels = torch.stack([processor(load_image(folder / name)) for name in golden["generate"]["images"][:8]])
    return Images(pixels, processor.mean, processor.std).to(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer()


class RecomputingDecoder:
    """No cache: every step runs the decoder over all tokens so far."""

    def __init__(self, text_decoder, image_embeds):
        self.text_decoder, self.image_embeds = text_decoder, image_embeds

    def start(self, prompt_ids, beams):
        self.sequences = prompt_ids.expand(len(self.image_embeds), beams, -1)
        return self.last_logits()[:, 0]

    def step(self, tokens):
        self.sequences = torch.cat([self.sequences, tokens.unsqueeze(-1)], dim=-1)
        return self.last_logits()

    def last_logits(self):
        return self.text_decoder(self.sequences.flatten(0, 1), self.image_embeds).unflatten(0, self.sequences.shape[:2])

    def reorder(self, parents):
        self.sequences = self.sequences.gather(1, parents.unsqueeze(-1).expand_as(self.sequences))

    def keep(self, images):
        self.sequences, self.image_embeds = self.sequences[images], self.image_embeds[images]


@torch.no_grad()
def test_cached_decoding_equals_recomputing(oracle_model, pixel_values, tokenizer):
    """Step by step, while beams change places and images leave."""
    image_embeds = oracle_model.visual_encoder(pixel_values)
    cached = CachedDecoder(oracle_model.text_decoder, image_embeds, max_length=12)
    recomputing = RecomputingDecoder(oracle_model.text_decoder, image_embeds)
    prompt_ids = torch.tensor(tokenizer.prompt_ids)
    torch.testing.assert_close(cached.start(prompt_ids, 3), recomputing.start(prompt_ids, 3), rtol=1e-4, atol=1e-4)

    generator = torch.Generator().manual_seed(1)
    images = len(pixel_values)
    for kept in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 5, 7], [0, 1, 2, 3], [3], [0]):
        for decoder in (cached, recomputing):
            decoder.keep(torch.tensor(kept))
        images = len(kept)
        parents = torch.randint(3, (images, 3), generator=generator)
        tokens = torch.randint(30522, (images, 3), generator=generator)
        for decoder in (cached, recomputing):
            decoder.reorder(parents)
        torch.testing.assert_close(cached.step(tokens), recomputing.step(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(num_beams=1)], ids=["beams", "greedy"])
@torch.no_grad()
def test_captions_equal_those_without_a_cache(oracle_model, pixel_values, tokenizer, config):
    prompt_ids = torch.tensor(tokenizer.prompt_ids)
    search = beam_search if config.num_beams > 1 else single_search
    image_embeds = oracle_model.visual_encoder(pixel_values)
    decoder = RecomputingDecoder(oracle_model.text_decoder, image_embeds)
    expected = search(decoder, prompt_ids, len(pixel_values), tokenizer.eos_token_id, config)
    for images in ({"pixel_values": pixel_values}, {"image_embeds": image_embeds}):
        assert oracle_model.generate(prompt_ids, tokenizer.eos_token_id, config, **images) == expected


@pytest.mark.parametrize(
    "config",
    [GenerationConfig(), GenerationConfig(num_beams=1), GenerationConfig(num_beams=1, use_nucleus_sampling=True)],
    ids=["beams", "greedy", "nucleus"],
)
def test_captions_do_not_depend_on_the_batch(oracle_model, pixel_values, tokenizer, config):
    prompt_ids = torch.tensor(tokenizer.prompt_ids)
    uniform = torch.rand(8, config.max_len, generator=torch.Generator().manual_seed(2))

    def generate(rows):
        images = {"pixel_values": pixel_values[rows]}
        return oracle_model.generate(prompt_ids, tokenizer.eos_token_id, config, uniform[rows], **images)

    together = generate(slice(None))
    assert len({len(caption) for caption in together}) > 1  # they leave the batch at different steps
    assert together == [generate(slice(image, image + 1))[0] for image in range(8)]


def test_nucleus_sampling_depends_on_the_random_numbers(oracle_model, pixel_values, tokenizer):
    config = GenerationConfig(num_beams=1, use_nucleus_sampling=True)
    prompt_ids = torch.tensor(tokenizer.prompt_ids)
    eos_token_id, images = tokenizer.eos_token_id, {"pixel_values": pixel_values[:1]}
    first, second = (
        oracle_model.generate(prompt_ids, eos_token_id, config, torch.full((1, 20), u), **images) for u in (0.1, 0.9)
    )
    assert first != second


@pytest.mark.parametrize("log_probs", [None, []], ids=["captions", "scores"])
@pytest.mark.parametrize(
    "config",
    [GenerationConfig(), GenerationConfig(num_beams=1), GenerationConfig(num_beams=1, use_nucleus_sampling=True)],
    ids=["beams", "greedy", "nucleus"],
)
def test_one_device_sync_a_token(oracle_model, pixel_values, tokenizer, monkeypatch, config, log_probs):
    """And one for the prompt, while images leave at different lengths; log-probabilities cost none."""
    tokens = []
    step = CachedDecoder.step
    monkeypatch.setattr(CachedDecoder, "step", lambda self, given: tokens.append(len(given)) or step(self, given))
    prompt_ids, uniform = torch.tensor(tokenizer.prompt_ids), torch.rand(len(pixel_values), config.max_len)
    with Syncs() as found:
        oracle_model.generate(
            prompt_ids, tokenizer.eos_token_id, config, uniform, pixel_values=pixel_values, log_probs=log_probs
        )
    assert found == [("tolist", f"generation.py:{'beam' if config.num_beams > 1 else 'single'}_search")] * (
        1 + 1 + len(tokens)
    )
    assert len(set(tokens)) > 1
