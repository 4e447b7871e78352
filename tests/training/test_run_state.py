"""The arithmetic of a run: steps counted by hand."""

from blipds.config.sections import RunConfig
from blipds.training.run_state import StepPlan


def plan_of(total_steps=30, **keys):
    """Epochs of ten steps."""
    return StepPlan(RunConfig(log_freq=4, **keys), 10, total_steps)


PLAN = plan_of()
# runner_iter: 25 steps, an inner epoch of 10
ITERATIONS = plan_of(25)


def steps(plan, question):
    return [step for step in range(1, plan.total_steps + 1) if question(plan, step)]


def test_the_length_of_a_run():
    assert StepPlan.of(RunConfig(max_epoch=3), 7) == StepPlan(RunConfig(max_epoch=3), 7, 21)
    for inner, epoch_steps in ((None, 7), (5, 5), (90, 20)):
        run = RunConfig(runner="runner_iter", max_iters=20, iters_per_inner_epoch=inner)
        assert StepPlan.of(run, 7) == StepPlan(run, epoch_steps, 20)


def test_epochs():
    assert PLAN.epochs == 3
    assert [PLAN.epoch_of(step) for step in (1, 10, 11, 20, 21, 30)] == [0, 0, 1, 1, 2, 2]
    assert steps(PLAN, StepPlan.epoch_ends) == [10, 20, 30]


def test_the_last_inner_epoch_may_be_short():
    assert ITERATIONS.epochs == 3
    assert [ITERATIONS.epoch_of(step) for step in (20, 21, 25)] == [1, 2, 2]
    assert steps(ITERATIONS, StepPlan.epoch_ends) == [10, 20, 25]


def test_a_run_shorter_than_an_epoch():
    plan = plan_of(3)
    assert plan.epochs == 1
    assert steps(plan, StepPlan.epoch_ends) == steps(plan, StepPlan.logs) == steps(plan, StepPlan.validates) == [3]


def test_logs_every_few_steps_and_at_the_end_of_each_epoch():
    assert steps(PLAN, StepPlan.logs) == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert steps(ITERATIONS, StepPlan.logs) == [4, 8, 10, 12, 16, 20, 24, 25]


def test_validates_by_epoch_and_always_at_the_end():
    assert steps(PLAN, StepPlan.validates) == [10, 20, 30]
    assert steps(plan_of(val_freq=2), StepPlan.validates) == [20, 30]
    assert steps(plan_of(val_freq=7), StepPlan.validates) == [30]
    assert steps(plan_of(25, val_freq=2), StepPlan.validates) == [20, 25]


def test_validates_by_steps_besides():
    assert steps(plan_of(val_freq=2, val_steps=7), StepPlan.validates) == [7, 14, 20, 21, 28, 30]


def test_saves_by_epoch_and_last():
    assert steps(PLAN, StepPlan.saves) == [10, 20, 30]
    assert steps(plan_of(save_freq=2), StepPlan.saves) == [20, 30]
    assert steps(plan_of(save_last=False), StepPlan.saves) == [10, 20]
    assert steps(ITERATIONS, StepPlan.saves) == [10, 20, 25]


def test_saves_by_steps_besides():
    assert steps(plan_of(save_steps=4), StepPlan.saves) == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert steps(plan_of(save_freq=9, save_steps=15, save_last=False), StepPlan.saves) == [15]
