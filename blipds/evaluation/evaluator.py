"""Evaluation: every rank captions its share, each image is counted exactly once, rank 0 has them scored."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from blipds import distributed
from blipds.captioning.captioner import Captioner
from blipds.captioning.confidence import Caption
from blipds.config.sections import Config, RunConfig
from blipds.data.annotations import read_splits
from blipds.data.datasets import CaptionDataset, build_dataset, splits_of
from blipds.data.loader import EvalBatch, EvalLoader
from blipds.data.preparation import fetch_annotations
from blipds.engine import DTYPES
from blipds.errors import UserError
from blipds.evaluation.diversity import TrainingCaptions, diversity
from blipds.files.paths import user_path
from blipds.files.replacing import replace_text
from blipds.models import build_model
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.models.protocol import CaptioningModel, keep_activations
from blipds.models.weights import base_of, load_weights, open_weights
from blipds.monitor import Monitor
from blipds.report.gallery import Shown
from blipds.report.run_files import read_clip, write_cider, write_clip, write_confidence
from blipds.scoring.clip import CLIP_METRICS, ClipScorer, ClipScores, ImageScore, clip_lines
from blipds.scoring.metrics import METRICS, Captions, Scores
from blipds.scoring.process import Scoring, ScoringTask

SHOWN_IMAGES = 8  # on the contact sheet of each evaluation


@dataclass
class GeneratedCaptions:
    """What the ranks generated together; `captions` by index in the dataset, unreadable images left out."""

    captions: dict[int, str]
    errors: list[str]
    seconds: float


@dataclass(frozen=True)
class References:
    """{image id: captions}, and of nocaps {image id: domain}."""

    captions: dict[str, list[str]]
    domains: dict[str, str] = field(default_factory=dict)


class Evaluator:
    """Captions one split of a dataset. Without references its captions are scored by `clips` alone, if there are any.

    Raises UserError where an image has no reference.
    """

    def __init__(
        self,
        split: str,
        dataset: CaptionDataset,
        captioner: Captioner,
        references: References | None,
        run: RunConfig,
        clips: Sequence[ClipScorer] = (),
        trained_on: TrainingCaptions | None = None,
    ) -> None:
        self.split = split
        self.clips = clips
        self.trained_on = trained_on
        self.dataset = dataset
        self.captioner = captioner
        self.references = references
        self.unscored = ""  # why its captions are not scored
        if references is None and not clips:
            self.unscored = "no references" if run.report_metric else "run.report_metric is false"
        if references is not None:
            ids = [str(record.image_id) for record in dataset.records]
            if unknown := [image_id for image_id in ids if not references.captions.get(image_id)]:
                raise UserError(f"{split}: no reference for {len(unknown)} images; the first is {unknown[0]}")
        # each image once, without fillers: the shares of the ranks may differ by one
        mine = range(distributed.rank(), len(dataset.records), distributed.world_size())
        views = [clip.image_processor for clip in clips]
        workers = run.num_workers
        self.loader = EvalLoader(dataset, mine, batch_size=run.batch_size_eval, num_workers=workers, views=views)

    def caption(
        self, model: CaptioningModel, device: torch.device, dtype: torch.dtype, results: Path, lockstep: bool = False
    ) -> GeneratedCaptions:
        """Captions every image; rank 0 writes [{image_id, caption}] to `results`, and beside it the model's confidence
        in each caption and what CLIPs say (report/run_files.py). Collective.

        Ranks may do different amounts of work: nothing here is collective until all captions are there. With `lockstep`
        (a model whose parameters are partitioned) they step together, and ranks with fewer images caption fillers.
        Raises UserError, on every rank, where no image can be read.
        """
        started = time.perf_counter()
        mine: dict[int, Caption] = {}
        judged: list[dict[int, ImageScore]] = [{} for _ in self.clips]
        errors: list[str] = []
        for clip in self.clips:
            clip.to(device)
        shown = {"desc": f"caption {self.split}", "disable": None if distributed.is_main() else True}
        for batch in tqdm(self.batches(lockstep), total=len(self.loader), unit="batch", leave=False, **shown):
            errors += batch.errors
            if batch.indices or lockstep:
                names = [self.dataset.records[index].image_id for index in batch.indices] or ["filler"]
                images = batch.images.model_inputs(device, dtype)
                found = self.captioner.caption(model, images, names, lockstep)
                mine.update(zip(batch.indices, found, strict=bool(batch.indices)))
            if batch.indices:
                self.judge(batch, [mine[index].text for index in batch.indices], judged)
        for clip in self.clips:
            clip.to(torch.device("cpu"))  # its share of the GPU is the training's again
        shares = distributed.gather((mine, errors))
        captions = dict(sorted(item for share, _ in shares for item in share.items()))
        errors = sorted(error for _, share in shares for error in share)
        clip_scores = self.gather_clip_scores(judged)
        if not captions:
            raise UserError(f"{self.split}: none of {len(errors)} images can be read; {'; '.join(errors[:3])}")
        if distributed.is_main():
            ids = {index: self.dataset.records[index].image_id for index in captions}
            write_confidence(results, {ids[index]: caption for index, caption in captions.items()})
            entries = [{"image_id": ids[index], "caption": caption.text} for index, caption in captions.items()]
            results.parent.mkdir(parents=True, exist_ok=True)
            if self.clips:
                write_clip(results, clip_scores)
            replace_text(results, json.dumps(entries, ensure_ascii=False, indent=0))
        texts = {index: caption.text for index, caption in captions.items()}
        return GeneratedCaptions(texts, errors, time.perf_counter() - started)

    def judge(self, batch: EvalBatch, captions: list[str], judged: list[dict[int, ImageScore]]) -> None:
        """Adds to `judged` what each CLIP says of the captions of a batch."""
        known = None if self.references is None else self.references.captions
        records = [self.dataset.records[index] for index in batch.indices]
        references = None if known is None else [known[str(record.image_id)] for record in records]
        for clip, pixel_values, found in zip(self.clips, batch.views, judged, strict=True):
            found.update(zip(batch.indices, clip.scores(pixel_values, captions, references), strict=True))

    def gather_clip_scores(self, judged: list[dict[int, ImageScore]]) -> ClipScores:
        """What the CLIPs of all ranks said. Collective."""
        whole = ClipScores()
        shares = distributed.gather(judged) if self.clips else []
        for place, clip in enumerate(self.clips):
            found = {index: score for share in shares for index, score in share[place].items()}
            whole.add(clip, {str(self.dataset.records[index].image_id): found[index] for index in sorted(found)})
        return whole

    def batches(self, lockstep: bool) -> Iterator[EvalBatch]:
        """This rank's batches; with `lockstep` as many as any rank has, and then it is collective."""
        most = max(distributed.gather(len(self.loader))) if lockstep else len(self.loader)
        yield from self.loader
        yield from itertools.repeat(self.loader.collate([]), most - len(self.loader))

    def scoring_tasks(
        self, results: Path, metrics: Sequence[str], cider_corpus: Captions | None = None
    ) -> dict[str, ScoringTask]:
        """Of the captions in `results`, by the name that their scores get: the split, and each domain of it.

        A domain is scored like a set of its own. Raises OSError or ValueError where `results` cannot be read.
        """
        if self.unscored:
            return {}
        references = self.references or References({})
        clip_scores = read_clip(results) if self.clips else ClipScores()
        candidates = {str(line["image_id"]): line["caption"] for line in json.loads(results.read_text("utf-8"))}
        parts = {self.split: list(candidates)}
        for image_id in candidates:
            if domain := references.domains.get(image_id):
                parts.setdefault(f"{self.split}_{domain}", []).append(image_id)
        return {
            name: ScoringTask(
                {image_id: candidates[image_id] for image_id in ids},
                {image_id: references.captions[image_id] for image_id in ids if self.references},
                metrics if self.references else (),
                cider_corpus or {},
                self.known_scores([candidates[image_id] for image_id in ids], clip_scores, ids),
            )
            for name, ids in parts.items()
            if ids
        }

    def known_scores(self, captions: list[str], clip_scores: ClipScores, ids: Sequence[str]) -> Scores:
        """Diversity of the captions of images, and the means of what CLIPs said."""
        scores = Scores(clip_scores.means(ids) | diversity(captions), settings=clip_scores.settings)
        if self.trained_on is not None:
            try:
                scores.values["seen_in_training"] = self.trained_on.share(captions)
            except UserError as error:
                scores.missing["seen_in_training"] = f"the training captions are not at hand: {error}"
        return scores

    def shown(self) -> Shown:
        """What the report needs of this split."""
        return Shown(self.split, self.dataset.records, self.references.captions if self.references else None)

    def contact_sheet(self, captions: dict[int, str]) -> dict[str, list[Any]]:
        """The first readable images with their captions and references, as the monitor shows them."""
        shown = list(captions)[:SHOWN_IMAGES]
        records = [self.dataset.records[index] for index in shown]
        return {
            "images": [record.image.open() for record in records],
            "captions": [captions[index] for index in shown],
            "references": [list(record.captions) for record in records],
        }


