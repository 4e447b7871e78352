"""Beam search, greedy search, nucleus sampling and drawing samples to learn from, over a decoder with caches.

Beam search is that of transformers 4.15 to 4.26, with which BLIP's published numbers were made; today's differs.
A sequence holds the prompt and what follows, without the closing token; lengths count the prompt.

Log-probabilities are those of the model: the natural log-softmax of its logits in fp32, before repetition penalty,
minimum length, temperature, top-k and top-p. A sequence has one for each token behind the prompt, and one for the
closing token if that ended it. So without a repetition penalty their sum over length ** length_penalty is the score by
which beam search ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blipds.errors import UserError

NUCLEUS_TOP_K = 50  # transformers 4's default, in force wherever the original code samples
NUCLEUS_REPETITION_PENALTY = 1.1  # fixed in the original code and in LAVIS


@dataclass(frozen=True)
class GenerationConfig:
    """How captions are generated; the defaults are the paper's. Names as in the run config, where LAVIS has them.

    num_captions: of each image; the best of its beams, or as many draws.
    """

    num_beams: int = 3
    max_len: int = 20
    min_len: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    use_nucleus_sampling: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    num_captions: int = 1

    def __post_init__(self) -> None:
        if self.num_captions > self.num_beams and not self.use_nucleus_sampling:
            raise UserError(
                f"{self.num_captions} captions an image need as many beams (num_beams is {self.num_beams}) or nucleus "
                "sampling"
            )


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn that a model learns from: by its own probabilities unless the last three say otherwise.

    `samples` of each image, and with `greedy` one more that takes the likeliest token each time. max_len: tokens, the
    prompt's included. top_k, top_p: only the likeliest tokens, so many or those that together reach `top_p`.
    """

    samples: int
    max_len: int
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A caption of the model's own: ids from the prompt to the closing token, which is missing where it was cut.

    log_p: of each token behind the prompt, under the distribution that it was drawn from.
    """

    ids: list[int]
    log_p: list[float]
    ended: bool


class StepDecoder(Protocol):
    """What generation needs of a model: next-token logits for J images with K rows of text each."""

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        """Takes the prompt (P,) in one pass; returns logits (J, V), the same for every beam."""

    def step(self, tokens: Tensor) -> Tensor:
        """Adds tokens (J, K); returns logits (J, K, V)."""

    def reorder(self, parents: Tensor) -> None:
        """Beam k of image j continues what beam `parents[j, k]` was."""

    def keep(self, images: Tensor) -> None:
        """Goes on with some of the images only."""


class Lockstep:
    """A decoder that steps as often as that of every other rank, for parameters that ranks gather step by step.

    `any_rank(asks)` says whether any rank asks for a step: a small all-reduce a token. Ranks that are done wait by
    stepping along. Building it, `start`, `step` and `finish` are collective.
    """

    def __init__(self, decoder: StepDecoder, any_rank: Callable[[bool], bool]) -> None:
        self.decoder = decoder
        self.any_rank = any_rank
        self.keep, self.reorder = decoder.keep, decoder.reorder

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        logits = self.decoder.start(prompt_ids, beams)
        self.filler = prompt_ids.new_zeros(len(logits), beams)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self.any_rank(True)
        self.filler = torch.zeros_like(tokens)
        return self.decoder.step(tokens)

    def finish(self) -> None:
        """Steps along until no rank has a token to add."""
        while self.any_rank(False):
            self.decoder.step(self.filler)


def penalise_repetition(scores: Tensor, sequences: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative scores of tokens already there (CTRL paper, section 4.1).

    scores (..., V), sequences (..., L).
    """
    if penalty == 1.0:
        return scores
    present = scores.gather(-1, sequences)
    return scores.scatter(-1, sequences, torch.where(present < 0, present * penalty, present / penalty))


def moved_to(device: torch.device, on_host: Tensor) -> Tensor:
    """On a device. The host does not wait: from pinned memory the copy takes its turn behind what is queued."""
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


