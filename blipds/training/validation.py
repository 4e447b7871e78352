"""Validation of a run that trains: captions now, scores beside the steps that follow, then the best checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blipds import distributed
from blipds.config.sections import RunConfig
from blipds.engine import Engine
from blipds.engine.checkpoints import CheckpointFolder
from blipds.evaluation.evaluator import Evaluator
from blipds.monitor import Monitor
from blipds.report.page import write_report
from blipds.report.run_files import write_cider
from blipds.scoring.clip import clip_lines
from blipds.scoring.metrics import METRICS, Scores
from blipds.scoring.process import Scoring, ScoringTask
from blipds.training.run_state import RunState, StepPlan


@dataclass(eq=False)
class Validation:
    """Captions and scores some splits at the step where `state` stands. Every rank makes one.

    `open`, a checkpoint, `caption`, `start_scoring`, and some steps later `take_scores`. In between
    (`state.awaited_step`) the step's checkpoint is the candidate of `checkpoints`, and a run that ends then, by
    whatever accident, makes up for what is missing when it resumes.
    """

    run: RunConfig
    run_dir: Path
    engine: Engine
    evaluators: Sequence[Evaluator]
    checkpoints: CheckpointFolder
    monitor: Monitor
    plan: StepPlan
    state: RunState

    def __post_init__(self) -> None:
        self.has_scores = any(not evaluator.unscored for evaluator in self.evaluators)
        self.generation_seconds: dict[str, float] = {}  # of the newest captions, by split
        self.scoring: Scoring | None = None  # of state.awaited_step; rank 0 only, as are its tasks
        self.tasks: dict[str, ScoringTask] = {}

    def open(self) -> None:
        """Makes the validation of this step due. Captions that another run wrote for the step are removed."""
        step = self.state.awaited_step = self.checkpoints.candidate = self.state.global_step
        if distributed.is_main():
            for evaluator in self.evaluators:
                self.results(evaluator, step).unlink(missing_ok=True)

    def needs_captions(self) -> bool:
        """Whether captions of the awaited step are missing, and the model is still that of the step. Collective."""
        step = self.state.global_step
        paths = [self.results(evaluator, step) for evaluator in self.evaluators]
        return self.state.awaited_step == step and distributed.broadcast(not all(path.exists() for path in paths))

    def caption(self) -> list[str]:
        """Captions every split; returns a line for each unreadable image. Collective.

        UserError where no image of a split can be read.
        """
        step, errors = self.state.global_step, []
        gather = self.run.gather_for_evaluation
        lockstep = self.engine.stage == 3 and not gather
        for evaluator in self.evaluators:
            with self.engine.evaluating(gather) as model:
                device, dtype, results = self.engine.device, self.engine.dtype, self.results(evaluator, step)
                generated = evaluator.caption(model, device, dtype, results, lockstep)
            errors += generated.errors
            if distributed.is_main():
                self.monitor.captions(evaluator.split, step, **evaluator.contact_sheet(generated.captions))
            self.generation_seconds[evaluator.split] = generated.seconds
        return errors

    def results(self, evaluator: Evaluator, step: int) -> Path:
        """The file of an evaluation's captions: what is scored, after a resume too."""
        when = f"epoch{self.plan.epoch_of(step)}" if self.plan.epoch_ends(step) else f"step{step}"
        return self.run_dir / "results" / f"{evaluator.split}_{when}.json"

    def start_scoring(self) -> None:
        """Has the captions of the awaited step scored by a process beside this one; with none to score all is done."""
        step = self.state.awaited_step
        assert step is not None
        self.checkpoints.candidate = step
        for evaluator in self.evaluators:
            if evaluator.unscored:
                self.log(evaluator.split, step, Scores())
        if not self.has_scores:
            self.state.awaited_step = self.checkpoints.candidate = None
            self.report()
        elif distributed.is_main():
            self.tasks = {}
            for evaluator in self.evaluators:
                path = self.results(evaluator, step)
                try:
                    self.tasks |= evaluator.scoring_tasks(path, METRICS)
                except (OSError, ValueError, LookupError, TypeError) as error:
                    self.monitor.say(f"the captions of step {step} cannot be scored, {path}: {error}")
            self.scoring = Scoring(list(self.tasks.values()))

    @property
    def scored(self) -> bool:
        """Whether scores are there to be taken; only rank 0 knows."""
        return self.scoring is not None and self.scoring.done()

    def take_scores(self) -> None:
        """Logs the awaited scores. With the highest CIDEr + BLEU-4 the candidate becomes the best. Collective.

        The candidate's checkpoint must be there.
        """
        state, step = self.state, self.state.awaited_step
        assert step is not None
        found: dict[str, Scores] = {}
        if self.scoring is not None:
            found = dict(zip(self.tasks, self.scoring.scores(), strict=True))
        found = distributed.broadcast(found)
        for name, scores in found.items():
            self.log(name, step, scores)
        splits = [found.get(evaluator.split, Scores()) for evaluator in self.evaluators]
        metrics = [scores.values["agg_metrics"] for scores in splits if "agg_metrics" in scores.values]
        metric = sum(metrics) / len(metrics) if metrics else -math.inf
        better = metric > (-math.inf if state.best_metric is None else state.best_metric)
        failure = distributed.broadcast(self.checkpoints.settle(better) if distributed.is_main() else None)
        if better and failure is None:
            state.best_metric, state.best_step = metric, step
        elif better:
            self.monitor.say(f"step {step} is the best so far, but {failure}")
        state.awaited_step = self.checkpoints.candidate = self.scoring = None
        for evaluator, scores in zip(self.evaluators, splits, strict=True):
            if distributed.is_main() and scores.per_image_cider:
                write_cider(self.results(evaluator, step), scores.per_image_cider)
        self.report()

    def log(self, split: str, step: int, scores: Scores) -> None:
        generation = self.generation_seconds.get(split)  # none: captioned before a resume, or a domain of a split
        seconds = scores.seconds if generation is None else {"generation": generation, **scores.seconds}
        note = f"training weights, {self.engine.precision}"
        epoch = self.plan.epoch_of(step)
        unscored = next((evaluator.unscored for evaluator in self.evaluators if evaluator.split == split), "")
        found = (scores.values, scores.missing)
        self.monitor.evaluation(split, epoch, step, *found, note, seconds, unscored, scores.settings)
        for line in [*scores.warnings, *clip_lines(scores.settings)]:
            self.monitor.say(f"  {line}")

    def report(self) -> None:
        if distributed.is_main():
            write_report(self.run_dir, [evaluator.shown() for evaluator in self.evaluators], self.monitor.say)
