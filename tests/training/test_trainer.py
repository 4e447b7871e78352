"""The loop on one rank without DeepSpeed: stubs write down what they are told, figures are worked out by hand."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from blipds.config.sections import Config, RunConfig
from blipds.errors import UserError
from blipds.monitor import NullMonitor
from blipds.signals import Stopped
from blipds.training.objectives import Objective
from blipds.training.run_state import RunState, StepPlan
from blipds.training.trainer import StepSignals, Trainer


@dataclass
class StubBatch:
    """What the loop asks of a micro-batch, and the figures that its objective will give."""

    num_images: int
    num_captions: int
    names: list[str]
    errors: list[str]
    weight: float
    loss: float


def batch(weight=1.0, loss=1.0, images=1, errors=()):
    named = [f"image of weight {weight:g}"]
    return StubBatch(images, 2 * images, named, list(errors), weight, loss)


class StubObjective(Objective):
    def weight(self, batch):
        return batch.weight

    def loss(self, engine, batch):
        return torch.tensor(batch.loss)


class StubEngine:
    device, dtype, stage, precision = torch.device("cpu"), torch.float32, 0, "fp32"
    loss_scale, scale_exhausted = None, False

    def __init__(self):
        self.gradients, self.rates, self.skipped = [], [], False

    def train(self):
        pass

    def backward(self, loss):
        self.gradients.append(loss.item())
        self.skipped = not math.isfinite(loss.item())

    def step(self, learning_rate, measure):
        self.rates.append(learning_rate)
        return 0.5 if measure else None

    def find_non_finite(self, losses):
        return f"{sum(1 for _ in losses)} losses"


class StubLoader:
    """Passes over the data, each with the same windows."""

    global_batch = 4

    def __init__(self, *windows):
        self.epoch, self.asked = windows, []
        self.steps_per_epoch = len(windows)

    def windows(self, epoch, first_step=0):
        self.asked.append((epoch, first_step))
        yield from self.epoch[first_step:]


class Log(NullMonitor):
    """All that happens, in order; the other stubs write to it too."""

    def __init__(self):
        self.events, self.lines, self.said = [], [], []

    def start_epoch(self, epoch, max_epoch, steps, done=0):
        self.events.append(f"epoch {epoch + 1}/{max_epoch}: {steps} steps, {done} done")

    def train(self, step, epoch, values):
        self.lines.append({"step": step, "epoch": epoch, **values})

    def say(self, line):
        self.said.append(line)


class StubCheckpoints:
    background, written, candidate = False, False, None

    def __init__(self, log):
        self.log, self.begun, self.states = log, None, []

    def begin(self, engine, state, shape, best):
        self.begun = SimpleNamespace(step=state["global_step"])
        self.states.append(state)
        self.log.events.append(f"save {state['global_step']}{' as best' if best else ''}")

    def finish(self):
        self.log.events.append(f"saved {self.begun.step}")
        self.begun = None


class StubValidation:
    """Scores are there `scored_after` questions after the captions."""

    def __init__(self, log, state, scored_after=1, fails=None, evaluators=("val",)):
        self.log, self.state, self.fails, self.evaluators = log, state, fails, evaluators
        self.scored_after = self.left = scored_after

    def open(self):
        self.state.awaited_step = self.state.global_step
        self.captioned = False

    def needs_captions(self):
        return not self.captioned

    def caption(self):
        self.log.events.append(f"caption {self.state.global_step}")
        if self.fails:
            raise self.fails
        return []

    def start_scoring(self):
        self.log.events.append(f"score {self.state.awaited_step}")
        self.left = self.scored_after

    @property
    def scored(self):
        self.left -= self.state.awaited_step is not None
        return self.state.awaited_step is not None and self.left < 0

    def take_scores(self):
        self.log.events.append(f"scores {self.state.awaited_step}")
        self.state.awaited_step = None


def trainer(tmp_path, *windows, state=None, validation=None, **keys):
    """A trainer of two epochs of the given windows, without validation unless `validation` has the stub's options."""
    keys = {"max_epoch": 2, "log_freq": 1, "save_freq": 99, "save_last": False, **keys}
    run, state, log = RunConfig(**keys), state or RunState(), Log()
    schedule = SimpleNamespace(lr=lambda epoch, step, global_step: 100 * epoch + 10 * step + global_step)
    return Trainer(
        run,
        tmp_path,
        StubEngine(),
        StubObjective(Config(run=run)),
        StubLoader(*windows),
        schedule,
        StubValidation(log, state, **({"evaluators": ()} if validation is None else validation)),
        StubCheckpoints(log),
        log,
        StepPlan.of(run, len(windows)),
        state,
    )


FULL = [batch()]


# --- steps and their arithmetic