def dataset_references(dataset: CaptionDataset) -> References | None:
    """The captions of the annotations in use; None where they have none (nocaps)."""
    references: dict[str, list[str]] = {}
    for record in dataset.records:
        references.setdefault(str(record.image_id), []).extend(record.captions)
    return References(references) if any(references.values()) else None


def read_references(path: Path) -> References:
    """`run.annotation_file`: COCO's layout, {images, annotations: [{image_id, caption}]}.

    The images of nocaps_val_4500_captions.json have a "domain" besides.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        references: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
        images = content.get("images", [])
        domains = {str(image["id"]): str(image["domain"]) for image in images if "domain" in image}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run.annotation_file {path}: not COCO's layout ({type(error).__name__}: {error})") from error
    for image_id, captions in references.items():
        for caption in captions:
            if not isinstance(caption, str):
                raise UserError(f"run.annotation_file {path}: a caption of image {image_id} is no text: {caption!r}")
    return References(references, domains)


def read_cider_corpus(path: Path) -> Captions:
    """Captions by image of an annotation file of any layout. No pickle is read: it could run code."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise UserError(
            f"--cider-df {path}: pickles are not read, since they can run code; give the annotation file in which the "
            "frequencies were counted (for coco-val-df.p: COCO's captions_val2014.json)"
        )
    records = [record for part in read_splits([user_path(path)], None, None).values() for record in part.records]
    corpus = {str(number): list(record.captions) for number, record in enumerate(records) if record.captions}
    if not corpus:
        raise UserError(f"--cider-df {path}: no caption in it")
    return corpus