class Hypotheses:
    """The best finished sequences of one image, with their score and the log-probabilities of their tokens."""

    def __init__(self, size: int, length_penalty: float) -> None:
        self.size = size
        self.length_penalty = length_penalty
        self.finished: list[tuple[float, list[int], list[float]]] = []

    def add(self, sequence: list[int], log_probability: float, log_probs: list[float]) -> None:
        score = log_probability / len(sequence) ** self.length_penalty
        if len(self.finished) == self.size:
            worst = min(self.finished, key=lambda hypothesis: hypothesis[0])
            if score <= worst[0]:
                return
            self.finished.remove(worst)
        self.finished.append((score, sequence, log_probs))

    def done(self, best_log_probability: float, length: int) -> bool:
        """Whether nothing unfinished can become better than the worst that is kept."""
        if len(self.finished) < self.size:
            return False
        worst = min(score for score, *_ in self.finished)
        return worst >= best_log_probability / length**self.length_penalty

    def best(self, count: int) -> list[tuple[list[int], list[float]]]:
        """The `count` best with the log-probabilities of their tokens, best first."""
        # of equal scores the later one, as a stable sort followed by pop() gives in the original
        ranked = sorted(enumerate(self.finished), key=lambda entry: (entry[1][0], entry[0]), reverse=True)
        return [(sequence, log_probs) for _, (_, sequence, log_probs) in ranked[:count]]


def search(
    decoder: StepDecoder,
    prompt_ids: Tensor,
    images: int,
    eos_token_id: int,
    config: GenerationConfig,
    uniform: Tensor | None = None,
    log_probs: list[list[float]] | None = None,
) -> list[list[int]]:
    """The search that `config` asks for; `uniform` (images, max_len): the random numbers of nucleus sampling.

    `log_probs`, where given, is told those of each returned sequence (see above). It costs no further device sync.
    """
    if config.use_nucleus_sampling:
        assert uniform is not None
        return single_search(decoder, prompt_ids, images, eos_token_id, config, uniform, log_probs)
    if config.num_beams == 1:
        return single_search(decoder, prompt_ids, images, eos_token_id, config, None, log_probs)
    return beam_search(decoder, prompt_ids, images, eos_token_id, config, log_probs)