def test_the_gradient_is_that_of_the_mean_over_the_window(tmp_path):
    """Losses of 6 and 2 over weights of 3 and 1: 8 / 4 in all, of which 6 / 4 and 2 / 4."""
    run = trainer(tmp_path, [batch(3, 6.0), batch(1, 2.0)], max_epoch=1)
    run.train()
    assert run.engine.gradients == [1.5, 0.5]
    assert [line["loss"] for line in run.monitor.lines] == [2.0]


def test_an_objective_may_prepare_the_window_and_add_to_the_log(tmp_path):
    """It learns from what it prepared: losses of 4 + step over a weight of 2, in steps 0 and 1."""
    run, examples = trainer(tmp_path, FULL, max_epoch=2), []
    objective, run.monitor.examples = run.objective, lambda step, images: examples.append((step, images))
    objective.prepare = lambda engine, window, step: [batch(weight=2.0, loss=4.0 + step) for _ in window]
    objective.metrics, objective.examples, objective.shown = lambda: {"reward": 0.25}, lambda: ["a"], ("reward",)
    run.train()
    assert run.engine.gradients == [2.0, 2.5]
    assert [line["reward"] for line in run.monitor.lines] == [0.25, 0.25]
    assert examples == [(1, ["a"]), (2, ["a"])] and run.shown["reward"] == "0.250"


def test_weights_below_one_are_divided_by_too(tmp_path):
    run = trainer(tmp_path, [batch(0.25, 1.0), batch(0.25, 0.5)], max_epoch=1)
    run.train()
    assert run.engine.gradients == [2.0, 1.0]


def test_passes_over_the_data_follow_each_other_from_where_the_run_stands(tmp_path):
    run = trainer(tmp_path, FULL, FULL, FULL, state=RunState(global_step=4), max_epoch=3)
    run.train()
    assert run.loader.asked == [(1, 1), (2, 0)]
    assert run.engine.rates == [100 + 10 + 4, 100 + 20 + 5, 200 + 6, 200 + 10 + 7, 200 + 20 + 8]
    assert run.monitor.events == ["epoch 2/3: 3 steps, 1 done", "epoch 3/3: 3 steps, 0 done"]


def test_a_log_line_is_about_all_steps_since_the_last(tmp_path):
    """Weights 1, 3 and losses 2, 10: 12 / 4. Then the end of the epoch, a window of its own: 5 / 5."""
    run = trainer(tmp_path, [batch(1, 2.0)], [batch(3, 10.0)], [batch(5, 5.0)], max_epoch=1, log_freq=2)
    run.train()
    assert [(line["step"], line["epoch"], line["loss"]) for line in run.monitor.lines] == [(2, 0, 3.0), (3, 0, 1.0)]
    assert all(line["grad_norm"] == 0.5 for line in run.monitor.lines)


# --- steps that are not finite


def test_a_bad_step_is_left_out_of_the_log_and_named(tmp_path):
    run = trainer(tmp_path, FULL, [batch(7, math.nan)], [batch(2, 8.0)], max_epoch=1, log_freq=3)
    run.train()
    assert run.monitor.lines[0]["loss"] == 3.0  # (1 + 8) / (1 + 2)
    assert (run.state.bad_steps, run.bad_in_a_row) == (1, 0)
    (line,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["not_finite"], line["losses"]) == (2, "loss", ["nan"])
    assert line["images"] == {"0": ["image of weight 7"]}


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    bad = [batch(1, math.inf)]
    run = trainer(tmp_path, bad, FULL, bad, bad, max_epoch=1, max_bad_steps=2)
    with pytest.raises(UserError, match=r"^2 steps in a row .* the last is step 4; first met at rank 0: 1 losses;"):
        run.train()
    assert run.state.bad_steps == 3


# --- nothing to learn from


def test_a_pass_without_any_readable_image_is_an_error(tmp_path):
    empty = [[batch(0, 0.0, images=0, errors=[f"{name}.jpg: no such file"])] for name in "ba"]
    run = trainer(tmp_path, *empty)
    with pytest.raises(UserError) as raised:
        run.train()
    assert str(raised.value) == (
        "no training image can be read, in 2 steps, a whole pass over the data or the whole run: "
        "a.jpg: no such file; b.jpg: no such file"
    )
    assert "save 2" not in run.monitor.events
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg: no such file\nb.jpg: no such file\n"


def test_a_pass_without_a_token_to_learn_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"^no training caption has a token to learn from, in 1 steps, "):
        trainer(tmp_path, [batch(0, 0.0)]).train()
    assert not (tmp_path / "bad_images.txt").exists()


def test_a_run_shorter_than_a_pass_is_looked_at_as_a_whole(tmp_path):
    run = trainer(tmp_path, *[[batch(0, 0.0)]] * 9, runner="runner_iter", max_iters=3)
    with pytest.raises(UserError, match="in 3 steps, "):
        run.train()


def test_an_empty_step_among_others_is_none(tmp_path):
    """Nor are as many as a pass has, where a resumed run had learnt in between."""
    run = trainer(tmp_path, [batch(0, 0.0)], FULL, [batch(0, 0.0)], log_freq=1)
    run.train()
    assert [line["loss"] for line in run.monitor.lines] == [None, 1.0, None] * 2
    assert run.state.empty_steps == 1


