"""A validation from `open` to its scores, with stub evaluators and a scoring process that has the answers."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from blipds.config.sections import RunConfig
from blipds.evaluation.evaluator import GeneratedCaptions
from blipds.monitor import NullMonitor
from blipds.scoring.metrics import Scores
from blipds.training import validation
from blipds.training.run_state import RunState, StepPlan


class StubEngine:
    """`evaluating` gives `gather` as the model, so that an evaluator can tell."""

    device, dtype, precision, stage = "cpu", "fp32", "fp32", 3

    def evaluating(self, gather):
        return nullcontext(gather)


class StubEvaluator:
    def __init__(self, split, references=True):
        self.split, self.references, self.calls = split, {} if references else None, []
        self.unscored = "" if references else "no references"

    def caption(self, model, device, dtype, results, lockstep):
        self.calls.append((model, lockstep))
        results.parent.mkdir(exist_ok=True)
        results.write_text("captions")
        return GeneratedCaptions({0: "a dog"}, [f"{self.split}: unreadable"], seconds=2.0)

    def contact_sheet(self, captions):
        return {"images": [], "captions": list(captions.values()), "references": []}

    def scoring_tasks(self, results, metrics):
        results.read_text()
        return {self.split: results.name} if self.references is not None else {}

    def shown(self):
        return self.split


class Log(NullMonitor):
    def __init__(self):
        self.evaluations, self.said = [], []

    def evaluation(self, split, epoch, step, values, missing, note="", seconds=None, unscored="", settings=None):
        self.evaluations.append((split, epoch, step, dict(values), dict(seconds)))

    def say(self, line):
        self.said.append(line)


class StubCheckpoints:
    candidate, failure = None, None

    def __init__(self):
        self.settled = []

    def settle(self, best):
        self.settled.append((self.candidate, best))
        return self.failure


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(*evaluators, state, answers={split: agg_metrics}): a validation every 10 steps of a run of 30."""

    def make(*evaluators, state, answers=None, **keys):
        def scoring(tasks):
            scores = [Scores({"agg_metrics": answers[task.split("_")[0]]}, seconds={"CIDEr": 1.0}) for task in tasks]
            return SimpleNamespace(done=lambda: True, scores=lambda: scores)

        monkeypatch.setattr(validation, "Scoring", scoring)
        monkeypatch.setattr(validation, "write_report", lambda run_dir, shown, say: say(f"report about {shown}"))
        run = RunConfig(max_epoch=3, **keys)
        plan = StepPlan(run, 10, 30)
        return validation.Validation(run, tmp_path, StubEngine(), evaluators, StubCheckpoints(), Log(), plan, state)

    return make


def test_from_open_to_the_best(make, tmp_path):
    state = RunState(global_step=20, best_metric=0.5, best_step=10)
    made = make(StubEvaluator("val"), StubEvaluator("own"), state=state, answers={"val": 0.8, "own": 0.4})
    made.open()
    assert (state.awaited_step, made.checkpoints.candidate) == (20, 20)
    assert made.needs_captions()
    assert made.caption() == ["val: unreadable", "own: unreadable"]
    assert not made.needs_captions()
    assert (tmp_path / "results" / "val_epoch1.json").exists()
    made.start_scoring()
    state.global_step = 25  # training goes on
    assert made.scored
    made.take_scores()
    seconds = {"generation": 2.0, "CIDEr": 1.0}
    assert made.monitor.evaluations == [
        ("val", 1, 20, {"agg_metrics": 0.8}, seconds),
        ("own", 1, 20, {"agg_metrics": 0.4}, seconds),
    ]
    # the mean of the splits, 0.6, is better than 0.5
    assert (state.best_metric, state.best_step, state.awaited_step) == (pytest.approx(0.6), 20, None)
    assert made.checkpoints.settled == [(20, True)]
    assert made.monitor.said == ["report about ['val', 'own']"]
    assert not made.scored


def scored(make, state, agg_metrics, failure=None):
    made = make(StubEvaluator("val"), state=state, answers={"val": agg_metrics})
    made.checkpoints.failure = failure
    made.open()
    made.caption()
    made.start_scoring()
    made.take_scores()
    return made


def test_an_equal_score_leaves_the_best_where_it_is(make):
    state = RunState(global_step=20, best_metric=0.5, best_step=10)
    assert scored(make, state, 0.5).checkpoints.settled == [(20, False)]
    assert (state.best_metric, state.best_step) == (0.5, 10)


def test_what_has_no_checkpoint_cannot_be_the_best(make):
    state = RunState(global_step=20, best_metric=0.5, best_step=10)
    made = scored(make, state, 0.9, failure="there is no checkpoint step_00000020")
    assert (state.best_metric, state.best_step) == (0.5, 10)
    assert made.monitor.said[0] == "step 20 is the best so far, but there is no checkpoint step_00000020"


def test_without_references_all_is_done_at_once(make):
    state = RunState(global_step=7)
    made = make(StubEvaluator("val", references=False), state=state)
    made.open()
    made.caption()
    assert state.awaited_step == 7
    made.start_scoring()
    assert (state.awaited_step, made.checkpoints.candidate, made.scored) == (None, None, False)
    assert made.monitor.evaluations == [("val", 0, 7, {}, {"generation": 2.0})]
    assert made.monitor.said == ["report about ['val']"]


def test_captions_of_an_earlier_attempt_are_not_taken_for_those_of_this_one(make, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "val_step7.json").write_text("of another run")
    made = make(StubEvaluator("val"), state=RunState(global_step=7))
    assert not made.needs_captions()
    made.open()
    assert made.needs_captions()


def test_lost_captions_of_an_earlier_step_are_said_and_not_made_anew(make):
    """The weights are no longer those of step 10."""
    state = RunState(global_step=12, awaited_step=10, best_metric=0.5, best_step=5)
    made = make(StubEvaluator("val"), state=state, answers={})
    assert not made.needs_captions()
    made.start_scoring()
    assert "the captions of step 10 cannot be scored" in made.monitor.said[0]
    made.take_scores()
    assert (state.best_step, state.awaited_step) == (5, None)
    assert made.checkpoints.settled == [(10, False)]


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_caption_in_step_where_weights_stay_partitioned(make, gather):
    evaluator = StubEvaluator("val")
    made = make(evaluator, state=RunState(global_step=10), gather_for_evaluation=gather)
    made.caption()
    assert evaluator.calls == [(gather, not gather)]