@torch.no_grad()
def beam_search(
    decoder: StepDecoder,
    prompt_ids: Tensor,
    images: int,
    eos_token_id: int,
    config: GenerationConfig,
    log_probs: list[list[float]] | None = None,
) -> list[list[int]]:
    """Returns the `num_captions` best sequences of each image, one image after the other. Arguments as `search`.

    The hypotheses are kept on the host, which reads the device once a token and writes to it when an image is done.
    """
    beams = config.num_beams
    length = len(prompt_ids)
    hypotheses = [Hypotheses(beams, config.length_penalty) for _ in range(images)]
    active = list(range(images))  # images that still run; row j of every tensor below is image active[j]
    said = [[prompt_ids.tolist()] * beams] * images  # `sequences` on the host
    sure: list[list[list[float]]] = [[[]] * beams] * images  # and the log-probabilities of their tokens, if asked for

    logits = decoder.start(prompt_ids, beams).unsqueeze(1).expand(-1, beams, -1)
    sequences = prompt_ids.expand(images, beams, -1)
    beam_scores = logits.new_full((images, beams), -1e9, dtype=torch.float32)
    beam_scores[:, 0] = 0.0  # all beams are equal at first: only one may branch

    while True:
        raw = logits.float().log_softmax(-1)
        scores = penalise_repetition(raw, sequences, config.repetition_penalty)
        if length < config.min_len:
            scores[..., eos_token_id] = -torch.inf
        vocabulary = scores.shape[-1]
        scores = (scores + beam_scores.unsqueeze(-1)).flatten(1)
        top_scores, top = scores.topk(2 * beams, dim=1)
        # the best that do not end go on; there are enough, since each beam has one token that ends it
        ranks = (top % vocabulary == eos_token_id).byte().argsort(dim=1, stable=True)[:, :beams]

        running = []
        columns = [top_scores, top] if log_probs is None else [top_scores, top, raw.flatten(1).gather(1, top)]
        candidates = torch.stack([column.double() for column in columns], dim=-1).tolist()
        for row, row_candidates in enumerate(candidates):
            image, grown = hypotheses[active[row]], []
            for rank, (score, place, *chosen) in enumerate(row_candidates):
                beam, token = divmod(int(place), vocabulary)
                if token != eos_token_id:
                    grown.append((score, [*said[row][beam], token], [*sure[row][beam], *chosen]))
                elif rank < beams:
                    image.add(said[row][beam], score, [*sure[row][beam], *chosen])
            said[row] = [sequence for _, sequence, _ in grown[:beams]]
            sure[row] = [chosen for _, _, chosen in grown[:beams]]
            if image.done(row_candidates[0][0], length):
                continue
            running.append(row)
            if length + 1 == config.max_len:
                for score, sequence, chosen in grown[:beams]:
                    image.add(sequence, score, chosen)
        length += 1
        if not running or length == config.max_len:
            break

        if len(running) < len(active):
            rows = moved_to(top.device, torch.tensor(running))
            decoder.keep(rows)
            top_scores, top, ranks, sequences = top_scores[rows], top[rows], ranks[rows], sequences[rows]
            active, said = [active[row] for row in running], [said[row] for row in running]
            sure = [sure[row] for row in running]
        beam_scores, chosen = top_scores.gather(1, ranks), top.gather(1, ranks)
        parents, tokens = chosen // vocabulary, chosen % vocabulary
        sequences = sequences.gather(1, parents.unsqueeze(-1).expand(-1, -1, length - 1))
        sequences = torch.cat([sequences, tokens.unsqueeze(-1)], dim=-1)
        decoder.reorder(parents)
        logits = decoder.step(tokens)

    best = [found for hypothesis in hypotheses for found in hypothesis.best(config.num_captions)]
    if log_probs is not None:
        log_probs += [chosen for _, chosen in best]
    return [sequence for sequence, _ in best]


@torch.no_grad()
def single_search(
    decoder: StepDecoder,
    prompt_ids: Tensor,
    images: int,
    eos_token_id: int,
    config: GenerationConfig,
    uniform: Tensor | None = None,
    log_probs: list[list[float]] | None = None,
) -> list[list[int]]:
    """Greedy search, or nucleus sampling with the random numbers `uniform` (images, max_len) in [0, 1).

    Arguments as `search`. The host reads the device once a token.
    """
    penalty = config.repetition_penalty if uniform is None else NUCLEUS_REPETITION_PENALTY
    finished: list[list[int]] = [[] for _ in range(images)]
    sure: list[list[float]] = [[] for _ in range(images)]
    active = list(range(images))
    said = [prompt_ids.tolist()] * images  # `sequences` on the host
    sequences = prompt_ids.expand(images, -1)
    logits = decoder.start(prompt_ids, beams=1)

    while True:
        length = sequences.shape[1]
        raw = None if log_probs is None else logits.float().log_softmax(-1)
        scores = penalise_repetition(logits.float(), sequences, penalty)
        if length < config.min_len:
            scores[:, eos_token_id] = -torch.inf
        if uniform is None:
            tokens = scores.argmax(-1)
        else:
            tokens = sample_nucleus(scores / config.temperature, config.top_p, uniform[:, length])

        running = []
        read = tokens.unsqueeze(-1)
        if raw is not None:
            read = torch.cat([read.double(), raw.gather(-1, read).double()], dim=-1)
        for row, (token, *chosen) in enumerate(read.tolist()):
            if token != eos_token_id:
                running.append(row)
                said[row] = [*said[row], int(token)]
            finished[active[row]] = said[row]
            sure[active[row]] += chosen
        if not running or length + 1 == config.max_len:
            break
        if len(running) < len(active):
            rows = moved_to(tokens.device, torch.tensor(running))
            decoder.keep(rows)
            sequences, tokens = sequences[rows], tokens[rows]
            uniform = None if uniform is None else uniform[rows]
            active, said = [active[row] for row in running], [said[row] for row in running]
        sequences = torch.cat([sequences, tokens.unsqueeze(-1)], dim=-1)
        logits = decoder.step(tokens.unsqueeze(-1)).squeeze(1)

    if log_probs is not None:
        log_probs += sure
    return finished