def load_clips(run: RunConfig, metrics: Sequence[str] = tuple(CLIP_METRICS)) -> list[ClipScorer]:
    """The CLIPs that the run config names for `metrics`, on the host: 0.6 GB each (ViT-B/32) on every rank."""
    named = {metric: getattr(run, CLIP_METRICS[metric].key) for metric in metrics if metric in CLIP_METRICS}
    return [ClipScorer(metric, source) for metric, source in named.items() if source and run.report_metric]


def build_evaluators(
    config: Config, splits: Sequence[str], captioner: Captioner, clips: Sequence[ClipScorer] = ()
) -> list[Evaluator]:
    """One evaluator for each split of each dataset that has it; a split that none has is an error."""
    evaluators = []
    trained_on = TrainingCaptions(config)
    given = config.run.annotation_file
    references = read_references(user_path(given)) if given else None
    for split in splits:
        names = [name for name in config.datasets if split in splits_of(config.datasets[name])] or list(config.datasets)
        for name in names:
            dataset = build_dataset(name, config, split, training=False)
            scored = (references or dataset_references(dataset)) if config.run.report_metric else None
            label = split if len(config.datasets) == 1 else f"{name}_{split}"
            evaluators.append(Evaluator(label, dataset, captioner, scored, config.run, clips, trained_on))
    return evaluators


def load_model(
    config: Config,
    checkpoint: str | None,
    captioner: Captioner,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> CaptioningModel:
    """The model of a run config with the weights of a checkpoint, for a captioner; None: with random weights."""
    model = build_model(config.model, keep_activations)
    captioner.check_model(model)
    if checkpoint is None:
        initialise(model, config.run.seed, partial(copy_into, model))
    else:
        stored = open_weights(checkpoint, user_path(config.env.cache_root), base_of(config.model))
        load_weights(model, stored, say)
    return model.to(device, dtype).eval()


def evaluate_checkpoint(
    config: Config,
    checkpoint: str | None,
    splits: Sequence[str],
    device: torch.device,
    precision: str,
    run_dir: Path,
    monitor: Monitor,
    step: int = 0,
    epoch: int | None = None,
    metrics: Sequence[str] = (*METRICS, *CLIP_METRICS),
    cider_corpus: Captions | None = None,
) -> list[tuple[str, dict[str, Scores]]]:
    """Builds the model on every rank, loads a checkpoint (None: random weights) and evaluates splits. Collective.

    Returns, on every rank, the dataset of each split and the scores by the names of the split and of its domains.
    """
    fetch_annotations(config, splits, monitor.say)
    captioner = Captioner.from_config(config)
    clips = load_clips(config.run, metrics)
    evaluators = build_evaluators(config, splits, captioner, clips)  # fails fast on what a user can mend
    model = load_model(config, checkpoint, captioner, device, DTYPES[precision], monitor.say)
    evaluations = []
    for evaluator in evaluators:
        name = evaluator.split if epoch is None else f"{evaluator.split}_epoch{epoch}"
        results = run_dir / "results" / f"{name}.json"
        generated = evaluator.caption(model, device, DTYPES[precision], results)
        scored = [metric for metric in metrics if metric not in CLIP_METRICS]
        tasks = evaluator.scoring_tasks(results, scored, cider_corpus) if distributed.is_main() else {}
        scores = score_together(tasks) or {evaluator.split: Scores()}
        if distributed.is_main() and (cider := scores[evaluator.split].per_image_cider):
            write_cider(results, cider)
        note = f"{checkpoint or 'random weights'}, {precision}"
        for name, found in scores.items():
            seconds = {"generation": generated.seconds, **found.seconds}
            numbers = (found.values, found.missing)
            monitor.evaluation(name, epoch, step, *numbers, note, seconds, evaluator.unscored, found.settings)
            for line in [*found.warnings, *clip_lines(found.settings)]:
                monitor.say(f"  {line}")
        for error in generated.errors[:10]:
            monitor.say(f"  skipped: {error}")
        evaluations.append((evaluator.dataset.name, scores))
    return evaluations


def score_together(tasks: dict[str, ScoringTask]) -> dict[str, Scores]:
    """The scores of rank 0's tasks, on every rank. Collective; scoring may take long, and no single call does."""
    scoring = Scoring(list(tasks.values())) if tasks else None
    while not distributed.broadcast(scoring is None or scoring.done()):
        time.sleep(0.1)
    return distributed.broadcast({} if scoring is None else dict(zip(tasks, scoring.scores(), strict=True)))
