"""Evaluation: every rank captions its share, each image is counted exactly once, rank 0 scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from blipds import distributed
from blipds.captioner import Captioner
from blipds.config import Config
from blipds.data.datasets import CaptionDataset, build_dataset, has_split
from blipds.data.loader import EvalLoader
from blipds.engine import DTYPES
from blipds.errors import UserError
from blipds.metrics import Scores, score_captions
from blipds.models import BlipCaption, build_model
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.monitor import NullMonitor
from blipds.report import Shown, write_cider
from blipds.weights import load_weights

SHOWN_IMAGES = 8  # on the contact sheet of each evaluation


@dataclass
class Evaluation:
    """What came out, the same on every rank; `captions` by index in the dataset, unreadable images left out."""

    split: str
    captions: dict[int, str]
    scores: Scores
    errors: list[str] = field(default_factory=list)


class Evaluator:
    """Captions and scores one split of one dataset. `references`: {image id: captions}; None scores nothing."""

    def __init__(
        self,
        split: str,
        dataset: CaptionDataset,
        captioner: Captioner,
        references: dict[str, list[str]] | None,
        *,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.split = split
        self.dataset = dataset
        self.captioner = captioner
        self.references = references
        # each image once, without fillers: the shares of the ranks may differ by one
        mine = range(distributed.rank(), len(dataset.records), distributed.world_size())
        self.loader = EvalLoader(dataset, mine, batch_size=batch_size, num_workers=num_workers)

    def evaluate(
        self, model: BlipCaption, device: torch.device, dtype: torch.dtype, results: Path | None = None
    ) -> Evaluation:
        """Captions every image and scores them; writes [{image_id, caption}] to `results`. Collective.

        Ranks may do different amounts of work: nothing here is collective until all captions are there.
        """
        mine: dict[int, str] = {}
        errors: list[str] = []
        progress = tqdm(
            self.loader,
            desc=f"caption {self.split}",
            unit="batch",
            leave=False,
            disable=None if distributed.is_main() else True,
        )
        for batch in progress:
            errors += batch.errors
            if batch.indices:
                names = [self.dataset.records[index].image_id for index in batch.indices]
                images = batch.images.model_inputs(device, dtype)
                mine.update(zip(batch.indices, self.captioner.caption(model, images, names), strict=True))
        shares = distributed.gather((mine, errors))
        captions = dict(sorted(item for share, _ in shares for item in share.items()))
        errors = [error for _, share in shares for error in share]
        scores: Scores | UserError = Scores()
        if distributed.is_main():
            if results is not None:
                self.write_results(captions, results)
            try:
                scores = self.score(captions)
            except UserError as error:  # raised on every rank below: the others wait for the scores
                scores = error
            if results is not None and isinstance(scores, Scores) and scores.per_image_cider:
                write_cider(results, scores.per_image_cider)
        scores = distributed.broadcast(scores)
        if isinstance(scores, UserError):
            raise scores
        return Evaluation(self.split, captions, scores, errors)

    def score(self, captions: dict[int, str]) -> Scores:
        if self.references is None:
            return Scores()
        ids = {index: str(self.dataset.records[index].image_id) for index in captions}
        unknown = [image_id for image_id in ids.values() if image_id not in self.references]
        if unknown:
            raise UserError(f"{self.split}: no reference for {len(unknown)} images; the first is {unknown[0]}")
        candidates = {ids[index]: caption for index, caption in captions.items()}
        return score_captions(candidates, {image_id: self.references[image_id] for image_id in candidates})

    def write_results(self, captions: dict[int, str], path: Path) -> None:
        entries = [
            {"image_id": self.dataset.records[index].image_id, "caption": caption}
            for index, caption in captions.items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(entries, ensure_ascii=False, indent=0), encoding="utf-8")
        partial.replace(path)

    def shown(self) -> Shown:
        """What the report needs of this split."""
        return Shown(self.split, self.dataset.records, self.references)

    def contact_sheet(self, captions: dict[int, str]) -> dict[str, list[Any]]:
        """The first readable images with their captions and references, as the monitor shows them."""
        shown = list(captions)[:SHOWN_IMAGES]
        records = [self.dataset.records[index] for index in shown]
        return {
            "images": [record.image.open() for record in records],
            "captions": [captions[index] for index in shown],
            "references": [list(record.captions) for record in records],
        }


def dataset_references(dataset: CaptionDataset) -> dict[str, list[str]] | None:
    """The captions of the annotations in use; None where they have none (nocaps)."""
    references: dict[str, list[str]] = {}
    for record in dataset.records:
        references.setdefault(str(record.image_id), []).extend(record.captions)
    return references if any(references.values()) else None


def read_references(path: Path) -> dict[str, list[str]]:
    """`run.annotation_file`: COCO's layout, {images, annotations: [{image_id, caption}]}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        references: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run.annotation_file {path}: not COCO's layout ({type(error).__name__}: {error})") from error
    return references


def build_evaluators(config: Config, splits: Sequence[str], captioner: Captioner) -> list[Evaluator]:
    """One evaluator for each split of each dataset that has it; a split that none has is an error."""
    evaluators = []
    given = config.run.annotation_file
    references = read_references(Path(given).expanduser()) if given else None
    for split in splits:
        names = [name for name in config.datasets if has_split(config.datasets[name], split)] or list(config.datasets)
        for name in names:
            dataset = build_dataset(name, config, split, training=False)
            scored = (references or dataset_references(dataset)) if config.run.report_metric else None
            label = split if len(config.datasets) == 1 else f"{name}_{split}"
            sizes = {"batch_size": config.run.batch_size_eval, "num_workers": config.run.num_workers}
            evaluators.append(Evaluator(label, dataset, captioner, scored, **sizes))
    return evaluators


def evaluate_checkpoint(
    config: Config,
    checkpoint: str | None,
    splits: Sequence[str],
    device: torch.device,
    precision: str,
    run_dir: Path,
    monitor: NullMonitor,
    step: int = 0,
    epoch: int | None = None,
) -> list[Evaluation]:
    """Builds the model on every rank, loads a checkpoint (None: random weights) and evaluates splits. Collective."""
    model = build_model(config.model, checkpoint_fn=lambda function, *inputs: function(*inputs))
    if checkpoint is None:
        initialise(model, config.run.seed, partial(copy_into, model))
    else:
        load_weights(model, checkpoint, Path(config.env.cache_root).expanduser(), monitor.say)
    model.to(device, DTYPES[precision]).eval()
    evaluations = []
    for evaluator in build_evaluators(config, splits, Captioner.from_config(config)):
        name = evaluator.split if epoch is None else f"{evaluator.split}_epoch{epoch}"
        evaluation = evaluator.evaluate(model, device, DTYPES[precision], run_dir / "results" / f"{name}.json")
        note = f"{checkpoint or 'random weights'}, {precision}"
        monitor.evaluation(evaluator.split, epoch, step, evaluation.scores.values, evaluation.scores.missing, note)
        for line in (*evaluation.scores.warnings, *(f"skipped: {error}" for error in evaluation.errors[:10])):
            monitor.say(f"  {line}")
        evaluations.append(evaluation)
    return evaluations
