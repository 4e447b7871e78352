"""Validation of a run that trains: captions now, scores beside the steps that follow, then the best checkpoint."""

import math
from collections.abc import Sequence
from pathlib import Path

from blipds import distributed
from blipds.engine import Engine
from blipds.engine.checkpoints import CheckpointFolder
from blipds.evaluation.evaluator import Evaluator
from blipds.monitor import Monitor
from blipds.report import write_cider, write_report
from blipds.scoring.metrics import METRICS, Scores
from blipds.scoring.process import Scoring, ScoringTask
from blipds.training.run_state import Plan, RunState


class Validation:
    """Evaluates some splits at the step where `state` stands. Every rank makes one.

    While scores are awaited (`state.awaited_step`) the step's checkpoint is the candidate of `checkpoints`. A run that
    ends before they come, by whatever accident, has its captions scored when it goes on.
    """

    def __init__(
        self,
        engine: Engine,
        evaluators: Sequence[Evaluator],
        checkpoints: CheckpointFolder,
        monitor: Monitor,
        plan: Plan,
        run_dir: Path,
        state: RunState,
        *,
        gather_for_evaluation: bool,
    ) -> None:
        self.engine = engine
        self.evaluators = evaluators
        self.checkpoints = checkpoints
        self.monitor = monitor
        self.plan = plan
        self.run_dir = run_dir
        self.state = state
        self.gather_for_evaluation = gather_for_evaluation
        self.has_references = any(evaluator.references is not None for evaluator in evaluators)
        self.generation_seconds: dict[str, float] = {}  # of the newest captions, by split
        self.scoring: Scoring | None = None  # of state.awaited_step; rank 0 only, as are its tasks
        self.tasks: dict[str, ScoringTask] = {}
        self.seconds_of_tasks: dict[str, float] = {}

    def caption(self) -> list[str]:
        """Captions every split; returns a line for each unreadable image. Collective."""
        step, errors = self.state.global_step, []
        lockstep = self.engine.stage == 3 and not self.gather_for_evaluation
        for evaluator in self.evaluators:
            with self.engine.evaluating(self.gather_for_evaluation) as model:
                device, dtype, results = self.engine.device, self.engine.dtype, self.results(evaluator, step)
                captioned = evaluator.caption(model, device, dtype, results, lockstep)  # type: ignore[arg-type]
            errors += captioned.errors
            if distributed.is_main():
                self.monitor.captions(evaluator.split, step, **evaluator.contact_sheet(captioned.captions))
            self.generation_seconds[evaluator.split] = captioned.seconds
            if evaluator.references is None:
                self.log(evaluator.split, step, Scores(), captioned.seconds, evaluator.unscored)
        if self.evaluators and not self.has_references:
            self.report()
        return errors

    def results(self, evaluator: Evaluator, step: int) -> Path:
        """The file of an evaluation's captions: what is scored, after a resume too."""
        when = f"epoch{self.plan.epoch_of(step)}" if self.plan.epoch_ends(step) else f"step{step}"
        return self.run_dir / "results" / f"{evaluator.split}_{when}.json"

    def start_scoring(self) -> None:
        """Has the captions of the awaited step, else of this one, scored by a process beside this one."""
        resumed = self.state.awaited_step is not None
        step = self.state.awaited_step if self.state.awaited_step is not None else self.state.global_step
        self.state.awaited_step = self.checkpoints.candidate = step
        self.seconds_of_tasks = {} if resumed else dict(self.generation_seconds)
        if not distributed.is_main():
            return
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
            self.log(name, step, scores, self.seconds_of_tasks.get(name))
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

    def log(self, split: str, step: int, scores: Scores, generation: float | None, unscored: str = "") -> None:
        seconds = scores.seconds if generation is None else {"generation": generation, **scores.seconds}
        note = f"training weights, {self.engine.precision}"
        epoch = self.plan.epoch_of(step)
        self.monitor.evaluation(split, epoch, step, scores.values, scores.missing, note, seconds, unscored)
        for warning in scores.warnings:
            self.monitor.say(f"  {warning}")

    def report(self) -> None:
        if distributed.is_main():
            write_report(self.run_dir, [evaluator.shown() for evaluator in self.evaluators], self.monitor.say)
