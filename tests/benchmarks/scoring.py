"""What an evaluation costs beside generation: tokenization and each metric, against pycocoevalcap as it comes."""

import json
import resource
import statistics
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from benchmarks.measuring import Row
from tqdm import tqdm

from blipds.scoring import metrics

Cost = tuple[float, float]  # seconds on the clock, seconds of processor time, Java's too
METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")


def cost_of(run: Callable[[], object]) -> Cost:
    def processor() -> float:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    started, before = time.perf_counter(), processor()
    run()
    return time.perf_counter() - started, processor() - before


def theirs(candidates: dict[str, str], references: dict[str, list[str]]) -> dict[str, Cost]:
    """pycocoevalcap's COCOEvalCap, part by part: the references are tokenized each time."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given = {key: [{"caption": text} for text in texts] for key, texts in references.items()}
    generated = {key: [{"caption": text}] for key, text in candidates.items()}
    tokens: list[dict[str, list[str]]] = []

    def meteor() -> None:
        scorer = Meteor()
        scorer.compute_score(*tokens)
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()  # so that its processor time is counted

    with metrics._java_for_spice():
        return {
            "tokenization": cost_of(lambda: tokens.extend(map(PTBTokenizer().tokenize, (given, generated)))),
            "Bleu": cost_of(lambda: Bleu(4).compute_score(*tokens, verbose=0)),
            "METEOR": cost_of(meteor),
            "ROUGE_L": cost_of(lambda: Rouge().compute_score(*tokens)),
            "CIDEr": cost_of(lambda: Cider().compute_score(*tokens)),
        }


def ours(candidates: dict[str, str], references: dict[str, list[str]]) -> dict[str, Cost]:
    """The parts of `score_captions`."""
    scores = metrics.Scores()
    texts = iter(metrics._tokenize([*candidates.values(), *chain(*references.values())]))
    tokens = {key: [next(texts)] for key in candidates}
    known = {key: [next(texts) for _ in captions] for key, captions in references.items()}
    costs = {"tokenization": cost_of(lambda: metrics.score_captions(candidates, references, ()))}
    for name in METRICS:
        costs[name] = cost_of(lambda name=name: metrics.SCORERS[name](tokens, known, scores))
    return costs


def scoring(rounds: int, data: Path, results: Path | None) -> list[Row]:
    """Flickr8k's val, 1,000 images: the captions of a run (`results`), else the first reference of each image.

    A row for each part.
    """
    records = json.loads((data / "flickr8k" / "annotations" / "val.json").read_text())
    references = {record["image_id"]: record["caption"] for record in records}
    if results is None:
        candidates = {key: texts[0] for key, texts in references.items()}
    else:
        candidates = {line["image_id"]: line["caption"] for line in json.loads(results.read_text())}
    references = {key: references[key] for key in candidates}
    sides: dict[str, list[dict[str, Cost]]] = {"ours": [], "theirs": []}
    for _ in tqdm(range(rounds), desc="scoring", leave=False, disable=None):
        sides["ours"].append(ours(candidates, references))
        sides["theirs"].append(theirs(candidates, references))

    def median(side: str, part: str, which: int) -> float:
        return statistics.median(costs[part][which] for costs in sides[side])

    rows = []
    for part in ("tokenization", *METRICS):
        clock, processor = ([median(side, part, which) for side in sides] for which in (0, 1))
        rows.append(
            Row(
                "scoring",
                f"{part}, {len(candidates):,} images",
                f"{clock[0]:.1f} s ({processor[0]:.1f} s of a core)",
                f"{clock[1]:.1f} s ({processor[1]:.1f} s of a core; pycocoevalcap)",
                clock[1] / clock[0],
                None,
                {side: [costs[part] for costs in sides[side]] for side in sides},
            )
        )
    return rows