def sample_nucleus(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Draws from the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020, section 3.1).

    logits (J, V), uniform (J,): one random number a row, so that a caption does not depend on its batch.
    """
    top_logits, tokens = logits.topk(min(NUCLEUS_TOP_K, logits.shape[-1]), dim=-1)
    probabilities = top_logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = probabilities.masked_fill(before > top_p, 0.0)
    cumulative = nucleus.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=(nucleus > 0).sum(-1, keepdim=True) - 1)
    return tokens.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def draw_samples(
    decoder: StepDecoder,
    prompt_ids: Tensor,
    eos_token_id: int,
    config: SamplingConfig,
    uniform: Tensor,
    take: Callable[[int, list[Drawn]], None],
) -> None:
    """Gives `take(image, samples)` the samples of an image as soon as the last of them has ended, greedy's at the end.

    uniform (images, samples, max_len): the random numbers in [0, 1). The host reads the device once a token.
    """
    images, rows = len(uniform), config.samples + config.greedy
    prompt = prompt_ids.tolist()
    found = [[Drawn([*prompt], [], False) for _ in range(rows)] for _ in range(images)]
    active = list(range(images))
    logits = decoder.start(prompt_ids, rows).unsqueeze(1).expand(-1, rows, -1)

    for length in range(len(prompt), config.max_len):
        tokens, log_p = draw_tokens(logits.float(), uniform[:, :, length], config)
        running = []
        for row, steps in enumerate(torch.stack([tokens.double(), log_p.double()], dim=-1).tolist()):
            image = found[active[row]]
            for k, (token, log_probability) in enumerate(steps):
                if not image[k].ended:
                    ids, log_ps = [*image[k].ids, int(token)], [*image[k].log_p, log_probability]
                    image[k] = Drawn(ids, log_ps, int(token) == eos_token_id)
            if length + 1 < config.max_len and not all(sample.ended for sample in image):
                running.append(row)
            else:
                take(active[row], image)
        if not running:
            return
        if len(running) < len(active):
            kept = moved_to(tokens.device, torch.tensor(running))
            decoder.keep(kept)
            tokens, uniform = tokens[kept], uniform[kept]
            active = [active[row] for row in running]
        logits = decoder.step(tokens)


def draw_tokens(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens (J, K) from logits (J, K, V) with random numbers `uniform` (J, samples), and their log-probabilities.

    One number decides a token, by where it falls among the summed probabilities: a caption does not depend on what is
    drawn beside it.
    """
    scores = logits / config.temperature
    if config.top_k is not None and config.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(config.top_k, dim=-1).values[..., -1:], -torch.inf)
    probabilities = scores.softmax(-1)
    if config.top_p is not None:
        ordered, tokens = probabilities.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > config.top_p, 0.0)
        probabilities = torch.zeros_like(ordered).scatter(-1, tokens, ordered / ordered.sum(-1, keepdim=True))
    summed = probabilities[:, : config.samples].cumsum(-1)
    total = summed[..., -1:]
    # below the total, also where the product rounds up to it: a token of probability 0 is never drawn
    places = torch.minimum(uniform.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(summed, places, right=True).clamp(max=summed.shape[-1] - 1)  # clamped: NaN ends there
    if config.greedy:
        drawn = torch.cat([drawn, probabilities[:, config.samples :].argmax(-1, keepdim=True)], dim=1)
    return drawn.squeeze(-1), probabilities.gather(-1, drawn).squeeze(-1).log()