def test_too_many_unreadable_images_end_the_run(tmp_path):
    window = [batch(errors=["b.jpg: cut off", "a.jpg: cut off"])]
    with pytest.raises(UserError, match=r"^2 images cannot be read, more than run.max_bad_images \(1\);.*first: a.jpg"):
        trainer(tmp_path, window, max_bad_images=1).train()


# --- checkpoints, signals and validation


def test_saves_by_steps_and_without_validation_as_the_best(tmp_path):
    run = trainer(tmp_path, FULL, FULL, FULL, max_epoch=1, save_steps=2, save_last=True)
    run.train()
    assert [event for event in run.monitor.events if "save" in event] == [
        *("save 2 as best", "saved 2", "save 3 as best", "saved 3"),
    ]


def test_saves_when_the_minutes_are_over(tmp_path):
    run = trainer(tmp_path, FULL, FULL, max_epoch=1, save_minutes=5)
    run.saved -= 301
    run.train()
    assert [event for event in run.monitor.events if event.startswith("save ")] == ["save 1 as best"]


def test_a_checkpoint_comes_before_each_validation(tmp_path):
    run = trainer(tmp_path, FULL, FULL, validation={"scored_after": 1})
    run.train()
    assert run.monitor.events == [
        "epoch 1/2: 2 steps, 0 done",
        *("save 2", "saved 2", "caption 2", "score 2"),
        "epoch 2/2: 2 steps, 0 done",
        "scores 2",  # asked for before step 3 and before step 4
        *("save 4", "saved 4", "caption 4", "score 4"),
        "scores 4",
    ]
    assert [state["awaited_step"] for state in run.checkpoints.states] == [2, 4]


def test_a_validation_waits_for_the_scores_of_the_one_before(tmp_path):
    run = trainer(tmp_path, FULL, validation={"scored_after": 3})
    run.train()
    events = run.monitor.events
    assert events.index("score 1") < events.index("scores 1") < events.index("save 2") < events.index("caption 2")


@pytest.mark.parametrize("background", [False, True])
def test_a_validation_that_fails_leaves_the_checkpoint_of_its_step(tmp_path, background):
    run = trainer(tmp_path, FULL, validation={"fails": RuntimeError("the disk is gone")})
    run.checkpoints.background = background
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run.train()
    assert run.monitor.events[-3:] == ["save 1", "saved 1", "caption 1"]
    assert run.checkpoints.states[-1]["awaited_step"] == 1


def told_to_stop(run, step):
    """Has a signal come before `step`."""
    run.schedule.lr = lambda epoch, _, global_step: setattr(run.stop, "received", "SIGUSR1" * (global_step + 1 >= step))
    return run


def test_a_signal_ends_the_run_after_the_step_and_a_checkpoint(tmp_path):
    run = told_to_stop(trainer(tmp_path, FULL, FULL, FULL, max_epoch=1), 2)
    run.engine.step = lambda learning_rate, measure: None
    run.log = lambda learning_rate, norm: None
    with pytest.raises(Stopped, match=f"^stopped by SIGUSR1 after step 2; go on with --resume {tmp_path}$"):
        run.train()
    assert run.monitor.events[1:] == ["save 2 as best", "saved 2"]


def test_a_signal_before_a_validation_leaves_it_to_the_resumed_run(tmp_path):
    run = told_to_stop(trainer(tmp_path, FULL, FULL, max_epoch=1, validation={}), 2)
    run.log = lambda learning_rate, norm: None
    with pytest.raises(Stopped):
        run.train()
    assert run.monitor.events[1:] == ["save 2", "saved 2"]
    state = RunState(**run.checkpoints.states[-1])
    assert (state.global_step, state.awaited_step) == (2, 2)

    resumed = trainer(tmp_path, FULL, FULL, max_epoch=1, state=state, validation={})
    resumed.validation.captioned = False
    resumed.train()
    assert resumed.monitor.events == ["caption 2", "score 2", "scores 2"]


def test_a_run_that_had_ended_says_so_and_scores_again(tmp_path):
    state = RunState(global_step=2, awaited_step=2)
    run = trainer(tmp_path, FULL, FULL, max_epoch=1, state=state, validation={})
    run.validation.captioned = True
    run.train()
    assert run.monitor.said == ["the run had ended after step 2; its captions are scored again"]
    assert run.monitor.events == ["score 2", "scores 2"]
    assert run.loader.asked == []


def test_sums_over_ranks_become_signals():
    """One rank: the checkpoint's files are written by all; the last of the three signals came."""
    signals = StepSignals(0, 1, 1, 0, 0, 1)
    assert (signals.save, signals.scored, signals.written, signals.stop) == (False, True, True, True)
    assert signals.signal == "SIGUSR1"
    assert not StepSignals(0, 0, 0, 0, 0, 0).stop
